"""A session's circuit on the canvas, with what it was before."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import streamlit as st

from apps import tab_storage
from apps.canvas import edge_id
from circuits.graph import CircuitGraph, GraphStore, UnitGroup, collapse
from circuits.graph.circuit import ORDER, Node, parse_node, units_of
from circuits.graph.formats import from_node_link, to_node_link
from circuits.graph.layout import PLACE
from circuits.history import UndoStack
from circuits.json_files import parse_json
from circuits.units import Unit
from circuits.weights import LiveGraph

MOST_NODES = 600
"""How many nodes a canvas may have."""


@dataclass(frozen=True)
class Drawing(UndoStack[CircuitGraph]):
    """A circuit being drawn, with undo; a circuit is never changed, only replaced by another.

    Attributes:
        origin: what the URL asked for when it was begun.
        version: of the saved circuit that it was made from; 0 for none.
    """

    origin: str = ""
    version: int = 0
    most: ClassVar[int] = 50

    @property
    def graph(self) -> CircuitGraph:
        """The circuit as it is."""
        return self.now

    @cached_property
    def text(self) -> str:
        """What a person has drawn, for the browser's tab to keep; empty if nothing was changed."""
        if not self.past:
            return ""
        graph = to_node_link(self.graph)
        return json.dumps({"graph": graph, "origin": self.origin, "version": self.version})


def slot(model_hash: str) -> str:
    """Where the session, and the tab, keep the circuit of a model."""
    return f"drawing {model_hash}"


def drawing(model_hash: str) -> Drawing | None:
    """This session's circuit of a model, None before it is begun; what the tab kept is a change of it."""
    # The tab may answer before the page has begun a circuit. Its answer waits: undo has to lead to what is begun.
    if slot(model_hash) not in st.session_state:
        return None
    return tab_storage.in_hand(slot(model_hash), _read)


def _read(text: str) -> Drawing:
    """A circuit that comes from a browser.

    Raises:
        ValueError, KeyError: if it is none, or too large.
    """
    try:
        raw = parse_json(text, "it")
        graph, origin, version = raw["graph"], str(raw["origin"]), int(raw["version"])
    except (TypeError, RecursionError) as error:
        raise ValueError("it is no circuit") from error
    return Drawing(_small(from_node_link(graph)), origin=origin, version=version)


def begin(model_hash: str, drawn: Drawing) -> None:
    """Begin with another circuit."""
    st.session_state[slot(model_hash)] = drawn


def replace_by(model_hash: str, before: Drawing, new: Drawing) -> None:
    """Begin with another circuit; what was drawn before comes back by undo."""
    if before.past:
        new = replace(new, past=(before.graph,))
        st.toast("Undo brings back the circuit that you had drawn.")
    begin(model_hash, new)


def change(model_hash: str, graph: CircuitGraph) -> None:
    """Go on with a changed circuit.

    Raises:
        ValueError: if it has become too large to draw.
    """
    _small(graph)
    now = drawing(model_hash)
    assert now is not None, "begun before"
    if not graph.same_as(now.graph):
        begin(model_hash, now.changed(graph))


def _small(graph: CircuitGraph) -> CircuitGraph:
    if len(graph) > MOST_NODES:
        raise ValueError(f"circuit has {len(graph)} nodes: a canvas takes {MOST_NODES}")
    return graph


def undo(model_hash: str) -> None:
    """Go back by one change."""
    now = drawing(model_hash)
    if now is not None:
        begin(model_hash, now.undone())


# --- changes -------------------------------------------------------------------------------------


def with_units(
    graph: CircuitGraph, store: GraphStore | LiveGraph, units: list[Unit]
) -> CircuitGraph:
    """With more units, and all weights between them and what is there already."""
    single = [u for u in graph if isinstance(u, Unit)]
    among = store.subgraph([*single, *units])
    made = graph.copy()
    made.add_nodes_from(units)
    new = set(units)
    for a, b, key, data in among.edges(keys=True, data=True):
        if a in new or b in new:
            made.add_edge(a, b, key, **data)
    return made


def with_neighbours(
    graph: CircuitGraph, store: GraphStore | LiveGraph, unit: Unit, incoming: bool, top: int
) -> CircuitGraph:
    """With the strongest that build a unit, or that it builds."""
    around = store.neighbourhood(unit, 1, top)
    edges = around.in_edges(unit, keys=True) if incoming else around.out_edges(unit, keys=True)
    made = graph.copy()
    for a, b, key in edges:
        made.add_edge(a, b, key, **around.edges[a, b, key])
    return made


def without(graph: CircuitGraph, node: Node) -> CircuitGraph:
    """Without a node and its edges."""
    made = graph.copy()
    made.remove_node(node)
    return made


def moved(graph: CircuitGraph, node: str, x: float, y: float) -> CircuitGraph:
    """With a node where a person has put it."""
    made = graph.copy()
    where = parse_node(node)
    if where in made:
        made.nodes[where][PLACE] = [round(x, 3), round(y, 3)]
    return made


def tidied(graph: CircuitGraph) -> CircuitGraph:
    """With all nodes in their rows again."""
    made = graph.copy()
    for _, data in made.nodes(data=True):
        data.pop(PLACE, None)
    return made


def above(graph: CircuitGraph, share: float) -> CircuitGraph:
    """Only edges of at least some share of the strongest of their kind; nodes stay."""
    strongest: dict[str, float] = {}
    for _, _, data in graph.edges(data=True):
        strongest[data["kind"]] = max(strongest.get(data["kind"], 0.0), data["norm"])
    made = graph.copy()
    made.graph[ORDER] = graph.sites()  # as all edges have it, where the circuit does not say it
    made.remove_edges_from(
        [
            (a, b, key)
            for a, b, key, data in graph.edges(keys=True, data=True)
            if data["norm"] < share * strongest[data["kind"]]
        ]
    )
    return made


def grouped(graph: CircuitGraph, groups: list[UnitGroup]) -> CircuitGraph:
    """With groups as one node each; those that have no unit here, or only one, are left out."""
    here = {unit for node in graph if isinstance(node, Unit) for unit in units_of(node)}
    fitting, taken = [], set()
    for group in groups:
        units = tuple(u for u in group.units if u in here and u not in taken)
        if len(units) > 1:
            fitting.append(UnitGroup(group.name, units))
            taken |= set(units)
    return collapse(graph, fitting) if fitting else graph


def edge_of(graph: CircuitGraph, name: str) -> tuple[Node, Node, str, dict[str, Any]] | None:
    """The edge that the canvas calls so."""
    for a, b, key in graph.edges(keys=True):
        if edge_id(a, b, key) == name:
            return a, b, key, graph.edges[a, b, key]
    return None
