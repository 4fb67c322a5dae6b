"""Circuits that are as good as one, and what changed between two tasks or models."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from circuits.cli.main import run
from circuits.discovery import (
    Alternatives,
    EdgeScores,
    Runs,
    compare_circuits,
    compare_models,
    contrast,
    edge_graph,
    find_alternatives,
    greedy,
    score_edges,
)
from circuits.discovery.comparing import chance_jaccard, jaccard
from circuits.discovery.contrasts import Change
from circuits.experiments.outcomes import Record
from circuits.figures import series_figure
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task
from tests.gates import GATES, Planted, as_transformer
from tests.specs import views

# --- alternatives --------------------------------------------------------------------------------


def alternatives_of(name: str, size: int) -> tuple[Planted, Alternatives]:
    planted = as_transformer(GATES[name])
    graph = edge_graph(planted.model)
    worth = np.abs(score_edges(graph, planted.task, "exact", direction="denoising").mean)
    if name == "and":
        worth = np.abs(score_edges(graph, planted.task, "exact").mean)
    runs, choose = Runs(graph, planted.task), partial(greedy, graph, n=size)
    return planted, find_alternatives(runs, runs, choose(worth), worth, choose, 2)


def test_of_an_or_gate_either_input_makes_a_circuit_and_both_are_found() -> None:
    planted, made = alternatives_of("or", 3)
    first, second = (set(edges) for edges in made.circuits[:2])
    assert (planted.wires["a"] in first) != (planted.wires["a"] in second)
    assert (planted.wires["b"] in first) != (planted.wires["b"] in second)
    assert [f.value for f in made.faithfulness[:2]] == pytest.approx([1, 1], abs=1e-5)
    assert made.on_find[:2] == pytest.approx((1, 1), abs=1e-5)
    assert set(made.core) == set.intersection(*map(set, made.circuits))
    assert set(made.union) == set.union(*map(set, made.circuits))
    assert made.to_dict()["jaccard"][0]["jaccard"] == jaccard(*made.circuits[:2])


def test_where_every_edge_is_needed_every_circuit_has_it() -> None:
    planted, made = alternatives_of("and", 8)
    for edges in made.circuits:
        assert {planted.wires[wire] for wire in ("a", "b")} <= set(edges)
    (line, *_) = [str(t) for t in replace(made, circuits=made.circuits[:1]).tables()]
    assert "no other circuit of this size is as good" in line


# --- contrasts -----------------------------------------------------------------------------------


def scored(model: HookedModel, values: np.ndarray, effect: np.ndarray, seed: int) -> EdgeScores:
    """Scores as they are given, of the task with a seed."""
    graph, task = edge_graph(model), load_task(model, n=len(values), seed=seed)
    n = len(values)
    return EdgeScores(
        "exact", {}, graph.edges, values, np.zeros(n), effect, (0,), "m", "", 1, tuple(range(n)),
        Record.of(model, task, 0),
    )  # fmt: skip


def changes(model: HookedModel, seed: int, planted: float, paired: bool) -> tuple[Change, ...]:
    """Edges of noise about equal means, one of which is larger on the second side."""
    rng = np.random.default_rng(seed)
    n, n_edges = 30, len(edge_graph(model))
    mean = rng.standard_normal(n_edges)
    sides = []
    for side in (0, 1):
        effect = 5 + rng.standard_normal(n)
        values = mean + rng.standard_normal((n, n_edges))
        values[:, 3] += planted * side
        sides.append(scored(model, values, effect, seed=0 if paired else side))
    return contrast(*sides, 5).edges  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("paired", [True, False])
def test_a_planted_difference_is_found_and_noise_is_not(paired: bool) -> None:
    model = load_model("addition-by-hand")
    largest, *rest = changes(model, 0, 4.0, paired)
    name = " -> ".join(edge_graph(model).edges[3])
    assert (largest.name, largest.p) == (name, pytest.approx(1 / 1001))
    assert largest.difference.low > 0.4
    assert all(c.p > 0.05 for c in rest)
    # All edges together are found different by chance in 5 % of draws.
    chance = [min(c.p for c in changes(model, seed, 0.0, paired)) for seed in range(1, 61)]
    assert 0 <= sum(p <= 0.05 for p in chance) <= 8
    assert 0.3 < np.mean(chance) < 0.7


def test_shares_are_ratios_of_means_and_parts_are_sums_of_their_edges() -> None:
    model = load_model("addition-by-hand")
    graph = edge_graph(model)
    rng = np.random.default_rng(0)
    sides = [
        scored(model, rng.standard_normal((8, len(graph))), 5 + rng.random(8), seed) for seed in (0, 1)
    ]  # fmt: skip
    made = contrast(sides[0], sides[1], 4, names=("one", "other"))
    shares = [s.values.mean(0) / s.corrupted.mean() for s in sides]
    for change in made.edges:
        edge = graph.index(change.name)
        assert change.first == pytest.approx(shares[0][edge])
        assert change.difference.value == pytest.approx(shares[1][edge] - shares[0][edge])
    for change in made.parts:
        own = [e for e, (source, _) in enumerate(graph.edges) if source == change.name]
        assert change.second == pytest.approx(shares[1][own].sum())
    assert not made.paired


def test_contrasts_of_what_cannot_be_compared_are_refused() -> None:
    model = load_model("addition-by-hand")
    n = len(edge_graph(model))
    one = scored(model, np.ones((6, n)), np.ones(6), 0)
    with pytest.raises(
        ValueError, match="which cannot be told from 0, so no edge has a share of it"
    ):
        contrast(one, scored(model, np.ones((6, n)), np.array([1.0, -1] * 3), 1), 4)
    with pytest.raises(ValueError, match="scores by eap are not compared with scores by exact"):
        contrast(one, replace(one, method="eap"), 4)
    with pytest.raises(ValueError, match="second has 20 edges that are not those of first"):
        contrast(one, replace(one, edges=one.edges[:-1], values=one.values[:, :-1]), 4)
    with pytest.raises(ValueError, match="one independent example says nothing about chance"):
        contrast(one, replace(one, clusters=(0,) * 6), 4)


def test_circuits_share_what_they_share() -> None:
    made = compare_circuits([("a", "b"), ("b", "c")], [("b", "c"), ("c", "d"), ("d", "e")], 10)
    assert made.jaccard == 1 / 4
    assert made.by_chance == pytest.approx(0.6 / 4.4) == chance_jaccard(2, 3, 10)
    same = compare_circuits(made.both + made.only_first, made.only_first + made.both, 10)
    (said,) = same.tables(5)
    assert (
        said
        == "the same circuit: all 2 edges are in both, nothing differs: Jaccard 1 (by chance 0.11)"
    )


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> HookedModel:
    return load_model("induction")


def without_head(model: HookedModel, layer: int, head: int) -> HookedModel:
    """A copy whose head writes nothing."""
    module: Any = copy.deepcopy(model.module)
    with torch.no_grad():
        module.blocks[layer].attn.W_O[head] = 0
    return HookedModel(module, model.input, "without a head")


def test_models_are_compared_with_the_first(trained: HookedModel) -> None:
    lacking = without_head(trained, 1, 1)
    graphs = {
        "trained": edge_graph(trained), "the same": edge_graph(trained), "lacking": edge_graph(lacking),
        "untrained": edge_graph(load_model("induction", weights="untrained:1")),
    }  # fmt: skip
    made = compare_models(graphs, load_task(trained, n=24), size=20, n_random=4)
    first, same, other, untrained = made.members
    assert (first.jaccard, first.correlation) == (same.jaccard, same.correlation) == (1, 1)
    assert first.own == same.of_first == first.of_first
    assert other.jaccard < 1
    assert ("1.1", "logits") in graphs["trained"].edges
    assert np.isnan(untrained.own.value)
    assert "cannot be told from 0" in made.notes[0]
    unchanged, changed = made.contrasts
    assert all(c.difference.value == 0 and c.p == 1 for c in unchanged.edges)
    part = next(c for c in changed.parts if c.name == "1.1")
    assert (part.first > 0.1, part.second, part.p < 0.01) == (True, 0, True)
    assert len(views(series_figure(made), "line")) == 1


def test_models_that_do_not_fit_are_refused(trained: HookedModel) -> None:
    graph, task = edge_graph(trained), load_task(trained, n=8)
    with pytest.raises(ValueError, match="models one: expected two or more"):
        compare_models({"one": graph}, task, size=3)
    with pytest.raises(ValueError, match="model two has 71 edges that are not those of one"):
        compare_models(
            {"one": graph, "two": edge_graph(load_model("induction-by-hand"))}, task, size=3
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected one of: the names of two saved circuits, --to-task, or --to-model"),
        (["one"], "expected one of"),
        (["one", "two", "--to-task", "repeats"], "expected one of"),
        (["--to-task", "repeats"], "--to-task 'repeats' is the task itself"),
        (["--to-model", "shapes"], "model shapes has"),
        (["--to-model", "induction", "--size", "107"], "size 107: induction has 106 edges"),
    ],
)
def test_the_command_refuses_what_it_cannot_compare(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "induction", *words]) == 2
    assert said in capsys.readouterr().err
