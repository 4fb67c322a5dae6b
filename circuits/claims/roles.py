"""Tests of what heads look at, and of what an edit does."""

from __future__ import annotations

from functools import partial

import numpy as np

from circuits.checks import whole
from circuits.claims.evidence import Mean, Region, Share
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Level, Measured, Quantity, quantity
from circuits.edits.records import Edit, read_edit
from circuits.experiments import INTACT, Variant, null_of, run
from circuits.localization.attention import pattern_head
from circuits.localization.heads import CHANCE, KINDS, score_heads
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.task import Question

_EDITED = "edited"


# --- heads -------------------------------------------------------------------------------------------


def head_role(subject: Subject, settings: Settings, level: Level) -> Measured:
    """How much of their attention heads pay to where heads of a kind look, on random repeated tokens."""
    if not isinstance(subject.model.input, TokenInput):
        why = f"model {subject.model.name} takes images: heads of this kind are of token models"
        return subject.cannot(why)
    heads = [pattern_head(subject.model, head) for head in settings["heads"]]
    kind = settings["role"]
    scored = score_heads(subject.model, [kind], n=settings["texts"], seed=subject.seed)
    found: list[Quantity] = []
    made = partial(quantity, level=level, parts=2 * len(heads))
    for head in heads:
        row = scored.heads.index(head)
        own, chance = scored.scores[0, row], scored.chance[0, row]
        least, margin = Region(low=settings["least"]), Region(low=settings["margin"])
        texts, null = range(len(own)), (float(chance.mean()),)
        found += [
            made(f"attention of {head}", Mean(own, texts), least, null=null, null_is=CHANCE[kind]),
            made(f"attention of {head} above chance", Mean(own - chance, texts), margin),
        ]
    best = np.argsort(-scored.scores[0].mean(1))[:5].tolist()
    ranked = ", ".join(f"{scored.heads[i]} {scored.scores[0, i].mean():.2f}" for i in best)
    note = f"the highest {kind.replace('_', ' ')} scores of all {len(scored.heads)} heads: {ranked}"
    said = f"{settings['texts']} texts of random repeated tokens"
    return Measured(tuple(found), said, subject.seed, (note,))


def attends(subject: Subject, settings: Settings, level: Level) -> Measured:
    """How much attention a head pays from one place of the task's texts to another, against even attention."""
    model, task = subject.model, subject.test
    if not isinstance(model.input, TokenInput):
        why = f"model {model.name} takes images: places are of texts"
        return subject.cannot(why)
    head = pattern_head(model, settings["head"])
    own, even = np.full(len(task), np.nan), np.full(len(task), np.nan)
    for part in task.batches():
        pattern = model.site(head.site)
        cache = model.run(part.inputs, mask=part.mask, read=[pattern], until=pattern)
        seen = pattern.by_unit(cache[pattern])[:, head.index].double()
        for row, example in enumerate(part.rows.tolist()):
            i = part.which[example]
            length = int(part.mask[row].sum()) if part.mask is not None else part.inputs.shape[1]
            query = place_of(settings["query"], task.questions[i], length, task.examples.names[i])
            keys = place_of(settings["key"], task.questions[i], length, task.examples.names[i])
            own[i] = float(seen[row, query][:, keys].sum(1).mean())
            even[i] = float(np.mean([sum(k <= q for k in keys) / (q + 1) for q in query]))
    made = partial(quantity, level=level, parts=2)
    found = (
        made(
            f"attention of {head} from {settings['query']} to {settings['key']}", Mean(own, task.clusters),
            Region(low=settings["least"]), null=(float(even.mean()),), null_is="even attention to all tokens so far",
        ),
        made("the same above even attention", Mean(own - even, task.clusters), Region(low=settings["margin"])),
    )  # fmt: skip
    return Measured(found, subject.said(), subject.seed)


def place_of(place: str, question: Question, length: int, name: str) -> list[int]:
    """The positions that a text names: `last`, a span of the task, or a position (negative ones from the end).

    Raises:
        ValueError: if an example has no such place.
    """
    if place in question.spans:
        return list(range(*question.spans[place]))
    number = -1 if place == "last" else whole(place)
    if number is None or not -length <= number < length:
        spans = ", ".join(question.spans) or "none"
        raise ValueError(
            f"place {place!r}: example {name!r} has no such place; expected last, a position from {-length} to "
            f"{length - 1}, or one of its spans ({spans})"
        )
    return [number % length]


def _check_heads(subject: Subject, settings: Settings) -> None:
    if isinstance(subject.model.input, TokenInput):
        for head in settings.get("heads", (settings.get("head"),)):
            pattern_head(subject.model, head)


# --- edits -------------------------------------------------------------------------------------------


def _read(subject: Subject, settings: Settings) -> tuple[Edit, ...]:
    return tuple(read_edit(subject.model, text, files=False) for text in settings["edits"])


def edit_effect(subject: Subject, settings: Settings, level: Level) -> Measured:
    """What edits do to the task's metric: as predicted, and more than random edits of the same kind and norm."""
    model, task = subject.model, subject.test
    edits = _read(subject, settings)
    own = Variant(_EDITED, edits)
    null = null_of(model, own, task.examples, settings["random"], subject.seed)
    outcomes = run(
        model,
        [own, *null.variants],
        task,
        measures=[task.metric],
        seed=subject.seed,
        progress=subject.progress,
    )
    name = task.metric.name
    change = outcomes.of(name, _EDITED) - outcomes.of(name, INTACT)
    others = [float((outcomes.of(name, v) - outcomes.of(name, INTACT)).mean()) for v in null.names]
    smaller = np.array([abs(v) < abs(change.mean()) for v in others], float)
    made = partial(quantity, level=level, parts=2)
    region = Region(settings["least"], settings["most"])
    found = [made(
        f"change of {name}", Mean(change, task.clusters), region, null=tuple(others), null_is=null.is_,
        unit=task.metric.unit,
    )]  # fmt: skip
    if len(smaller):
        share = Share(smaller, range(len(smaller)))
        found.append(
            made("share of random edits that change less", share, Region(low=settings["rank"]))
        )
    before = outcomes.mean(name)
    note = f"{name} is {before:.4g} before and {before + change.mean():.4g} after: {'; '.join(map(str, edits))}"
    return Measured(tuple(found), subject.said(), subject.seed, (note,))


TESTS = (
    ClaimTest(
        "head-role", ("role",),
        "How much of their attention heads pay to previous tokens, earlier copies, or what followed earlier copies "
        "(induction; Olsson et al. 2022), against chance.",
        (
            Parameter("heads", "the heads, as LAYER.HEAD or units of their sites", form="texts"),
            Parameter("role", "of which kind they are", form="text", choices=KINDS),
            Parameter("least", "the least share of attention", 0.3, 0, 1),
            Parameter("margin", "how much it has to be above chance", 0.1, 0, 1),
            Parameter("texts", "how many texts", 64, 4, 10**5, whole=True),
        ), head_role, circuit=False, check=_check_heads,
    ),
    ClaimTest(
        "attends", ("role",),
        "How much attention a head pays from one place of the task's texts to another, against even attention.",
        (
            Parameter("head", "the head, as LAYER.HEAD or a unit of its site", form="text"),
            Parameter("query", "from where: last, a span of the task, or a position", form="text"),
            Parameter("key", "to where", form="text"),
            Parameter("least", "the least share of attention", 0.3, 0, 1),
            Parameter("margin", "how much it has to be above even attention", 0.1, 0, 1),
        ), attends, circuit=False, check=_check_heads,
    ),
    ClaimTest(
        "edit-effect", ("effect",),
        "What edits do to the task's metric: whether the change lies in the predicted range, and whether random edits "
        "of the same kind and norm do less.",
        (
            Parameter("edits", "the edits, as `circuits edit` takes them", form="texts"),
            Parameter("least", "the least change of the metric, in its unit"),
            Parameter("most", "the largest change"),
            Parameter("random", "how many random edits", 99, 19, 10**5, whole=True),
            Parameter("rank", "the least share of random edits that change less", 0.9, 0, 1),
        ), edit_effect, circuit=False, check=_read,
    ),
)  # fmt: skip
