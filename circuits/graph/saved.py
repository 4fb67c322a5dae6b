"""Circuits that people name and keep, with their history."""

from __future__ import annotations

from typing import Any

from circuits.database import Database, Record
from circuits.graph.circuit import CircuitGraph, parse_node, units_of
from circuits.graph.formats import from_node_link, to_node_link
from circuits.units import Unit

KIND = "circuit"


def save_circuit(
    database: Database,
    name: str,
    graph: CircuitGraph,
    note: str = "",
    author: str | None = None,
    replaces: int | None = None,
) -> Record:
    """Save a circuit as a new version of its name.

    Args:
        database: of the workspace.
        name: what it is called, among the circuits of its weights.
        graph: the circuit; its `graph` must say the `model_hash`.
        note: why.
        author: who; the user of the machine if not given.
        replaces: the version that it was made from, 0 for none; not checked if not given.

    Raises:
        ValueError: if it does not say its weights, the name is empty, or a later version is there.
    """
    if not graph.model_hash:
        raise ValueError(
            f"circuit {name!r} does not say its model_hash: it cannot be kept by weights"
        )
    return database.save(KIND, graph.model_hash, name, to_node_link(graph), note, author, replaces)


def load_circuit(
    database: Database, name: str, model_hash: str, version: int | None = None
) -> CircuitGraph:
    """A saved circuit, the last version if none is given.

    Raises:
        KeyError: if there is none.
    """
    return from_node_link(database.load(KIND, model_hash, name, version).body)


def saved_circuits(database: Database, model_hash: str) -> list[Record]:
    """The last versions of all circuits of some weights, by name; a damaged one has a `fault` and no body."""
    return database.latest(KIND, model_hash, _check)


def _check(body: Any) -> None:
    """Raise if a body has not the parts that lists of circuits read; the rest is checked when it is loaded."""
    for node in body["nodes"]:
        parse_node(node["id"])
    len(body["edges"])


def circuits_with(database: Database, model_hash: str, unit: Unit) -> list[Record]:
    """The last versions of the circuits that a unit is in, by itself or in a group, by name."""
    return [
        record
        for record in saved_circuits(database, model_hash)
        if not record.fault
        and any(unit in units_of(parse_node(node["id"])) for node in record.body["nodes"])
    ]


def circuit_history(database: Database, name: str, model_hash: str) -> list[Record]:
    """All versions of a circuit, oldest first."""
    return database.history(KIND, model_hash, name, _check)
