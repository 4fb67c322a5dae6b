"""The oracle of edge scores: equal to the models themselves, to runs by hand and to what the definitions imply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.routes import paths
from tests.conftest import seeded
from tests.edge_oracle import (
    ConvolutionEdges,
    Frozen,
    Oracle,
    TransformerEdges,
    alphas,
    last_logits,
)  # fmt: skip
from tests.plain_transformer import Plain
from tests.test_paths import drawn, gpt2_like, llama_like

WEIGHTS = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
METRIC = last_logits(WEIGHTS)

Case = tuple[HookedModel, Plain, Oracle]


def oracle_of(model: HookedModel, plain: Plain) -> Oracle:
    edges = [(str(sender), str(receiver)) for sender, receiver in paths(model)]
    return Oracle(TransformerEdges(plain, edges), METRIC, *drawn(2, 5))


@pytest.fixture(scope="module", params=[gpt2_like, llama_like])
def case(request: pytest.FixtureRequest) -> Case:
    made: Callable[[], tuple[HookedModel, Plain]] = request.param
    model, plain = made()
    return model, plain, oracle_of(model, plain)


def small_net() -> nn.Sequential:
    """Two convolutions and a linear layer, with all weights random."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)
    ).double()  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Oracle:
    clean, corrupted = torch.rand(2, 2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    net = seeded(small_net())
    return Oracle(ConvolutionEdges(net), lambda out: out[:, 0] - out[:, 1], clean, corrupted)  # type: ignore[arg-type]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# --- the runs ------------------------------------------------------------------------------------


def test_no_edges_and_all_edges_are_the_models_own_runs(case: Case) -> None:
    model, plain, oracle = case
    assert sorted(oracle.network.edges) == sorted(plain.edges())
    n = len(oracle.network.edges)
    for share, tokens in ((0.0, oracle.clean), (1.0, oracle.corrupted)):
        found = oracle.value(torch.full((n,), share, dtype=torch.float64))
        close(found, METRIC(model.logits(tokens).double()), 1e-4)
    close(oracle.logits, plain.run(oracle.clean)[0])
    halves = torch.tensor([[0.0], [1.0]]).expand(2, n).double()
    mixed = torch.stack([METRIC(oracle.logits)[0], METRIC(oracle.other_logits)[1]])
    close(oracle.value(halves), mixed)


def test_each_edge_equals_a_run_by_hand(case: Case) -> None:
    _, plain, oracle = case
    runs = {"clean": plain.run(oracle.clean), "corrupted": plain.run(oracle.corrupted)}
    for base, other, found in (
        ("clean", "corrupted", oracle.noising()),
        ("corrupted", "clean", oracle.denoising()),
    ):
        for i, edge in list(enumerate(oracle.network.edges))[:: 1 if base == "clean" else 4]:
            logits, _ = plain.run(getattr(oracle, base), {edge}, runs[other][1])
            close(found[:, i], METRIC(logits) - METRIC(runs[base][0]))


def test_what_senders_write_can_be_given(case: Case) -> None:
    _, _, oracle = case
    for site in oracle.network.sites:
        mixed = {name: oracle.other[name] for name in site}
        logits, made = oracle.network.run(oracle.starts["clean"], replaced=mixed)
        assert all(torch.equal(made[name], oracle.other[name]) for name in site)
        # The same by edges: every edge of the site's senders carries the other run.
        w = torch.tensor([float(sender in site) for sender, _ in oracle.network.edges]).double()
        close(oracle.value(w), METRIC(logits))


# --- the gradients -------------------------------------------------------------------------------


def check_gradients(oracle: Oracle) -> None:
    """What holds of the gradient methods in any network."""
    none = torch.zeros(len(oracle.network.edges), dtype=torch.float64)
    eap = oracle.eap()
    assert eap.abs().max() > 1e-3
    close(eap, oracle.slopes(none))
    for i in range(0, len(none), 7):
        step = 1e-5 * torch.eye(len(none), dtype=torch.float64)[i]
        close(eap[:, i], (oracle.value(step) - oracle.value(-step)) / 2e-5, 1e-6)
    # One step of the left sum is the corrupted end, one of the right sum the clean end.
    left, right = oracle.ig_inputs(1, "left"), oracle.ig_inputs(1, "right")
    close(right, eap)
    close(oracle.clean_corrupted(), (left + right) / 2)
    back = Oracle(oracle.network, oracle.metric, oracle.corrupted, oracle.clean)
    close(left, -back.eap())
    close(oracle.ig_inputs(3, "right") - oracle.ig_inputs(3, "left"), (right - left) / 3)


def check_sums(oracle: Oracle, steps: int) -> None:
    """Integrated gradients add up to the effect of what is interpolated."""
    edges, sites = oracle.network.edges, oracle.network.sites
    base = oracle.metric(oracle.logits)
    inputs = torch.tensor([sender in sites[0] for sender, _ in edges])
    total = oracle.metric(oracle.other_logits) - base
    close(oracle.ig_inputs(steps, "midpoint")[:, inputs].sum(1), total, 2e-3)
    scores = oracle.ig_activations(steps, "midpoint")
    for site in sites:
        own = torch.tensor([sender in site for sender, _ in edges])
        mixed = {name: oracle.other[name] for name in site}
        logits, _ = oracle.network.run(oracle.starts["clean"], replaced=mixed)
        close(scores[:, own].sum(1), oracle.metric(logits) - base, 2e-3)


def test_gradients_are_derivatives_by_the_weights_of_edges(case: Case) -> None:
    check_gradients(case[2])


def test_integrated_gradients_add_up(case: Case) -> None:
    check_sums(case[2], 12)


def test_relevance_is_conserved(case: Case) -> None:
    """Without biases, a frozen network is a linear one: outputs times gradients add up to the metric at every cut."""
    _, plain, oracle = case
    weights = {name: value for name, value in plain.w.items() if not name.endswith(".bias")}
    ones = {
        f"{name}.bias": torch.zeros_like(value) for name, value in weights.items() if "ln" in name
    }
    frozen = Frozen.of(replace(plain, w=weights | (ones if plain.norm == "ln" else {})))
    network = TransformerEdges(frozen, oracle.network.edges)
    found = Oracle(network, METRIC, oracle.clean, oracle.corrupted)
    close(found.logits, Plain(**vars(frozen)).run(oracle.clean)[0])
    gradients = found.gradients(found.starts["clean"])
    for crossing in (
        [edge for edge in network.edges if edge[0] in network.sites[0]],
        [edge for edge in network.edges if edge[1] == "logits"],
    ):
        parts = [(found.live[s] * gradients[s, t]).flatten(1).sum(1) for s, t in crossing]
        close(torch.stack(parts).sum(0), METRIC(found.logits))


def test_frozen_networks_have_the_same_values(case: Case, images: Oracle) -> None:
    _, plain, oracle = case
    frozen = Oracle(
        TransformerEdges(Frozen.of(plain), oracle.network.edges), METRIC, oracle.clean, oracle.corrupted
    )  # fmt: skip
    assert isinstance(images.network, ConvolutionEdges)
    net = ConvolutionEdges(images.network.module, frozen=True)
    both = Oracle(net, images.metric, images.clean, images.corrupted)
    close(frozen.logits, oracle.logits)
    close(both.logits, images.logits)
    assert (frozen.eap() - oracle.eap()).abs().max() > 1e-3
    close(both.eap(), images.eap())  # a ReLU is already proportional to what it is given


def test_alphas_from_the_corrupted_end() -> None:
    assert alphas(5, "left") == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert alphas(5, "right") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert alphas(2, "midpoint") == [0.25, 0.75]


# --- convolutions --------------------------------------------------------------------------------


def test_channels_are_the_networks_own(images: Oracle) -> None:
    network = images.network
    assert isinstance(network, ConvolutionEdges)
    close(images.logits, network.module(images.clean.double()))
    assert len(network.edges) == 3 * 4 + 4 * 3 + 3 * 2
    everything = torch.ones(len(network.edges), dtype=torch.float64)
    close(images.value(everything), images.metric(network.module(images.corrupted.double())))
    (first, *_), (*_, last) = network.edges, network.edges
    assert (first, last) == (("image:0", "0:0"), ("3:2", "5:1"))


def test_each_kernel_equals_a_change_of_the_layers_output(images: Oracle) -> None:
    """An edge of layer L adds (its kernel applied to the difference of its channel) to one channel that L makes."""
    assert isinstance(images.network, ConvolutionEdges)
    net, noising = images.network.module, images.noising()
    inputs: dict[str, list[Tensor]] = {}
    for batch in (images.clean, images.corrupted):
        value = batch.double()
        for name, module in net.named_children():
            inputs.setdefault(name, []).append(value)
            value = module(value)
    for i, (sender, target) in enumerate(images.network.edges):
        (name, k), source = target.split(":"), int(sender.split(":")[1])
        layer, (clean, corrupted) = net[int(name)], inputs[name]
        only = torch.zeros_like(clean)
        only[:, source] = (corrupted - clean)[:, source]
        whole, rest = layer(clean + only), layer(clean)
        added = (whole - rest)[:, int(k)]

        def changed(
            _m: object, _x: object, out: Tensor, k: int = int(k), added: Tensor = added
        ) -> Tensor:
            out = out.clone()
            out[:, k] += added
            return out

        hook = layer.register_forward_hook(changed)
        found = images.metric(net(images.clean.double())) - images.metric(images.logits)
        hook.remove()
        close(noising[:, i], found)


def test_gradients_of_channels(images: Oracle) -> None:
    check_gradients(images)
    check_sums(
        images, 64
    )  # the error of a kink falls with the number of steps, not with its square
