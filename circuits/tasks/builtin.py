"""Tasks by name: those of the built-in models, templates for text, and task files."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits.examples import LIMIT, Examples, How, choose
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.stimuli.images import ImageSource
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import open_source
from circuits.stimuli.texts import TextSource
from circuits.tasks.compiling import compile_task
from circuits.tasks.files import read_items
from circuits.tasks.generated import Generated
from circuits.tasks.generators import GENERATORS
from circuits.tasks.images import IMAGE_PAIRS, ImagePairs
from circuits.tasks.items import Item
from circuits.tasks.metrics import Metric, as_metric
from circuits.tasks.tables import read_table
from circuits.tasks.targets import output_index
from circuits.tasks.task import Question, Task, default_metric, of_examples
from circuits.tasks.templates import TEMPLATES
from circuits.units import unknown

DEFAULTS: Mapping[str, str] = {
    "induction": "repeats",
    "induction-by-hand": "repeats",
    "induction-infinite": "repeats",
    "addition-by-hand": "addition",
    "modular-addition": "addition",
    "stories260k": "pronouns",
    "shapes": "classes",
    "cleanroom": "curves",
    "googlenet": "prediction",
    "cifar10-resnet20": "prediction",
}
"""The task of each built-in model, when nobody names one."""

STATED = ("classes", "next-token", "prediction")
"""Tasks that examples state by themselves (see `of_examples`): they need data."""

_DATA = {"shapes": "shapes", "cleanroom": "curves"}
"""Where a built-in model's examples come from, when nobody says."""


def names_of(model: HookedModel) -> list[str]:
    """The tasks that a model can be given by name, its own first."""
    if isinstance(model.input, ImageInput):
        known = [
            *STATED[::2],
            *(name for name in IMAGE_PAIRS if name != "shapes" or _shapes(model)),
        ]
    elif model.input.encoder is not None:
        known = [*TEMPLATES, STATED[1]]
    else:
        known = [*GENERATORS, STATED[1]]
    own = DEFAULTS.get(base_name(model))
    return [*([own] if own else []), *(name for name in known if name != own)]


def base_name(model: HookedModel) -> str:
    """The name of a model without what was attached to it or done to it."""
    return model.name.partition("+")[0].partition(",")[0]


def load_task(
    model: HookedModel,
    spec: str = "",
    *,
    n: int = LIMIT,
    seed: int = 0,
    how: How = "spread",
    data: str = "",
    labels: Sequence[int] | None = None,
    texts: Sequence[str] = (),
    metric: str = "",
    positions: str = "",
    answer: str = "",
    against: str = "",
) -> Task:
    """A task by name, from a file, or from what a person types.

    Args:
        model: what it is for.
        spec: the name of a task, with options behind a colon (`indirect-object:templates=ABBA,corruption=swap`); a task
            file (`.jsonl`) or a table (`.csv`, `.tsv`, `.json`); empty for the built-in model's own task, or, with
            data or texts, the one that these state by themselves.
        n: how many examples at most.
        seed: of what is drawn, of the choice of examples, and of the split into halves.
        how: how examples of the data are chosen.
        data: examples by name (see `open_source`), for tasks that need some.
        labels: the class of each example of the data; from their names if None, where these tell.
        texts: prompts, instead of data.
        metric: what is measured, by name; the task's own if empty.
        positions: `last`, `all` or whole numbers separated by commas: the positions that count.
        answer: what the model should say to each example: a text or class; several are separated by `|`.
        against: what the answer is compared with, likewise.

    Raises:
        KeyError: if there is no such task, metric or class.
        FileNotFoundError: if a file does not exist.
        ValueError: if the task does not fit the model, or an option does not go with it.
    """
    chosen = as_metric(metric) if metric else None
    if answer or against or positions:
        if spec and spec not in STATED:
            raise ValueError(f"task {spec!r} has answers and positions of its own: name no others")
        return _typed(model, n, seed, how, data, texts, positions, answer, against, chosen)
    if not spec:
        spec = "" if data or texts else default_of(model)
    name, _, options = spec.partition(":")
    if not spec or name in STATED:
        task = _stated(model, name, n, seed, how, data, labels, texts)
    elif name in IMAGE_PAIRS:
        task = of_pairs(
            model, IMAGE_PAIRS[name](n, seed, **_options(IMAGE_PAIRS[name], options)), chosen
        )
    elif name in GENERATORS or name in TEMPLATES:
        task = of_generated(model, _drawn(model, name, n, seed, options), seed)
    elif Path(spec).suffix in (".jsonl", ".csv", ".tsv", ".json") or Path(spec).exists():
        task = _from_file(model, Path(spec), n, seed, how)
    else:
        raise unknown("task", name, names_of(model))
    return task if chosen is None else task.with_metric(chosen)


def default_of(model: HookedModel) -> str:
    """The name of a built-in model's own task.

    Raises:
        ValueError: if the model is none of these.
    """
    own = DEFAULTS.get(base_name(model))
    if own is None and isinstance(model.input, ImageInput):
        return "prediction"
    if own is None:
        raise ValueError(
            f"model {model.name} has no task of its own: name one (--task {', '.join(names_of(model)[:4])} or a file) "
            "or data (--data)"
        )
    return own


def of_generated(model: HookedModel, made: Generated, seed: int = 0) -> Task:
    """A task from what a generator drew."""
    return compile_task(
        model, made.items, name=made.name, metric=made.metric, seed=seed, about=made.about,
        left_out=dict(made.left_out),
    )  # fmt: skip


def of_pairs(model: HookedModel, pairs: ImagePairs, metric: Metric | None = None) -> Task:
    """A task from pairs of images: a class against another where there are classes, else what the model puts out.

    Raises:
        ValueError: if the model takes tokens, or a class is none of its outputs.
    """
    if not isinstance(model.input, ImageInput):
        raise ValueError(f"task {pairs.name} is about images: model {model.name} takes tokens")
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


def _drawn(model: HookedModel, name: str, n: int, seed: int, options: str) -> Generated:
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(f"task {name!r} is about tokens: model {model.name} takes images")
    if name in TEMPLATES:
        make = TEMPLATES[name]
        return make(n, seed, spec, **_options(make, options))
    make = GENERATORS[name]
    given = _options(make, options)
    known = inspect.signature(make).parameters
    sizes = {"length": min(spec.n_ctx, 64), "n_vocab": spec.n_vocab, "p": spec.n_vocab - 1}
    if name == "repeats":
        longest = max(1, (sizes["length"] - 3) // 2)
        sizes["periods"] = (min(6, longest), min(24, longest))  # type: ignore[assignment]
    return make(n, seed, **{k: v for k, v in sizes.items() if k in known} | given)


def _options(make: Callable[..., Any], text: str) -> dict[str, Any]:
    """Options written `name=value,name=value`."""
    known = [k for k in inspect.signature(make).parameters if k not in ("n", "seed", "tokenizer")]
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(
                f"option {part!r} of a task is not of the form NAME=VALUE, e.g. {known[0]}=…"
            )
        if key not in known and "settings" not in known:
            raise unknown("option of the task", key, known)
        found[key] = int(value) if value.lstrip("-").isdigit() else value
    return found


def _from_file(model: HookedModel, path: Path, n: int, seed: int, how: How) -> Task:
    """A task file, or a table of the community."""
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(f"task {str(path)!r} is about tokens: model {model.name} takes images")
    if path.suffix != ".jsonl":
        table = read_table(path, tokenizer=spec)
        kept = tuple(table.items[i] for i in choose(range(len(table.items)), n, how, seed))
        return of_generated(model, replace(table, items=kept), seed)
    header, items = read_items(path)
    if header.tokenizer and header.tokenizer != tokenizer_of(spec):
        raise ValueError(
            f"task file {str(path)!r} has tokens of another tokenizer ({header.tokenizer}): model {model.name} has "
            f"{tokenizer_of(spec)}"
        )
    kept = tuple(items[i] for i in choose(range(len(items)), n, how, seed))
    return compile_task(
        model, kept, name=header.name, metric=header.metric, feeding=header.reading, seed=header.seed,
        about=header.about,
    )  # fmt: skip


def tokenizer_of(spec: TokenInput) -> str:
    """What stands in a task file whose items are tokens: how many there are, and a digest of how they are written.

    >>> tokenizer_of(TokenInput(3, 8))
    '3 tokens, 778d5d27b716'
    """
    digest = hashlib.sha256(repr([*spec.vocabulary, spec.bos]).encode()).hexdigest()
    return f"{spec.n_vocab} tokens, {digest[:12]}"


def _stated(
    model: HookedModel,
    name: str,
    n: int,
    seed: int,
    how: How,
    data: str,
    labels: Sequence[int] | None,
    texts: Sequence[str],
) -> Task:
    """The task that examples state by themselves."""
    images = isinstance(model.input, ImageInput)
    if name and (name == "next-token") == images:
        raise ValueError(
            f"task {name!r} does not fit: model {model.name} takes {'images' if images else 'tokens'}"
        )
    if texts:
        return of_examples(Examples.texts(model, list(texts)))
    if not data and not images:
        raise ValueError(f"task {name!r} needs data (--data) or a text (--text)")
    source = open_source(data or _DATA.get(base_name(model), "photos"))
    if images and labels is None and name == "classes":
        labels = read_labels(source, model.classes)
    if name == "prediction":
        labels = None
    return of_examples(Examples(model, source, n, how=how, seed=seed, labels=labels))


def _typed(
    model: HookedModel,
    n: int,
    seed: int,
    how: How,
    data: str,
    texts: Sequence[str],
    positions: str,
    answer: str,
    against: str,
    metric: Metric | None,
) -> Task:
    """A task from examples, and answers and positions that a person types, the same for all."""
    right, wrong = ([w for w in words.split("|") if w] for words in (answer, against))
    if wrong and not right:
        raise ValueError(f"against {against!r} needs an answer that is compared with it")
    if isinstance(model.input, ImageInput):
        if positions:
            raise ValueError(
                f"positions {positions!r}: model {model.name} takes images, which have none"
            )
        examples = Examples(
            model, data or _DATA.get(base_name(model), "photos"), n, how=how, seed=seed
        )
        question = Question(
            answers=tuple((output_index(model, f"class:{w}"),) for w in right),
            against=tuple((output_index(model, f"class:{w}"),) for w in wrong),
        )
        asked = (question,) * len(examples)
        return Task("answer", examples, asked, metric or default_metric(asked))
    own: Sequence[str | tuple[int, ...]] = list(texts)
    if not own:
        source = open_source(data) if data else None
        if not isinstance(source, TextSource):
            raise ValueError("answers and positions need a text (--text) or data of texts (--data)")
        taken = Examples(model, source, n, how=how, seed=seed)
        own = [source.texts[i] for i in taken.numbers]
    at = _numbers(positions)
    if not right:
        return _next_at(model, own, at)
    items = [Item(t, tuple(right), tuple(wrong), positions=at) for t in own]
    return compile_task(model, items, name="answer", metric=metric, seed=seed)


def _numbers(positions: str) -> str | tuple[int, ...]:
    if positions in ("", "last", "all"):
        return positions or "last"
    try:
        return tuple(int(p) for p in positions.split(","))
    except ValueError:
        raise ValueError(
            f"positions {positions!r}: expected last, all, or whole numbers separated by commas"
        ) from None


def _next_at(
    model: HookedModel, texts: Sequence[str | tuple[int, ...]], at: str | tuple[int, ...]
) -> Task:
    """Predict the next token, counted at some positions only."""
    whole = of_examples(Examples.texts(model, texts))
    asked = []
    for i, question in enumerate(whole.questions):
        length = len(whole.examples.load(i))
        assert question.labels is not None, "every next token is a label"
        wanted = range(length - 1) if at == "all" else [length - 2] if at == "last" else at
        far = [p for p in wanted if isinstance(p, int) and not -length <= p < length]
        if far or any(int(p) % length == length - 1 for p in wanted):
            raise ValueError(
                f"position {(far or [length - 1])[0]} of {whole.examples.names[i]!r}: expected {-length} to "
                f"{length - 2}, where a next token is known"
            )
        places = tuple(int(p) % length for p in wanted)
        asked.append(Question(places, labels=tuple(question.labels[p] for p in places)))
    return Task(whole.name, whole.examples, tuple(asked), whole.metric, about=whole.about)


def _shapes(model: HookedModel) -> bool:
    return base_name(model) == "shapes"
