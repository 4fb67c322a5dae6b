"""Circuits that are learned: masks over edges, and constants that removed edges carry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits.autograd import recording_gradients
from circuits.cleanroom import induction
from circuits.discovery import Runs, discover, edge_graph, edges_of, evaluate, pruning, score_edges
from circuits.discovery.losses import Distance
from circuits.discovery.optimal import STEPS, learn_constants
from circuits.discovery.pruning import chances, gates, prune, strongest_connected
from circuits.discovery.searching import values_of
from circuits.files import keeping
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.progress import Progress
from circuits.tasks import Task
from circuits.tasks.builtin import load_task
from circuits.tasks.metrics import accuracy, kl
from tests.edge_oracle import ConvolutionEdges, Oracle, TransformerEdges, last_logits
from tests.gates import GATES, Planted, as_convolutions, as_transformer
from tests.test_discovery import ADDITION, LAST, weighed
from tests.test_paths import drawn, gpt2_like, llama_like, pairs


def names(graph: Any, mask: np.ndarray) -> set[tuple[str, str]]:
    return {graph.edges[i] for i in np.flatnonzero(mask)}


def as_graph(edge: tuple[str, str]) -> tuple[str, str]:
    """An edge of the gates' networks as a graph of channels names it: targets by the nonlinearity behind them."""
    source, target = (end.replace("image", "input").replace("conv", "act") for end in edge)
    return source, target


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("make", [gpt2_like, llama_like])
def test_gradients_of_masks_of_a_transformer_are_those_by_definition(
    make: Callable[[], Any], share: float
) -> None:
    model, plain = make()
    clean, corrupted = drawn()
    graph = edge_graph(model)
    oracle = Oracle(TransformerEdges(plain, graph.edges), last_logits(LAST), clean, corrupted)
    wanted = oracle.slopes(torch.full((len(graph),), share, dtype=torch.float64)).sum(0)
    runs = Runs(graph, pairs(model, clean, corrupted, weighed))
    (pair,) = runs.pairs()
    off = torch.full((1, len(graph)), share, requires_grad=True)
    with recording_gradients():
        runs.patched(pair, off).sum().backward()
    assert off.grad is not None
    assert (off.grad[0] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("grain", [{"neurons": "all"}, {"spans": "0-2,3-"}, {"kv": "head"}])
def test_gradients_of_masks_are_slopes_at_every_grain(grain: dict[str, Any]) -> None:
    model, _ = llama_like()
    clean, corrupted = drawn()
    graph = edge_graph(model, **grain)
    runs = Runs(graph, pairs(model, clean, corrupted, weighed))
    (pair,) = runs.pairs()
    rng = torch.Generator().manual_seed(3)
    off = torch.rand(2, len(graph), generator=rng)
    off[:, ::4] = 0
    off[0, graph.edges_into[0]] = (
        1  # a target that is given to the bit what it was given in the other run
    )
    way = torch.randn(2, len(graph), generator=rng)
    leaf = off.clone().requires_grad_()
    with recording_gradients():
        runs.patched(pair, leaf).sum().backward()
    assert leaf.grad is not None
    step = 1e-2
    up, down = (runs.patched(pair, off + sign * step * way).sum(1) for sign in (1, -1))
    found = (leaf.grad * way).sum(1).double()
    torch.testing.assert_close(found, (up - down) / (2 * step), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("gate", ["or", "and", "2a-b"])
def test_gradients_of_masks_of_channels_are_those_by_definition(gate: str) -> None:
    planted = as_convolutions(GATES[gate])
    graph = edge_graph(planted.model)
    network = ConvolutionEdges(planted.model.module)  # type: ignore[arg-type]
    oracle = Oracle(network, lambda y: y[:, 0] - y[:, 1], planted.clean, planted.corrupted)
    w = torch.full((len(graph),), 0.1, dtype=torch.float64)
    places = [graph.index(as_graph(edge)) for edge in network.edges]
    wanted = oracle.slopes(w).sum(0)
    runs = Runs(graph, planted.task)
    (pair,) = runs.pairs()
    off = torch.full((1, len(graph)), 0.1, requires_grad=True)
    with recording_gradients():
        runs.patched(pair, off).sum().backward()
    assert off.grad is not None
    assert wanted.abs().max() > 0
    torch.testing.assert_close(off.grad[0, places].double(), wanted, atol=1e-5, rtol=1e-4)


# --- gates -------------------------------------------------------------------------------------------


def test_gates_are_hard_concrete() -> None:
    a = torch.tensor([-2.0, 0.0, 1.5])
    u = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0))
    z = gates(a, u.expand(-1, 3))
    # The chance that a gate is not shut, counted; and the formula of Louizos et al., written plainly.
    torch.testing.assert_close((z > 0).float().mean(0), chances(a), atol=5e-3, rtol=0)
    s = 1 / (1 + torch.exp(-(torch.log(u / (1 - u)) + a) / (2 / 3)))
    torch.testing.assert_close(z, (s * 1.2 - 0.1).clamp(0, 1), atol=1e-4, rtol=0)
    assert {0.0, 1.0} <= set(z[:, 1].tolist())


# --- known circuits ----------------------------------------------------------------------------------


def test_pruning_finds_the_hand_made_circuits() -> None:
    model = load_model("addition-by-hand")
    graph = edge_graph(model)
    task = load_task(model, n=16, seed=1)
    found = discover(graph, task, "exact", search="pruning", size=3, n_random=3, n_curves=1)
    assert set(edges_of(found.circuit)) == ADDITION
    assert found.evaluation.faithfulness.value == 1
    assert found.stability is None


@pytest.mark.nightly
def test_pruning_finds_the_edges_of_the_induction_circuit() -> None:
    model = load_model("induction-by-hand")
    graph, task = edge_graph(model), load_task(model, n=16, seed=1).find
    wanted = {edge for edge in induction.TRUE_EDGES if edge[0] != "position"}
    assert names(graph, prune(Runs(graph, task), 5)) == wanted
    assert names(graph, prune(Runs(graph, task, shift=1), 7)) == set(induction.TRUE_EDGES)


def pruned(planted: Planted, n: int) -> set[tuple[str, str]]:
    graph = edge_graph(planted.model)
    return names(graph, prune(Runs(graph, planted.task), n, steps=120))


def test_pruning_keeps_both_sides_of_an_and_and_one_of_an_or() -> None:
    both = as_transformer(GATES["and"])
    assert pruned(both, 5) == set(both.circuit("a a>m b b>m m>out"))
    either = as_transformer(GATES["or"])
    ways = [set(either.circuit(wires)) for wires in ("a a>m m>out", "b b>m m>out")]
    assert pruned(either, 3) in ways


def test_pruning_finds_channels() -> None:
    both = as_convolutions(GATES["and"])
    wanted = both.circuit("a a>m b b>m m>out")
    assert pruned(both, 5) == {as_graph(edge) for edge in wanted}


def test_as_many_connected_edges_are_kept_as_asked_for() -> None:
    graph = edge_graph(load_model("induction-by-hand"))
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 17, 40, 71):
        for _ in range(5):
            worth = rng.standard_normal(len(graph))
            kept = strongest_connected(graph, worth, n)
            assert (graph.connected(kept) == kept).all()
            assert kept.sum() == n
    # The strongest edges make a path of three; with room for one only an edge straight to the output is left.
    chain = [("token", "0.0.v"), ("0.0", "1.0.v"), ("1.0", "logits")]
    worth = np.where(graph.mask(chain), 1.0, 0.0)
    assert names(graph, strongest_connected(graph, worth, 3)) == set(chain)
    (alone,) = names(graph, strongest_connected(graph, worth, 1))
    assert alone[1] == "logits"


# --- the same again ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_model() -> tuple[HookedModel, Task]:
    model, _ = gpt2_like()
    return model, pairs(model, *drawn(6), weighed)


@pytest.mark.parametrize("optimal", [False, True])
def test_the_same_seed_prunes_the_same_and_a_stopped_search_goes_on(
    random_model: tuple[HookedModel, Task], tmp_path: Path, optimal: bool, monkeypatch: Any
) -> None:
    model, task = random_model
    graph = edge_graph(model)
    runs = Runs(graph, task, ablation="mean" if optimal else "counterpart", batch=4)
    monkeypatch.setattr(pruning, "_CHUNK", 8)
    given: dict[str, Any] = {"steps": 24, "optimal": optimal}
    states: list[Any] = []

    def noting(name: str, make: Callable[[], Any]) -> Any:
        states.append(make())
        return states[-1]

    whole = prune(runs, 20, keep=noting, **given)
    keep, kept = keeping(tmp_path), list[str]()

    def stopping(name: str, make: Callable[[], Any]) -> Any:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(name)
        return keep(name, make)

    with pytest.raises(KeyboardInterrupt):
        prune(runs, 20, keep=stopping, **given)
    done: list[int] = []
    again = prune(runs, 20, keep=keep, progress=lambda now, of: done.append(now), **given)
    assert (again == whole).all()
    # The whole state after each part is the same as that of the search that was never stopped.
    assert [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())] == states
    assert [state["done"] for state in states] == [8, 16, 24]
    assert done == [8, 16, *range(17, 25), 24], "what was kept at once, then each step"
    assert (prune(runs, 20, seed=1, **given) != whole).any()


# --- the distance ------------------------------------------------------------------------------------


def test_the_distance_is_0_for_the_model_and_1_without_edges(
    random_model: tuple[HookedModel, Task],
) -> None:
    model, task = random_model
    graph = edge_graph(model)
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    distance = Distance.of(runs)
    half = np.random.default_rng(1).random(len(graph)) < 0.5
    empty, full, own = values_of(runs, [np.zeros_like(half), np.ones_like(half), half])
    wanted = ((own - full) ** 2).mean() / ((empty - full) ** 2).mean()
    off = torch.from_numpy(np.stack([~half, half & False, half | True])).float()
    found = [float(distance.at(pair, row[None])) for row in off]
    assert found == pytest.approx([wanted, 0, 1], rel=1e-4, abs=1e-9)
    # Of KL divergence it is the divergence itself.
    runs = Runs(graph, task.with_metric(kl))
    (pair,) = runs.pairs()
    empty, own = values_of(runs, [np.zeros_like(half), half])
    assert float(Distance.of(runs).at(pair, off[:1])) == pytest.approx(own.mean() / empty.mean())


# --- optimal constants -------------------------------------------------------------------------------


def test_constants_are_what_the_circuit_is_evaluated_with_and_no_worse_than_means(
    random_model: tuple[HookedModel, Task],
) -> None:
    model, task = random_model
    graph = edge_graph(model)
    kept = np.random.default_rng(2).random(len(graph)) < 0.5
    constants = learn_constants(graph, task, kept, steps=40)
    again = learn_constants(graph, task, kept, steps=40)
    assert all(torch.equal(value, again[name]) for name, value in constants.items())
    by_means, optimal = (
        Runs(graph, task, ablation="mean"),
        Runs(graph, task, ablation="optimal", constants=constants),
    )
    apart = []
    for runs in (by_means, optimal):
        full, own = values_of(runs, [np.ones(len(graph), bool), kept])
        apart.append(((own - full) ** 2).mean())
    assert apart[1] < 0.4 * apart[0]
    # Every source carries its constant, the same at all positions of all examples.
    (pair,) = optimal.pairs()
    for sites, _ in graph.source_sites():
        for site in sites:
            assert torch.equal(pair.other[site], constants[site].float().expand_as(pair.clean[site]))  # fmt: skip


@pytest.mark.parametrize("grain", [{"neurons": "all"}, {"spans": "0-2,3-"}, {"kv": "head"}])
def test_constants_are_learned_at_every_grain(grain: dict[str, Any]) -> None:
    model, _ = llama_like()
    graph, task = edge_graph(model, **grain), pairs(model, *drawn(4), weighed)
    kept = np.random.default_rng(2).random(len(graph)) < 0.5
    constants = learn_constants(graph, task, kept, steps=10)
    by_means = Runs(graph, task, ablation="mean")
    optimal = Runs(graph, task, ablation="optimal", constants=constants)
    full = np.ones(len(graph), bool)
    before, after = (values_of(runs, [full, kept]) for runs in (by_means, optimal))
    assert ((after[1] - after[0]) ** 2).mean() < 0.9 * ((before[1] - before[0]) ** 2).mean()


def test_constants_of_a_hand_made_gate_are_those_worked_out_by_hand() -> None:
    # y = a + b - 1 where m is active. In the circuit without b, m reads a + constant - 1, and the model's y is 1 on
    # clean examples (a = b = 1), so the constant has to become 1, which is also the mean: nothing has to be learned.
    # Of the metric's effect on examples with b = 0 nothing is known to the constant.
    planted = as_transformer(GATES["and"])
    graph = edge_graph(planted.model)
    kept = graph.mask(planted.circuit("a a>m m>out"))
    constants = learn_constants(graph, planted.task, kept, steps=100)
    runs = Runs(graph, planted.task, ablation="optimal", constants=constants)
    full, own = values_of(runs, [np.ones(len(graph), bool), kept])
    np.testing.assert_allclose(own, full, atol=1e-3)


def test_a_circuit_is_found_and_evaluated_with_optimal_constants() -> None:
    model = load_model("addition-by-hand")
    graph, task = edge_graph(model), load_task(model, n=16, seed=1)
    given: dict[str, Any] = {"size": 3, "n_random": 2, "n_curves": 1, "ablation": "optimal"}
    stages: list[str] = []

    def stage(name: str) -> Progress:
        stages.append(name)
        return lambda done, total: (
            stages.append(f"{done} of {total}") if "constants" in name else None
        )

    found = discover(graph, task, "eap-ig", search="greedy", check=0, stage=stage, **given)
    made = found.evaluation
    steps = [f"{done} of {STEPS}" for done in range(STEPS + 1)]
    assert stages[-len(steps) - 2 :] == ["optimal constants", *steps, "evaluation"]
    assert made.ablation == "optimal"
    assert found.scores.settings["ablation"] == "mean"
    assert found.notes[0].startswith("edges were scored by mean ablation")
    again = evaluate(
        graph, task.test, edges_of(found.circuit), find=task.find, ablation="optimal", n_random=2
    )
    np.testing.assert_array_equal(again.own, made.own)
    assert any("constants that were learned" in line for line in made.tables() if isinstance(line, str))  # fmt: skip


def test_the_number_of_steps_of_pruning_is_asked_for() -> None:
    model = load_model("addition-by-hand")
    graph, task = edge_graph(model), load_task(model, n=8)
    told: list[int] = []
    stage = lambda name: (lambda done, total: told.append(total)) if name == "search" else None  # noqa: E731
    given: dict[str, Any] = {"check": 0, "n_random": 0, "n_curves": 0, "size": 3, "stage": stage}
    discover(graph, task, "eap", search="pruning", pruning_steps=7, **given)
    assert set(told) == {7}
    short = discover(graph, task, "eap", search="pruning", pruning_steps=1, **given | {"size": 5})
    n = len(edges_of(short.circuit))
    assert n < 5
    assert short.notes[0].startswith(f"5 edges were asked for, and the circuit has {n}: ")
    with pytest.raises(
        ValueError, match="pruning_steps 7 belong to the search pruning, not to top"
    ):
        discover(graph, task, "eap", search="top", pruning_steps=7, **given)


# --- refused -----------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_line(random_model: tuple[HookedModel, Task]) -> None:
    model, task = random_model
    graph = edge_graph(model)
    runs = Runs(graph, task)
    planted = as_transformer(GATES["xor"])
    xor = Runs(edge_graph(planted.model), planted.task)
    adding = load_model("addition-by-hand")
    right = load_task(adding, n=16, seed=1).with_metric(accuracy)
    for made, said in (
        (lambda: prune(runs, 0), "size 0: gpt2-like has"),
        (lambda: prune(runs, 5, steps=0), "steps 0 must be at least 1"),
        (lambda: prune(runs, 5, optimal=True), "ablation counterpart has no constants"),
        (lambda: prune(xor, 3), "is the same with every edge removed, on every example"),
        (lambda: prune(Runs(edge_graph(adding), right), 3), "metric accuracy has no gradient"),
        (lambda: score_edges(graph, task, ablation="optimal"), "constants are learned for a circuit"),
        (lambda: Runs(graph, task, ablation="optimal"), "needs those that were learned"),
        (lambda: Runs(graph, task, constants={}), "constants belong to the ablation optimal"),
        (lambda: evaluate(graph, task, graph.mask([]), ablation="optimal"), "expected find=task.find"),
        (lambda: discover(graph, task, search="refine", ablation="optimal"), "the search refine tries many"),
        (lambda: discover(graph, task, ablation="optimal", alternatives=2), "alternatives 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said) as caught:
            made()
        assert "\n" not in str(caught.value)
