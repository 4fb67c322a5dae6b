"""What edges carry that are removed, where it is not what they carry on the counterpart: means of aligned texts, and
other examples in the place of counterparts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.task import Task, TaskBatch

Ablation = Literal[
    "counterpart", "resample", "mean", "mean-by-position", "mean-by-template", "optimal", "zero"
]
"""What an edge that is not in a circuit carries:

- `counterpart`: what it carries on the example's counterpart;
- `resample`: what it carries on another example of the same length, which is drawn by seed, the same for all edges;
- `mean`: the mean over the task's examples and positions;
- `mean-by-position`: the mean over the task's examples at each position (for images at each place of the map);
- `mean-by-template`: the same over the examples of one template and length;
- `optimal`: a constant for each source, the same at all positions, that was learned for the circuit (Li & Janson 2024);
- `zero`: nothing.
"""


# --- another example ---------------------------------------------------------------------------------


def resampled(task: Task, seed: int) -> Task:
    """The task with another of its examples, drawn at random, as each example's counterpart.

    Raises:
        ValueError: if no other example has the length of one of them.
    """
    examples, rng = task.examples, np.random.default_rng(seed)
    texts = isinstance(task.model.input, TokenInput)
    lengths = [len(examples.load(i)) if texts else 0 for i in range(len(examples))]
    names = examples.identities
    same = {length: [i for i, own in enumerate(lengths) if own == length] for length in {*lengths}}
    drawn = []
    for i, length in enumerate(lengths):
        others = [k for k in same[length] if names[k] != names[i]]
        if not others:
            raise ValueError(
                f"ablation resample: no other example of task {task.name} is as long as {examples.names[i]!r}"
                + (f" ({length} tokens)" if texts else "")
            )
        drawn.append(others[int(rng.integers(len(others)))])
    return replace(task, counterparts=examples.subset(drawn))


# --- means of aligned examples -----------------------------------------------------------------------

Group = tuple[str, int]
"""A template (empty if all examples count as one) and a number of tokens (0 for images)."""


@dataclass(frozen=True, eq=False)
class AlignedMeans:
    """The mean of each site at each position, over examples that are aligned.

    Attributes:
        values: for each group of examples and each site the mean, without the axis of examples.
        by_template: whether each template has means of its own.
    """

    values: Mapping[Group, Mapping[str, Tensor]]
    by_template: bool

    @classmethod
    def of(
        cls,
        task: Task,
        runs: Iterable[tuple[TaskBatch, Mapping[str, Tensor]]],
        by_template: bool,
    ) -> AlignedMeans:
        """The means over a task's runs.

        Args:
            task: the task.
            runs: its batches with the tensors of sites.
            by_template: examples of a template have means of their own; else there are means of all.

        Raises:
            ValueError: if the texts are not of one length or answers are fed into them, an example has no template, or
                is the only one of its template and length, so that its mean would be itself.
        """
        check_aligned(task, by_template)
        totals: dict[Group, dict[str, Tensor]] = {}
        counts: dict[Group, int] = {}
        for part, tensors in runs:
            for group, rows in _rows_of(task, part, by_template).items():
                counts[group] = counts.get(group, 0) + len(rows)
                own = totals.setdefault(group, {})
                for name, value in tensors.items():
                    made = _real(value, part, rows).double().sum(0)
                    own[name] = own[name] + made if name in own else made
        means = {g: {n: t / counts[g] for n, t in own.items()} for g, own in totals.items()}
        return cls(means, by_template)

    def filled(
        self, task: Task, part: TaskBatch, clean: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Some sites of a batch with every row's own means; nothing at padding.

        Args:
            task: the task.
            part: a batch of it.
            clean: the sites in the batch's own run.
            names: which of them.
        """
        found = {name: torch.zeros_like(clean[name]) for name in names}
        for group, rows in _rows_of(task, part, self.by_template).items():
            for row in rows:
                there = slice(None) if part.mask is None else part.mask[row]
                for name, value in found.items():
                    value[row, there] = self.values[group][name].to(value)
        return found


def check_aligned(task: Task, by_template: bool) -> None:
    """Raise ValueError unless the examples that a mean is taken over are aligned, and at least two."""
    ablation = f"ablation mean-by-{'template' if by_template else 'position'}"
    if task.feeding == "fed":
        raise ValueError(
            f"{ablation} needs texts of one length: those of task {task.name} end in answers of several tokens; "
            "expected another ablation, or feeding 'first'"
        )
    counts: dict[Group, int] = {}
    for i, question in enumerate(task.questions):
        if by_template and not question.template:
            raise ValueError(
                f"{ablation}: example {task.examples.names[i]!r} of task {task.name} has no template; expected another "
                "ablation, or a task made from templates"
            )
        group = _group(task, i, by_template)
        counts[group] = counts.get(group, 0) + 1
    lengths = sorted({length for _, length in counts})
    if not by_template and len(lengths) > 1:
        raise ValueError(
            f"{ablation} needs texts of one length: those of task {task.name} have {lengths[0]} to {lengths[-1]} tokens"
        )
    alone = [group for group, n in counts.items() if n < 2]
    if alone:
        template, length = alone[0]
        of = f" of template {template!r}" if template else ""
        long = f" with {length} tokens" if length else ""
        raise ValueError(
            f"{ablation}: task {task.name} has a single example{of}{long}, whose mean is what it carries itself; "
            "expected at least 2"
        )


def _group(task: Task, example: int, by_template: bool) -> Group:
    texts = isinstance(task.model.input, TokenInput)
    length = len(task.examples.load(example)) if texts else 0
    return (task.questions[example].template if by_template else "", length)


def _rows_of(task: Task, part: TaskBatch, by_template: bool) -> dict[Group, list[int]]:
    """The rows of a batch, one for each example, by the group that they belong to."""
    found: dict[Group, list[int]] = {}
    for row, place in enumerate(part.which):
        found.setdefault(_group(task, place, by_template), []).append(row)
    return found


def _real(value: Tensor, part: TaskBatch, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, equally long, without padding."""
    if part.mask is None:
        return value[list(rows)]
    return torch.stack([value[row, part.mask[row]] for row in rows])
