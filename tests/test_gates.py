"""The gate zoo: its networks compute their gates, and its tables, made by hand, are what the definitions give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuits
from circuits.experiments.running import run
from circuits.models.paths.routes import paths
from tests.edge_oracle import ConvolutionEdges, Frozen, Network, Oracle, TransformerEdges
from tests.gates import (
    DEAD,
    GATES,
    N_PAIRS,
    Gate,
    Planted,
    Row,
    as_convolutions,
    as_transformer,
    first_less_second,
    image_of,
)  # fmt: skip
from tests.plain_transformer import Plain, of_native

METHODS: dict[str, Callable[[Oracle], Tensor]] = {
    "noising": Oracle.noising,
    "denoising": Oracle.denoising,
    "eap": Oracle.eap,
    "ends": Oracle.clean_corrupted,
    "left": lambda oracle: oracle.ig_inputs(5, "left"),
    "right": lambda oracle: oracle.ig_inputs(5, "right"),
    "midpoint": lambda oracle: oracle.ig_inputs(6, "midpoint"),
}
"""How each column of a table is computed."""


def last_difference(logits: Tensor) -> Tensor:
    """The logit of token `1` less that of `0` at the last position."""
    return logits[:, -1, 1] - logits[:, -1, 0]


def network_of(planted: Planted) -> Network:
    if isinstance(planted.model.module, nn.Sequential):
        return ConvolutionEdges(planted.model.module)
    plain = Plain(of_native(planted.model.module, 1), 1, 4, 4, "", act=torch.relu)
    return TransformerEdges(plain, [(str(s), str(r)) for s, r in paths(planted.model)])


def frozen_network_of(planted: Planted) -> Network:
    network = network_of(planted)
    if isinstance(network, ConvolutionEdges):
        return ConvolutionEdges(network.module, frozen=True)
    assert isinstance(network, TransformerEdges)
    return TransformerEdges(Frozen.of(network.plain), network.edges)


def oracle_of(planted: Planted) -> Oracle:
    network = network_of(planted)
    metric = last_difference if isinstance(network, TransformerEdges) else first_less_second
    return Oracle(network, metric, planted.clean, planted.corrupted)


Case = tuple[Planted, Oracle]


@pytest.fixture(
    scope="module",
    params=[(build, gate) for build in (as_transformer, as_convolutions) for gate in GATES.values()],
    ids=lambda param: f"{param[0].__name__}-{param[1].name}",
)  # fmt: skip
def case(request: pytest.FixtureRequest) -> Case:
    build, gate = request.param
    planted = build(gate)
    return planted, oracle_of(planted)


def test_networks_compute_their_gates(case: Case) -> None:
    planted, _ = case
    every = list(itertools.product((0.0, 1.0), repeat=3))
    wanted = torch.tensor([planted.gate.truth(*values) for values in every])
    if isinstance(planted.model.module, nn.Sequential):
        images = torch.stack([image_of(values, 0.5) for values in every])
        found = first_less_second(planted.model.logits(images))
    else:
        tokens = torch.tensor([[*map(int, values), 1, 2] for values in every])
        logits = planted.model.logits(tokens)[:, -1]
        found = logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_tasks_measure_the_output_of_gates(case: Case) -> None:
    planted, _ = case
    gate, task = planted.gate, planted.task
    for corrupted, values in ((False, gate.clean), (True, gate.corrupted)):
        found = run(planted.model, [], task, measures=[task.metric], corrupted=corrupted)
        wanted = np.full(N_PAIRS, gate.truth(*values))
        np.testing.assert_allclose(found.of(task.metric.name), wanted, rtol=0, atol=1e-6)


def test_tables_are_what_the_definitions_give(case: Case) -> None:
    planted, oracle = case
    edges = oracle.network.edges
    assert set(planted.expected) <= set(edges)
    dead = [i for i, edge in enumerate(edges) if edge not in planted.expected]
    assert len(dead) >= len(edges) / 2
    for column, method in METHODS.items():
        found = method(oracle)
        wanted = planted.column(column, edges)
        torch.testing.assert_close(
            found, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, c=column: f"{c}: {m}"
        )
        assert not found[:, dead].any(), "dead edges are exactly zero"
    # What lies before a gate's unit is linear in alpha, so that interpolating one layer is interpolating the inputs.
    torch.testing.assert_close(
        oracle.ig_activations(5, "right"), planted.column("right", edges), rtol=1e-9, atol=1e-9
    )


def test_dead_edges_come_from_senders_that_change(case: Case) -> None:
    """A score of zero is the network's doing, not that of inputs which do not differ."""
    planted, oracle = case
    changing = {name for name, change in oracle.differences.items() if change.any()}
    silent = [e for e in oracle.network.edges if e not in planted.expected and e[0] in changing]
    assert len(silent) >= 8


def test_two_variables_together(case: Case) -> None:
    planted, oracle = case
    if planted.gate.both is None or "b" not in planted.wires:
        assert planted.gate.name == "sigmoid"
        return
    pair = [planted.wires["a"], planted.wires["b"]]
    for base, wanted in zip(("clean", "corrupted"), planted.gate.both, strict=True):
        found = oracle.together(pair, base)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.full_like(found, wanted), rtol=1e-9, atol=1e-9)


def test_circuits(case: Case) -> None:
    planted, oracle = case
    assert planted.gate.circuits
    for wires, y in planted.gate.circuits.items():
        found = oracle.circuit(planted.circuit(wires))
        torch.testing.assert_close(found, torch.full_like(found, y), rtol=1e-9, atol=1e-9)
    assert torch.equal(oracle.circuit(oracle.network.edges), oracle.metric(oracle.logits))
    torch.testing.assert_close(oracle.circuit([]), oracle.metric(oracle.other_logits))
    # What the table names is all that is needed.
    found = oracle.circuit(list(planted.expected))
    torch.testing.assert_close(found, oracle.metric(oracle.logits), rtol=1e-12, atol=1e-12)


def test_what_the_unit_adds_once_a_is_removed(case: Case) -> None:
    """In the backup it grows; in OR, which has the same truth table, noising and denoising, it does not."""
    planted, oracle = case
    if planted.gate.m_adds is None:
        assert planted.gate.name in ("sigmoid", "2a-b")
        return
    sender, target = planted.wires["m>out"]
    edges = list(oracle.network.edges)
    a = torch.zeros(len(edges), dtype=torch.float64)
    a[edges.index(planted.wires["a"])] = 1
    without = torch.zeros_like(a)
    without[edges.index((sender, target))] = 1
    # Nothing in place of m: the difference is what it adds.
    zero = {name: torch.zeros_like(value) for name, value in oracle.live.items()}
    found = []
    for w in (torch.zeros_like(a), a):
        whole = oracle.value(w)
        mixed = Oracle(oracle.network, oracle.metric, oracle.clean, oracle.corrupted)
        mixed.other = oracle.other | {sender: zero[sender]}  # type: ignore[operator]
        found.append(whole - mixed.value(w + without))
    wanted = torch.tensor(planted.gate.m_adds, dtype=torch.float64)[:, None].expand(2, 2)
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-9, atol=1e-9)


def relation_of(gate: Gate) -> str | None:
    """The relation that the table implies, by the rules that it is to illustrate."""
    rows, both = gate.rows, gate.both
    if both is None or "b" not in rows:
        return None
    a, b = rows["a"], rows["b"]
    apart = both[0] - a.noising - b.noising, both[1] - a.denoising - b.denoising
    if apart == (0, 0):
        return "additive"
    if apart == (-1, -1) and a.noising == b.noising == 0:
        assert gate.m_adds is not None
        return "backup" if gate.m_adds[1] > gate.m_adds[0] else "redundant"
    if a.denoising == b.denoising == 0:
        return "conjunctive"
    return None


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_relations_follow_from_the_tables(gate: Gate) -> None:
    assert relation_of(gate) == gate.relation


def test_an_odd_number_of_midpoints_meets_the_kink() -> None:
    """At alpha = 1/2 the units of OR and AND stand at 0, where a ReLU's gradient is 0: .8 is found of an effect 1."""
    for name in ("or", "and"):
        planted = as_transformer(GATES[name])
        oracle = oracle_of(planted)
        found = oracle.ig_inputs(5, "midpoint")
        at = [list(oracle.network.edges).index(planted.wires[v]) for v in "ab"]
        torch.testing.assert_close(found[:, at], torch.full((2, 2), -0.4, dtype=torch.float64))


def test_relp_sees_no_attention_and_no_saturation(case: Case) -> None:
    """RelP is EAP where units are ReLUs. Of the sigmoid it takes sigmoid(x)/x, of attention nothing.

    At the clean run m = sigmoid(10) is read as x sigmoid(10)/10 with x = 20 a - 10: a slope of 20 sigmoid(10)/10, which
    is 1 + tanh(5), nearly twice the effect.
    """
    planted, oracle = case
    network = frozen_network_of(planted)
    found = Oracle(network, oracle.metric, planted.clean, planted.corrupted).eap()
    wanted = planted.column("eap", network.edges).clone()
    if planted.gate.name == "sigmoid":
        alone = isinstance(network, TransformerEdges)
        for wire in ("a",) if alone else ("a", "a>m"):
            at = list(network.edges).index(planted.wires[wire])
            wanted[:, at] = 0 if alone else -1 - math.tanh(5)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "backup", "xor"])
def test_exact_patching_of_the_package_agrees(name: str) -> None:
    planted = as_transformer(GATES[name])
    edges = [(str(s), str(r)) for s, r in paths(planted.model)]
    live = torch.tensor([edge in planted.expected for edge in edges])
    assert len(edges) == 37
    for direction in ("noising", "denoising"):
        found = circuits.patch_paths(
            planted.model, planted.clean, planted.corrupted, paths(planted.model), direction=direction,
            metric=last_difference,
        )  # fmt: skip
        wanted = planted.column(direction, edges).T
        torch.testing.assert_close(found.effects.double(), wanted, rtol=1e-6, atol=1e-6)
        assert not found.effects[~live].any()


def test_rows_name_wires_that_exist() -> None:
    for gate in GATES.values():
        wires = as_convolutions(gate).wires.keys()
        assert gate.rows.keys() <= wires
        assert Row(0, 0, 0, 0, 0, 0, 0) == DEAD
