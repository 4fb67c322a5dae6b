"""Steering: whether a model uses what can be read off. Directions are added to runs and compared with random ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.examples import BATCH
from circuits.experiments import Context, Variant
from circuits.experiments.running import MEMORY
from circuits.hooks import Change
from circuits.localization.cells import Cell, column_of
from circuits.localization.grids import PatchDirection, PatchGrid
from circuits.localization.patching import Directions, GridPlan, measured_grid
from circuits.localization.readouts import Readouts
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.tasks.metrics import Metric, as_metric
from circuits.tasks.task import Task
from circuits.units import Site

N_DIRECTIONS = 10
"""The number of random directions that each direction is compared with."""

_MOST = 1e6
"""The largest multiple of a direction that can be added."""


def steering_grid(
    model: HookedModel,
    task: Task,
    readouts: Readouts,
    *,
    amount: float = 1.0,
    direction: Directions = "both",
    metric: str | Metric | Callable[[Tensor], Tensor] | None = None,
    n_random: int = N_DIRECTIONS,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> PatchGrid:
    """Move the activations at each readout along its direction, one at a time, and measure on the `test` half.

    In the corrupted run (`denoising`) the direction is added; in the clean run (`noising`) it is subtracted.

    Args:
        model: the model.
        task: the whole task that the directions were found on, with counterparts.
        readouts: readouts of two classes, corrupted and clean.
        amount: the multiple of the direction.
        direction: `noising`, `denoising` or `both`.
        metric: what is measured; the task's own if None.
        n_random: the number of random directions of equal norm.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: seed of random directions, intervals and p-values.
        progress: called with the work done and the total, in examples times runs.

    Raises:
        KeyError: if there is no such metric.
        ValueError: if the task has no counterparts or is the half that the directions were found on, the readouts have
            other labels, or a number is out of range.
    """
    if not math.isfinite(amount) or abs(amount) > _MOST:
        raise ValueError(f"amount {amount:g} must be a number from {-_MOST:g} to {_MOST:g}")
    judged = task.test
    if judged.counterparts is None:
        raise ValueError(
            f"task {task.name} has no counterparts: there is no other run to compare with"
        )
    if readouts.labels != "clean or corrupted":
        raise ValueError(
            f"readouts of {readouts.labels}: expected those of clean or corrupted (labels 'pair')"
        )
    if n_random < 0:
        raise ValueError(f"n_random {n_random} must be 0 or more")
    judged = judged if metric is None else judged.with_metric(as_metric(metric))
    cells, along = [], dict[str, Tensor]()
    for readout in readouts.readouts:
        assert readout.vector is not None, "of two classes"
        column = None if readout.key is None else column_of(judged, readout.key)
        cell = Cell(readout.site, None, column)
        cells.append(cell)
        along[str(cell)] = readout.vector * amount

    def make(way: PatchDirection, cell: Cell, draw: int) -> Variant:
        site, sign = model.site(cell.site), -1.0 if way == "noising" else 1.0
        vector = along[str(cell)]
        if draw:
            vector = _random(vector, seed, cells.index(cell), draw)
        return Variant("", live=_MovedAlong(site, cell, sign * vector), sites=(site.name,))

    def there(way: PatchDirection, draw: int) -> Bool[np.ndarray, " example"]:
        return np.ones(len(judged), dtype=bool)

    plan = GridPlan(
        judged, "position", tuple(cells), make, n_random, there, f"itself, moved {amount:g} times along its direction",
        "the same along a random direction of equal norm",
    )  # fmt: skip
    return measured_grid(
        model, plan, direction, batch=batch, memory=memory, seed=seed, progress=progress
    )


@dataclass(frozen=True, eq=False)
class _MovedAlong:
    """Adds a vector to a cell's activations."""

    site: Site
    cell: Cell
    vector: Float[Tensor, " width"]

    def __call__(self, context: Context) -> Mapping[str, Change]:
        part, site = context.batch, self.site
        assert part is not None, "called in an experiment"
        along = site.spread(self.vector.reshape(site.unit_shape))
        return {
            site.name: lambda value: value + self.cell.mask(site, part, value) * along.to(value)
        }


def _random(vector: Tensor, seed: int, place: int, draw: int) -> Tensor:
    """A random direction of the same norm."""
    drawn = np.random.default_rng([seed, place, draw]).standard_normal(len(vector))
    made = torch.from_numpy(drawn)
    return made * (vector.norm() / made.norm())
