"""Cells of a grid: a site, or some of its units, at some positions of each example."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.checks import whole
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.selecting import select_sites
from circuits.tasks.task import Task, TaskBatch
from circuits.units import Site

By = Literal["site", "position", "head", "head_position", "unit"]
"""What a cell of a grid is: a whole site; a site at one position; a head (or its attention pattern); a head at one
position; or one unit of any site."""

BY_UNIT: tuple[By, ...] = ("head", "head_position", "unit")
BY_POSITION: tuple[By, ...] = ("position", "head_position")

_USUAL: dict[By, tuple[str, ...]] = {
    "site": ("attn_out", "mlp_out"),
    "position": ("resid_pre",),
    "head": ("z",),
    "head_position": ("z",),
}
"""A transformer's sites in a grid when none are named."""


@dataclass(frozen=True)
class GridPosition:
    """One position (or span) of a grid, in each example.

    Attributes:
        name: the position's label.
        places: the positions in each example, counted from the text's first token (for images, over the map, row by
            row); empty where an example has no such position.
    """

    name: str
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Cell:
    """What is replaced at a time: a site, or one of its units, at all positions or at one.

    Attributes:
        site: the site's name.
        unit: one of its units; None for all units.
        column: a position; None for all positions.
    """

    site: str
    unit: int | None = None
    column: GridPosition | None = None

    def __str__(self) -> str:
        unit = "" if self.unit is None else f":{self.unit}"
        return f"{self.site}{unit}" + ("" if self.column is None else f"@{self.column.name}")

    @property
    def row(self) -> str:
        """Its row in a matrix: the site, or the head if the columns are positions."""
        both = self.unit is not None and self.column is not None
        return f"{self.site}:{self.unit}" if both else self.site

    @property
    def place(self) -> str:
        """Its column in a matrix: the position, or the unit if the cell covers all positions."""
        if self.column is not None:
            return self.column.name
        return "all" if self.unit is None else str(self.unit)

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        column = None if self.column is None else self.column.name
        return {"site": self.site, "unit": self.unit, "position": column}

    def reaches(self, n: int) -> Bool[Tensor, " example"]:
        """Which of a task's examples have this cell."""
        if self.column is None:
            return torch.ones(n, dtype=torch.bool)
        return torch.tensor([len(places) > 0 for places in self.column.places])

    def mask(self, site: Site, part: TaskBatch, value: Tensor) -> Bool[Tensor, "row *rest"]:
        """True where the cell is in the site's tensor; broadcasts against the tensor."""
        # Built as row x unit x positions (x inner axis), then moved into the site's own axis order.
        shape = site.positions_of(value)
        wanted = torch.ones(len(value), 1, *(1,) * len(shape), dtype=torch.bool)
        if self.column is not None:
            wanted = self._positions_mask(part, shape)
        if self.unit is not None:
            own = torch.arange(site.n_units) == self.unit
            wanted = wanted & own.reshape(1, -1, *(1,) * len(shape))
        if site.inner_axis is not None:
            wanted = wanted[..., None]
        return site.from_by_unit(wanted).to(value.device)

    def _positions_mask(self, part: TaskBatch, shape: tuple[int, ...]) -> Tensor:
        """The cell's positions in each row of a batch: row x 1 x positions."""
        assert self.column is not None, "called for a column"
        flat = torch.zeros(len(part.inputs), math.prod(shape), dtype=torch.bool)
        first = [0] * len(flat) if part.mask is None else part.mask.int().argmax(1).tolist()
        for row, example in enumerate(part.rows.tolist()):
            for place in self.column.places[part.which[example]]:
                if first[row] + place < flat.shape[1]:
                    flat[row, first[row] + place] = True
        return flat.reshape(len(flat), 1, *shape)


def cells_of(
    model: HookedModel,
    task: Task,
    sites: str | Site | Sequence[str | Site] | None,
    by: By,
    positions: str | Sequence[Key] | None = None,
) -> tuple[Cell, ...]:
    """All cells of a grid, site by site.

    Args:
        model: the model.
        task: what is measured on.
        sites: see `select_sites`; the usual ones of a transformer if None.
        by: what a cell is.
        positions: see `keys_of`.

    Raises:
        KeyError: if there is no such site.
        ValueError: if a site has no heads or positions where these are asked for, or positions do not fit.
    """
    if by not in get_args(By):
        raise ValueError(f"by {by!r} is not one of {', '.join(get_args(By))}")
    if positions is not None and by not in BY_POSITION:
        raise ValueError(f"positions go with by {' or '.join(BY_POSITION)}, not with {by!r}")
    chosen = sites_of(model, sites, by)
    columns: tuple[GridPosition | None, ...] = (None,)
    if by in BY_POSITION:
        columns = columns_of(task, chosen, positions)
    found = []
    for site in chosen:
        units: Sequence[int | None] = range(site.n_units) if by in BY_UNIT else (None,)
        found += [Cell(site.name, unit, column) for unit in units for column in columns]
    return tuple(found)


def sites_of(
    model: HookedModel, sites: str | Site | Sequence[str | Site] | None, by: By
) -> list[Site]:
    """The sites of a grid, in order of execution.

    Raises:
        KeyError: if there is no such site.
        ValueError: if no site is named and the model has no default ones, or a site has no heads or positions.
    """
    if sites is None:
        try:
            chosen = [s for name in _USUAL.get(by, ()) for s in select_sites(model, name)]
        except KeyError:
            chosen = []
        if not chosen:
            raise ValueError(
                f"sites: model {model.name} has no default sites for by {by!r}, so name some"
            )
    else:
        chosen = select_sites(model, sites)
    if not chosen:
        raise ValueError("sites are empty: expected at least one")
    for site in chosen:
        if by in ("head", "head_position") and site.kind not in ("head", "pattern"):
            raise ValueError(
                f"by {by!r}: the units of {site.name} are of kind {site.kind}, expected a site of heads"
            )
        if by in BY_POSITION and (not site.position_axes or "query" in site.position_axes):
            raise ValueError(
                f"by {by!r}: site {site.name} has no position axis, expected one that does"
            )
    order = {s.name: i for i, s in enumerate(model.sites)}
    return sorted(chosen, key=lambda s: order[s.name])


Key = int | str
"""A position: a number from the text's first token, negative from its end, or the name of a span."""


def columns_of(
    task: Task, sites: Sequence[Site], positions: str | Sequence[Key] | None = None
) -> tuple[GridPosition, ...]:
    """The positions of a grid.

    Args:
        task: the examples.
        sites: the sites; for images their maps must have the same size.
        positions: see `keys_of`.

    Raises:
        ValueError: if no example has one of the positions or spans, or the sites' maps differ in size.
    """
    if not isinstance(task.model.input, TokenInput):
        return _map_positions(task, sites, positions)
    return tuple(column_of(task, key) for key in keys_of(task, positions))


def keys_of(task: Task, positions: str | Sequence[Key] | None = None) -> tuple[Key, ...]:
    """Parse positions.

    Args:
        task: a task of texts.
        positions: whole numbers, from each text's first token or negative from its end; names of the task's spans; or
            `spans` for all spans. A string may hold several, separated by commas. None means every position.

    Raises:
        ValueError: if no example has one of them.
    """
    lengths = [length_of(task, i) for i in range(len(task))]
    if positions is None:
        return tuple(range(max(lengths)))
    spans = dict.fromkeys(name for q in task.questions for name in q.spans)
    if positions == "spans" and not spans:
        raise ValueError(f"positions 'spans': task {task.name} has no named spans")
    keys = list(spans) if positions == "spans" else positions
    for key in (keys := _parsed(keys) if isinstance(keys, str) else list(keys)):
        if isinstance(key, int) and not any(-n <= key < n for n in lengths):
            raise ValueError(
                f"position {key} is outside every text of task {task.name}: expected {-max(lengths)} to "
                f"{max(lengths) - 1}"
            )
        if isinstance(key, str) and key not in spans:
            known = f" or {', '.join(spans)}" if spans else ""
            raise ValueError(
                f"position {key!r} is not a span of task {task.name}: expected whole numbers{known}"
            )
    if not keys:
        raise ValueError("positions are empty: expected at least one")
    return tuple(dict.fromkeys(keys))


def _parsed(text: str) -> list[Key]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [p if (index := whole(p)) is None else index for p in parts]


def column_of(task: Task, key: Key) -> GridPosition:
    """A position in each example; empty in the examples that are too short."""
    lengths = [length_of(task, i) for i in range(len(task))]
    if isinstance(key, int):
        places = tuple((key % n,) if -n <= key < n else () for n in lengths)
        return GridPosition(_label(task, str(key), places), places)
    spans = [q.spans.get(key, (0, 0)) for q in task.questions]
    inside = (tuple(range(a, min(b, n))) for (a, b), n in zip(spans, lengths, strict=True))
    return GridPosition(key, tuple(inside))


def length_of(task: Task, i: int) -> int:
    """The number of tokens of an example's prompt; answers that are fed in after it do not count."""
    asked = task.questions[i].positions
    if task.feeding == "fed" and asked is not None:
        return asked[0] + 1
    return len(task.examples.load(i))


def _label(task: Task, name: str, places: Sequence[tuple[int, ...]]) -> str:
    """A position's label, with its token if all examples have the same one there."""
    spec = task.model.input
    assert isinstance(spec, TokenInput), "called for tokens"
    tokens = {task.examples.tokens(i)[p] for i, own in enumerate(places) for p in own}
    return f"{name} {spec.word(tokens.pop())}" if len(tokens) == 1 else name


def _map_positions(
    task: Task, sites: Sequence[Site], positions: str | Sequence[Key] | None
) -> tuple[GridPosition, ...]:
    if positions is not None:
        raise ValueError(
            f"positions {positions!r}: images have no positions to name, so leave positions out"
        )
    shapes = {s.position_shape: s.name for s in sites}
    if len(shapes) > 1:
        (a, one), (b, other) = list(shapes.items())[:2]
        raise ValueError(
            f"sites {one} ({' x '.join(map(str, a))}) and {other} ({' x '.join(map(str, b))}) have maps of different "
            "sizes: expected one size"
        )
    (shape,) = shapes
    names = [",".join(map(str, at)) for at in itertools.product(*map(range, shape))]
    return tuple(GridPosition(name, ((i,),) * len(task)) for i, name in enumerate(names))
