"""The strongest paths between two units, found a site at a time."""

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
    if not nx.is_directed_acyclic_graph(order):
        raise ValueError(
            f"no paths from {start} to {end}: the chosen kinds of edges go round in circles"
        )
    # Both the ends and what comes after the one and before the other; all other sites cannot be on a way.
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
    # A path is as strong as the product of its edges' strengths. The k-th best way to a unit v of a site is the k-th
    # largest of norm(u -> v) S_j(u) over all units u of earlier sites and j = 1 .. top: a way that is not among the
    # `top` best to u cannot be among the `top` best through u. Work grows with the number of edges and not with that of
    # paths.
    strength = {s: np.zeros((n_units[s], top)) for s in order}
    came = {s: np.full((n_units[s], top, 3), -1, np.int64) for s in order}
    strength[start.site][start.index, 0] = 1.0
    for site in order:
        if site == start.site:
            continue
        # Of the last site only one unit matters.
        units = [end.index] if site == end.site else range(n_units[site])
        for source in order:
            between = [
                (number, block)
                for number, block in enumerate(blocks)
                if (block.info.source, block.info.target) == (source, site)
            ]
            used = np.flatnonzero(strength[source][:, 0])
            if not between or not len(used):
                continue
            for unit in units:
                norms, through = _strongest_edges(between, unit, n_units[source])
                # used x top numbers, flattened behind the `top` ways that were known before: entry top + at * top + way
                # is the way-th best way to source used[at], continued by its strongest edge.
                reached = norms[used, None] * strength[source][used]
                mine = np.concatenate([strength[site][unit], reached.ravel()])
                # Stable, so that among equal ways the one that was found first is kept and results do not depend on the
                # sorting.
                best = np.argsort(-mine, kind="stable")[:top]
                # A copy, since rows are overwritten while others are still read.
                old = came[site][unit].copy()
                strength[site][unit] = mine[best]
                for place, which in enumerate(best.tolist()):
                    if which < top:
                        came[site][unit, place] = old[which]
                    else:
                        at, way = divmod(which - top, top)
                        came[site][unit, place] = (*through[used[at]], way)
    return [
        (float(value), _retraced(blocks, came, end, place))
        for place, value in enumerate(strength[end.site][end.index])
        if value > 0
    ]


def _strongest_edges(
    between: Sequence[tuple[int, Block]], unit: int, n_sources: int
) -> tuple[np.ndarray, np.ndarray]:
    """The strongest edge into a unit from each source over some blocks, and its block and column."""
    norms = np.zeros(n_sources)
    through = np.zeros((n_sources, 2), np.int64)
    for number, block in between:
        row = block.info.row(unit)
        if row is None:
            continue
        values = np.nan_to_num(block.norms(row).astype(np.float64), nan=0.0)
        sources = np.array(block.info.sources) if block.info.sources else np.arange(len(values))
        # Of several edges between two units (two kinds, two layers) the strongest counts; else paths through the same
        # units would fill the list.
        better = np.flatnonzero(values > norms[sources])
        norms[sources[better]] = values[better]
        through[sources[better], 0] = number
        through[sources[better], 1] = better
    return norms, through


def _retraced(
    blocks: Sequence[Block], came: Mapping[str, np.ndarray], end: Unit, place: int
) -> list[Step]:
    steps: list[Step] = []
    here, way = end, place
    while True:
        number, column, before = came[here.site][here.index, way].tolist()
        # -1 is where nothing came from: the start.
        if number < 0:
            return steps[::-1]
        row = blocks[number].info.row(here.index)
        assert row is not None, "a path leads along rows of its blocks"
        steps.append((number, row, column))
        here, way = blocks[number].units(row, column)[0], before
