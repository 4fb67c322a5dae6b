"""`circuits expand`, `families` and `graph` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest

from circuits.cli.main import run
from circuits.graph.formats import read_circuit
from circuits.models.zoo.loading import load_model
from circuits.units import Unit
from circuits.weights import ExpandedWeights, expand_weights


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "ws"))
    return tmp_path / "ws"


def output(capsys, *arguments: str) -> object:
    assert run(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_expand(capsys, tmp_path: Path) -> None:
    found = output(
        capsys, "expand", "shapes", "mixed3a", "mixed3b:200", "--top", "3", "--apart", "--factors", "2", "--json",
        "--out", str(tmp_path / "w.safetensors"), "--figure", str(tmp_path / "k.png"),
    )  # fmt: skip
    ours = expand_weights(load_model("shapes"), "mixed3a", "mixed3b", units=[200])
    best = ours.connections(200, top=3)
    assert [c["source"] for c in found["connections"]] == [str(c.source) for c in best]
    assert [c["norm"] for c in found["connections"]] == pytest.approx([c.norm for c in best])
    assert found["connections"][0]["norm_in_shuffled_weights"] > 0
    assert 0 < found["factors"]["hidden"] < 1
    kept = ExpandedWeights.load(tmp_path / "w.safetensors")
    assert kept.positive is not None
    assert (kept.weight - ours.weight).abs().max() == 0
    assert (tmp_path / "k.png").stat().st_size > 1000
    assert (
        run(["expand", "shapes", "mixed3a", "mixed3b:200", "--mode", "mean", "--limit", "4"]) == 0
    )
    assert "4 of 163, spread evenly (seed 0)" in " ".join(capsys.readouterr().out.split())


def test_where_the_graph_has_no_edge_it_says_what_to_build(capsys) -> None:
    assert run(["graph", "build", "shapes"]) == 0
    # mixed3b is put together of 64 + 96 + 64 + 32 units; 100 is of the second part, whose layer reads a bottleneck.
    units = ["mixed3a:3", "mixed3b:100"]
    asked = {
        (*units,): "`circuits graph build shapes --expand mixed3a=mixed3b` stores their weights",
        ("mixed3a:3", "mixed3a:4"): "no weights lead from one to another",
        ("mixed3b_3x3_bottleneck:1", "mixed3b_5x5_bottleneck:1"): "no weights lead from one to another",
        ("mixed3b:3", "--kinds", "effect"): "no edges of kind effect are stored; there are others: --kinds weight",
        ("mixed3b:3", "--kinds", "expanded"): "--expand mixed3b_5x5_bottleneck=mixed3b` stores",
    }  # fmt: skip
    for words, message in asked.items():
        capsys.readouterr()
        assert run(["graph", "show", "shapes", *words, "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["edges"] == []
        assert message in shown.err, words
    for left_out, message in {
        "mixed3b_5x5:3": f"there it is mixed3b:{64 + 96 + 3}",
        "mixed3b_pool_reduce_pre_relu:1": f"there it is mixed3b:{64 + 96 + 64 + 1}",
        "maxpool0:5": "there it is conv2d2:5",
        "mixed3b_pool:5": "there it is mixed3a:5",
        "avgpool:255": "there it is mixed3b:255",
    }.items():
        assert run(["graph", "show", "shapes", left_out]) == 2
        assert message in capsys.readouterr().err
    # What it says to build gives edges.
    assert run(["graph", "build", "shapes", "--expand", "mixed3a=mixed3b"]) == 0
    capsys.readouterr()
    (edge,) = output(capsys, "graph", "show", "shapes", *units, "--json")["edges"]
    expanded = expand_weights(load_model("shapes"), "mixed3a", "mixed3b", units=[100], sources=[3])
    assert edge["sum"] == pytest.approx(float(expanded.weight.sum()), rel=1e-4)


def test_graph_from_build_to_export(capsys, tmp_path: Path, workspace: Path) -> None:
    built = output(capsys, "graph", "build", "shapes", "--expand", "mixed3a=mixed3b", "--json")
    assert Path(built["file"]).parent.parent == workspace
    assert built["edges"] > 10_000
    shown = output(
        capsys, "graph", "show", "shapes", "mixed3b:200", "--top", "2", "--kinds", "expanded", "--save", "mine",
        "--note", "a start", "--figure", str(tmp_path / "c.svg"), "--json",
    )  # fmt: skip
    assert len(shown["edges"]) == 2
    assert {e["kind"] for e in shown["edges"]} == {"expanded"}
    assert run(["graph", "show", "shapes", "mixed3b:200", "--top", "3", "--save", "mine"]) == 0
    assert "typical norm" in capsys.readouterr().out
    listed = output(capsys, "graph", "ls", "shapes", "--json")
    assert [(c["circuit"], c["version"]) for c in listed] == [("mine", 2)]
    versions = output(capsys, "graph", "ls", "shapes", "--circuit", "mine", "--json")
    assert [c["note"] for c in versions] == ["a start", ""]
    changes = output(capsys, "graph", "diff", "shapes", "mine", "1", "2", "--json")
    assert changes["edges_added"]
    for ending in ("json", "graphml", "gexf"):
        path = tmp_path / f"out.{ending}"
        facts = output(
            capsys,
            "graph",
            "export",
            "shapes",
            str(path),
            "--circuit",
            "mine",
            "--version",
            "1",
            "--json",
        )
        assert facts["edges"] == 2
        assert read_circuit(path).same_as(read_circuit(tmp_path / "out.json"))
    assert set(nx.read_graphml(tmp_path / "out.graphml")) >= {"mixed3b:200"}
    again = output(
        capsys, "graph", "import", "shapes", str(tmp_path / "out.gexf"), "--name", "b", "--json"
    )
    assert again == {"name": "b", "version": 1, "nodes": 3}
    assert run(["graph", "show", "shapes", "conv2d1:3", "--to", "mixed3b:200", "--top", "2"]) == 0
    assert "conv2d1:3 -> " in capsys.readouterr().out


def test_families(capsys, tmp_path: Path) -> None:
    small = ("--size", "64", "--permutations", "19")
    (found,) = output(capsys, "families", "cleanroom", "line", *small, "--name", "lines", "--json")
    assert len(found["members"]) == 12
    assert found["p_value"] == 0.05
    (tmp_path / "drawn").mkdir()
    (measured,) = output(
        capsys, "families", "cleanroom", "complex", "--units", "0,3,6,9", *small, "--name", "four", "--json",
        "--figure", str(tmp_path / "drawn" / "Four.PNG"),
    )  # fmt: skip
    (drawn,) = (tmp_path / "drawn").iterdir()
    assert drawn.name == "Four.PNG", "exactly the file that was asked for"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert {Unit.parse(m["unit"]).index for m in measured["members"]} == {0, 3, 6, 9}
    listed = output(capsys, "families", "cleanroom", "--rename", "four=gabors", "--json")
    assert [f["name"] for f in listed] == ["gabors", "lines"]
    between = output(
        capsys, "families", "cleanroom", "--weights-from", "lines=gabors", "--permutations", "99", "--json",
        "--figure", str(tmp_path / "f.png"),
    )  # fmt: skip
    assert between["multiple"] == 2
    assert between["correlation_p"] <= 0.01
    assert between["explained_p"] <= 0.01, "lines are written as turned copies of one"
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert [
        f["name"] for f in output(capsys, "families", "cleanroom", "--remove", "lines", "--json")
    ] == ["gabors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["expand", "shapes", "mixed3b", "mixed3a:1"], "source mixed3b comes after target mixed3a"),
        (["expand", "shapes", "mixed3a", "mixed3b:9999"], "mixed3b:9999 does not exist"),
        (
            ["expand", "shapes", "mixed3a", "mixed3b:1", "--at", "x"],
            "--at 'x' is not of the form Y,X",
        ),
        (
            ["expand", "shapes", "mixed3a", "mixed3b:1", "--mode", "sharp"],
            "'sharp' is not one of 'linear', 'mean'",
        ),
        (
            ["expand", "shapes", "mixed3a", "mixed3b:1", "--figure", "a.pdf"],
            "must end in .png or .svg",
        ),
        (
            ["expand", "shapes", "mixed3a", "mixed3b:1", "--factors", "999"],
            "factors 999 must be 0 to",
        ),
        (
            ["expand", "shapes", "mixed3a", "mixed3b:1", "--out", "a.txt"],
            "must end in .safetensors",
        ),
        (["families", "shapes", "mixed3a", "--size", "0"], "'--size': 0 must be 16 to 1024"),
        (["graph", "show", "shapes", "mixed3b:1"], "no graph at"),
        (["graph", "show", "shapes"], "expected units"),
        (["graph", "show", "shapes", "--circuit", "x"], "no circuit 'x'"),
        (
            ["graph", "export", "shapes", "a.csv", "mixed3b:1"],
            "unknown format by file ending 'csv'",
        ),
        (["graph", "build", "shapes", "--expand", "mixed3a"], "is not of the form SOURCE=TARGET"),
        (["graph", "import", "shapes", "nowhere.json", "--name", "x"], "nowhere.json"),
        (["families", "shapes"], "SITE is missing"),
        (["families", "shapes", "mixed3a", "--units", "1,x"], "is not a list of indices"),
        (["families", "shapes", "--remove", "x"], "no family 'x'"),
        (["families", "induction", "blocks.1.attn.hook_z"], "takes no photographs"),
        (["weights", "shapes", "mixed3b:1", "--figure", "a.txt"], "must end in .png or .svg"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments: list[str], message: str, workspace: Path) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert not workspace.exists(), "nothing is written"


def test_a_circuit_of_other_weights_is_refused(capsys, tmp_path: Path) -> None:
    assert run(["graph", "build", "cleanroom"]) == 0
    assert (
        run(["graph", "export", "cleanroom", str(tmp_path / "c.json"), "line:1", "--top", "2"]) == 0
    )
    assert run(["graph", "import", "shapes", str(tmp_path / "c.json"), "--name", "x"]) == 2
    assert "circuit belongs to model" in capsys.readouterr().err
