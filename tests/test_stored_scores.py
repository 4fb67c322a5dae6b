"""Scores of large graphs: the same as in memory, example by example, in files."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuits.cli import discovering
from circuits.cli.main import run
from circuits.discovery import (
    EdgeGraph,
    contrast,
    discover,
    edge_graph,
    edges_of,
    graphs,
    results,
    score_edges,
    searching,
    stability,
    stored,
    top,
)
from circuits.discovery.graphs import EdgeNames
from circuits.discovery.results import ranked
from circuits.discovery.searching import Masks
from circuits.discovery.stored import Cost, StoredScores
from circuits.models.zoo.loading import load_model
from circuits.tasks import Task
from circuits.tasks.builtin import load_task
from tests.test_channel_graph import net, task_of
from tests.test_discovery import weighed
from tests.test_paths import drawn, gpt2_like, llama_like, pairs

SETTINGS = [
    ("eap", {}), ("eap-ig", {"steps": 3, "rule": "left"}), ("clean-corrupted", {}), ("relp", {}),
    ("eap", {"ablation": "mean"}),
]  # fmt: skip


PARTS: list[dict[str, Any]] = [
    {"neurons": "all", "neuron_targets": "all"},
    {"kv": "head", "neurons": "1", "spans": "0,1-3,4-"},
    {"neurons": "0", "neuron_targets": "1", "spans": "0,1-"},
]


def made(number: int) -> tuple[EdgeGraph, Task]:
    if number == 6:
        model = net("residual")
        return edge_graph(model), task_of(model, 5)
    model, _ = (gpt2_like, llama_like)[number // 3]()
    return edge_graph(model, **PARTS[number % 3]), pairs(model, *drawn(5), weighed)


@pytest.fixture(scope="module", params=range(7))
def case(request: pytest.FixtureRequest) -> tuple[EdgeGraph, Task]:
    return made(request.param)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and chunks of a few numbers."""
    monkeypatch.setattr("circuits.discovery.streams._NUMBERS", 2000)
    monkeypatch.setattr("circuits.discovery.graphs._PIECE", 2000)
    monkeypatch.setattr(stored, "_NUMBERS", 500)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Every graph counts as large."""
    for name in (
        "graphs",
        "results",
        "searching",
        "scoring",
        "finding",
        "runs",
        "streams",
        "truth",
    ):
        monkeypatch.setattr(f"circuits.discovery.{name}.LIMIT", 10)


@pytest.mark.parametrize(("method", "given"), SETTINGS)
def test_scores_in_files_are_those_in_memory(
    case: tuple[EdgeGraph, Task], method: Any, given: Any, tmp_path: Path, small: None
) -> None:
    graph, task = case
    wanted = score_edges(graph, task, method, batch=2, **given)
    found = score_edges(graph, task, method, batch=2, folder=tmp_path, **given)
    assert isinstance(found.values, StoredScores)
    assert isinstance(wanted.values, np.ndarray)
    assert found.values.shape == wanted.values.shape
    every = np.arange(len(graph))
    size = np.abs(wanted.values).max()
    np.testing.assert_allclose(
        found.of(every[::-1]), wanted.values[:, ::-1], rtol=0, atol=1e-6 * size
    )
    np.testing.assert_array_equal(found.mean, found.of(every).mean(0))
    np.testing.assert_array_equal(found.clean, wanted.clean)
    np.testing.assert_array_equal(found.corrupted, wanted.corrupted)
    assert found.input_edges == wanted.input_edges
    assert found.notes == wanted.notes
    assert found.completeness == pytest.approx(wanted.completeness, rel=1e-3, abs=1e-6)


def test_scoring_that_was_stopped_goes_on_with_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, task = made(0)
    whole = score_edges(graph, task, "eap", batch=2)
    told: list[int] = []

    def stop(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_edges(graph, task, "eap", batch=2, folder=tmp_path, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["batch-0.h5", "batch-1.h5"]
    (tmp_path / "batch-1.h5").write_bytes(b"damaged")
    written: list[str] = []
    write = stored.write_rows
    monkeypatch.setattr(
        "circuits.discovery.scoring.write_rows", lambda path, *a: (written.append(path.name), write(path, *a))
    )  # fmt: skip
    found = score_edges(graph, task, "eap", batch=2, folder=tmp_path)
    assert written == ["batch-1.h5", "batch-2.h5"]
    np.testing.assert_allclose(found.mean, whole.mean, rtol=0, atol=1e-6 * np.abs(whole.mean).max())
    again = score_edges(graph, task, "eap", batch=2, folder=tmp_path)
    assert written == ["batch-1.h5", "batch-2.h5"]
    np.testing.assert_array_equal(again.mean, found.mean)
    assert again.clean.tolist() == whole.clean.tolist()


def test_a_temporary_folder_goes_with_the_scores(large: None) -> None:
    graph, task = made(0)
    found = score_edges(graph, task, "eap")
    assert isinstance(found.values, StoredScores)
    folder = found.values.files[0].parent
    assert folder.is_dir()
    del found
    assert not folder.exists()


def test_discovery_in_a_large_graph_finds_what_it_finds_in_a_small_one(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = load_model("induction")
    task = load_task(model, n=16, seed=1)
    given: dict[str, Any] = {"size": 12, "check": 6, "n_random": 3, "n_curves": 1}
    wanted = {
        search: discover(edge_graph(model), task, "eap-ig", search=search, **given)
        for search in ("top", "greedy")
    }
    request.getfixturevalue("large")
    graph = edge_graph(model, limit=10**6)
    assert isinstance(graph.edges, EdgeNames)
    for search, own in wanted.items():
        found = discover(graph, task, "eap-ig", search=search, folder=tmp_path / search, **given)
        assert {p.name for p in (tmp_path / search).iterdir()} == {"scores"}
        assert edges_of(found.circuit) == edges_of(own.circuit)
        one, other = found.to_dict(), own.to_dict()
        assert one["scores"]["n_edges"] == len(graph)
        for part in ("agreement", "stability", "evaluation"):
            same(one[part], other[part], part)
        lines = [str(line) for line in found.tables(5)]
        assert lines


def same(one: Any, other: Any, where: str) -> None:
    """Two results in JSON are the same, up to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}.{i}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6), where
    else:
        assert one == other, where


def test_edges_of_a_large_graph_are_named_when_asked_for(large: None) -> None:
    model, _ = gpt2_like()
    graph = edge_graph(model, neurons="all", neuron_targets="all", limit=10**6)
    names = graph.edges
    assert isinstance(names, EdgeNames)
    listed = list(names)
    assert len(names) == len(listed) == len(graph)
    assert [names[i] for i in (0, 7, -1)] == [listed[0], listed[7], listed[-1]]
    assert names[3:9] == tuple(listed[3:9])
    for number in range(0, len(graph), 17):
        assert graph.index(listed[number]) == number == graph.index(" -> ".join(listed[number]))
    other = edge_graph(model, neurons="all", neuron_targets="all", limit=10**6)
    assert names == other.edges
    assert names != edge_graph(model, neurons="all", limit=10**6).edges
    for edge, said in (
        ("mlp:0:12 -> logits", r"source of gpt2-like .*mlp:0:12"),
        ("token -> mlp:9", r"target of gpt2-like .*mlp:9"),
        ("mlp:1:3 -> mlp:0:1", r"edge of gpt2-like .*mlp:1:3 -> mlp:0:1"),
    ):
        with pytest.raises(KeyError, match=said):
            graph.index(edge)


def test_classes_are_numbered_by_their_first_edge() -> None:
    for number in (0, 1, 5, 6):
        graph, _ = made(number)
        kinds = [(graph.kind(a), graph.kind(b)) for a, b in graph.edges]
        known = {pair: i for i, pair in enumerate(dict.fromkeys(kinds))}
        assert graph.classes.tolist() == [known[pair] for pair in kinds]
        into = [np.flatnonzero(graph.ends[:, 1] == t).tolist() for t in range(len(graph.targets))]
        assert [edges.tolist() for edges in graph.edges_into] == into
        assert [b - a for a, b in pairwise(graph.bounds)] == list(map(len, into))


def test_rankings_and_circuits_of_large_graphs_are_those_of_small_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worth = np.random.default_rng(0).integers(0, 9, 200).astype(float)
    wanted = np.argsort(-worth, kind="stable")
    circuits = [np.random.default_rng(i).random(200) < 0.3 for i in range(4)]
    for limit in (10**6, 10):
        monkeypatch.setattr(results, "LIMIT", limit)
        monkeypatch.setattr(searching, "LIMIT", limit)
        for n in (1, 5, 60, 199, 200):
            assert ranked(worth, n).tolist() == wanted[:n].tolist()
        masks = Masks(200, circuits)
        for own in (list(masks), list(masks + Masks(200))):
            np.testing.assert_array_equal(own, circuits)
        np.testing.assert_array_equal(masks[-1], circuits[-1])
        np.testing.assert_array_equal(list(masks[1:3]), circuits[1:3])
        assert len({masks.key(i) for i in range(4)}) == 4
        assert masks.key(0) == Masks(200, [circuits[0].copy()]).key(0)


def test_the_cost_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: None
) -> None:
    assert str(Cost.of(10**7, 8)).startswith(
        "10000000 edges: their scores on 8 examples take 320 MB of disk, and all of it about "
    )
    assert "8 examples, 4 times with those to compare with, take 1.3 GB" in str(
        Cost.of(10**7, 8, 4)
    )
    # No less than was measured.
    assert Cost.of(347_121, 66).memory > 1.19e9
    assert Cost.of(11_005_074, 8).memory > 1.78e9
    model, _ = gpt2_like()
    with pytest.raises(
        ValueError, match=r"more than 100; expected .* of memory and .* of disk an example"
    ):
        edge_graph(model, neurons="all", neuron_targets="all", limit=100)
    graph, task = made(0)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("circuits.discovery.stored.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(
        ValueError, match=r"has 0.001 MB free, .* are needed: expected another folder"
    ) as error:
        score_edges(graph, task, "eap", folder=tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_needs_all_scores_at_once_is_refused(tmp_path: Path) -> None:
    graph, task = made(0)
    found = score_edges(graph, task, "eap", folder=tmp_path)
    with pytest.raises(ValueError, match=r"lie in files, .* expected a graph of at most"):
        contrast(found, found, 10)


def test_stability_and_top_from_files(tmp_path: Path) -> None:
    graph, task = made(0)
    wanted = score_edges(graph, task, "eap")
    found = score_edges(graph, task, "eap", folder=tmp_path)
    circuits = [top(graph, s.worth(), 40) for s in (wanted, found)]
    np.testing.assert_array_equal(*circuits)
    one, other = (
        stability.stability(s, circuits[0], lambda mean: top(graph, np.abs(mean), 40), 12).to_dict()
        for s in (wanted, found)
    )
    same(one, other, "stability")


def test_graphs_module_has_one_limit() -> None:
    assert results.LIMIT == searching.LIMIT == graphs.LIMIT


@pytest.mark.nightly
def test_ten_million_edges_take_less_than_two_gigabytes(tmp_path: Path) -> None:
    script = [sys.executable, "-m", "tests.large_graph", "1344", str(tmp_path)]
    made = subprocess.run(script, capture_output=True, text=True, check=True)
    said = json.loads(made.stdout.splitlines()[-1])
    sys.stdout.write(f"{said['stages']}\n")  # seconds and bytes at the beginning of each stage
    assert said["edges"] > 10**7
    assert said["peak"] < 2e9
    assert said["defined"]
    assert 0 < said["kept"] <= 1000
    assert said["completeness"] < 0.05
    files = [*(tmp_path / "scores").iterdir(), *(tmp_path / "swapped").glob("*")]
    assert sum(file.stat().st_size for file in files) > 4 * 8 * said["edges"]


def test_the_command_says_what_a_large_graph_takes_and_keeps_its_scores_with_the_work(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(discovering, "LIMIT", 10)
    words = (
        "discover addition-by-hand --neurons all --neuron-targets all --method eap --check 0 --size 40 --random 1 "
        "--random-rankings 0 --limit 8 --json"
    )
    saved = ["--most-edges", "1000", "--save", "found", "--workspace", str(tmp_path)]
    assert run([*words.split(), *saved]) == 0
    told = capsys.readouterr()
    assert "241 edges: their scores on 4 examples take" in told.err
    made = json.loads(told.out)
    assert any(target.startswith("mlp:0:") for _, target in made["circuit"]["edges"])
    assert [p.name for p in tmp_path.rglob("scores/batch-*.h5")] == ["batch-0.h5"]
    assert run([*words.split(), "--most-edges", "30"]) == 2
    told = capsys.readouterr()
    assert "241 edges between heads and MLPs" in told.err
    assert "more than 30; expected" in told.err
