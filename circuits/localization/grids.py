"""What a grid of replaced cells found: every cell on every example, and tables and matrices read from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.experiments import Record
from circuits.experiments.statistics import LEVEL, Correction, corrected, paired_ps, resampled
from circuits.files import finite
from circuits.localization.cells import By
from circuits.tables import Table, between
from circuits.tasks.metrics import Metric

PatchDirection = Literal["noising", "denoising"]
"""`noising` puts parts of the corrupted run into the clean one, `denoising` restores parts of the clean run in the
corrupted one."""

Quantity = Literal["normalised", "change", "null"]
"""A cell's change as a share of the way to the other run; in the metric's unit; or what another pair's does, as a share
of that way."""

_RESAMPLES = 40
"""Changes of sign for each cell: twice as many as p = 0.05 needs after the correction."""

_NO_GAP = 1e-6
"""Runs whose metrics differ by less than this share of their size leave nothing to normalise by."""


@runtime_checkable
class GridCell(Protocol):
    """What is replaced at once: some units of a site, or a path."""

    @property
    def row(self) -> str:
        """Its row in a matrix."""
        ...

    @property
    def place(self) -> str:
        """Its column in a matrix."""
        ...

    def reaches(self, n: int) -> Bool[Tensor, " example"]:
        """Which of a task's examples have it at all."""
        ...

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        ...


@dataclass(frozen=True)
class CellEffect:
    """What one cell does.

    Attributes:
        cell: as it is written.
        change: of the metric, the mean over examples.
        low: lower end of its 95 % interval: bootstrap over examples, by cluster where they share a template instance.
        high: its upper end.
        normalised: the change as a share of the way from the run that is patched (0) to the other (1); NaN if these
            do not differ.
        null: the same with what takes the cell's place from another pair; NaN if it was not measured.
        p_value: of a paired test that the own pair's does something else than another pair's, corrected for the number
            of cells; NaN without a null.
        n: how many examples have the cell.
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
        base: of the run that is patched.
        other: of the run that patches come from.
        patched: with each cell replaced; NaN where an example has no such cell.
        random: with each cell replaced from another pair's run, draw by draw; NaN where there is no other pair.
    """

    base: Float[np.ndarray, " example"]
    other: Float[np.ndarray, " example"]
    patched: Float[np.ndarray, "cell example"]
    random: Float[np.ndarray, "draw cell example"]

    @property
    def gap(self) -> float:
        """How far the two runs' means are apart."""
        return float((self.other - self.base).mean())

    @cached_property
    def changes(self) -> Float[np.ndarray, "cell example"]:
        """What each cell changes on each example."""
        return self.patched - self.base

    @cached_property
    def random_changes(self) -> Float[np.ndarray, "cell example"]:
        """The mean of what each cell changes when it is replaced from another pair's run; NaN without a draw."""
        if not len(self.random):
            return np.full_like(self.patched, np.nan)
        return self.random.mean(0) - self.base

    def share(self, changes: Float[np.ndarray, "cell example"]) -> Float[np.ndarray, " cell"]:
        """Mean changes as a share of the way to the other run, over the examples that have the cell."""
        known = ~np.isnan(changes)
        gap = (known * (self.other - self.base)).sum(1)
        size = (known * np.maximum(np.abs(self.base), np.abs(self.other))).sum(1)
        wide = np.abs(gap) > _NO_GAP * size
        return np.where(wide, np.nansum(changes, 1) / np.where(wide, gap, 1.0), np.nan)


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """What replacing each cell of a grid does to a task's metric.

    Attributes:
        metric: what was measured.
        by: what a cell is.
        cells: in the order of the sides' rows.
        sides: what was found, by direction.
        clusters: a number for each example; those of one template instance share it.
        replaced_by: what takes a cell's place.
        null_is: what the random draws are.
        record: what it belongs to.
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
        """One direction; the only or the first one if none is named.

        Raises:
            KeyError: if it was not measured.
        """
        key = next(iter(self.sides)) if direction is None else direction
        if key not in self.sides:
            raise KeyError(f"direction {key!r} was not measured: there is {', '.join(self.sides)}")
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
        """Percentiles of means over the same resampled clusters."""
        nan = np.full(len(changes), np.nan)
        if len(set(self.clusters)) < 2:
            return nan, nan
        known = ~np.isnan(changes)
        seed, clusters = self.record.seed, self.clusters
        sums = resampled(np.nan_to_num(changes), clusters=clusters, seed=seed)
        shares = resampled(known.astype(float), clusters=clusters, seed=seed)
        drawn = sums / np.where(shares > 0, shares, np.nan)
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return low, high

    def _p_values(self, side: GridSide, correction: Correction) -> Float[np.ndarray, " cell"]:
        if not len(side.random):
            return np.full(len(self.cells), np.nan)
        # enough for the smallest p to stay below 0.05 after the correction
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
    """Of each cell over the examples that have it; NaN if none has."""
    known = (~np.isnan(changes)).sum(1)
    return np.where(known > 0, np.nansum(changes, 1) / np.maximum(known, 1), np.nan)
