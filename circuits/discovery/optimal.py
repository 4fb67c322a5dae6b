"""Optimal ablation: constants that removed edges carry, learned for a circuit (Li & Janson 2024).

A removed edge carries a constant of its source, the same at all positions of all examples: the one with which the
circuit is closest to the model. A mean is such a constant, too, and the learning begins there. What distance is left is
due to what the circuit lacks, and less to what a badly chosen value does to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.discovery.graphs import EdgeGraph, Mask, as_off
from circuits.discovery.losses import Distance
from circuits.discovery.runs import Runs
from circuits.examples import BATCH
from circuits.experiments.running import MEMORY
from circuits.progress import Progress
from circuits.tasks.task import Task

STEPS = 30
"""The number of steps in which constants are learned for a circuit."""

RATE = 0.1
"""The learning rate of constants (Adam), as a share of the size of what they stand for."""


@dataclass(frozen=True, eq=False)
class Constants:
    """What sites are given where edges are removed, as it is being learned.

    Attributes:
        start: what each site is given at first: its mean.
        scale: the root mean square of each learned site.
        moves: for each learned site the change of what it is given, in units of its scale.
    """

    start: Mapping[str, Tensor]
    scale: Mapping[str, Tensor]
    moves: dict[str, Tensor]

    @classmethod
    def of(cls, runs: Runs) -> Constants:
        """The means of a task's runs, to be learned from there.

        Raises:
            ValueError: if edges carry something else than means in these runs.
        """
        start = dict(runs.constants)
        first = next(iter(runs.pairs())).clean
        learned = dict.fromkeys(name for names, _ in runs.graph.source_sites() for name in names)
        scale = {name: first[name].square().mean().sqrt() for name in learned}
        moves = {
            name: torch.zeros_like(start[name], dtype=scale[name].dtype, requires_grad=True)
            for name in learned
        }
        return cls(start, scale, moves)

    @property
    def now(self) -> dict[str, Tensor]:
        """What each site is given."""
        learned = {
            name: self.start[name].to(move) + self.scale[name] * move
            for name, move in self.moves.items()
        }
        return dict(self.start) | learned


@recording_gradients()
def learn_constants(
    graph: EdgeGraph,
    task: Task,
    circuit: Mask,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The constants with which a circuit is closest to the model, for `Runs(..., ablation="optimal", constants=...)`.

    They are learned on all examples of a task at once; the best of all steps are returned, so that they are never worse
    there than means.

    Args:
        graph: the model's edges.
        task: the `find` half of a task.
        circuit: the edges that are kept.
        steps: how often the constants are changed.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        progress: called with the steps done and their number.

    Returns:
        What each site is given, by site, without the axes of examples and positions.

    Raises:
        ValueError: if the task does not fit, or nothing changes when all its edges are removed.
    """
    runs = Runs(graph, task, ablation="mean", batch=batch, memory=memory)
    distance, constants, off = Distance.of(runs), Constants.of(runs), as_off(graph, [circuit])
    optimizer = torch.optim.Adam([*constants.moves.values()], lr=RATE)
    best, least = {name: value.detach() for name, value in constants.now.items()}, np.inf
    for step in range(steps + 1):
        optimizer.zero_grad()
        total = 0.0
        for pair in runs.pairs():
            share = distance.at(pair, off, constants.now) * (len(pair.part) / len(task))
            if share.requires_grad:  # no edge is removed otherwise
                share.backward()
            total += float(share.detach())
        if total < least:
            best, least = {name: value.detach() for name, value in constants.now.items()}, total
        if step < steps:
            optimizer.step()
        if progress is not None:
            progress(step, steps)
    return best
