"""Second-order effects of edges: those of gates, by hand, and of random models, by the definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.discovery import EdgePairs, edge_graph, pair_edges, score_edges, strongest
from circuits.discovery.pairs import Effects, Growth, behind, relation_of, removed
from circuits.examples import Examples
from circuits.experiments.statistics import Interval
from circuits.tasks import Question, Task
from circuits.tasks.metrics import logit_difference
from tests.edge_oracle import Oracle, TransformerEdges, last_logits
from tests.gates import GATES, N_PAIRS, Gate, Planted, as_transformer
from tests.test_paths import drawn, gpt2_like, llama_like
from tests.test_relp import LENGTH, RIGHT, WRONG, task_of

# --- gates ---------------------------------------------------------------------------------------


def paired(planted: Planted, *wires: str) -> EdgePairs:
    edges = [planted.wires[wire] for wire in wires]
    return pair_edges(edge_graph(planted.model), planted.task, edges)


@pytest.mark.parametrize("gate", [g for g in GATES.values() if g.both], ids=lambda g: g.name)
def test_the_variables_of_gates(gate: Gate) -> None:
    planted = as_transformer(gate)
    (found,) = paired(planted, "a", "b").pairs
    assert gate.both is not None
    for way, both in zip(("noising", "denoising"), gate.both, strict=True):
        effects: Effects = getattr(found, way)
        rows = [getattr(gate.rows[w], way) if w in gate.rows else 0 for w in "ab"]
        for values, wanted in ((effects.first, rows[0]), (effects.second, rows[1])):
            np.testing.assert_allclose(values, [wanted] * N_PAIRS, atol=1e-6)
        np.testing.assert_allclose(effects.both, [both] * N_PAIRS, atol=1e-6)
        assert effects.interval.value == pytest.approx(both - sum(rows), abs=1e-6)
    assert found.relation == gate.relation


@pytest.mark.parametrize("name", ["or", "and", "a-b+c", "backup", "dead"])
def test_what_removing_a_does_to_the_unit(name: str) -> None:
    """The unit's direct effect is what it adds in the corrupted run less what it adds now."""
    gate = GATES[name]
    planted = as_transformer(gate)
    (found,) = paired(planted, "a", "m>out").pairs
    growth = next(g for g in found.growth if g.removed == planted.wires["a"])
    assert gate.m_adds is not None
    corrupted = gate.m_adds[0] + gate.rows["m>out"].noising if "m>out" in gate.rows else 0.0
    assert growth.source == "mlp:0"
    assert growth.before == pytest.approx(corrupted - gate.m_adds[0], abs=1e-6)
    assert growth.after == pytest.approx(corrupted - gate.m_adds[1], abs=1e-6)


def test_a_backup_is_told_from_or() -> None:
    """Both have the same rows; the backup's unit steps in once a is removed, whichever edges show it."""
    (found,) = paired(as_transformer(GATES["backup"]), "a", "b").pairs
    best = max(found.growth, key=lambda g: g.amount)
    assert (best.source, best.before, best.after) == ("mlp:0", 0, -1)
    (same,) = paired(as_transformer(GATES["or"]), "a", "b").pairs
    assert all(g.amount == 0 for g in same.growth)
    for way in ("noising", "denoising"):
        assert getattr(found, way).means == getattr(same, way).means
    # Two edges into the output are additive; that m steps in shows when all that the head puts out is removed.
    (out,) = paired(as_transformer(GATES["backup"]), "a>out", "m>out").pairs
    assert out.noising.means == (-1, 0, -1)
    assert out.relation == "backup"
    (plain,) = paired(as_transformer(GATES["2a-b"]), "a>out", "b>out").pairs
    assert plain.relation == "additive"


def test_edges_in_a_row_are_none_of_these() -> None:
    """Either of two edges of one path stops it, and either restores it."""
    (found,) = paired(as_transformer(GATES["sigmoid"]), "a", "m>out").pairs
    np.testing.assert_allclose(found.noising.means, [-1] * 3, atol=1e-3)
    np.testing.assert_allclose(found.denoising.means, [1] * 3, atol=1e-3)
    assert found.relation is None


def test_pairs_of_xor_are_none_of_these_or_additive() -> None:
    found = paired(as_transformer(GATES["xor"]), "a", "b", "a>out", "b>out", "a>m", "b>m")
    assert len(found.pairs) == 15
    assert {p.relation for p in found.pairs} == {None, "additive"}
    planted = as_transformer(GATES["xor"])
    assert found.of(planted.wires["b>m"], planted.wires["a>m"]).noising.means == (0, -2, 0)


# --- random models -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[gpt2_like, llama_like])
def measured(request: pytest.FixtureRequest) -> tuple[Oracle, EdgePairs]:
    make: Callable[[], Any] = request.param
    model, plain = make()
    graph, (clean, corrupted) = edge_graph(model), drawn(2, LENGTH)
    weights = torch.zeros(20, dtype=torch.float64)
    weights[RIGHT], weights[WRONG] = 1, -1
    oracle = Oracle(TransformerEdges(plain, graph.edges), last_logits(weights), clean, corrupted)
    task = task_of(model, clean, corrupted)
    chosen = [
        *strongest(score_edges(graph, task, "exact"), 2),
        ("0.1", "mlp:1"),
        ("mlp:0", "logits"),
    ]
    return oracle, pair_edges(graph, task, list(dict.fromkeys(chosen)))


def close(found: np.ndarray, wanted: Tensor, scale: float) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * scale)


def test_effects_are_those_of_the_definition(measured: tuple[Oracle, EdgePairs]) -> None:
    oracle, found = measured
    scale = float(oracle.metric(oracle.logits).abs().max())
    close(found.clean, oracle.metric(oracle.logits), scale)
    close(found.corrupted, oracle.metric(oracle.other_logits), scale)
    for pair in found.pairs:
        for effects, base in ((pair.noising, "clean"), (pair.denoising, "corrupted")):
            sets = ([pair.first], [pair.second], [pair.first, pair.second])
            one, two, both = (oracle.together(edges, base) for edges in sets)  # type: ignore[arg-type]
            close(effects.first, one, scale)
            close(effects.second, two, scale)
            close(effects.both, both, scale)
            assert effects.interval.value == pytest.approx(
                float((both - one - two).mean()), abs=1e-4 * scale
            )


def test_growth_is_that_of_the_definition(measured: tuple[Oracle, EdgePairs]) -> None:
    oracle, found = measured
    edges = list(oracle.network.edges)

    def value(off: list[tuple[str, str]]) -> float:
        w = torch.tensor([float(e in off) for e in edges], dtype=torch.float64)
        return float(oracle.value(w).mean())

    assert any(pair.growth for pair in found.pairs)
    for pair in found.pairs:
        for growth in pair.growth:
            source = growth.removed[0]
            computed = source not in ("token", "position")
            gone = [e for e in edges if e[0] == source] if computed else [growth.removed]
            direct = [(growth.source, "logits")]
            assert growth.before == pytest.approx(value(direct) - value([]), abs=1e-4)
            assert growth.after == pytest.approx(value([*gone, *direct]) - value(gone), abs=1e-4)
            other = pair.second if growth.removed == pair.first else pair.first
            assert growth.source == other[0] or other[1] != "logits"


def test_what_lies_behind_an_edge() -> None:
    graph = edge_graph(gpt2_like()[0])

    def names(source: str, target: str) -> set[str]:
        return {graph.sources[u] for u in behind(graph, graph.index((source, target)))}

    assert names("0.1", "logits") == {"0.1"}
    assert names("token", "mlp:1") == {"mlp:1"}
    assert names("token", "1.0.k") == {"1.0", "mlp:1"}
    assert names("token", "0.1.q") == {"0.1", "mlp:0", "1.0", "1.1", "mlp:1"}
    gone = removed(graph, graph.index(("1.0", "mlp:1")))
    assert [graph.edges[i] for i in np.flatnonzero(gone)] == [("1.0", "mlp:1"), ("1.0", "logits")]
    assert removed(graph, graph.index(("token", "mlp:1"))).sum() == 1


# --- names ---------------------------------------------------------------------------------------


def effects(first: float, second: float, both: float, spread: float = 0.0) -> Effects:
    """Effects with these means, with an interval of the interaction of this width on either side."""
    over = both - first - second
    one, two, joint = (np.array([float(x)]) for x in (first, second, both))
    return Effects(one, two, joint, Interval(over, over - spread, over + spread))


AS_OR = effects(0, 0, -1), effects(1, 1, 1)
GROWS = (Growth(("a", "b"), "m", 0.1, -0.6),)


@pytest.mark.parametrize(
    ("ways", "growth", "into_output", "wanted"),
    [
        (AS_OR, (), False, "redundant"),
        (AS_OR, GROWS, False, "backup"),
        (AS_OR[::-1], GROWS, False, "conjunctive"),
        ((effects(-1, -2, -3), effects(1, 2, 3)), GROWS, False, "additive"),
        ((effects(-1, -2, -3), effects(1, 2, 3)), GROWS, True, "backup"),
        ((effects(-1, -2, -3), effects(1, 2, 3)), (Growth(("a", "b"), "m", -2, -2.2),), True, "additive"),
        ((effects(-0.2, -0.2, -1), effects(0.8, 0.7, 1)), (), False, "redundant"),
        # A source that did nothing steps in, one that works the other way does not, nor where nothing was done.
        ((effects(-1, 0, -1), effects(1, 0, 1)), GROWS, True, "backup"),
        ((effects(1, 0, 1), effects(-1, 0, -1)), GROWS, True, None),
        ((effects(0, 0, 0), effects(0, 0, 0)), GROWS, True, None),
        # The last normalisation makes a little interaction.
        ((effects(-1, 0, -1.05), effects(1, 0, 0.95)), GROWS, True, "backup"),
        ((effects(-1, 0, -1.3), effects(1, 0, 0.7)), GROWS, True, None),
        # An effect that chance explains has no name, nor has half an interaction.
        ((effects(0, 0, -1, 1.5), effects(1, 1, 1, 1.5)), (), False, None),
        ((effects(-1, -2, -3, 0.5), effects(1, 2, 3)), (), False, None),
        ((effects(-0.6, -0.1, -1), effects(0.6, 0.3, 1)), (), False, None),
        # An edge that does nothing, and two that do nothing.
        ((effects(-1, 0, -1), effects(1, 0, 1)), (), False, None),
        ((effects(0, 0, 0), effects(0, 0, 0)), (), False, None),
    ],
)  # fmt: skip
def test_relations(
    ways: tuple[Effects, Effects], growth: tuple[Growth, ...], into_output: bool, wanted: Any
) -> None:
    assert relation_of(*ways, growth, into_output) == wanted


def test_rounding_has_no_name() -> None:
    tiny = effects(1e-8, 0, -3e-8), effects(0, 1e-8, 0)
    assert relation_of(*tiny, (), False, noise=1e-6) is None


# --- what is returned ----------------------------------------------------------------------------


def test_results_as_json_and_tables() -> None:
    found = paired(as_transformer(GATES["backup"]), "a", "b", "a>out")
    made = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (made["clean"], made["corrupted"], len(made["pairs"])) == (1, 0, 3)
    (row,) = [r for r in made["pairs"] if r["relation"] == "backup"]
    assert row["noising"]["interaction"] == {"value": -1, "low": -1, "high": -1}
    assert {"removed": ["token", "0.0.v"], "source": "mlp:0", "before": 0, "after": -1} in row[
        "growth"
    ]
    noising, denoising, line = found.tables(2)
    assert not isinstance(noising, str)
    assert not isinstance(denoising, str)
    assert noising.title.startswith("noising: change of")
    assert "2 of 3 pairs" in denoising.title
    assert ("token -> 0.0.v", "token -> 0.1.v", 0, 0, -1, -1, "-1 to -1", "backup") in noising.rows
    assert line == "backup: without token -> 0.0.v the direct effect of mlp:0 goes from 0 to -1"


def test_texts_that_are_each_others_counterparts_are_told() -> None:
    """Each direction then is the other one with its sign changed, so that no relation shows."""
    planted = as_transformer(GATES["or"])
    both = (
        torch.cat([planted.clean, planted.corrupted]),
        torch.cat([planted.corrupted, planted.clean]),
    )
    sides = (((1,), (0,)),) * N_PAIRS + (((0,), (1,)),) * N_PAIRS
    asked = tuple(Question((4,), answers=(a,), against=(b,)) for a, b in sides)
    source, other = (Examples.given(planted.model, tokens) for tokens in both)
    task = Task("both ways", source, asked, logit_difference, counterparts=other)
    edges = [planted.wires["a"], planted.wires["b"]]
    found = pair_edges(edge_graph(planted.model), task, edges)
    assert found.pairs[0].relation is None
    (note,) = found.notes
    assert note.endswith("redundant and conjunctive cannot be told apart")
    assert [*found.tables(1)][-1] == note
    assert not paired(planted, "a", "b").notes


def test_stopped_runs_go_on_and_progress_is_told() -> None:
    planted, kept, told = as_transformer(GATES["and"]), dict[str, Any](), list[tuple[int, int]]()
    graph, edges = edge_graph(planted.model), [planted.wires["a"], planted.wires["b"]]

    def keep(name: str, make: Callable[[], Any]) -> Any:
        return (
            kept.setdefault(name, json.loads(json.dumps(make())))
            if name not in kept
            else kept[name]
        )

    first = pair_edges(
        graph, planted.task, edges, keep=keep, batch=1, progress=lambda n, of: told.append((n, of))
    )
    assert sorted(kept) == [
        "denoising batch 0",
        "denoising batch 1",
        "noising batch 0",
        "noising batch 1",
    ]
    assert told[-1][0] == told[-1][1]
    assert [n for n, _ in told] == sorted(n for n, _ in told)
    again = pair_edges(graph, planted.task, edges, keep=keep, batch=1)
    assert again.to_dict() == first.to_dict()


def test_refusals_are_one_clear_line() -> None:
    planted = as_transformer(GATES["or"])
    graph, task, wires = edge_graph(planted.model), planted.task, planted.wires
    with pytest.raises(ValueError, match="1 edges: expected 2 to 32"):
        pair_edges(graph, task, [wires["a"]])
    with pytest.raises(ValueError, match="33 edges: expected 2 to 32"):
        pair_edges(graph, task, graph.edges[:33])
    with pytest.raises(ValueError, match=r"edge token -> 0.0.v is given twice"):
        pair_edges(graph, task, ["token -> 0.0.v", wires["a"]])
    with pytest.raises(KeyError, match=r"token -> 0.9.v.*did you mean token -> 0"):
        pair_edges(graph, task, ["token -> 0.9.v", wires["a"]])
    with pytest.raises(
        ValueError, match=r"ablation zero: pairs need denoising.*expected counterpart"
    ):
        pair_edges(graph, task, list(wires.values()), ablation="zero")
    found = pair_edges(graph, task, [wires["a"], wires["b"]])
    with pytest.raises(KeyError, match=r"no pair of token -> 0.0.v and 0.0 -> mlp:0"):
        found.of(wires["a"], wires["a>m"])
    with pytest.raises(ValueError, match="n 0: expected 1 to 37, the number of edges"):
        strongest(score_edges(graph, task, "eap"), 0)
