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

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.selecting import select_sites
from circuits.tasks.task import Task, TaskBatch
from circuits.units import Site

By = Literal["site", "position", "head", "head_position", "unit"]
"""What a cell is: a whole site; a site at one position; a head (or its attention pattern); a head at one position; a
unit of any site."""

BY_UNIT: tuple[By, ...] = ("head", "head_position", "unit")
BY_POSITION: tuple[By, ...] = ("position", "head_position")

_USUAL: dict[By, tuple[str, ...]] = {
    "site": ("attn_out", "mlp_out"),
    "position": ("resid_pre",),
    "head": ("z",),
    "head_position": ("z",),
}
"""Sites of a transformer that are looked at when nobody names any."""


@dataclass(frozen=True)
class Column:
    """A position of each example.

    Attributes:
        name: how it is written.
        places: where it is in each example, counted from the text's first token (of images over the map, row by row);
            none where an example does not reach it.
    """

    name: str
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Cell:
    """What is replaced at once.

    Attributes:
        site: the site's name.
        unit: one of its units; None for all.
        column: a position; None for all.
    """

    site: str
    unit: int | None = None
    column: Column | None = None

    def __str__(self) -> str:
        unit = "" if self.unit is None else f":{self.unit}"
        return f"{self.site}{unit}" + ("" if self.column is None else f"@{self.column.name}")

    @property
    def row(self) -> str:
        """Its row in a matrix: the site, or the head where there is a column for each of its positions."""
        both = self.unit is not None and self.column is not None
        return f"{self.site}:{self.unit}" if both else self.site

    @property
    def place(self) -> str:
        """Its column in a matrix: the position, or the unit where it has none."""
        if self.column is not None:
            return self.column.name
        return "all" if self.unit is None else str(self.unit)

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        column = None if self.column is None else self.column.name
        return {"site": self.site, "unit": self.unit, "position": column}

    def reaches(self, n: int) -> Bool[Tensor, " example"]:
        """Which of a task's examples have the cell at all."""
        if self.column is None:
            return torch.ones(n, dtype=torch.bool)
        return torch.tensor([len(places) > 0 for places in self.column.places])

    def mask(self, site: Site, part: TaskBatch, value: Tensor) -> Bool[Tensor, "row *rest"]:
        """Where in the site's tensor the cell is, so that it broadcasts against it."""
        shape = site.positions_of(value)
        wanted = torch.ones(len(value), 1, *(1,) * len(shape), dtype=torch.bool)
        if self.column is not None:
            wanted = self._there(part, shape)
        if self.unit is not None:
            own = torch.arange(site.n_units) == self.unit
            wanted = wanted & own.reshape(1, -1, *(1,) * len(shape))
        if site.inner_axis is not None:
            wanted = wanted[..., None]
        return site.from_by_unit(wanted).to(value.device)

    def _there(self, part: TaskBatch, shape: tuple[int, ...]) -> Tensor:
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
    columns: tuple[Column | None, ...] = (None,)
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
        ValueError: if none is named and the model has none of the usual ones, or one has no heads or positions.
    """
    if sites is None:
        try:
            chosen = [s for name in _USUAL.get(by, ()) for s in select_sites(model, name)]
        except KeyError:
            chosen = []
        if not chosen:
            raise ValueError(
                f"sites: model {model.name} has none of those that by {by!r} takes unless sites are named"
            )
    else:
        chosen = select_sites(model, sites)
    if not chosen:
        raise ValueError("sites name none: expected at least one")
    for site in chosen:
        if by in ("head", "head_position") and site.kind not in ("head", "pattern"):
            raise ValueError(
                f"by {by!r}: the units of {site.name} are no heads but of kind {site.kind}"
            )
        if by in BY_POSITION and (not site.position_axes or "query" in site.position_axes):
            raise ValueError(f"by {by!r}: site {site.name} holds nothing by position")
    order = {s.name: i for i, s in enumerate(model.sites)}
    return sorted(chosen, key=lambda s: order[s.name])


Key = int | str
"""A position: from a text's first token, negative from its end, or the name of a span."""


def columns_of(
    task: Task, sites: Sequence[Site], positions: str | Sequence[Key] | None = None
) -> tuple[Column, ...]:
    """The positions of a grid.

    Args:
        task: the examples.
        sites: where; of images they have to be of one size.
        positions: see `keys_of`.

    Raises:
        ValueError: if no example has a position or span, or sites differ in size.
    """
    if not isinstance(task.model.input, TokenInput):
        return _of_maps(task, sites, positions)
    return tuple(column_of(task, key) for key in keys_of(task, positions))


def keys_of(task: Task, positions: str | Sequence[Key] | None = None) -> tuple[Key, ...]:
    """The positions that are meant.

    Args:
        task: of texts.
        positions: whole numbers, counted from each text's first token or negative from its end; names of the task's
            spans; or `spans` for all of these. One text may hold several, separated by commas. None for every position.

    Raises:
        ValueError: if no example has one.
    """
    lengths = [length_of(task, i) for i in range(len(task))]
    if positions is None:
        return tuple(range(max(lengths)))
    spans = dict.fromkeys(name for q in task.questions for name in q.spans)
    if positions == "spans" and not spans:
        raise ValueError(f"positions 'spans': task {task.name} names none")
    keys = list(spans) if positions == "spans" else positions
    for key in (keys := _parsed(keys) if isinstance(keys, str) else list(keys)):
        if isinstance(key, int) and not any(-n <= key < n for n in lengths):
            raise ValueError(
                f"position {key} is past the end of every text of task {task.name}: expected {-max(lengths)} to "
                f"{max(lengths) - 1}"
            )
        if isinstance(key, str) and key not in spans:
            known = f" or {', '.join(spans)}" if spans else ""
            raise ValueError(
                f"position {key!r} is no span of task {task.name}: expected whole numbers{known}"
            )
    if not keys:
        raise ValueError("positions name none: expected at least one")
    return tuple(dict.fromkeys(keys))


def _parsed(text: str) -> list[Key]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [int(p) if p.lstrip("-").isdigit() else p for p in parts]


def column_of(task: Task, key: Key) -> Column:
    """Where a position is in each example; nowhere in those that do not reach it."""
    lengths = [length_of(task, i) for i in range(len(task))]
    if isinstance(key, int):
        places = tuple((key % n,) if -n <= key < n else () for n in lengths)
        return Column(_label(task, str(key), places), places)
    spans = [q.spans.get(key, (0, 0)) for q in task.questions]
    inside = (tuple(range(a, min(b, n))) for (a, b), n in zip(spans, lengths, strict=True))
    return Column(key, tuple(inside))


def length_of(task: Task, i: int) -> int:
    """How many tokens of an example's text are run; answers that are fed in behind it do not count."""
    asked = task.questions[i].positions
    if task.feeding == "fed" and asked is not None:
        return asked[0] + 1
    return len(task.examples.load(i))


def _label(task: Task, name: str, places: Sequence[tuple[int, ...]]) -> str:
    """A position with its token, where all examples have the same."""
    spec = task.model.input
    assert isinstance(spec, TokenInput), "called for tokens"
    tokens = {task.examples.tokens(i)[p] for i, own in enumerate(places) for p in own}
    return f"{name} {spec.word(tokens.pop())}" if len(tokens) == 1 else name


def _of_maps(
    task: Task, sites: Sequence[Site], positions: str | Sequence[Key] | None
) -> tuple[Column, ...]:
    if positions is not None:
        raise ValueError("positions are of texts: of images every place of the map is taken")
    shapes = {s.position_shape: s.name for s in sites}
    if len(shapes) > 1:
        (a, one), (b, other) = list(shapes.items())[:2]
        raise ValueError(
            f"sites {one} ({' x '.join(map(str, a))}) and {other} ({' x '.join(map(str, b))}) have maps of different "
            "sizes: expected one size"
        )
    (shape,) = shapes
    names = [",".join(map(str, at)) for at in itertools.product(*map(range, shape))]
    return tuple(Column(name, ((i,),) * len(task)) for i, name in enumerate(names))
