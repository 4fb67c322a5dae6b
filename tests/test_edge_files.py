"""Files of edges of other tools: written and read again, read by a reader of one's own, and refused where damaged."""

from __future__ import annotations

import json
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from circuits.cli.main import run
from circuits.discovery import edge_graph, evaluate, score_edges
from circuits.discovery.channels import ChannelGraph
from circuits.discovery.formats import Layout, named, read_edges, write_edges
from circuits.discovery.graphs import EdgeGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task
from tests.test_paths import drawn, gpt2_like, llama_like, pairs


@pytest.fixture(scope="module")
def gpt2() -> EdgeGraph:
    return edge_graph(gpt2_like()[0])


@pytest.fixture(scope="module")
def llama() -> EdgeGraph:
    return edge_graph(llama_like()[0], kv="head")


def values_of(graph: EdgeGraph, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, of positions 0, and a circuit with both embeddings or none."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(len(graph)).astype(np.float32).astype(float)
    kept = rng.random(len(graph)) < 0.4
    for i, (source, target) in enumerate(graph.edges):
        if source == "position":
            scores[i] = 0
            kept[i] = kept[graph.index(("token", target))]
    return scores, kept


def peers_edges(n_layers: int, n_heads: int) -> list[str]:
    """Every edge of MIB's graph, from its description."""
    found, sources = [], ["input"]
    for layer in range(n_layers):
        heads = [f"a{layer}.h{h}" for h in range(n_heads)]
        found += [f"{s}->{h}<{x}>" for s in sources for h in heads for x in "qkv"]
        sources += heads
        found += [f"{s}->m{layer}" for s in sources]
        sources.append(f"m{layer}")
    return found + [f"{s}->logits" for s in sources]


@pytest.mark.parametrize("ending", ["json", "pt"])
@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_what_is_written_is_read_again(
    which: str, ending: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    graph: EdgeGraph = request.getfixturevalue(which)
    scores, kept = values_of(graph)
    path = tmp_path / f"edges.{ending}"
    write_edges(path, graph, scores, kept)
    found = read_edges(path, graph)
    assert found.scores is not None
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.kept, kept)


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_every_edge_has_the_name_that_mib_gives_it(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    graph: EdgeGraph = request.getfixturevalue(which)
    n_heads = 2 if which == "gpt2" else 4
    assert sorted(f"{a}->{b}" for a, b in Layout(graph).edges) == sorted(peers_edges(2, n_heads))
    scores, kept = values_of(graph)
    write_edges(tmp_path / "a.json", graph, scores, kept)
    said = json.loads((tmp_path / "a.json").read_text())
    assert said["cfg"] == {
        "n_layers": 2, "n_heads": n_heads, "parallel_attn_mlp": False, "d_model": 8,
    }  # fmt: skip
    assert set(said["edges"]) == set(peers_edges(2, n_heads))
    i = graph.index("0.1 -> 1.0.k")
    assert said["edges"]["a0.h1->a1.h0<k>"] == {"score": scores[i], "in_graph": bool(kept[i])}
    assert said["nodes"]["a0.h1"]["in_graph"] == any(
        kept[i] for i, (source, _) in enumerate(graph.edges) if source == "0.1"
    )
    write_edges(tmp_path / "a.pt", graph, scores, kept)
    tensors = torch.load(tmp_path / "a.pt", weights_only=True)
    row, column = (
        tensors[k].index(n) for k, n in (("src_nodes", "a0.h1"), ("dst_nodes", "a1.h0<k>"))
    )
    # As its code counts: the input, then the heads and the MLP of each layer; all q of a layer, all k, all v, the MLP.
    assert (row, column) == (2, (3 * n_heads + 1) + n_heads)
    assert float(tensors["edges_scores"][row, column]) == scores[i]
    assert tensors["edges_scores"].shape == (1 + 2 * (n_heads + 1), 2 * (3 * n_heads + 1) + 1)
    assert int(tensors["edges_in_graph"].sum()) == sum(
        e["in_graph"] for e in said["edges"].values()
    )


def test_their_input_stands_for_token_and_position(gpt2: EdgeGraph, tmp_path: Path) -> None:
    token, position = (gpt2.index((s, "0.0.q")) for s in ("token", "position"))
    scores, kept = np.zeros(len(gpt2)), np.zeros(len(gpt2), bool)
    scores[[token, position]], kept[position] = (0.25, 0.5), True
    write_edges(tmp_path / "a.json", gpt2, scores, kept)
    said = json.loads((tmp_path / "a.json").read_text())["edges"]["input->a0.h0<q>"]
    assert said == {"score": 0.75, "in_graph": True}
    found = read_edges(tmp_path / "a.json", gpt2)
    assert found.scores is not None
    assert found.scores[[token, position]].tolist() == [0.75, 0]
    assert found.kept[[token, position]].all()
    assert found.kept.sum() == 2


def test_layers_without_mlps_have_theirs_empty(tmp_path: Path) -> None:
    graph = edge_graph(load_model("induction-by-hand"))
    scores, kept = values_of(graph)
    write_edges(tmp_path / "a.pt", graph, scores, kept)
    found = read_edges(tmp_path / "a.pt", graph)
    np.testing.assert_array_equal(found.kept, kept)
    assert not any("m0" in f"{a}->{b}" for a, b in Layout(graph).edges)


def test_a_file_is_evaluated_as_the_circuit_that_it_holds(tmp_path: Path) -> None:
    model = load_model("addition-by-hand")
    graph, task = edge_graph(model), load_task(model, n=16, seed=1)
    scores = score_edges(graph, task.find, "exact")
    kept = np.abs(scores.mean) > 1e-6
    write_edges(tmp_path / "a.json", graph, scores.mean, kept)
    found = read_edges(tmp_path / "a.json", graph)
    made = evaluate(
        graph, task.test, found.kept, scores=found.scored(graph, task.test), n_random=2, n_curves=1
    )
    assert made.faithfulness.value == 1
    assert made.smallest == kept.sum()


# --- ACDC --------------------------------------------------------------------------------------------

PATHS = {
    ("blocks.1.hook_resid_post", (None,), "blocks.0.attn.hook_result", (None, None, 1)): ("0.1", "logits"),
    ("blocks.1.hook_resid_post", (None,), "blocks.1.hook_mlp_out", (None,)): ("mlp:1", "logits"),
    ("blocks.1.hook_k_input", (None, None, 1), "blocks.0.hook_mlp_out", (None,)): ("mlp:0", "1.1.k"),
    ("blocks.1.hook_resid_mid", (None,), "blocks.1.attn.hook_result", (None, None, 0)): ("1.0", "mlp:1"),
    ("blocks.0.hook_v_input", (None, None, 0), "hook_embed", (None,)): ("token", "0.0.v"),
}  # fmt: skip
INNER = [
    ("blocks.1.hook_mlp_out", (None,), "blocks.1.hook_resid_mid", (None,)),
    ("blocks.1.attn.hook_k", (None, None, 1), "blocks.1.hook_k_input", (None, None, 1)),
    ("blocks.1.attn.hook_result", (None, None, 1), "blocks.1.attn.hook_k", (None, None, 1)),
]


def kept_edges(path: Path, graph: EdgeGraph) -> set[tuple[str, str]]:
    return {graph.edges[i] for i in np.flatnonzero(read_edges(path, graph).kept)}


def test_acdcs_subgraph_is_read_with_the_edges_inside_parts_taken_into_account(
    gpt2: EdgeGraph, tmp_path: Path
) -> None:
    there = OrderedDict.fromkeys([*PATHS, *INNER], True)
    gone = ("blocks.1.hook_q_input", (None, None, 0), "blocks.0.hook_resid_pre", (None,))
    torch.save(there | {gone: False}, tmp_path / "subgraph.pth")
    # Nothing leads from the values' input of head 0.0 to its values.
    wanted = set(PATHS.values()) - {("token", "0.0.v")}
    assert kept_edges(tmp_path / "subgraph.pth", gpt2) == wanted
    torch.save(OrderedDict.fromkeys(PATHS, True), tmp_path / "paths.pth")
    assert kept_edges(tmp_path / "paths.pth", gpt2) == set(PATHS.values())
    torch.save({gone: True}, tmp_path / "whole.pth")
    assert kept_edges(tmp_path / "whole.pth", gpt2) == {("token", "1.0.q"), ("position", "1.0.q")}
    torch.save({gone: 1}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="expected a dictionary from edges to true or false"):
        read_edges(tmp_path / "numbers.pth", gpt2)


@pytest.fixture
def indices(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ACDC's class of indices, while a file is written; it is gone when it is read."""
    module = ModuleType("acdc.TLACDCEdge")

    class TorchIndex:
        def __init__(self, given: tuple[int | None, ...]) -> None:
            self.as_index = tuple(slice(None) if x is None else x for x in given)
            self.hashable_tuple = given

        def __hash__(self) -> int:
            return hash(self.hashable_tuple)

    TorchIndex.__module__, TorchIndex.__qualname__ = "acdc.TLACDCEdge", "TorchIndex"
    module.TorchIndex = TorchIndex  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acdc", ModuleType("acdc"))
    monkeypatch.setitem(sys.modules, "acdc.TLACDCEdge", module)
    return TorchIndex


def test_acdcs_pickled_edges_are_read_and_nothing_else_is(
    gpt2: EdgeGraph, tmp_path: Path, indices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = [((a, indices(i), b, indices(j)), 0.5) for a, i, b, j in PATHS]
    good, bad, cut = (tmp_path / f"{name}.pkl" for name in ("good", "bad", "cut"))
    good.write_bytes(pickle.dumps(edges))
    bad.write_bytes(pickle.dumps([(print, 1.0)]))
    cut.write_bytes(good.read_bytes()[:-20])
    monkeypatch.undo()
    assert kept_edges(good, gpt2) == set(PATHS.values())
    with pytest.raises(ValueError, match=r"no complete list of ACDC's edges .*builtins\.print"):
        read_edges(bad, gpt2)
    with pytest.raises(ValueError, match="no complete list of ACDC's edges"):
        read_edges(cut, gpt2)


# --- refused -----------------------------------------------------------------------------------------


def said(path: Path, graph: EdgeGraph) -> str:
    with pytest.raises((ValueError, KeyError)) as caught:
        read_edges(path, graph)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_damaged_json_is_refused_in_one_line(gpt2: EdgeGraph, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_edges(path, gpt2, *values_of(gpt2))
    whole = path.read_text()

    def changed(change: Any) -> str:
        made = json.loads(whole)
        change(made)
        path.write_text(json.dumps(made))
        return said(path, gpt2)

    edge = "input->a0.h0<q>"
    assert "n_layers 3: expected 2" in changed(lambda d: d["cfg"].update(n_layers=3))
    assert "has no n_heads; expected 2" in changed(lambda d: d["cfg"].pop("n_heads"))
    assert "has no node a1.h1" in changed(lambda d: d["nodes"].pop("a1.h1"))
    assert "keeps some neurons of m0" in changed(
        lambda d: d["nodes"]["m0"].update(neurons=[True, False])
    )
    assert f"lacks 1 edges of gpt2-like, as {edge}" in changed(lambda d: d["edges"].pop(edge))
    assert "the score of input->a0.h0<q> is nan" in changed(
        lambda d: d["edges"][edge].update(score=float("nan"))
    )
    assert "the score of input->a0.h0<q> is 'x'" in changed(
        lambda d: d["edges"][edge].update(score="x")
    )
    assert "neither 'score' nor 'in_graph'" in changed(lambda d: d["edges"][edge].clear())
    assert "has no score, others have one" in changed(lambda d: d["edges"][edge].pop("score"))
    assert "'in_graph' of input->a0.h0<q> is 1" in changed(
        lambda d: d["edges"][edge].update(in_graph=1)
    )
    assert "unknown edge of gpt2-like 'm1->m0'" in changed(
        lambda d: d["edges"].update({"m1->m0": {"score": 1.0, "in_graph": True}})
    )
    assert "has no 'cfg', 'nodes'" in changed(lambda d: [d.pop("cfg"), d.pop("nodes")])
    path.write_text(whole[: len(whole) // 2])
    assert str(path) in said(path, gpt2)
    assert "expected one that ends in .json, .pt, .pth, .pkl" in said(tmp_path / "a.csv", gpt2)
    with pytest.raises(FileNotFoundError):
        read_edges(tmp_path / "none.json", gpt2)


def test_a_list_of_a_circuits_edges_alone_is_a_circuit_without_scores(
    gpt2: EdgeGraph, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    scores, kept = values_of(gpt2)
    write_edges(path, gpt2, scores, kept)
    made = json.loads(path.read_text())
    made["edges"] = {e: {"in_graph": True} for e, x in made["edges"].items() if x["in_graph"]}
    path.write_text(json.dumps(made))
    found = read_edges(path, gpt2)
    np.testing.assert_array_equal(found.kept, kept)
    assert found.scores is None
    with pytest.raises(ValueError, match="has no scores"):
        found.scored(gpt2, pairs(gpt2.model, *drawn()))


def test_damaged_tensors_are_refused_in_one_line(gpt2: EdgeGraph, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_edges(path, gpt2, *values_of(gpt2))
    whole = path.read_bytes()

    def changed(change: Any) -> str:
        path.write_bytes(whole)
        made = torch.load(path, weights_only=True)
        change(made)
        torch.save(made, path)
        return said(path, gpt2)

    def backwards(made: dict[str, Any]) -> None:
        made["edges_in_graph"][-1, 0] = True

    assert "d_model 16: expected 8" in changed(lambda d: d["cfg"].update(d_model=16))
    assert "'src_nodes' lacks m1" in changed(lambda d: d["src_nodes"].pop())
    assert "'dst_nodes' has m9" in changed(lambda d: d["dst_nodes"].append("m9"))
    assert "'edges_scores' is (3, 3): expected a tensor of shape (7, 15)" in changed(
        lambda d: d.update(edges_scores=torch.zeros(3, 3))
    )
    assert "the score of input->a0.h0<q> is nan" in changed(
        lambda d: d["edges_scores"].fill_(torch.nan)
    )
    assert "unknown edge of gpt2-like 'm1->a0.h0<q>'" in changed(backwards)
    assert "keeps some neurons" in changed(lambda d: d.update(neurons_in_graph=torch.zeros(7, 8)))
    assert "has no 'edges_scores'" in changed(lambda d: d.pop("edges_scores"))
    path.write_bytes(whole[:-300])
    assert "is not a complete file of plain data" in said(path, gpt2)
    torch.save({"cfg": Path("x")}, path)
    assert "is not a complete file of plain data" in said(path, gpt2)
    path.write_text("hello")
    assert "is not a complete file of plain data" in said(path, gpt2)


def test_graphs_of_other_grains_are_refused(
    gpt2: EdgeGraph, llama: EdgeGraph, own_net: HookedModel, tmp_path: Path
) -> None:
    by_group = edge_graph(llama.model)
    nothing = np.zeros(len(by_group)), np.zeros(len(by_group), bool)
    with pytest.raises(ValueError, match=r"expected a graph by query head \(--kv head\)"):
        write_edges(tmp_path / "a.json", by_group, *nothing)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.json or \.pt"):
        write_edges(tmp_path / "a.csv", llama, *values_of(llama))
    with pytest.raises(ValueError, match="lead between heads and MLPs and neurons of layer 0"):
        Layout(edge_graph(gpt2.model, neurons="0"))
    with pytest.raises(ValueError, match="files of edges are of transformers' heads and MLPs"):
        Layout(ChannelGraph(own_net))
    assert [named(n) for n in ("token", "mlp:3", "2.10", "2.10.v")] == [
        "input",
        "m3",
        "a2.h10",
        "a2.h10<v>",
    ]


# --- command line ------------------------------------------------------------------------------------


def test_scores_are_written_by_discover_and_evaluated_by_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, few = str(tmp_path / "adding.json"), ["--limit", "8", "--random", "2", "--json"]
    made = ["--method", "exact", "--size", "3", "--scores", path, "--random-rankings", "1"]
    assert run(["discover", "addition-by-hand", *made, *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run(["evaluate", "addition-by-hand", path, *few]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["faithfulness"] == found["evaluation"]["faithfulness"]
    # `input->a0.h0<v>` of the file stands for the edge of the position, too.
    both = {*map(tuple, found["evaluation"]["edges"]), ("position", "0.0.v")}
    assert set(map(tuple, again["edges"])) == both
    assert again["by_size"][-1]["faithfulness"] == 1, "the file's scores are a ranking"
    for asked, error in (
        ([path, "--size", "1"], "make no path"),
        ([path, "--version", "1"], "belongs to saved circuits"),
        (["saved", "--size", "1"], "belongs to a file with scores"),
        ([str(tmp_path / "none.pt")], "does not exist"),
    ):
        assert run(["evaluate", "addition-by-hand", *asked, *few]) == 2
        assert error in capsys.readouterr().err
    assert run(["discover", "addition-by-hand", "--scores", "a.csv", *few]) == 2
    assert "expected a name that ends in .json or .pt" in capsys.readouterr().err
