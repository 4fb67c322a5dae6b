"""Results of patch grids: the metric with every cell replaced on every example, and tables and matrices of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.experiments import Record
from circuits.experiments.statistics import (
    Correction,
    corrected,
    ends,
    n_clusters,
    paired_ps,
    resampled,
)
from circuits.files import finite
from circuits.localization.cells import By
from circuits.tables import Table, between
from circuits.tasks.metrics import Metric

PatchDirection = Literal["noising", "denoising"]
"""`noising` patches parts of the corrupted run into the clean run; `denoising` restores parts of the clean run in the
corrupted run."""

Quantity = Literal["normalised", "change", "null"]
"""A cell's change as a share of the gap between the two runs; in the metric's unit; or the change when the cell is
patched from another pair, as a share of the gap."""

_RESAMPLES = 40
"""Sign flips for each cell. Holm multiplies the smallest of n p-values by n, so p < 0.05 takes 20 n flips; twice
that."""

_NO_GAP = 1e-6
"""If the metrics of the two runs differ by less than this share of their size, the gap is too small to divide by."""


@runtime_checkable
class GridCell(Protocol):
    """What is replaced at a time: some units of a site, or a path."""

    @property
    def row(self) -> str:
        """Its row in a matrix."""
        ...

    @property
    def place(self) -> str:
        """Its column in a matrix."""
        ...

    def reaches(self, n: int) -> Bool[Tensor, " example"]:
        """Which of a task's examples have this cell."""
        ...

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        ...


@dataclass(frozen=True)
class CellEffect:
    """The effect of patching one cell.

    Attributes:
        cell: the cell in words.
        change: the change of the metric, averaged over examples.
        low: lower end of its 95 % interval: bootstrap over examples, by cluster if they share a template instance.
        high: upper end of the interval.
        normalised: the change as a share of the gap, from the patched run (0) to the other run (1); NaN if the two
            runs do not differ.
        null: the normalised change when the cell is patched from another pair; NaN if it was not measured.
        p_value: a paired test of whether patching from the own pair differs from patching from another pair, corrected
            for the number of cells; NaN without a null.
        n: the number of examples that have the cell.
    """

    cell: str
    change: float
    low: float
    high: float
    normalised: float
    null: float
    p_value: float
    n: int


@dataclass(frozen=True, eq=False)
class GridSide:
    """One direction of a grid: the metric on each example.

    Attributes:
        base: the metric of the run that is patched.
        other: the metric of the run that patches come from.
        patched: the metric with each cell replaced; NaN where an example has no such cell.
        random: the metric with each cell replaced from another pair's run, for each draw; NaN where there is no other
            pair.
    """

    base: Float[np.ndarray, " example"]
    other: Float[np.ndarray, " example"]
    patched: Float[np.ndarray, "cell example"]
    random: Float[np.ndarray, "draw cell example"]

    @property
    def gap(self) -> float:
        """The difference of the two runs' means."""
        return float((self.other - self.base).mean())

    @cached_property
    def changes(self) -> Float[np.ndarray, "cell example"]:
        """The change that each cell makes on each example."""
        return self.patched - self.base

    @cached_property
    def random_changes(self) -> Float[np.ndarray, "cell example"]:
        """The change of each cell patched from another pair's run, averaged over draws; NaN without draws."""
        if not len(self.random):
            return np.full_like(self.patched, np.nan)
        return self.random.mean(0) - self.base

    def share(self, changes: Float[np.ndarray, "cell example"]) -> Float[np.ndarray, " cell"]:
        """Mean changes as a share of the gap between the runs, over the examples that have the cell."""
        # A ratio of means, not a mean of ratios: single examples with a tiny gap would dominate the latter.
        known = ~np.isnan(changes)
        gap = (known * (self.other - self.base)).sum(1)
        size = (known * np.maximum(np.abs(self.base), np.abs(self.other))).sum(1)
        wide = np.abs(gap) > _NO_GAP * size
        return np.where(wide, np.nansum(changes, 1) / np.where(wide, gap, 1.0), np.nan)


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The effect of replacing each cell of a grid on a task's metric.

    Attributes:
        metric: what was measured.
        by: what a cell is.
        cells: the cells, in the order of the sides' rows.
        sides: the results, by direction.
        clusters: a number for each example, shared by those of one template instance.
        replaced_by: what replaces a cell.
        null_is: what the random draws are.
        record: where the numbers come from.
    """

    metric: Metric
    by: By | Literal["path"]
    cells: tuple[GridCell, ...]
    sides: Mapping[PatchDirection, GridSide]
    clusters: tuple[int, ...]
    replaced_by: str
    null_is: str
    record: Record

    def side(self, direction: PatchDirection | None = None) -> GridSide:
        """The results in one direction; in the first one if none is named.

        Raises:
            KeyError: if it was not measured.
        """
        key = next(iter(self.sides)) if direction is None else direction
        if key not in self.sides:
            raise KeyError(
                f"direction {key!r} was not measured: expected {' or '.join(self.sides)}"
            )
        return self.sides[key]

    def effects(
        self, direction: PatchDirection | None = None, correction: Correction = "holm"
    ) -> tuple[CellEffect, ...]:
        """Each cell's mean effect with its interval and p-value, in the grid's order."""
        side = self.side(direction)
        columns = (
            means(side.changes), *self._intervals(side.changes), side.share(side.changes),
            side.share(side.random_changes), self._p_values(side, correction),
        )  # fmt: skip
        counts = (~np.isnan(side.changes)).sum(1).tolist()
        each = zip(self.cells, np.stack(columns, 1).tolist(), counts, strict=True)
        return tuple(CellEffect(str(cell), *row, n=n) for cell, row, n in each)

    def _intervals(
        self, changes: Float[np.ndarray, "cell example"]
    ) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
        """Intervals of the cells' means, over the same bootstrap resamples of clusters."""
        # Cells exist on different examples: both the sum of changes and the share of examples that have the cell are
        # resampled, and their ratio is the mean over these examples.
        nan = np.full(len(changes), np.nan)
        if n_clusters(self.clusters) < 2:
            return nan, nan
        known = ~np.isnan(changes)
        seed, clusters = self.record.seed, self.clusters
        sums = resampled(np.nan_to_num(changes), clusters=clusters, seed=seed)
        shares = resampled(known.astype(float), clusters=clusters, seed=seed)
        drawn = sums / np.where(shares > 0, shares, np.nan)
        # A cell's mean is of the clusters that have it.
        having = np.array([n_clusters(np.array(clusters)[row].tolist()) for row in known])
        return ends(means(changes), drawn, having)

    def _p_values(self, side: GridSide, correction: Correction) -> Float[np.ndarray, " cell"]:
        if not len(side.random):
            return np.full(len(self.cells), np.nan)
        resamples = max(9999, _RESAMPLES * len(self.cells))
        found = paired_ps(
            side.changes - side.random_changes, self.clusters, seed=self.record.seed, resamples=resamples
        )  # fmt: skip
        made, known = np.full(len(found), np.nan), ~np.isnan(found)
        if known.any():
            made[known] = corrected(found[known].tolist(), correction)
        return made

    # --- as a matrix -----------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of `matrix`: sites, heads where there is a column for each of their positions, or senders."""
        return tuple(dict.fromkeys(c.row for c in self.cells))

    @property
    def columns(self) -> tuple[str, ...]:
        """Its columns: positions, units where cells have none, or receivers."""
        return tuple(dict.fromkeys(c.place for c in self.cells))

    def matrix(
        self, what: Quantity = "normalised", direction: PatchDirection | None = None
    ) -> Float[np.ndarray, "row column"]:
        """Means over examples as rows and columns; NaN where there is no such cell."""
        side = self.side(direction)
        values = {
            "normalised": lambda: side.share(side.changes),
            "change": lambda: means(side.changes),
            "null": lambda: side.share(side.random_changes),
        }[what]()
        rows, columns = ({name: i for i, name in enumerate(n)} for n in (self.rows, self.columns))
        made = np.full((len(rows), len(columns)), np.nan)
        for cell, value in zip(self.cells, values, strict=True):
            made[rows[cell.row], columns[cell.place]] = value
        return made

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite({
            "metric": self.metric.name, "unit": self.metric.unit, "by": self.by, "replaced_by": self.replaced_by,
            "null_is": self.null_is,
            "cells": [cell.describe() for cell in self.cells],
            "directions": {
                name: {
                    "base": side.base.tolist(), "other": side.other.tolist(), "patched": side.patched.tolist(),
                    "effects": [asdict(e) for e in self.effects(name)],
                }
                for name, side in self.sides.items()
            },
            "clusters": list(self.clusters), "record": asdict(self.record),
        })  # fmt: skip

    def tables(self, top: int) -> Iterator[Table | str]:
        """The cells (or paths) with the largest effects, a table for each direction, and what its columns mean."""
        word = "path" if self.by == "path" else "cell"
        columns = (
            word,
            "share",
            "change",
            "95 % interval",
            "another pair's",
            "p of the pair",
            "examples",
        )
        for way, side in self.sides.items():
            effects = sorted(self.effects(way), key=lambda e: -abs(e.change))
            rows = [
                (e.cell, e.normalised, e.change, between(e.low, e.high), e.null, e.p_value, e.n)
                for e in effects[:top]
            ]
            chosen = f"{len(rows)} of {len(effects)} {word}s, seed {self.record.seed}"
            yield Table(columns, rows, f"{self.heading(way, side)}; {chosen}")
        yield (
            "share: of the way from the run that is patched (0) to the other run of the pair (1); another pair's: the "
            f"same share, {self.null_is}; p of the pair: tests whether the pair's own run does something else than "
            "another pair's, not whether there is an effect "
            f"(paired, Holm correction over all {word}s)"
        )

    def heading(self, way: PatchDirection, side: GridSide) -> str:
        """What was measured in one direction, and the metric of both runs."""
        return (
            f"{way}: {self.metric.name} of {self.record.measured_on}; {side.base.mean():.4g} in the run that is "
            f"patched, {side.other.mean():.4g} in the other"
        )


def means(changes: Float[np.ndarray, "cell example"]) -> Float[np.ndarray, " cell"]:
    """The mean of each cell over the examples that have it; NaN if no example has it."""
    known = (~np.isnan(changes)).sum(1)
    return np.where(known > 0, np.nansum(changes, 1) / np.maximum(known, 1), np.nan)
