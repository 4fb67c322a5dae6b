"""Whether a model, and a circuit of it, give an algorithm's answer on every input there is: proved, not sampled."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from circuits.checks import clipped
from circuits.claims.abstraction.algorithms import Algorithm
from circuits.claims.abstraction.interchange import ALGORITHM, hashes, named
from circuits.claims.evidence import Known, Region
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Level, Measured, Quantity, quantity
from circuits.examples import Examples
from circuits.experiments import run
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.metrics import accuracy
from circuits.tasks.task import Question, Task, output_width

MOST = 200_000
"""The most inputs that are enumerated."""

_BATCH = 512
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def tokens_of(text: str) -> tuple[int, ...]:
    """The tokens that may stand at a position, written `1,4-6`.

    Raises:
        ValueError: if it is not of that form, or names more than `MOST`.

    >>> tokens_of("1,4-6")
    (1, 4, 5, 6)
    """
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or len(found) + last - first >= MOST:
            raise ValueError(
                f"tokens {clipped(repr(text))}: expected tokens of one position, such as 0-112 or 1,4-6"
            )
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def domain(model: HookedModel, positions: Sequence[str]) -> list[tuple[int, ...]]:
    """All texts whose tokens are allowed at each position.

    Args:
        model: the model.
        positions: for each position the tokens that may stand there.

    Raises:
        ValueError: if there are none or too many, the model takes no tokens, or it has no such token.
    """
    if not isinstance(model.input, TokenInput):
        raise ValueError(f"model {model.name} takes no tokens: only texts can be enumerated")
    if not 1 <= len(positions) <= model.input.n_ctx:
        raise ValueError(f"tokens: {len(positions)} positions, expected 1 to {model.input.n_ctx}")
    allowed = [tokens_of(text) for text in positions]
    size = math.prod(map(len, allowed))
    if size > MOST:
        raise ValueError(f"tokens: they make {size} texts, expected at most {MOST}")
    far = next((t for own in allowed for t in own if t >= model.input.n_vocab), None)
    if far is not None:
        raise ValueError(f"tokens: {far}, expected 0 to {model.input.n_vocab - 1}")
    return list(itertools.product(*allowed))


def as_task(model: HookedModel, algorithm: Algorithm, texts: Sequence[tuple[int, ...]]) -> Task:
    """The task of giving the algorithm's answer at the end of each text."""
    most = output_width(model) - 1
    answers = [algorithm.answer(text, most=most) for text in texts]
    examples = Examples.texts(model, texts, [" ".join(map(str, text)) for text in texts])
    questions = tuple(Question((len(t) - 1,), ((a,),)) for t, a in zip(texts, answers, strict=True))
    return Task("every input", examples, questions, accuracy)


def specification(subject: Subject, settings: Settings, level: Level) -> Measured:
    """The share of all inputs on which the model's first choice, and the circuit's, is the algorithm's answer."""
    algorithm, _ = named(subject, settings)
    task = as_task(subject.model, algorithm, domain(subject.model, settings["tokens"]))
    values = {
        "model": run(subject.model, [], task, measures=[accuracy], batch=_BATCH).values[
            accuracy.name
        ][0]
    }
    notes = []
    if subject.kept is not None:
        parts, kept = subject.circuit
        ablation = settings["ablation"]
        values[f"circuit ({ablation} ablation)"] = parts.values(
            [kept], task, ablation, "noising", subject.progress
        )[0]
        notes.append(
            "what is outside the circuit carries the same on every input: nothing is drawn"
        )
    found = tuple(_share(name, own, level, len(values)) for name, own in values.items())
    notes[:0] = [_said(name, algorithm, own, task) for name, own in values.items()]
    said = f"all {len(task)} texts with tokens {'; '.join(settings['tokens'])}"
    return Measured(found, said, subject.seed, tuple(notes), hashes(algorithm))


def _share(name: str, values: Float[np.ndarray, " example"], level: Level, parts: int) -> Quantity:
    return quantity(
        f"share of all inputs on which the {name} gives the algorithm's answer", Known(float(values.mean())),
        Region(low=1.0), level, parts=parts, n=len(values), clusters=len(values), exact=True,
    )  # fmt: skip


def _said(
    name: str, algorithm: Algorithm, values: Float[np.ndarray, " example"], task: Task
) -> str:
    wrong = np.flatnonzero(values < 1)
    if not len(wrong):
        return f"{name} = {algorithm.name}: proved on all {len(task)} inputs, not sampled"
    first = task.examples.names[int(wrong[0])]
    return f"{name}: another answer, or a tie, on {len(wrong)} of all {len(task)} inputs, such as {first!r}"


def _check(subject: Subject, settings: Settings) -> None:
    named(subject, settings)
    domain(subject.model, settings["tokens"])


TESTS = (
    ClaimTest(
        "specification", ("algorithm",),
        "Whether the model, and its circuit if there is one, give the algorithm's answer on every input, all of which "
        "are enumerated.",
        (
            *ALGORITHM,
            Parameter("tokens", "for each position the tokens that may stand there, such as 0-112", form="texts"),
            Parameter(
                "ablation", "what is outside the circuit carries", "mean", choices=("mean", "mean-by-position", "zero"),
                form="text",
            ),
        ), specification, circuit=False, check=_check,
    ),
)  # fmt: skip
