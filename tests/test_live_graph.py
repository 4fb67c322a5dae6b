"""Weights read as they are asked for, against the graph on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from circuits.graph import CircuitGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.units import Unit
from circuits.weights import LiveGraph, build_graph, incoming, outgoing
from circuits.weights.connections import both_ways


@pytest.fixture(scope="module", params=["induction", "addition"])
def model(request: pytest.FixtureRequest) -> HookedModel:
    return load_model(request.param)


def facts(graph: CircuitGraph, exact: bool = True) -> dict[object, object]:
    """What is said of each edge; `exact` as it is, else to be compared with what is."""
    found: dict[object, object] = {}
    for a, b, key, data in graph.edges(keys=True, data=True):
        numbers = [data["sum"], data["norm"], data["typical"], *np.ravel(data.get("kernel", []))]
        words = (data["kind"], data["layer"], tuple(data["through"]))
        found[a, b, key] = words, numbers if exact else pytest.approx(numbers, rel=1e-4, abs=1e-6)
    return found


def test_it_answers_as_the_graph_on_disk_does(model: HookedModel, tmp_path: Path) -> None:
    live = LiveGraph(model)
    with build_graph(model, tmp_path) as stored:
        assert live.sites == stored.sites
        assert live.n_edges == stored.n_edges
        ends = [[(b.source, b.target) for b in g.blocks] for g in (live, stored)]
        assert ends[0] == ends[1]
        unit = Unit(stored.blocks[0].target, 1)
        around = stored.neighbourhood(unit, 2, 3)
        assert around.number_of_edges() > 2
        found = live.neighbourhood(unit, 2, 3)
        assert set(found) == set(around)
        assert norms(found) == pytest.approx(norms(around), rel=1e-4, abs=1e-6)
        chosen = list(stored.neighbourhood(unit, 1, 3))
        assert facts(live.subgraph(chosen)) == facts(stored.subgraph(chosen), exact=False)
        assert live.subgraph(chosen).sites() == stored.subgraph(chosen).sites()


def norms(graph: CircuitGraph) -> dict[object, float]:
    return {(a, b, key): d["norm"] for a, b, key, d in graph.edges(keys=True, data=True)}


def test_both_ways_is_incoming_and_outgoing(model: HookedModel) -> None:
    unit = Unit(LiveGraph(model).blocks[-1].target, 0)
    into, out = both_ways(model, unit, 4)
    assert [c.to_dict() for c in into] == [c.to_dict() for c in incoming(model, unit, 4)]
    assert [c.to_dict() for c in out] == [c.to_dict() for c in outgoing(model, unit, 4)]
    assert both_ways(model, Unit(model.sites[0].name, 0), 4)[0] == [], "nothing writes it"


def test_what_is_wrong_is_said(model: HookedModel) -> None:
    live = LiveGraph(model)
    site = live.blocks[-1].target
    with pytest.raises(KeyError, match="site of the graph"):
        live.neighbourhood("nowhere:0")
    with pytest.raises(ValueError, match="does not exist"):
        live.check(f"{site}:999999")
    with pytest.raises(ValueError, match="top 0 must be at least 1"):
        live.neighbourhood(f"{site}:0", top=0)
