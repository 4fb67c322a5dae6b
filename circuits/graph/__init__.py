"""Units and the edges between them: the whole network on disk, circuits in memory."""

from circuits.graph.blocks import BlockInfo
from circuits.graph.circuit import (
    CircuitDiff,
    CircuitGraph,
    UnitAt,
    UnitGroup,
    WholeSite,
    circuit_diff,
    collapse,
    difference,
    union,
)
from circuits.graph.formats import read_circuit, write_circuit
from circuits.graph.saved import load_circuit, save_circuit
from circuits.graph.store import GraphStore, add_edges, remove_edges

__all__ = [
    "BlockInfo",
    "CircuitDiff",
    "CircuitGraph",
    "GraphStore",
    "UnitAt",
    "UnitGroup",
    "WholeSite",
    "add_edges",
    "circuit_diff",
    "collapse",
    "difference",
    "load_circuit",
    "read_circuit",
    "remove_edges",
    "save_circuit",
    "union",
    "write_circuit",
]
