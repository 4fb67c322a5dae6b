"""Activation patching over a grid: each cell in turn is replaced by its activation in the other run of its pair.

Meng et al. 2022 (causal tracing); Zhang and Nanda 2024, "Towards Best Practices of Activation Patching", on the two
directions and on metrics. Many cells share a pass, which starts at the first site that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.examples import BATCH
from circuits.experiments import Context, Outcomes, Record, Variant, run
from circuits.experiments.running import MEMORY
from circuits.hooks import Change
from circuits.localization.cells import By, Cell, Key, cells_of
from circuits.localization.grids import GridCell, GridSide, PatchDirection, PatchGrid
from circuits.localization.pairing import OtherPairs
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.tasks.metrics import Metric, as_metric
from circuits.tasks.targets import output_site
from circuits.tasks.task import Task
from circuits.units import Site

Directions = Literal["noising", "denoising", "both"]

OTHER = "the other run"
"""The name of the variant whose whole output comes from the other run."""

Make = Callable[[PatchDirection, Any, int], Variant]
"""Makes the model with a cell replaced in one direction: from the other run (0), or by a random draw (1, 2, …)."""


def patch_grid(
    model: HookedModel,
    task: Task,
    sites: str | Site | Sequence[str | Site] | None = None,
    *,
    by: By = "position",
    positions: str | Sequence[Key] | None = None,
    direction: Directions = "both",
    metric: str | Metric | Callable[[Tensor], Tensor] | None = None,
    n_random: int = 1,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> PatchGrid:
    """Replace each cell of a grid, one at a time, by its activation in the other run of its pair, and measure.

    Metrics that compare with the intact model, such as the KL divergence, compare with the run that is patched.

    Args:
        model: the model.
        task: a task with counterparts.
        sites: names, patterns (`blocks.*.hook_mlp_out`) or ends of hook names (`resid_pre`, `z`). By default the
            residual stream before each layer (by position), heads' outputs (by head), or the outputs of attention
            layers and MLPs (by site).
        by: what a cell is.
        positions: whole numbers (negative from the end), names of the task's spans, or `spans`; all if None.
        direction: `noising`, `denoising` or `both`.
        metric: what is measured; the task's own if None.
        n_random: how many times each cell is also patched from another pair's run, drawn at random: the null.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: seed of the random pairs, of intervals and p-values.
        progress: called with the work done and the total, in examples times runs.

    Raises:
        KeyError: if there is no such site or metric.
        ValueError: if the task has no counterparts, a position is outside every text, a site has no heads or positions,
            the metric does not fit the task or is not finite, or a number is out of range.
    """
    if task.counterparts is None:
        raise ValueError(f"task {task.name} has no counterparts: there is nothing to patch from")
    if n_random < 0:
        raise ValueError(f"n_random {n_random} must be 0 or more")
    asked = task if metric is None else task.with_metric(as_metric(metric))
    cells = cells_of(model, asked, sites, by, positions)
    places = {name: model.site(name) for name in dict.fromkeys(c.site for c in cells)}
    sources = {"noising": task.counterparts, "denoising": task.examples}
    others = {
        way: OtherPairs(model, asked, source, list(places.values()), n_random, seed)
        for way, source in sources.items()
    }

    def make(way: PatchDirection, cell: Cell, draw: int) -> Variant:
        own = others[way] if draw else None
        live = _PatchedCell(places[cell.site], cell, own, draw)
        return Variant("", live=live, sites=(cell.site,), reads=(cell.site,))

    plan = GridPlan(
        asked, by, cells, make, n_random, lambda way, draw: others[way].there(draw - 1),
        "what it is in the other run of its pair", "the same of another pair, drawn at random",
    )  # fmt: skip
    return measured_grid(
        model, plan, direction, batch=batch, memory=memory, seed=seed, progress=progress
    )


@dataclass(frozen=True, eq=False)
class _PatchedCell:
    """Replaces a cell by its activation in the other run of its pair, or in that of another pair."""

    site: Site
    cell: Cell
    others: OtherPairs | None
    draw: int

    def __call__(self, context: Context) -> Mapping[str, Change]:
        part, name = context.batch, self.site.name
        assert part is not None, "called in an experiment"
        others = self.others
        source = context.counterpart if others is None else others.tensors(self.draw - 1, part)
        donors = source[name]
        if self.cell.unit is None and self.cell.column is None:
            return {name: lambda value: donors}
        where = self.cell.mask(self.site, part, donors)
        return {name: lambda value: torch.where(where, donors, value)}


# --- grids of any kind ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GridPlan:
    """What to measure for each cell of a grid.

    Attributes:
        task: the task, with counterparts and the metric.
        by: what a cell is.
        cells: all cells.
        make: makes the model with a cell replaced.
        n_random: the number of random draws for each cell.
        there: which examples have a random draw, by direction and draw.
        replaced_by: what replaces a cell, for titles.
        null_is: what the random draws are.
    """

    task: Task
    by: By | Literal["path"]
    cells: tuple[GridCell, ...]
    make: Make
    n_random: int
    there: Callable[[PatchDirection, int], Bool[np.ndarray, " example"]]
    replaced_by: str
    null_is: str


def measured_grid(
    model: HookedModel,
    plan: GridPlan,
    direction: Directions,
    *,
    batch: int,
    memory: int,
    seed: int,
    progress: Progress | None,
) -> PatchGrid:
    """Run a plan in one direction or both.

    Raises:
        ValueError: if the direction is unknown, or the metric is not finite somewhere.
    """
    if direction not in get_args(Directions):
        raise ValueError(f"direction {direction!r} is not one of {', '.join(get_args(Directions))}")
    ways: tuple[PatchDirection, ...] = (
        ("noising", "denoising") if direction == "both" else (direction,)
    )
    sides: dict[PatchDirection, GridSide] = {}
    for i, way in enumerate(ways):
        variants = [_other_run(model, plan.task.metric)]
        for draw in range(plan.n_random + 1):
            variants += [
                replace(
                    plan.make(way, cell, draw), name=f"{cell}{f', random {draw}' if draw else ''}"
                )
                for cell in plan.cells
            ]
        outcomes = run(
            model, variants, plan.task, measures=[plan.task.metric], corrupted=way == "denoising",
            batch=batch, memory=memory, seed=seed, progress=_part(progress, i, len(ways)),
        )  # fmt: skip
        sides[way] = _side(outcomes, plan, way)
    null_is = f"{plan.n_random} times {plan.null_is}" if plan.n_random else "not measured"
    return PatchGrid(
        plan.task.metric, plan.by, plan.cells, sides, plan.task.clusters, plan.replaced_by, null_is,
        Record.of(model, plan.task, seed),
    )  # fmt: skip


def _other_run(model: HookedModel, metric: Metric) -> Variant:
    """The other run: everything that the metric reads is taken from there."""
    # Measured as a variant, so that the other run's metric is computed in the same way, against the same intact run.
    read = tuple(dict.fromkeys([output_site(model).name, *metric.sites()]))

    def live(context: Context) -> Mapping[str, Change]:
        return {name: _constant(context.counterpart[name]) for name in read}

    return Variant(OTHER, live=live, sites=read, reads=read)


def _constant(tensor: Tensor) -> Change:
    return lambda value: tensor


def _part(progress: Progress | None, i: int, n: int) -> Progress | None:
    """Reports the progress of the i-th of n runs of the same length."""
    if progress is None:
        return None
    return lambda done, total: progress(i * total + done, n * total)


def _side(outcomes: Outcomes, plan: GridPlan, way: PatchDirection) -> GridSide:
    values = outcomes.values[plan.task.metric.name]
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        variant, example = bad[0]
        name = outcomes.variants[variant]
        raise ValueError(
            f"metric {plan.task.metric.name} is {values[variant, example]} "
            + (f"in {name}" if name == OTHER else f"with {name} replaced")
            + f" on example {plan.task.examples.names[example]!r}: expected a finite number"
        )
    n_cells, n = len(plan.cells), values.shape[1]
    patched, random = values[2 : 2 + n_cells], values[2 + n_cells :].reshape(-1, n_cells, n)
    reached = np.stack([cell.reaches(n).numpy() for cell in plan.cells])
    there = np.stack(
        [plan.there(way, draw) for draw in range(1, plan.n_random + 1)] or [np.ones(n, bool)]
    )
    return GridSide(
        values[0], values[1], np.where(reached, patched, np.nan),
        np.where(reached & there[: len(random), None], random, np.nan),
    )  # fmt: skip
