"""Where a circuit's nodes are drawn."""

from __future__ import annotations

import math

from circuits.graph.circuit import CircuitGraph, Node, site_of

_WITHIN = 0.55  # from one row of a site to the next of the same site
PLACE = "place"
"""The attribute of a node that a person has moved: its x and y."""


def layered(graph: CircuitGraph) -> dict[Node, tuple[float, float]]:
    """Nodes of a site in a row, what comes first at the bottom, each near the middle of what it is built from.

    Many nodes of a site stand in several rows, so that the whole is not much wider than high.

    Returns:
        x (one apart) and y (the row, from 0 on) of each node; those that have a `place` keep it.
    """
    places: dict[Node, tuple[float, float]] = {}
    # A long site is broken into several rows, or a circuit with 200 units of one site would be a line.
    level, widest = 0.0, max(12, math.ceil(math.sqrt(3 * len(graph))))
    for site in graph.sites():
        row = [node for node in graph if site_of(node) == site]
        below = {node: _mean_x(graph, node, places) for node in row}
        rows = -(-len(row) // widest)
        # -(-a // b) is a / b rounded up: 30 nodes at most 12 wide are 3 rows of 10.
        columns = -(-len(row) // rows)
        for i, node in enumerate(sorted(row, key=lambda n: (below[n], str(n)))):
            # Column by column: nodes that are neighbours in the order come to lie above each other, near what builds
            # both.
            places[node] = (i // rows - (columns - 1) / 2, level + _WITHIN * (i % rows))
        level += 1 + _WITHIN * (rows - 1)
    # Places that a person chose win over computed ones.
    moved = {n: d[PLACE] for n, d in graph.nodes(data=True) if PLACE in d}
    return places | {node: (float(x), float(y)) for node, (x, y) in moved.items()}


def _mean_x(graph: CircuitGraph, node: Node, places: dict[Node, tuple[float, float]]) -> float:
    known = [places[a][0] for a in graph.predecessors(node) if a in places]
    return sum(known) / len(known) if known else 0.0
