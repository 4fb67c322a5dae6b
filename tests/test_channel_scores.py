"""Scores of edges between channels: gates worked out by hand, baselines and relevance by their definitions, pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.discovery import EdgePairs, EdgeScores, Runs, pair_edges, score_edges
from circuits.discovery.channels import ChannelGraph
from circuits.discovery.pairs import Effects
from circuits.discovery.searching import values_of
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks.metrics import UnitActivation
from tests.conftest import seeded
from tests.gates import COLUMNS, GATES, N_PAIRS, Gate, Planted, as_convolutions
from tests.plain_transformer import Edge
from tests.test_channel_graph import (
    NETS,
    Dense,
    Grouped,
    Inverted,
    Part,
    Sources,
    by_hand,
    net,
    runs_by_hand,
    task_of,
)

# --- gates -------------------------------------------------------------------------------------------

CALLED = {"image": "input", "conv1": "act1", "conv2": "act2"}
"""What a graph of channels calls what the gates' tables call otherwise: targets by what is made of them."""


def called(name: str) -> str:
    site, _, channel = name.partition(":")
    return f"{CALLED.get(site, site)}:{channel}"


def as_channels(edge: Edge) -> Edge:
    return called(edge[0]), called(edge[1])


@pytest.fixture(scope="module", params=list(GATES))
def planted(request: pytest.FixtureRequest) -> Planted:
    made = as_convolutions(GATES[request.param])
    return replace(made, wires={wire: as_channels(edge) for wire, edge in made.wires.items()})


def dead_edges(planted: Planted, scores: EdgeScores) -> list[int]:
    return [i for i, edge in enumerate(scores.edges) if edge not in planted.expected]


BY_ACTIVATIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    # What lies before a gate's unit is linear in alpha: interpolating one layer is interpolating the image.
    ("left", "eap-ig-activations", {"steps": 5, "rule": "left"}),
    ("midpoint", "eap-ig-activations", {"steps": 6}),
)


@pytest.mark.parametrize(("column", "method", "given"), [*COLUMNS, *BY_ACTIVATIONS])
def test_gates_score_what_was_worked_out_by_hand_and_dead_edges_nothing(
    planted: Planted, column: str, method: Any, given: Any
) -> None:
    graph = ChannelGraph(planted.model)
    assert len(graph) == 30
    found = score_edges(graph, planted.task, method, **given)
    wanted = planted.column(column, graph.edges)
    torch.testing.assert_close(torch.from_numpy(found.values), wanted, rtol=1e-4, atol=1e-5)
    dead = dead_edges(planted, found)
    assert len(dead) >= 20
    assert (found.values[:, dead] == 0).all()


def test_relevance_of_gates(planted: Planted) -> None:
    """As `eap` where units are ReLUs; a sigmoid is x sigmoid(10)/10 with x = 20 a - 10: a slope of 1 + tanh(5)."""
    graph = ChannelGraph(planted.model)
    found = score_edges(graph, planted.task, "relp")
    wanted = planted.column("eap", graph.edges).clone()
    if planted.gate.name == "sigmoid":
        at = [graph.index(planted.wires[wire]) for wire in ("a", "a>m")]
        wanted[:, at] = -1 - float(np.tanh(5))
    torch.testing.assert_close(torch.from_numpy(found.values), wanted, rtol=1e-4, atol=1e-5)
    assert (found.values[:, dead_edges(planted, found)] == 0).all()


def test_baselines_of_gates(planted: Planted) -> None:
    """Each kernel of `conv1` has four weights of 1/4 at most; those of `conv2` and `fc` are the gate's own numbers."""
    graph, gate = ChannelGraph(planted.model), planted.gate
    found = score_edges(graph, planted.task, "weights")
    weights = dict(zip(graph.edges, found.mean.tolist(), strict=True))
    assert weights[called("image:0"), called("conv1:0")] == pytest.approx(0.5)
    assert weights[called("image:0"), called("conv1:1")] == 0
    for i, letter in enumerate("abc"):
        assert weights[planted.wires[f"{letter}>m"]] == pytest.approx(abs(gate.into[i]))
        assert weights[planted.wires[f"{letter}>out"]] == pytest.approx(abs(gate.direct[i]))
    assert weights[planted.wires["m>out"]] == pytest.approx(abs(gate.out))
    sizes = score_edges(graph, planted.task, "activations")
    act = nn.ReLU() if gate.act == "relu" else nn.Sigmoid()
    for row, pair in zip(sizes.values, range(N_PAIRS), strict=True):
        own = dict(zip(graph.edges, row.tolist(), strict=True))
        values = torch.tensor(gate.values(pair, corrupted=False))
        # What `conv1` makes is the variable plus 1, and after its nonlinearity one number is read by `conv2`.
        for i, letter in enumerate("abc"):
            read = act(values[i] + 1) if gate.act == "relu" else values[i] + 1
            assert own[planted.wires[f"{letter}>m"]] == pytest.approx(
                float(read * abs(gate.into[i])), rel=1e-5
            )


@pytest.mark.parametrize("gate", [g for g in GATES.values() if g.both], ids=lambda g: g.name)
def test_pairs_of_gates_are_named(gate: Gate) -> None:
    planted = as_convolutions(gate)
    edges = [as_channels(planted.wires[wire]) for wire in "ab"]
    (found,) = pair_edges(ChannelGraph(planted.model), planted.task, edges).pairs
    assert gate.both is not None
    for way, both in zip(("noising", "denoising"), gate.both, strict=True):
        effects: Effects = getattr(found, way)
        rows = [getattr(gate.rows[w], way) if w in gate.rows else 0 for w in "ab"]
        for values, wanted in ((effects.first, rows[0]), (effects.second, rows[1])):
            np.testing.assert_allclose(values, [wanted] * N_PAIRS, atol=1e-5)
        np.testing.assert_allclose(effects.both, [both] * N_PAIRS, atol=1e-5)
    assert found.relation == gate.relation


def test_the_backups_unit_steps_in_once_a_is_removed() -> None:
    planted = as_convolutions(GATES["backup"])
    a, b = (as_channels(planted.wires[w]) for w in "ab")
    (found,) = pair_edges(ChannelGraph(planted.model), planted.task, [a, b]).pairs
    best = max(found.growth, key=lambda g: g.amount)
    assert best.source == called("act2:1")
    assert (best.before, best.after) == (0, pytest.approx(-1, abs=1e-5))


# --- pairs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_effects_of_pairs_are_those_of_passes_by_hand(name: str) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    chosen = [graph.edges[i] for i in (0, len(graph) // 3, len(graph) // 2, len(graph) - 5)]
    found: EdgePairs = pair_edges(graph, task, chosen)
    parts, clean, corrupted = runs_by_hand(model, task)
    images = {"noising": (clean, corrupted), "denoising": (corrupted, clean)}
    for pair in found.pairs:
        for way, (image, other) in images.items():
            carried = by_hand(parts, other, {})[0]

            def value(*edges: Edge, image: Tensor = image, carried: Sources = carried) -> Tensor:
                return by_hand(parts, image, dict.fromkeys(edges, 1.0), carried)[1][:, 1]

            effects: Effects = getattr(pair, way)
            sets = ([pair.first], [pair.second], [pair.first, pair.second])
            for made, edges in zip(
                (effects.first, effects.second, effects.both), sets, strict=True
            ):
                wanted = (value(*edges) - value()).numpy()
                np.testing.assert_allclose(made, wanted, atol=1e-10, rtol=1e-8)


# --- relevance ---------------------------------------------------------------------------------------


def proportional(part: Part, given: Tensor, found: Sources) -> Part:
    """A part whose nonlinearity is the given one's value times what it is given: f(x0)/x0, f'(0) where both are 0."""
    value = part.put_out(given, found)
    ratio = torch.where(given == 0, torch.zeros_like(given), value / given)
    return replace(part, put_out=lambda x, _: x * ratio)


def gated(part: Part, given: Tensor, found: Sources) -> Part:
    """A gate, each of whose factors counts half: (a b0 + a0 b) / 2, with b = x sigmoid(x0)/x0."""
    a, b = found["act"], given.sigmoid()[:, :, None, None]
    ratio = given.sigmoid() / given

    def put_out(x: Tensor, s: Sources) -> Tensor:
        return (s["act"] * b + a * (x * ratio)[:, :, None, None]) / 2

    return replace(part, put_out=put_out)


def by_rules(parts: list[Part], image: Tensor) -> list[Part]:
    """The network with every nonlinearity replaced by a linear function of the same value on these images."""
    found: dict[str, Tensor] = {"input": image}
    made = []
    for part in parts:
        given = part.given(found)
        if part.source:
            found[part.source] = part.put_out(given, found)
            made.append((gated if part.target == "gate" else proportional)(part, given, found))
        else:
            made.append(part)
    return made


@pytest.mark.parametrize("name", NETS)
def test_relp_is_the_derivative_of_the_network_by_its_rules(name: str) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    scores = score_edges(graph, task, "relp")
    parts, image, other = runs_by_hand(model, task)
    carried = by_hand(parts, other, {})[0]
    with torch.no_grad():
        rules = by_rules(parts, image)
    torch.testing.assert_close(by_hand(rules, image, {})[1], by_hand(parts, image, {})[1])
    step, every = 1e-5, 1 + len(graph) // 60
    for e in range(0, len(graph), every):
        up, down = (
            by_hand(rules, image, {graph.edges[e]: share}, carried)[1][:, 1]
            for share in (step, -step)
        )
        wanted = ((up - down) / (2 * step)).numpy()
        np.testing.assert_allclose(scores.values[:, e], wanted, atol=1e-8, rtol=1e-5)
    plain = score_edges(graph, task, "eap").values
    linear = name in ("residual",)  # nothing but ReLUs, whose rule is their gradient
    assert np.allclose(plain, scores.values, atol=1e-9) == linear


# --- baselines ---------------------------------------------------------------------------------------


def middle(value: Tensor) -> Tensor:
    return value[(..., *(n // 2 for n in value.shape[2:]))]


@pytest.mark.parametrize("name", NETS)
def test_weights_are_those_with_which_the_middle_of_a_target_reads_a_source(name: str) -> None:
    model = net(name)
    graph = ChannelGraph(model)
    norms = graph.weight_norms()
    parts, image, _ = runs_by_hand(model, task_of(model))
    found = by_hand(parts, image[:1], {})[0]
    wanted: dict[Edge, float] = {}
    for part in parts:
        # Random values, so that max pooling takes one of each window.
        values = {n: torch.randn_like(x).requires_grad_() for n, x in found.items()}
        try:
            given = middle(part.given(values))[0]
        except KeyError:
            continue
        for j, number in enumerate(given):
            slopes = torch.autograd.grad(
                number, list(values.values()), retain_graph=True, allow_unused=True
            )
            for source, slope in zip(values, slopes, strict=True):
                for i, own in enumerate([] if slope is None else slope[0]):
                    wanted[f"{source}:{i}", f"{part.target}:{j}"] = float(own.norm())
    np.testing.assert_allclose(norms, [wanted[e] for e in graph.edges], rtol=1e-9, atol=1e-12)
    assert (norms > 0).all()


@pytest.mark.parametrize("name", NETS)
def test_sizes_are_root_mean_squares_of_what_sources_add(name: str) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    found = score_edges(graph, task, "activations")
    parts, image, _ = runs_by_hand(model, task)
    clean = by_hand(parts, image, {})[0]
    of = {part.target: part for part in parts}
    for e, (source, target) in enumerate(graph.edges):
        (a, i), (b, j) = source.rsplit(":", 1), target.rsplit(":", 1)
        without = {**clean, a: clean[a].clone()}
        without[a][:, int(i)] = 0
        with torch.no_grad():
            added = (of[b].given(clean) - of[b].given(without))[:, int(j)]
        wanted = added.reshape(len(added), -1).square().mean(1).sqrt()
        np.testing.assert_allclose(found.values[:, e], wanted.numpy(), rtol=1e-8, atol=1e-12)
    alone = replace(task, counterparts=None)
    np.testing.assert_array_equal(score_edges(graph, alone, "activations").values, found.values)


@pytest.mark.parametrize("kind", [Dense, Inverted, Grouped])
def test_baselines_of_every_kind_of_network_are_numbers(kind: type[nn.Module]) -> None:
    """An edge that carries something has weights, and one whose weights are all 0 carries nothing."""
    model = HookedModel(seeded(kind()).double(), (3, 16, 16), "plain")
    graph, task = ChannelGraph(model), task_of(model)
    norms = graph.weight_norms()
    sizes = score_edges(graph, task, "activations").values
    assert np.isfinite(norms).all()
    assert np.isfinite(sizes).all()
    assert (sizes[:, norms == 0] == 0).all()
    assert (norms[(sizes > 0).any(0)] > 0).all()


def test_a_shortcut_and_the_kernel_that_it_goes_round_add_up() -> None:
    class Cancelling(nn.Module):
        """y = relu(x + conv(x)), with a kernel that takes away x of channel 0 and doubles that of channel 1."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return F.relu(x + self.conv(x)).mean((2, 3))

    module = seeded(Cancelling())
    kernel = module.get_submodule("conv").weight
    assert isinstance(kernel, Tensor)
    with torch.no_grad():
        kernel.zero_()
        kernel[0, 0, 1, 1], kernel[1, 1, 1, 1], kernel[1, 0, 0, 0] = -1, 1, 3
    graph = ChannelGraph(HookedModel(module.double(), (3, 6, 6), "plain"))
    own = dict(zip(graph.edges, graph.weight_norms().tolist(), strict=True))
    rows = {(a[-1], b[-1]): v for (a, b), v in own.items() if not a.startswith("input")}
    assert rows == {("0", "0"): 0, ("0", "1"): 3, ("1", "0"): 0, ("1", "1"): 2}


def test_gradients_end_at_the_metrics_unit() -> None:
    """The activation of a unit in the middle: what comes after is not run, and edges there score 0."""
    model = net("branched")
    task = task_of(model)
    task = task.with_metric(UnitActivation.named(model, "relu_wide:1"))
    graph = ChannelGraph(model)
    found = score_edges(graph, task, "eap")
    exact = score_edges(graph, task, "exact")
    later = [i for i, (_, t) in enumerate(graph.edges) if t.startswith(("output", "relu_pooled"))]
    assert later
    assert not found.values[:, later].any()
    assert not exact.values[:, later].any()
    into = [i for i, (_, t) in enumerate(graph.edges) if t == "relu_wide:1"]
    assert found.values[:, into].any()


def test_smaller_maps_have_more_sets_in_a_pass() -> None:
    model = net("plain")
    runs = Runs(ChannelGraph(model), task_of(model))
    (pair,) = runs.pairs()
    assert runs.sets_per_pass(pair) == 2**19 // (3 * 3 * 16 * 16)
    assert runs.sets_per_pass(pair, "relu3") > runs.sets_per_pass(pair, "relu2")


def test_circuits_that_are_the_same_are_measured_once() -> None:
    model = net("plain")
    runs = Runs(ChannelGraph(model), task_of(model))
    empty, full = np.zeros(len(runs.graph), bool), np.ones(len(runs.graph), bool)
    told: list[tuple[int, int]] = []
    found = values_of(
        runs, [empty, full, empty, full, empty], lambda done, n: told.append((done, n))
    )
    assert {n for _, n in told} == {2 * 3}
    np.testing.assert_array_equal(found, found[[0, 1, 0, 1, 0]])
    assert (found[0] != found[1]).all()
