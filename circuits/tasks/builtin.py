"""Tasks by name: those of the built-in models, templates for text, and task files."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits.checks import whole
from circuits.examples import LIMIT, Examples, How, choose
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.stimuli.images import ImageSource
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import Source, open_source
from circuits.stimuli.texts import TextSource
from circuits.tasks.compiling import compile_task
from circuits.tasks.files import read_items
from circuits.tasks.generated import Generated
from circuits.tasks.generators import GENERATORS
from circuits.tasks.images import IMAGE_PAIRS, ImagePairs, Kind, pairs_of
from circuits.tasks.items import Item
from circuits.tasks.metrics import METRICS, Metric, UnitActivation, as_metric
from circuits.tasks.tables import read_table
from circuits.tasks.targets import output_index
from circuits.tasks.task import Question, Task, default_metric, of_examples
from circuits.tasks.templates import ALIASES, TEMPLATES
from circuits.units import unknown

DEFAULTS: Mapping[str, str] = {
    "induction": "repeats",
    "induction-by-hand": "repeats",
    "induction-infinite": "repeats",
    "addition": "addition",
    "addition-by-hand": "addition",
    "modular-addition": "addition",
    "stories260k": "pronouns",
    "smollm2": "indirect-object",
    "shapes": "classes",
    "cleanroom": "curves",
    "googlenet": "prediction",
    "cifar10-resnet20": "prediction",
}
"""The default task of each built-in model."""

STATED = ("classes", "next-token", "prediction")
"""Tasks that follow from the data alone (see `of_examples`)."""

_DATA = {"shapes": "shapes", "cleanroom": "curves"}
"""The default data of built-in models."""


def names_of(model: HookedModel) -> list[str]:
    """The names of the tasks that fit a model, its default task first."""
    if isinstance(model.input, ImageInput):
        known = [
            *STATED[::2],
            *(name for name in IMAGE_PAIRS if name != "shapes" or _is_shapes(model)),
        ]
    elif model.input.encoder is not None:
        known = [*TEMPLATES, *ALIASES, STATED[1]]
    else:
        known = [*GENERATORS, STATED[1]]
    own = DEFAULTS.get(base_name(model))
    return [*([own] if own else []), *(name for name in known if name != own)]


def base_name(model: HookedModel) -> str:
    """The name of a model without its attached autoencoders (`+NAME`), edits (after a comma) and kind of weights."""
    return re.split(r"[+,]| \(", model.name, maxsplit=1)[0]


def load_task(
    model: HookedModel,
    spec: str = "",
    *,
    n: int = LIMIT,
    seed: int = 0,
    how: How = "spread",
    data: str | Source = "",
    labels: Sequence[int] | None = None,
    texts: Sequence[str] = (),
    metric: str = "",
    positions: str = "",
    answer: str = "",
    against: str = "",
) -> Task:
    """Load a task by name, from a file, or from texts and answers.

    Args:
        model: the model that the task is for.
        spec: the name of a task, with options after a colon (`indirect-object:templates=ABBA,corruption=swap`; `ioi` is
            another name of `indirect-object`); a task file (`.jsonl`) or a table (`.csv`, `.tsv`, `.json`). If empty:
            the task that follows from `data` or `texts`, or the built-in model's default task if there are none.
        n: the largest number of examples.
        seed: seed of what is drawn, of the choice of examples, and of the split into halves.
        how: how examples of the data are chosen.
        data: the data, for tasks that need some, by name (see `open_source`) or opened. Of a folder, files that cannot
            be read are left out (see `Examples.skipped`).
        labels: the class of each example of the data; read from the examples' names if None and possible.
        texts: prompts to use instead of data.
        metric: the name of the metric, or a unit `SITE:INDEX` whose activation is measured; the task's own if empty.
        positions: the counted positions: `last`, `all`, or whole numbers separated by commas.
        answer: what the model should say to each example, a text or a class; several are separated by `|`.
        against: the wrong answers that these are compared with, in the same form.

    Raises:
        KeyError: if there is no such task, metric or class.
        FileNotFoundError: if a file does not exist.
        ValueError: if the task does not fit the model, or an option does not fit the task.
    """
    chosen = named_metric(model, metric) if metric else None
    if answer or against or positions:
        if spec and spec not in STATED:
            raise ValueError(
                f"task {spec!r} has its own answers and positions: leave out answer, against and positions"
            )
        return _task_from_answers(
            model, n, seed, how, data, texts, positions, answer, against, chosen
        )
    if not spec:
        spec = "" if data or texts else default_task_name(model)
    name, _, options = spec.partition(":")
    name = ALIASES.get(name, name)
    if not spec or name in STATED:
        task = _task_from_examples(model, name, n, seed, how, data, labels, texts)
    elif name in IMAGE_PAIRS:
        task = task_from_pairs(
            model, IMAGE_PAIRS[name](n, seed, **_options(IMAGE_PAIRS[name], options)), chosen
        )
    elif name in GENERATORS or name in TEMPLATES:
        task = task_from_generated(model, _generate(model, name, n, seed, options), seed)
    elif Path(spec).suffix in (".jsonl", ".csv", ".tsv", ".json") or Path(spec).exists():
        task = _from_file(model, Path(spec), n, seed, how)
    else:
        raise unknown("task", name, names_of(model))
    return task if chosen is None else task.with_metric(chosen)


def named_metric(model: HookedModel, name: str) -> Metric:
    """A metric by its name, or the activation of the unit that is named."""
    if name in METRICS or ":" not in name:
        return as_metric(name)
    return UnitActivation.named(model, name)


def with_counterparts(task: Task, kind: Kind, seed: int = 0) -> Task:
    """A task of images with a changed version of each image as its counterpart, or an image of another class.

    Args:
        task: a task of images without counterparts.
        kind: what the counterparts are, see `circuits.tasks.images`.
        seed: of the pairing with images of another class.

    Raises:
        ValueError: if the task is of tokens, has counterparts, or images have no classes to pair them by.
    """
    if not isinstance(task.model.input, ImageInput):
        raise ValueError(f"counterpart {kind!r} is of images: model {task.model.name} takes tokens")
    if task.counterparts is not None:
        raise ValueError(
            f"task {task.name} has counterparts of its own: leave out counterpart {kind!r}"
        )
    images = task.examples.images()
    labels = task.examples.labels
    if images is None or (kind == "another" and labels is None):
        what = "three channels" if images is None else "classes (labels)"
        raise ValueError(f"counterpart {kind!r} needs images with {what}")
    pairs = pairs_of(images, labels or (), task.examples.names, seed, name=task.name, kind=kind)
    # Against an image of another class the question is which of the two; else the task's own metric stays.
    own = None if kind == "another" and not isinstance(task.metric, UnitActivation) else task.metric
    return replace(task_from_pairs(task.model, pairs, own), seed=task.seed)


def paired_with(task: Task, source: str | Source) -> Task:
    """A task of images with the images of the same names in another source as counterparts.

    Args:
        task: a task of images without counterparts.
        source: where the counterparts are, such as `folder:PATH`.

    Raises:
        ValueError: if the task is of tokens or has counterparts, or an image has none of its name.
    """
    other = _opened(source)
    if not isinstance(task.model.input, ImageInput):
        raise ValueError(
            f"counterparts {other.spec!r} are images: model {task.model.name} takes tokens"
        )
    if task.counterparts is not None:
        raise ValueError(f"task {task.name} has counterparts of its own: leave out {other.spec!r}")
    known = {name: i for i, name in enumerate(other.names)}
    missing = [name for name in task.examples.names if name not in known]
    if missing:
        raise ValueError(
            f"counterparts {other.spec!r} have no {missing[0]!r} (one of {len(missing)} that are missing): expected a "
            f"file of the same name for each of the {len(task)} images"
        )
    among = [known[name] for name in task.examples.names]
    made = Examples(task.model, other, None, among=among, how="given")
    return replace(task, counterparts=made)


def default_task_name(model: HookedModel) -> str:
    """The name of a model's default task; for an image model that is not built in, its own prediction.

    Raises:
        ValueError: if a token model is not built in.
    """
    own = DEFAULTS.get(base_name(model))
    if own is None and isinstance(model.input, ImageInput):
        return "prediction"
    if own is None:
        raise ValueError(
            f"model {model.name} has no default task: name one (--task {', '.join(names_of(model)[:4])} or a file) or "
            "data (--data)"
        )
    return own


def task_from_generated(model: HookedModel, made: Generated, seed: int = 0) -> Task:
    """A task from the items that a generator drew."""
    return compile_task(
        model, made.items, name=made.name, metric=made.metric, seed=seed, about=made.about,
        left_out=dict(made.left_out),
    )  # fmt: skip


def task_from_pairs(model: HookedModel, pairs: ImagePairs, metric: Metric | None = None) -> Task:
    """A task from image pairs: one class against another if there are classes, else the model's own prediction.

    Raises:
        ValueError: if the model takes tokens, or a class is not one of its outputs.
    """
    if not isinstance(model.input, ImageInput):
        raise ValueError(f"task {pairs.name} needs an image model: model {model.name} takes tokens")
    clean, other = (_images(model, pairs, which) for which in ("clean", "corrupted"))
    groups = pairs.groups or ("",) * len(pairs.names)
    asked = tuple(
        Question(
            answers=((pairs.classes[i],),) if pairs.classes else (),
            against=((pairs.against[i],),) if pairs.against else (),
            group=groups[i],
        )
        for i in range(len(pairs.names))
    )
    return Task(pairs.name, clean, asked, metric or default_metric(asked), other, about=pairs.about)


def _images(model: HookedModel, pairs: ImagePairs, which: str) -> Examples:
    images: Tensor = getattr(pairs, which)
    source = ImageSource(f"{pairs.name} ({which})", pairs.names, "", images.__getitem__)
    made = Examples(model, source, None, how="given")
    if pairs.classes and which == "clean":
        made.labels = pairs.classes
    return made


def _generate(model: HookedModel, name: str, n: int, seed: int, options: str) -> Generated:
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(f"task {name!r} needs a token model: model {model.name} takes images")
    if name in TEMPLATES:
        make = TEMPLATES[name]
        return make(n, seed, spec, **_options(make, options))
    make = GENERATORS[name]
    given = _options(make, options)
    known = inspect.signature(make).parameters
    sizes = {"length": min(spec.n_ctx, 64), "n_vocab": spec.n_vocab, "p": spec.n_vocab - 1}
    if name == "repeats":
        # A pattern and its repeat fit behind the starting token, with a token left to predict.
        longest = max(1, (sizes["length"] - 3) // 2)
        sizes["periods"] = (min(6, longest), min(24, longest))  # type: ignore[assignment]
    return make(n, seed, **{k: v for k, v in sizes.items() if k in known} | given)


def _options(make: Callable[..., Any], text: str) -> dict[str, Any]:
    """Parse options written as `name=value,name=value`, checked against a generator's own parameters."""
    known = [k for k in inspect.signature(make).parameters if k not in ("n", "seed", "tokenizer")]
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(f"task option {part!r}: expected NAME=VALUE, for example {known[0]}=…")
        if key not in known and "settings" not in known:
            raise unknown("option of the task", key, known)
        index = whole(value)
        found[key] = value if index is None else index
    return found


def _from_file(model: HookedModel, path: Path, n: int, seed: int, how: How) -> Task:
    """A task from a task file, or from a published table."""
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(f"task {str(path)!r} needs a token model: model {model.name} takes images")
    if path.suffix != ".jsonl":
        table = read_table(path, tokenizer=spec)
        kept = tuple(table.items[i] for i in choose(range(len(table.items)), n, how, seed))
        return task_from_generated(model, replace(table, items=kept), seed)
    header, items = read_items(path)
    if header.tokenizer and header.tokenizer != tokenizer_of(spec):
        raise ValueError(
            f"task file {str(path)!r} holds tokens of another tokenizer ({header.tokenizer}): expected those of model "
            f"{model.name} ({tokenizer_of(spec)})"
        )
    kept = tuple(items[i] for i in choose(range(len(items)), n, how, seed))
    return compile_task(
        model, kept, name=header.name, metric=header.metric, feeding=header.reading, seed=header.seed,
        about=header.about,
    )  # fmt: skip


def tokenizer_of(spec: TokenInput) -> str:
    """A tokenizer's fingerprint in task files whose items are tokens: its vocabulary's size and a digest of it.

    >>> tokenizer_of(TokenInput(3, 8))
    '3 tokens, 778d5d27b716'
    """
    digest = hashlib.sha256(repr([*spec.vocabulary, spec.bos]).encode()).hexdigest()
    return f"{spec.n_vocab} tokens, {digest[:12]}"


def _task_from_examples(
    model: HookedModel,
    name: str,
    n: int,
    seed: int,
    how: How,
    data: str | Source,
    labels: Sequence[int] | None,
    texts: Sequence[str],
) -> Task:
    """The task that follows from data or texts alone."""
    images = isinstance(model.input, ImageInput)
    if name and (name == "next-token") == images:
        raise ValueError(
            f"task {name!r} does not fit model {model.name}, which takes {'images' if images else 'tokens'}"
        )
    if texts:
        return of_examples(Examples.texts(model, list(texts)))
    if not data and not images:
        raise ValueError(f"task {name!r} needs data (--data) or a text (--text)")
    source = _opened(data or _DATA.get(base_name(model), "photos"))
    if images and labels is None and name == "classes":
        labels = read_labels(source, model.classes)
    if name == "prediction":
        labels = None
    return of_examples(Examples(model, source, n, how=how, seed=seed, labels=labels).readable())


def _opened(data: str | Source) -> Source:
    return open_source(data) if isinstance(data, str) else data


def _task_from_answers(
    model: HookedModel,
    n: int,
    seed: int,
    how: How,
    data: str | Source,
    texts: Sequence[str],
    positions: str,
    answer: str,
    against: str,
    metric: Metric | None,
) -> Task:
    """A task from examples, with answers and positions that are given once and hold for all of them."""
    right, wrong = ([w for w in words.split("|") if w] for words in (answer, against))
    if wrong and not right:
        raise ValueError(f"against {against!r} needs an answer (--answer) to compare it with")
    if isinstance(model.input, ImageInput):
        if positions:
            raise ValueError(
                f"positions {positions!r} do not fit model {model.name}: images have no positions, only texts do"
            )
        examples = Examples(
            model, data or _DATA.get(base_name(model), "photos"), n, how=how, seed=seed
        ).readable()
        question = Question(
            answers=tuple((output_index(model, f"class:{w}"),) for w in right),
            against=tuple((output_index(model, f"class:{w}"),) for w in wrong),
        )
        asked = (question,) * len(examples)
        return Task("answer", examples, asked, metric or default_metric(asked))
    own: Sequence[str | tuple[int, ...]] = list(texts)
    if not own:
        source = _opened(data) if data else None
        if not isinstance(source, TextSource):
            what = f"positions {positions!r}" if positions else "an answer"
            why = "there is neither" if source is None else f"data {source.spec!r} is not texts"
            raise ValueError(f"{what} needs a text (--text) or data of texts, and {why}")
        taken = Examples(model, source, n, how=how, seed=seed)
        own = [source.texts[i] for i in taken.numbers]
    at = _parse_positions(positions)
    if not right:
        return _next_token_at(model, own, at)
    items = [Item(t, tuple(right), tuple(wrong), positions=at) for t in own]
    return compile_task(model, items, name="answer", metric=metric, seed=seed)


def _parse_positions(positions: str) -> str | tuple[int, ...]:
    if positions in ("", "last", "all"):
        return positions or "last"
    found = tuple(whole(p.strip()) for p in positions.split(","))
    if None in found:
        raise ValueError(
            f"positions {positions!r}: expected last, all, or whole numbers separated by commas"
        )
    return tuple(p for p in found if p is not None)


def _next_token_at(
    model: HookedModel, texts: Sequence[str | tuple[int, ...]], at: str | tuple[int, ...]
) -> Task:
    """The task of predicting the next token, counted at some positions only."""
    whole = of_examples(Examples.texts(model, texts))
    asked = []
    for i, question in enumerate(whole.questions):
        length = len(whole.examples.load(i))
        assert question.labels is not None, "every next token is a label"
        # Nothing is known to follow the last token, so `last` is the position before it.
        wanted = range(length - 1) if at == "all" else [length - 2] if at == "last" else at
        far = [p for p in wanted if isinstance(p, int) and not -length <= p < length]
        if far or any(int(p) % length == length - 1 for p in wanted):
            raise ValueError(
                f"position {(far or [length - 1])[0]} of {whole.examples.names[i]!r}: expected {-length} to "
                f"{length - 2}, a position with a next token"
            )
        places = tuple(int(p) % length for p in wanted)
        asked.append(Question(places, labels=tuple(question.labels[p] for p in places)))
    return Task(whole.name, whole.examples, tuple(asked), whole.metric, about=whole.about)


def _is_shapes(model: HookedModel) -> bool:
    return base_name(model) == "shapes"
