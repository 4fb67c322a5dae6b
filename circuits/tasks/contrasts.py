"""Tasks of image models from labelled or unlabelled photographs: one class against another, and the images of a unit.

Photographs of two classes, or of two groups of classes, are counterparts of each other; what is measured is the logit
of an image's own class less that of the other. Images for a unit are those that activate it most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import BATCH, Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.stimuli.sources import Source
from circuits.tasks.builtin import task_from_pairs
from circuits.tasks.images import ImagePairs
from circuits.tasks.metrics import UnitActivation, logit_difference
from circuits.tasks.reading import Reading
from circuits.tasks.targets import output_index
from circuits.tasks.task import Task

_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


def parse_classes(model: HookedModel, text: str) -> tuple[int, ...]:
    """The outputs that classes stand for, written `NAME|NAME`; a number or a range `FIRST-LAST` is of outputs.

    Raises:
        KeyError: if there is no such class.
        ValueError: if no class is named, or a range is empty or out of range.
    """
    found: list[int] = []
    for part in (p.strip() for p in text.split("|")):
        ends = _RANGE.fullmatch(part)
        if ends is None:
            found.append(output_index(model, f"class:{part}"))
            continue
        first, last = map(int, ends.groups())
        if last < first:
            raise ValueError(f"classes {part}: expected FIRST-LAST, the first at most the last")
        output_index(model, f"class:{last}")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def class_against_class(
    model: HookedModel,
    source: Source,
    labels: Sequence[int],
    first: str,
    second: str,
    *,
    n: int,
    seed: int = 0,
) -> Task:
    """The task of telling two classes, or two groups of classes, apart on photographs of both.

    Each photograph's counterpart is one of the other class, and the two are each other's: they stay in one half of a
    split. The metric is the mean logit of the classes of a photograph's own group less that of the other group's.

    Args:
        model: an image model.
        source: its images.
        labels: the class of each image of the source.
        first: a class, or several (see `parse_classes`).
        second: the class or classes that it is compared with.
        n: the most photographs to take, half of each class.
        seed: of the choice, and of who is whose counterpart.

    Raises:
        KeyError: if there is no such class.
        ValueError: if the model takes tokens, a class is in both groups, or there is no photograph of one of them.
    """
    if not isinstance(model.input, ImageInput):
        raise ValueError(
            f"classes {first} and {second}: model {model.name} takes tokens, expected images"
        )
    groups = parse_classes(model, first), parse_classes(model, second)
    if both := set(groups[0]) & set(groups[1]):
        raise ValueError(f"class {min(both)} is both in {first!r} and in {second!r}")
    random, chosen = Random(seed), list[list[int]]()
    for name, own in zip((first, second), groups, strict=True):
        there = [i for i, label in enumerate(labels) if label in own]
        if not there:
            raise ValueError(f"class {name!r}: no image of {source.spec} is of it")
        chosen.append(random.sample(there, len(there)))
    size = max(1, min(*map(len, chosen), n // 2))
    numbers = [i for pair in zip(*(some[:size] for some in chosen), strict=True) for i in pair]
    images = _pictures(model, source, numbers)
    others = [i ^ 1 for i in range(len(numbers))]  # photographs 2 k and 2 k + 1 are a pair
    pairs = ImagePairs(
        f"{first} against {second}", images, images[others], tuple(source.names[i] for i in numbers), "another",
        f"Which of two classes a photograph is of: {first} or {second}.", tuple(labels[i] for i in numbers),
        tuple(labels[numbers[i]] for i in others), tuple(f"pair {i // 2}" for i in range(len(numbers))),
    )  # fmt: skip
    task = task_from_pairs(model, pairs, logit_difference)
    sides = [tuple((c,) for c in group) for group in groups]
    asked = tuple(
        replace(q, answers=sides[i % 2], against=sides[1 - i % 2])
        for i, q in enumerate(task.questions)
    )
    return replace(task, questions=asked, seed=seed)


def _pictures(
    model: HookedModel, source: Source, numbers: Sequence[int]
) -> Float[Tensor, "image 3 h w"]:
    """Some images of a source in a given order, in 0..1, as large as the model takes them."""
    found = Examples(model, source, None, how="given", among=numbers).images()
    if found is None:
        raise ValueError(f"images of {source.spec} do not have three channels")
    return found


def most_active(task: Task, n: int, progress: Progress | None = None) -> Task:
    """The examples of a task on which the unit of its metric is most active, at its most active position.

    Args:
        task: a task whose metric is the activation of a unit.
        n: how many to keep; all if there are no more.
        progress: called with the number of examples run and the total.

    Raises:
        ValueError: if the metric is no unit's activation, or `n` is not positive.
    """
    metric = task.metric
    if not isinstance(metric, UnitActivation) or metric.site is None:
        raise ValueError(
            f"most active {n}: metric {metric.name} is not the activation of a unit; expected SITE:INDEX"
        )
    if n < 1:
        raise ValueError(f"most active {n} must be at least 1")
    values, done = torch.zeros(len(task), dtype=torch.float64), 0
    for part in task.batches(BATCH):
        cache = task.model.run(part.inputs, mask=part.mask, read=[metric.site], until=metric.site)
        site = metric.site.name
        reading = Reading(part.places(1), torch.zeros(len(part), 0), {site: cache[site]}, part.mask)
        values[list(part.which)] = metric.of(reading, reading)
        done += len(part)
        if progress is not None:
            progress(done, len(task))
    order = values.argsort(descending=True, stable=True)[:n]
    # Halves are drawn again: those of all examples may hold very different numbers of the most active ones.
    return replace(task.subset(sorted(order.tolist())), split=None)
