"""A session's edits and circuit, as values: what changes, what is taken back."""

from __future__ import annotations

import pytest

from apps import drawing
from apps.editing import Stack
from circuits.edits.activations import scale
from circuits.graph import CircuitGraph, GraphStore, UnitGroup
from circuits.graph.layout import PLACE, layered
from circuits.models.zoo.loading import load_model
from circuits.units import Unit
from circuits.weights import build_graph


def test_a_stack_forgets_what_is_long_ago() -> None:
    now = Stack()
    for i in range(Stack.most + 5):
        now = now.changed((scale("a:0", float(i)),))
    assert len(now.past) == Stack.most


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> GraphStore:
    return build_graph(load_model("cleanroom"), tmp_path_factory.mktemp("graph"))


def test_units_come_with_all_weights_to_what_is_there(store: GraphStore) -> None:
    line = Unit("line", 3)
    graph = store.neighbourhood(line, 1, 4)
    more = [Unit("line", 4), Unit("early", 0)]
    made = drawing.with_units(graph, store, more)
    whole = store.subgraph([n for n in made if isinstance(n, Unit)])
    for a, b, key in whole.edges(keys=True):
        if a in more or b in more:
            assert made.edges[a, b, key]["norm"] == whole.edges[a, b, key]["norm"]
    assert set(graph.edges(keys=True)) <= set(made.edges(keys=True))
    assert len(graph) + 2 == len(made), "the graph that it was made from is as it was"


def test_neighbours_are_the_strongest_of_one_side(store: GraphStore) -> None:
    unit = Unit("curve", 30)
    alone = CircuitGraph(model_hash=store.model_hash)
    alone.add_node(unit)
    made = drawing.with_neighbours(alone, store, unit, incoming=True, top=3)
    assert made.number_of_edges() == 3
    assert all(b == unit for _, b in made.edges())
    assert not alone.number_of_edges()


def graph_of(*edges: tuple[str, str, float]) -> CircuitGraph:
    made = CircuitGraph(model_hash="x")
    for a, b, total in edges:
        made.connect(Unit.parse(a), Unit.parse(b), "weight", sum=total)
    return made


def test_weak_edges_are_hidden_and_nodes_stay() -> None:
    graph = graph_of(("a:0", "b:0", 1.0), ("a:1", "b:0", -0.4), ("a:2", "b:0", 0.6))
    made = drawing.above(graph, 0.5)
    assert {str(a) for a, _ in made.edges()} == {"a:0", "a:2"}
    assert len(made) == 4
    assert drawing.above(graph, 0.0).number_of_edges() == 3


def test_groups_become_nodes_and_single_units_do_not() -> None:
    graph = graph_of(("a:0", "b:0", 1.0), ("a:1", "b:0", 2.0), ("c:0", "b:0", 1.0))
    groups = [
        UnitGroup("both", (Unit("a", 0), Unit("a", 1), Unit("a", 7))),
        UnitGroup("again", (Unit("a", 1), Unit("a", 0))),
        UnitGroup("one", (Unit("c", 0),)),
    ]
    made = drawing.grouped(graph, groups)
    assert sorted(map(str, made)) == ["b:0", "c:0", "{both}a:0,1"]
    total = next(d["sum"] for a, _, d in made.edges(data=True) if isinstance(a, UnitGroup))
    assert total == 3.0


def test_nodes_stand_by_layer_and_stay_where_a_person_puts_them() -> None:
    graph = graph_of(("a:0", "b:0", 1.0), ("b:0", "c:0", 1.0), ("a:1", "c:0", 1.0))
    places = layered(graph)
    heights = [places[Unit(site, 0)][1] for site in "abc"]
    assert heights == sorted(set(heights))
    moved = drawing.moved(graph, "b:0", 3.14159, -2.0)
    assert layered(moved)[Unit("b", 0)] == (3.142, -2.0)
    assert layered(drawing.tidied(moved)) == places
    assert PLACE not in graph.nodes[Unit("b", 0)], "the graph that it was made from is as it was"
    assert drawing.moved(graph, "z:9", 0.0, 0.0).same_as(graph)


def test_many_nodes_of_a_site_stand_in_several_rows() -> None:
    graph = CircuitGraph(model_hash="x")
    graph.add_nodes_from(Unit("a", i) for i in range(300))
    places = layered(graph)
    assert len(set(places.values())) == 300
    xs = {x for x, _ in places.values()}
    assert max(xs) - min(xs) < 40


def test_a_canvas_takes_so_many_nodes(monkeypatch) -> None:
    kept: dict[str, object] = {}
    monkeypatch.setattr(drawing.st, "session_state", kept)
    drawing.begin("h", drawing.Drawing(graph_of(("a:0", "b:0", 1.0))))
    large = CircuitGraph(model_hash="h")
    large.add_nodes_from(Unit("a", i) for i in range(drawing.MOST_NODES + 1))
    with pytest.raises(ValueError, match="circuit has 601 nodes: a canvas takes 600"):
        drawing.change("h", large)
    now = drawing.drawing("h")
    assert now is not None
    assert len(now.graph) == 2
    drawing.change("h", drawing.without(now.graph, Unit("a", 0)))
    drawing.undo("h")
    back = drawing.drawing("h")
    assert back is not None
    assert back.graph.same_as(now.graph)
