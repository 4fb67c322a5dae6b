from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import h5py
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from circuits.database import Database
from circuits.graph import (
    BlockInfo,
    CircuitGraph,
    GraphStore,
    UnitAt,
    UnitGroup,
    add_edges,
    circuit_diff,
    collapse,
    difference,
    remove_edges,
    union,
)
from circuits.graph.blocks import writing
from circuits.graph.circuit import parse_node
from circuits.graph.formats import (
    circuit_text,
    from_node_link,
    read_circuit,
    schema,
    to_node_link,
    write_circuit,
)
from circuits.graph.saved import (
    circuit_history,
    circuits_with,
    load_circuit,
    save_circuit,
    saved_circuits,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.units import Unit
from circuits.weights import expand_weights, incoming, outgoing, raw_weights
from circuits.weights.graphs import build_graph, expanded_block
from tests.conftest import examples, seeded


@pytest.fixture
def built(branches: HookedModel, tmp_path: Path) -> GraphStore:
    return build_graph(branches, tmp_path)


# --- the store ---------------------------------------------------------------------------------


def test_neighbourhood_is_the_connections(branches: HookedModel, built: GraphStore) -> None:
    for unit in ("cat:1", "cat:5", "stem_relu:3", "out_relu:0", "fc:2"):
        around = built.neighbourhood(unit, top=3)
        for connections in (incoming(branches, unit, top=3), outgoing(branches, unit, top=3)):
            for c in connections:
                data = around.edges[c.source, c.target, f"weight:{c.layer}"]
                assert data["norm"] == pytest.approx(c.norm)
                assert data["sum"] == pytest.approx(c.total, rel=1e-5)
                assert data["typical"] == pytest.approx(c.typical)
                assert data["through"] == c.through
                torch.testing.assert_close(torch.tensor(data["kernel"]), c.kernel)
        n = len(incoming(branches, unit, top=3)) + len(outgoing(branches, unit, top=3))
        assert around.number_of_edges() == n


def test_hops_go_on_from_what_was_found(built: GraphStore) -> None:
    one = built.neighbourhood("cat:1", hops=1, top=2)
    two = built.neighbourhood("cat:1", hops=2, top=2)
    by_hand = one
    for unit in set(one) - {Unit("cat", 1)}:
        by_hand = union(by_hand, built.neighbourhood(unit, top=2))
    assert set(two.edges(keys=True)) == set(by_hand.edges(keys=True))


def test_subgraph_has_every_edge_between(branches: HookedModel, built: GraphStore) -> None:
    units = [Unit("stem_relu", 0), Unit("stem_relu", 4), *(Unit("cat", i) for i in range(6))]
    found = built.subgraph([*units, Unit("fc", 1)])
    expected = {
        (c.source, c.target)
        for unit in units[2:]
        for c in incoming(branches, unit, top=99)
        if c.source in units
    }
    assert set(found.edges()) == expected
    assert Unit("fc", 1) in found


def test_paths_by_listing_all_of_them(branches: HookedModel, built: GraphStore) -> None:
    edges: dict[Unit, list[tuple[Unit, float]]] = {}
    for unit in (Unit(s, i) for s in ("stem_relu", "cat", "out_relu") for i in range(6)):
        for c in outgoing(branches, unit, top=999):
            edges.setdefault(c.source, []).append((c.target, c.norm))

    def walk(unit: Unit, strength: float) -> list[tuple[float, list[Unit]]]:
        if unit == Unit("fc", 2):
            return [(strength, [unit])]
        return [
            (value, [unit, *rest])
            for target, norm in edges.get(unit, ())
            for value, rest in walk(target, strength * norm)
        ]

    every = sorted(walk(Unit("stem_relu", 1), 1.0), key=lambda way: -way[0])
    assert len(every) > 20
    found = built.paths("stem_relu:1", "fc:2", top=7).graph["paths"]
    for (strength, units), path in zip(every, found, strict=False):
        assert path["strength"] == pytest.approx(strength, rel=1e-5)
        assert path["units"] == [str(u) for u in units]
    assert len(found) == 7


def test_sum_over_paths_is_the_expanded_weight(tmp_path: Path) -> None:
    """Three 1 x 1 layers: the signed products of all paths add up to the weight in linear mode."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    model = HookedModel(seeded(net), (2, 4, 4))
    store = build_graph(model, tmp_path)
    expanded = expand_weights(model, "input", "4")
    for source, target in itertools.product(range(2), range(2)):
        paths = store.paths(f"input:{source}", f"4:{target}", top=100).graph["paths"]
        assert len(paths) == 12
        total = sum(p["strength"] * p["sign"] for p in paths)
        assert total == pytest.approx(expanded.weight[target, source].item(), rel=1e-5)


def test_permuting_channels_permutes_the_graph(tmp_path: Path) -> None:
    net = seeded(nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)))
    before = build_graph(HookedModel(net, (2, 9, 9)), tmp_path / "a").neighbourhood("1:0", top=99)
    order = [3, 0, 4, 1, 2]
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[order])
        net[2].weight.copy_(net[2].weight[:, order])
    after = build_graph(HookedModel(net, (2, 9, 9)), tmp_path / "b")
    moved = after.neighbourhood(Unit("1", order.index(0)), top=99)
    renamed = nx.relabel_nodes(before, {Unit("1", 0): Unit("1", order.index(0))})
    assert {(a, b, k): d["kernel"] for a, b, k, d in renamed.edges(keys=True, data=True)} == {
        (a, b, k): d["kernel"] for a, b, k, d in moved.edges(keys=True, data=True)
    }


def test_added_edges_stand_beside_the_weights(branches: HookedModel, tmp_path: Path) -> None:
    build_graph(branches, tmp_path)
    expanded = expand_weights(branches, "stem_relu", "out_relu", units=[1, 4])
    effects = np.array([[0.5, np.nan], [0.0, -2.0]], np.float32)
    measured = BlockInfo(
        "cat",
        "fc",
        "effect",
        "",
        (),
        (0, 2),
        (3, 5),
        (2, 2),
        (),
        {"method": "zero ablation", "seed": 0},
    )
    add_edges(tmp_path, "mine", [expanded_block(expanded), (measured, effects)])
    with GraphStore(tmp_path, branches.hash) as store:
        only = store.neighbourhood("out_relu:4", kinds=["expanded"], top=99)
        assert only.number_of_edges() == 6
        data = only.edges[Unit("stem_relu", 2), Unit("out_relu", 4), "expanded:linear"]
        assert data["sum"] == pytest.approx(expanded.sums[1, 2].item(), rel=1e-4)
        both = store.subgraph(["cat:3", "cat:5", "fc:0", "fc:2"])
        assert both.edges[Unit("cat", 3), Unit("fc", 0), "effect"]["sum"] == 0.5
        assert both.edges[Unit("cat", 5), Unit("fc", 2), "effect"]["sum"] == -2.0
        assert not both.has_edge(Unit("cat", 5), Unit("fc", 0)), "not measured"
        assert store.blocks[-1].provenance == {"method": "zero ablation", "seed": 0}
    remove_edges(tmp_path, "mine")
    with GraphStore(tmp_path) as store:
        assert {info.kind for info in store.blocks} == {"weight"}
    with pytest.raises(FileNotFoundError, match="no added edges 'mine': there are none"):
        remove_edges(tmp_path, "mine")
    (tmp_path / "graph.h5").rename(tmp_path / "other.h5")
    with pytest.raises(ValueError, match=r"name '../other' of edges must be letters"):
        remove_edges(tmp_path, "../other")
    assert (tmp_path / "other.h5").exists()


def test_edges_of_other_weights_are_left_out(branches: HookedModel, tmp_path: Path) -> None:
    store = build_graph(branches, tmp_path)
    info = BlockInfo("cat", "fc", "effect", "", (), (0,), (3,), (1, 1), (), {"method": "a"})
    add_edges(tmp_path, "old", [(info, np.ones((1, 1)))])
    other = HookedModel(seeded(branches.module, seed=1), (3, 8, 10))
    again = build_graph(other, tmp_path)
    assert again.model_hash != store.model_hash
    assert [path.name for path in again.skipped] == ["old.h5"]
    assert {b.kind for b in again.blocks} == {"weight"}


def test_composition_singles_out_the_pair(tmp_path: Path) -> None:
    """In the hand-written induction heads K-composition is that of the previous-token head with the
    induction head, and every other score is zero.
    """
    store = build_graph(load_model("induction-by-hand"), tmp_path)
    around = store.neighbourhood("blocks.1.attn.hook_z:0", top=99)
    ((source, _, data),) = around.edges(data=True)
    assert source == Unit("blocks.0.attn.hook_z", 0)
    assert data["kernel"] == pytest.approx([0.0, 64**-0.5, 0.0]), "1 / sqrt(tokens)"
    for head in (1, 2):
        alone = store.neighbourhood(Unit("blocks.1.attn.hook_z", head), top=99)
        assert alone.number_of_edges() == 0


def test_bad_input_is_named(branches: HookedModel, built: GraphStore, tmp_path: Path) -> None:
    for ask, message in (
        (lambda: built.neighbourhood("cat:6"), "unit cat:6 does not exist: cat has units 0 to 5"),
        (lambda: built.neighbourhood("dog:1"), "unknown site of the graph 'dog'"),
        (lambda: built.neighbourhood("cat"), "not of the form SITE:INDEX"),
        (lambda: built.neighbourhood("cat:1", hops=0), "hops 0 must be at least 1"),
        (
            lambda: built.neighbourhood("cat:1", kinds=["love"]),
            "kinds: 'love' is not one of weight",
        ),
        (lambda: built.paths("fc:1", "cat:1"), "no path from fc:1 to cat:1: cat:1 comes before"),
        (lambda: built.paths("cat:1", "cat:1"), "no path from cat:1 to cat:1"),
        (
            lambda: GraphStore(tmp_path, "f" * 64),
            f"{branches.hash[:16]}, the model has ffffffffffffffff",
        ),
        (lambda: GraphStore(tmp_path / "nowhere"), "no graph at .*graph build"),
        (lambda: add_edges(tmp_path, "../x", []), "name '../x' of edges"),
    ):
        with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
            ask()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "graph.h5").write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match="is no graph of this version"):
        GraphStore(tmp_path / "broken")
    info = BlockInfo("cat", "fc", "effect", "", (), (9,), (0,), (1, 1), (), {"method": "a"})
    with pytest.raises(ValueError, match="unit fc:9 does not exist"):
        add_edges(tmp_path, "x", [(info, np.ones((1, 1)))])
    assert not (tmp_path / "graph").exists(), "nothing was written"


def test_a_graph_that_leads_elsewhere_is_refused(branches: HookedModel, tmp_path: Path) -> None:
    path = tmp_path / "graph.h5"

    def replaced(by: Any) -> None:
        build_graph(branches, tmp_path).close()
        with h5py.File(path, "r+") as file:
            del file["blocks/0/sum"]
            file["blocks/0/sum"] = by

    replaced(h5py.ExternalLink(str(tmp_path / "other.h5"), "x"))
    with pytest.raises(ValueError, match=r"is damaged: graph.h5: 'blocks/0/sum' is a link.*again"):
        GraphStore(tmp_path)
    replaced(np.ones((1, 1), np.float32))
    with GraphStore(tmp_path) as store:
        info = store.blocks[0]
        with pytest.raises(
            ValueError, match=r"is damaged: .* of shape \(1, 1\), expected floats of"
        ):
            store.subgraph([f"{info.source}:0", f"{info.target}:0"])


def test_a_build_that_fails_leaves_the_old_graph(branches: HookedModel, tmp_path: Path) -> None:
    build_graph(branches, tmp_path)
    before = (tmp_path / "graph.h5").read_bytes()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_graph(branches, tmp_path, stop)
    assert (tmp_path / "graph.h5").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["graph.h5"]


def test_large_blocks_are_turned_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuits.graph.blocks._BUFFER", 600)
    values = np.random.default_rng(0).normal(size=(37, 11, 2)).astype(np.float32)
    info = BlockInfo("a", "b", "weight", "l", (), (), (), (37, 11), (2,), {})
    sites = {"a": 11, "b": 37}
    with (
        writing(tmp_path / "graph.h5", "m", "0" * 64, sites) as writer,
        writer.block(info) as block,
    ):
        for i in range(0, 37, 5):
            block.write(values[i : i + 5])
    with h5py.File(tmp_path / "graph.h5") as file:
        np.testing.assert_allclose(file["blocks/0/sum_by_source"][()], values.sum(2).T, rtol=1e-5)
        np.testing.assert_allclose(
            file["blocks/0/norm_by_source"][()], np.linalg.norm(values, axis=2).T, rtol=1e-5
        )


# --- circuits ----------------------------------------------------------------------------------


def small() -> CircuitGraph:
    graph = CircuitGraph(model="shapes", model_hash="ab" * 32, note=None)
    a, b, c = Unit("x", 0), Unit("x", 1), Unit("y", 7)
    graph.add_node(a, label="curve", tags=["up", "left"], phase=(1, 2.5))
    graph.connect(
        a, c, "weight", sum=-1.0, norm=2.0, kernel=[[0.5, -1.5]], layer="l", through=("p",)
    )
    graph.connect(b, c, "weight", sum=4.0, norm=4.0, kernel=[[2.0, 2.0]], layer="l", through=("p",))
    graph.connect(a, c, "effect", sum=0.25)
    return graph


def test_union_difference_and_diff() -> None:
    one, two = small(), small()
    two.remove_node(Unit("x", 1))
    two.connect(Unit("y", 7), Unit("z", 0), "weight", sum=1.0)
    two.edges[Unit("x", 0), Unit("y", 7), "effect"]["sum"] = 0.5
    assert set(union(one, two)) == set(one) | set(two)
    assert list(difference(one, two).edges(keys=True)) == [(Unit("x", 1), Unit("y", 7), "weight:l")]
    changes = circuit_diff(one, two)
    assert changes.nodes_added == (Unit("z", 0),)
    assert changes.nodes_removed == (Unit("x", 1),)
    assert changes.edges_changed == ((Unit("x", 0), Unit("y", 7), "effect"),)
    assert circuit_diff(one, one).empty
    two.graph["model_hash"] = "cd" * 32
    with pytest.raises(ValueError, match=r"different weights, abab.* and cdcd"):
        union(one, two)


def test_collapse_by_sum_and_by_representative() -> None:
    family = UnitGroup("curves", (Unit("x", 0), Unit("x", 1)))
    summed = collapse(small(), [family])
    data = summed.edges[family, Unit("y", 7), "weight:l"]
    assert (data["sum"], data["norm"], data["members"]) == (3.0, 3.0, 2)
    assert "kernel" not in data
    strongest = collapse(small(), [family], "representative")
    data = strongest.edges[family, Unit("y", 7), "weight:l"]
    assert (data["sum"], data["members"], data["kernel"]) == (4.0, 2, [[2.0, 2.0]])
    with pytest.raises(ValueError, match="unit x:0 is in two groups"):
        collapse(small(), [family, UnitGroup("again", (Unit("x", 0),))])
    with pytest.raises(ValueError, match="has no unit in the circuit"):
        collapse(small(), [UnitGroup("none", (Unit("q", 0),))])


def test_a_circuit_checks_the_model_that_it_is_used_with() -> None:
    with pytest.raises(ValueError, match="names units that the model does not have: y:7"):
        small().checked("ab" * 32, {"x": 2, "y": 3})
    with pytest.raises(ValueError, match=r"belongs to model abab.*, this one is 9999"):
        small().checked("9" * 64, {"x": 2, "y": 8})
    assert small().checked("ab" * 32, {"x": 2, "y": 8}).same_as(small())


_ATTRIBUTES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["tuple:", "float:", "dict:", "a"]), inner, max_size=2)
    ),
    max_leaves=6,
)
_NAMES = st.sampled_from("label note id weight kinds type viz start name x__ a.b a__json".split())  # noqa: SIM905
_NODES = st.one_of(
    st.builds(Unit, st.sampled_from(["a", "b.c", "d@0"]), st.integers(0, 9)),
    st.builds(UnitAt, st.builds(Unit, st.just("t"), st.integers(0, 9)), st.integers(0, 5)),
    st.builds(
        UnitGroup,
        st.sampled_from(["curves", "a b: c"]),
        st.lists(st.builds(Unit, st.just("g"), st.integers(0, 9)), min_size=1, max_size=3).map(
            tuple
        ),
    ),
)


@st.composite
def circuits(draw: st.DrawFn) -> CircuitGraph:
    made = CircuitGraph()
    made.graph.update(draw(st.dictionaries(_NAMES, _ATTRIBUTES, max_size=3)))
    nodes = draw(st.lists(_NODES, min_size=1, max_size=5, unique=True))
    for node in nodes:
        made.add_node(node, **draw(st.dictionaries(_NAMES, _ATTRIBUTES, max_size=3)))
    for _ in range(draw(st.integers(0, 6))):
        ends = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
        kind = draw(st.sampled_from(["weight", "expanded", "attribution", "effect"]))
        number = draw(st.floats(allow_nan=False, allow_infinity=False, width=32))
        extra = draw(st.dictionaries(_NAMES, _ATTRIBUTES, max_size=2))
        made.connect(*ends, kind, sum=float(number), **extra)
    return made


# the type checker looks at a random element of a tuple, which Hypothesis takes for the strategy's doing
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@pytest.mark.parametrize("format", ["json", "graphml", "gexf", "attribution"])
@settings(max_examples=examples(60), suppress_health_check=list(HealthCheck))
@given(graph=circuits())
def test_every_format_is_read_back_equal(format: str, tmp_path: Path, graph: CircuitGraph) -> None:
    path = tmp_path / "circuit"
    write_circuit(graph, path, format)
    assert read_circuit(path, format).same_as(graph)


def test_files_are_read_by_networkx_and_fit_the_schema(tmp_path: Path) -> None:
    import jsonschema

    graph = small()
    for format in ("json", "graphml", "gexf"):
        write_circuit(graph, tmp_path / f"c.{format}")
    raw = json.loads((tmp_path / "c.json").read_text())
    jsonschema.validate(raw, schema("node-link"))
    for theirs in (
        nx.node_link_graph(raw, edges="edges"),
        nx.read_graphml(tmp_path / "c.graphml", force_multigraph=True),
        nx.read_gexf(tmp_path / "c.gexf", version="1.2draft"),
    ):
        assert set(theirs) == {"x:0", "x:1", "y:7"}
        assert theirs.number_of_edges() == 3
    assert theirs.nodes["x:0"]["circuit.label"] == "curve"
    write_circuit(graph, tmp_path / "c.attribution.json", "attribution")
    raw = json.loads((tmp_path / "c.attribution.json").read_text())
    jsonschema.validate(raw, schema("attribution-graph"))
    assert read_circuit(tmp_path / "c.attribution.json").same_as(graph), "told by what is in it"


def tracer_graph() -> dict:
    """A small graph as circuit-tracer writes them."""
    return {
        "metadata": {"slug": "s", "scan": "gemma", "prompt_tokens": ["<bos>", "Hi"], "prompt": "Hi"},
        "qParams": {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": ""},
        "nodes": [
            {"node_id": "0_7_1", "feature": 35, "layer": "0", "ctx_idx": 1, "jsNodeId": "0_7-0",
             "feature_type": "cross layer transcoder", "clerp": "", "influence": 0.5, "activation": 3.25},
            {"node_id": "0_3_1", "feature": -1, "layer": "3", "ctx_idx": 1, "jsNodeId": "3_1-0",
             "feature_type": "mlp reconstruction error", "clerp": "Err: mlp", "influence": None},
            {"node_id": "E_23_1", "feature": 1, "layer": "E", "ctx_idx": 1, "jsNodeId": "E_23-1",
             "feature_type": "embedding", "clerp": "Emb: Hi"},
            {"node_id": "27_55_1", "feature": 55, "layer": "27", "ctx_idx": 1, "jsNodeId": "L_55-1",
             "feature_type": "logit", "clerp": "Output: there", "is_target_logit": True, "token_prob": 0.5},
        ],
        "links": [
            {"source": "E_23_1", "target": "0_7_1", "weight": 1.5},
            {"source": "0_7_1", "target": "27_55_1", "weight": -0.75},
        ],
    }  # fmt: skip


def test_circuit_tracers_graphs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    path.write_text(json.dumps(tracer_graph()))
    graph = read_circuit(path)
    feature = UnitAt(Unit("layer0.features", 7), 1)
    assert graph.nodes[feature]["activation"] == 3.25
    assert UnitAt(Unit("layer3.error", 0), 1) in graph
    assert graph.edges[feature, UnitAt(Unit("logits", 55), 1), "attribution"]["sum"] == -0.75
    assert graph.graph["prompt"] == "Hi"
    write_circuit(graph, path, "attribution")
    again = json.loads(path.read_text())
    last = again["nodes"][3]["layer"]
    ids = [n["node_id"] for n in again["nodes"]]
    assert ids == ["0_7_1", "3_error_1", "E_23_1", f"{last}_55_1"]
    assert read_circuit(path).same_as(graph)


def test_every_node_of_a_file_has_its_own_ids(tmp_path: Path) -> None:
    graph = CircuitGraph()
    # The site `a` is numbered 0, which is also the layer of one of the others.
    graph.add_nodes_from([Unit("a", 0), Unit("layer0.features", 0), Unit("layer1.features", 0)])
    path = tmp_path / "g.json"
    write_circuit(graph, path, "attribution")
    nodes = json.loads(path.read_text())["nodes"]
    assert len({n["node_id"] for n in nodes}) == len({n["jsNodeId"] for n in nodes}) == 3


def test_colliding_ids_are_detected(tmp_path: Path) -> None:
    raw = tracer_graph()
    raw["nodes"][0]["node_id"] = "0_3_1"  # feature 3 of layer 0, and the error of layer 3
    raw["links"] = []
    path = tmp_path / "g.json"
    path.write_text(json.dumps(raw))
    assert read_circuit(path).number_of_nodes() == 4, "no link is in doubt"
    raw["links"] = [{"source": "0_3_1", "target": "27_55_1", "weight": 1.0}]
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"'0_3_1' names two nodes, a 'cross layer.* 'mlp recon"):
        read_circuit(path)


def test_files_that_are_no_circuits(tmp_path: Path) -> None:
    for name, text, message in (
        ("a.json", "{", "is no circuit in the format json"),
        ("a.json", "[]", "no node-link file: at the top"),
        ("a.json", '{"directed": true}', "no node-link file"),
        ("a.graphml", "<graphml>", "is no circuit in the format graphml"),
        ("a.gexf", "<a/>", "its top is a: expected GEXF 1.2"),
        ("a.csv", "", "unknown format by file ending 'csv'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises((ValueError, KeyError), match=message):
            read_circuit(tmp_path / name)
    raw = to_node_link(small())
    raw["nodes"].pop()
    with pytest.raises(ValueError, match="names a node that is not listed"):
        from_node_link(raw)
    theirs = nx.DiGraph([("conv1:0", "conv2:3")])
    nx.write_graphml(theirs, tmp_path / "theirs.graphml")
    assert list(read_circuit(tmp_path / "theirs.graphml").edges()) == [
        (Unit("conv1", 0), Unit("conv2", 3))
    ]
    nx.write_graphml(nx.DiGraph([("Anna", "Bert")]), tmp_path / "other.graphml")
    with pytest.raises(ValueError, match="unit 'Anna' is not of the form"):
        read_circuit(tmp_path / "other.graphml")


@pytest.mark.parametrize(
    ("where", "changed", "message"),
    [
        ("edge", {"norm": "strong"}, "norm of the edge x:0 -> y:7 is 'strong': expected a finite"),
        (
            "edge",
            {"norm": -1.0},
            "norm of the edge x:0 -> y:7 is -1.0: expected a finite number of at",
        ),
        (
            "edge",
            {"sum": {"float:": "nan"}},
            "sum of the edge x:0 -> y:7 is nan: expected a finite",
        ),
        ("edge", {"typical": True}, "typical of the edge x:0 -> y:7 is True"),
        ("edge", {"kernel": [[1.0], [1.0, 2.0]]}, "kernel of the edge x:0 -> y:7 is "),
        ("edge", {"layer": 3}, "layer of the edge x:0 -> y:7 is 3: expected a text"),
        ("graph", {"order": 5}, "order of the circuit is 5: expected a list of sites"),
        ("graph", {"paths": [{"sign": 1}]}, "paths of the circuit is "),
        ("graph", {"made": 4}, "made of the circuit is 4: expected an object"),
        ("graph", {"model_hash": ["x"]}, "model_hash of the circuit is "),
        ("edges", [0, 0], "edge 'effect' from x:0 to y:7 is listed twice"),
        ("nodes", [0, 0, 1], "node x:0 is listed twice"),
    ],
)
def test_circuits_of_wrong_values_are_refused(where: str, changed: Any, message: str) -> None:
    """They came in, and a page that drew them failed."""
    graph = CircuitGraph()
    graph.add_nodes_from([Unit("x", 0), Unit("y", 7)])
    graph.connect(Unit("x", 0), Unit("y", 7), "effect", sum=1.0)
    raw = to_node_link(graph)
    assert from_node_link(raw).same_as(graph)
    if where in ("edges", "nodes"):
        raw[where] = [raw[where][i] for i in changed]
    else:
        (raw["edges"][0] if where == "edge" else raw["graph"]).update(changed)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_node_link(raw)


def test_graphs_of_other_programs_have_directions_and_each_edge_once(tmp_path: Path) -> None:
    pair = ("x:0", "y:1")
    for theirs, message in (
        (nx.Graph([pair]), "its edges have no direction: expected a directed graph"),
        (nx.MultiDiGraph([pair, pair]), "edge 'weight' from x:0 to y:1 is listed twice"),
        (nx.DiGraph([(*pair, {"weight": math.nan})]), "expected a finite number"),
        (nx.DiGraph([(*pair, {"weight": "much"})]), "expected a number|could not convert"),
    ):
        nx.write_graphml(theirs, tmp_path / "a.graphml")
        nx.write_gexf(theirs, tmp_path / "a.gexf")
        for path in tmp_path.iterdir():
            with pytest.raises(ValueError, match=message):
                read_circuit(path)
    text = '<graph edgedefault="directed"><node id="x:0"/><node id="x:0"/></graph>'
    top = f'<graphml xmlns="http://graphml.graphdrawing.org/xmlns">{text}</graphml>'
    (tmp_path / "a.graphml").write_text(top)
    with pytest.raises(ValueError, match="node x:0 is listed twice"):
        read_circuit(tmp_path / "a.graphml")
    with pytest.raises(ValueError, match="norm of the edge x:0 -> y:1 is inf"):
        CircuitGraph().connect(Unit("x", 0), Unit("y", 1), "weight", sum=1.0, norm=math.inf)


def test_nodes_parse_and_print() -> None:
    for node in (
        Unit("a@1", 3),
        UnitAt(Unit("a@1", 3), 9),
        UnitGroup("x y", (Unit("s", 1), Unit("s", 4))),
    ):
        assert parse_node(str(node)) == node
    with pytest.raises(ValueError, match="units of exactly one site"):
        UnitGroup("x", (Unit("a", 1), Unit("b", 1)))


# --- saved circuits ----------------------------------------------------------------------------


def test_saved_circuits_keep_their_history(tmp_path: Path) -> None:
    database = Database(tmp_path / "workspace.db")
    graph = small()
    assert saved_circuits(database, graph.model_hash) == []
    first = save_circuit(database, "curves", graph, "a start", author="me", replaces=0)
    assert (first.version, first.author, first.note) == (1, "me", "a start")
    changed = small()
    changed.remove_node(Unit("x", 1))
    save_circuit(database, "curves", changed, "fewer", replaces=1)
    assert load_circuit(database, "curves", graph.model_hash).same_as(changed)
    left, gone = next(n for n in changed if isinstance(n, Unit)), Unit("x", 1)
    assert [r.version for r in circuits_with(database, graph.model_hash, left)] == [2]
    assert circuits_with(database, graph.model_hash, gone) == []
    group = CircuitGraph(model_hash=graph.model_hash)
    group.add_node(UnitGroup("both", (Unit("x", 0), gone)))
    save_circuit(database, "grouped", group)
    assert [r.name for r in circuits_with(database, graph.model_hash, gone)] == ["grouped"]
    database.save("circuit", graph.model_hash, "grouped", None)
    assert load_circuit(database, "curves", graph.model_hash, version=1).same_as(graph)
    assert [r.note for r in circuit_history(database, "curves", graph.model_hash)] == [
        "a start",
        "fewer",
    ]
    with pytest.raises(
        ValueError, match="was changed meanwhile: it is at version 2, yours started from 1"
    ):
        save_circuit(database, "curves", graph, replaces=1)
    with pytest.raises(KeyError, match=r"no circuit 'lines' for weights abab.*: there are curves"):
        load_circuit(database, "lines", graph.model_hash)
    with pytest.raises(ValueError, match="does not say its model_hash"):
        save_circuit(database, "x", CircuitGraph())
    database.save("circuit", graph.model_hash, "curves", None, "gone")
    assert saved_circuits(database, graph.model_hash) == []
    assert len(circuit_history(database, "curves", graph.model_hash)) == 3


def test_two_people_at_once(tmp_path: Path) -> None:
    """Forty saves by four threads: every one has its own version, none is lost."""
    from concurrent.futures import ThreadPoolExecutor

    database = Database(tmp_path / "workspace.db")
    with ThreadPoolExecutor(4) as pool:
        versions = list(
            pool.map(lambda i: database.save("circuit", "h", "n", {"i": i}).version, range(40))
        )
    assert sorted(versions) == list(range(1, 41))
    kept = {r.version: r.body["i"] for r in database.history("circuit", "h", "n")}
    assert kept == {version: i for i, version in enumerate(versions)}


class TwoLayers(nn.Module):
    """Two convolutions between the same sites, added up before one batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r = nn.Conv2d(2, 3, 1), nn.ReLU()
        self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn, self.r2, self.d = nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.r(self.a(x))
        return self.d(self.r2(self.bn(self.b(x) + self.c(x))))


def test_two_layers_between_the_same_sites(tmp_path: Path) -> None:
    model = HookedModel(seeded(TwoLayers()), (2, 4, 4))
    both = raw_weights(model, "r", "r2")
    net = model.module
    scale = net.bn.weight / (net.bn.running_var + net.bn.eps).sqrt()
    bias = (net.b.bias + net.c.bias - net.bn.running_mean) * scale + net.bn.bias
    torch.testing.assert_close(sum(w.bias for w in both), bias.detach())
    with build_graph(model, tmp_path) as store:
        paths = [tuple(p["units"]) for p in store.paths("input:0", "d:1", top=100).graph["paths"]]
        assert len(paths) == len(set(paths)) == 9
        strongest = max(w.weight[2, 1].abs().item() for w in both)
        first = store.paths("r:1", "r2:2", top=3).graph["paths"]
        assert [p["strength"] for p in first] == pytest.approx([strongest])


def test_edges_that_do_not_fit_are_refused(branches: HookedModel, tmp_path: Path) -> None:
    build_graph(branches, tmp_path).close()
    good = np.ones((2, 2), np.float32)
    for changes, values, message in (
        ({"targets": (-1, 2)}, good, "index -1"),
        ({"targets": (1, 1)}, good, "listed twice"),
        ({"targets": ()}, good, "3 units of fc do not fit shape"),
        ({}, good * np.inf, "must be finite or NaN"),
        ({}, np.ones((2, 3)), "numbers of shape"),
        ({"provenance": {}}, good, "provenance needs a method"),
    ):
        facts = {"targets": (0, 2), "sources": (3, 5), "provenance": {"method": "a"}} | changes
        info = BlockInfo("cat", "fc", "effect", "", (), shape=(2, 2), kernel=(), **facts)
        with pytest.raises(ValueError, match=message):
            add_edges(tmp_path, "x", [(info, values)])
    assert not (tmp_path / "graph").exists()


def test_odd_attributes_survive(tmp_path: Path) -> None:
    graph = small()
    graph.edges[Unit("x", 0), Unit("y", 7), "effect"].update(
        {"key": "mine", "spread": float("nan")}
    )
    graph.nodes[Unit("x", 0)]["node_for_adding"] = "x"
    for format in ("json", "graphml", "gexf", "attribution"):
        write_circuit(graph, tmp_path / "c", format)
        assert read_circuit(tmp_path / "c", format).same_as(graph)
    with pytest.raises(ValueError, match="must be printable"):
        UnitGroup("a\x01b", (Unit("x", 0),))


def test_foreign_node_link_files_get_what_they_lack(tmp_path: Path) -> None:
    theirs = nx.MultiDiGraph()
    theirs.add_edge("a:0", "b:1", key="0", weight=-2.5)
    (tmp_path / "c.json").write_text(json.dumps(nx.node_link_data(theirs, edges="edges")))
    data = read_circuit(tmp_path / "c.json").edges[Unit("a", 0), Unit("b", 1), "0"]
    assert (data["kind"], data["sum"], data["norm"]) == ("weight", -2.5, 2.5)


def test_features_under_ids_that_say_nothing(tmp_path: Path) -> None:
    raw = tracer_graph()
    raw["links"] = []
    raw["nodes"][0]["node_id"], raw["nodes"][0]["feature"] = "f1", 11
    (tmp_path / "g.json").write_text(json.dumps(raw))
    assert UnitAt(Unit("layer0.features", 11), 1) in read_circuit(tmp_path / "g.json")
    raw["nodes"][0]["feature"] = None
    (tmp_path / "g.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="'f1' does not say which feature"):
        read_circuit(tmp_path / "g.json")


def test_circles_have_no_paths(branches: HookedModel, tmp_path: Path) -> None:
    build_graph(branches, tmp_path).close()
    back = BlockInfo("fc", "cat", "effect", "", (), (0,), (1,), (1, 1), (), {"method": "a"})
    add_edges(tmp_path, "back", [(back, np.ones((1, 1)))])
    with GraphStore(tmp_path) as store:
        assert store.paths("cat:0", "fc:1").graph["paths"]
        with pytest.raises(ValueError, match="go round in circles"):
            store.paths("cat:0", "fc:1", kinds=["weight", "effect"])


def test_a_name_can_be_used_again_after_it_was_deleted(tmp_path: Path) -> None:
    database = Database(tmp_path / "workspace.db")
    database.save("circuit", "h", "n", {"a": 1}, replaces=0)
    database.save("circuit", "h", "n", None, replaces=1)
    assert database.save("circuit", "h", "n", {"a": 2}, replaces=0).version == 3
    with pytest.raises(ValueError, match="was changed meanwhile"):
        database.save("circuit", "h", "n", {"a": 3}, replaces=0)


@pytest.mark.parametrize("format", ["json", "graphml", "gexf"])
def test_text_is_what_a_file_holds(tmp_path: Path, format: str) -> None:
    graph = CircuitGraph(model_hash="x")
    graph.connect(Unit("a", 0), Unit("b", 1), "weight", sum=-0.5)
    write_circuit(graph, tmp_path / f"c.{format}")
    assert (tmp_path / f"c.{format}").read_text() == circuit_text(graph, format)
    with pytest.raises(KeyError, match="unknown format 'pdf'"):
        circuit_text(graph, "pdf")
