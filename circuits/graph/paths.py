"""The strongest paths between two units, found a site at a time (layer 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import networkx as nx
import numpy as np

from circuits.graph.blocks import BlockInfo
from circuits.units import Unit

Step = tuple[int, int, int]
"""The number of a block, and the row and column of an edge in it."""


@runtime_checkable
class Block(Protocol):
    """A block of edges whose strengths can be read."""

    info: BlockInfo

    def norms(self, at: int) -> np.ndarray:
        """Strengths of a row."""
        ...

    def units(self, row: int, column: int) -> tuple[Unit, Unit]:
        """The units at an edge's ends."""
        ...


def sites_between(blocks: Sequence[Block], start: str, end: str) -> list[str]:
    """The sites on some way from one site to another, in topological order; empty without a way."""
    order = nx.DiGraph((b.info.source, b.info.target) for b in blocks)
    if start not in order or end not in order or not nx.has_path(order, start, end):
        return []
    inside = ({start} | nx.descendants(order, start)) & ({end} | nx.ancestors(order, end))
    return list(nx.lexicographical_topological_sort(order.subgraph(inside)))


def strongest_paths(
    blocks: Sequence[Block],
    order: Sequence[str],
    n_units: Mapping[str, int],
    start: Unit,
    end: Unit,
    top: int,
) -> list[tuple[float, list[Step]]]:
    """The best `top` paths by dynamic programming over sites: for each unit of a site the best `top`
    ways to it, each as a strength, the block and column that it came through, and which of the
    ways to that column it goes on from.
    """
    strength = {s: np.zeros((n_units[s], top)) for s in order}
    came = {s: np.full((n_units[s], top, 3), -1, np.int64) for s in order}
    strength[start.site][start.index, 0] = 1.0
    inside = set(order)
    for site in order:
        if site == start.site:
            continue
        for number, block in enumerate(blocks):
            info = block.info
            if info.target != site or info.source not in inside:
                continue
            sources = np.array(info.sources or range(info.shape[1]))
            ways = strength[info.source][sources]  # column x way
            used = np.flatnonzero(ways[:, 0])
            if not len(used):
                continue
            rows: Sequence[int] = range(info.shape[0])
            if site == end.site:
                place = info.row(end.index)
                rows = () if place is None else (place,)
            for row in rows:
                unit = info.targets[row] if info.targets else row
                norms = np.nan_to_num(block.norms(row)[used].astype(np.float64), nan=0.0)
                reached = norms[:, None] * ways[used]
                mine = np.concatenate([strength[site][unit], reached.ravel()])
                best = np.argsort(-mine, kind="stable")[:top]
                old = came[site][unit].copy()
                strength[site][unit] = mine[best]
                for place, which in enumerate(best.tolist()):
                    if which < top:
                        came[site][unit, place] = old[which]
                    else:
                        at, way = divmod(which - top, top)
                        came[site][unit, place] = (number, used[at], way)
    return [
        (float(value), _retraced(blocks, came, end, place))
        for place, value in enumerate(strength[end.site][end.index])
        if value > 0
    ]


def _retraced(
    blocks: Sequence[Block], came: Mapping[str, np.ndarray], end: Unit, place: int
) -> list[Step]:
    steps: list[Step] = []
    here, way = end, place
    while True:
        number, column, before = came[here.site][here.index, way].tolist()
        if number < 0:
            return steps[::-1]
        row = blocks[number].info.row(here.index)
        assert row is not None, "a path leads along rows of its blocks"
        steps.append((number, row, column))
        here, way = blocks[number].units(row, column)[0], before
