"""Units and the edges between them: the whole network on disk, circuits in memory (layer 2)."""

from circuits.graph.blocks import BlockInfo
from circuits.graph.circuit import (
    CircuitDiff,
    CircuitGraph,
    UnitAt,
    UnitGroup,
    circuit_diff,
    collapse,
    difference,
    union,
)
from circuits.graph.store import GraphStore, add_edges, remove_edges

__all__ = [
    "BlockInfo",
    "CircuitDiff",
    "CircuitGraph",
    "GraphStore",
    "UnitAt",
    "UnitGroup",
    "add_edges",
    "circuit_diff",
    "collapse",
    "difference",
    "remove_edges",
    "union",
]
