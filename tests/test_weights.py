from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.units import Unit
from circuits.weights import Connection, gate_on, incoming, incoming_through, outgoing
from circuits.weights.heads import direct_logits, neuron_directions, ov_circuit, qk_circuit
from tests.conftest import seeded


def impulse_response(
    model: HookedModel, source: Unit, target: str, at: tuple[int, int]
) -> torch.Tensor:
    """What one more unit of activation at `at` does to a target site that reads it linearly."""
    x = model.input.example(1)

    def nudged(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[0, source.index, at[0], at[1]] += 1
        return value

    with_it = model.run(x, read=[target], edits={source.site: nudged})[target]
    return (with_it - model.run(x, read=[target])[target])[0]


@pytest.mark.parametrize(
    ("source", "target", "layer"),
    [
        ("pool", "left", "left"),  # grouped
        ("pool", "right", "right"),  # 1 x 1
        ("cat", "bn", "inner"),  # batch norm folded in
    ],
)
def test_kernels_are_what_an_impulse_does(branches: HookedModel, source, target, layer) -> None:
    found = 0
    for unit in range(branches.site(source).n_units):
        response = impulse_response(branches, Unit(source, unit), target, (2, 2))
        for c in outgoing(branches, Unit(source, unit), top=99):
            if c.layer != layer:
                continue
            found += 1
            index = c.target.index - {"left": 0, "right": 4, "inner": 0}[layer]
            size = c.kernel.shape[0] // 2
            # a convolution puts the mirrored kernel around an impulse
            seen = response[index, 2 - size : 3 + size, 2 - size : 3 + size]
            torch.testing.assert_close(seen, c.kernel.flip(0, 1), rtol=1e-4, atol=1e-5)
            response[index] = 0
        assert response.abs().max() < 1e-5, "an effect that no connection explains"
    assert found


def test_incoming_and_outgoing_are_the_same_connections(branches: HookedModel) -> None:
    def key(c: Connection) -> tuple:
        return str(c.source), str(c.target), c.layer

    built = {
        key(c): c.kernel for i in range(6) for c in incoming(branches, Unit("cat", i), top=999)
    }
    assert built
    for site in ("stem_relu",):
        for i in range(6):
            for c in outgoing(branches, Unit(site, i), top=999):
                if c.target.site == "cat":
                    assert torch.equal(built.pop(key(c)), c.kernel)
    assert not built


def test_concatenation_and_residual_are_followed(branches: HookedModel) -> None:
    into_cat = incoming(branches, "cat:5", top=99)
    assert {c.source.site for c in into_cat} == {"stem_relu"}
    assert {c.layer for c in into_cat} == {"right"}
    assert into_cat[0].through == ("norm", "pool")
    # the residual sum is written by the inner convolution and, through the shortcut, by both branches
    layers = {c.layer for c in incoming(branches, "out_relu:5", top=99)}
    assert layers == {"inner"}


def test_flattened_linear_layer_has_a_kernel_in_space(branches: HookedModel) -> None:
    connections = incoming(branches, "fc:1", top=99)
    assert {c.source.site for c in connections} == {"out_relu"}
    assert {tuple(c.kernel.shape) for c in connections} == {(4, 5)}
    weight = branches.module.fc.weight.detach().reshape(3, 6, 4, 5)
    for c in connections:
        assert torch.equal(c.kernel, weight[1, c.source.index])


def test_first_layer_reads_the_input(branches: HookedModel) -> None:
    connections = incoming(branches, "stem_relu:2", top=99)
    assert {str(c.source) for c in connections} == {"input:0", "input:1", "input:2"}
    for c in connections:
        assert torch.equal(c.kernel, branches.module.stem.weight[2, c.source.index])


def test_reused_block_connects_its_two_calls(own_net: HookedModel) -> None:
    first = {str(c.target) for c in outgoing(own_net, "relu:3", top=99)}
    assert {t.partition(":")[0] for t in first} == {"block.act@0"}
    second = outgoing(own_net, "block.act@0:3", top=99)
    assert {"block.act@1", "fc"} == {c.target.site for c in second}
    kernel = next(c.kernel for c in second if str(c.target) == "block.act@1:6")
    assert torch.equal(kernel, own_net.module.block.conv.weight[6, 3])


class Depthwise(nn.Module):
    """A convolution, and two depthwise ones behind it with a pooled map in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, 2, padding=1), nn.ReLU6()
        self.deep1, self.act1 = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)
        self.deep2, self.act2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), nn.ReLU()
        self.mix = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, bend: bool = True) -> Tensor:
        """What `act2` puts out, mixed; without the nonlinearities if `bend` is false."""
        acts = (self.act, self.act1, self.act2) if bend else [nn.Identity()] * 3
        x = acts[1](self.deep1(acts[0](self.conv(x))))
        x = acts[2](self.deep2(self.pool(x)))
        return self.mix(x) if bend else x


def test_what_reads_one_unit_only_is_built_from_what_that_reads() -> None:
    net = seeded(Depthwise())
    model = HookedModel(net, (3, 64, 48))
    assert [c.source for c in incoming(model, "act2:1")] == [Unit("act1", 1)]
    found = incoming_through(model, "act2:1", top=9)
    assert found is not None
    assert [g.unit for g in found.gates] == [Unit("act1", 1), Unit("act", 1)]
    assert {g.open for g in found.gates} == {None}
    x = torch.zeros(1, 3, 64, 48, requires_grad=True)
    (slopes,) = torch.autograd.grad(net(x, bend=False)[0, 1, 8, 6], x)
    assert {c.source for c in found.connections} == {Unit("input", i) for i in range(3)}
    assert not found.cut
    for c in found.connections:
        kernel = slopes[0, c.source.index]
        rows, columns = kernel.nonzero()[:, 0], kernel.nonzero()[:, 1]
        wanted = kernel[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        torch.testing.assert_close(c.kernel, wanted, rtol=1e-5, atol=1e-7)
        assert c.through == ("act", "act1")
        assert c.target == Unit("act2", 1)
    norms = [c.norm for c in found.connections]
    assert norms == sorted(norms, reverse=True)
    assert (
        incoming_through(model, "act2:1", top=1).connections[0].source
        == found.connections[0].source
    )  # type: ignore[union-attr]


def test_it_is_counted_how_often_gates_are_open() -> None:
    net = seeded(Depthwise())
    model = HookedModel(net, (3, 16, 12))
    x = model.input.example(3) * 40
    found = incoming_through(model, "deep2:2", examples=x)
    assert found is not None
    with torch.no_grad():
        first = net.conv(x)
        second = net.deep1(net.act(first))
    (near, far) = found.gates
    assert near.open == float((second[:, 2] > 0).double().mean())
    assert near.full == 0
    assert far.open == float(((first[:, 2] > 0) & (first[:, 2] < 6)).double().mean())
    assert far.full == float((first[:, 2] >= 6).double().mean())
    assert 0.1 < far.full < 0.9
    assert far.n == first[:, 2].numel()
    said = found.table().title
    assert f"act:2, open at {far.open:.1%} of {far.n} positions, at its upper bound" in said
    assert found.to_dict()["gates"][0] == {
        "unit": "act1:2", "open": near.open, "full": 0.0, "n": near.n
    }  # fmt: skip
    # A unit that no nonlinearity comes before is open everywhere.
    assert gate_on(model, "conv:2", x).open == 1


@pytest.mark.parametrize("unit", ["act:1", "mix:0"])
def test_what_reads_several_units_has_no_single_way_in(unit: str) -> None:
    assert incoming_through(HookedModel(seeded(Depthwise()), (3, 16, 12)), unit) is None


def test_what_reads_the_only_channel_of_an_image_goes_no_further() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, groups=2))
    model = HookedModel(seeded(net), (1, 9, 9))
    assert incoming_through(model, "1:1") is None
    found = incoming_through(model, "2:1")
    assert found is not None
    assert [c.source for c in found.connections] == [Unit("input", 0)]
    with pytest.raises(ValueError, match="must be at least 1"):
        incoming_through(model, "2:1", top=0)


def test_strongest_come_first_and_typical_is_the_median(branches: HookedModel) -> None:
    connections = incoming(branches, "left:1", top=2)
    weight = branches.module.left.weight[1]
    norms = weight.flatten(1).norm(dim=1)
    assert [c.norm for c in connections] == sorted(norms.tolist(), reverse=True)[:2]
    assert connections[0].typical == pytest.approx(norms.median().item())
    assert connections[0].total == pytest.approx(connections[0].kernel.sum().item())


def test_permuting_channels_permutes_connections() -> None:
    plain = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    model = HookedModel(seeded(plain), (2, 9, 9))
    before = {c.source.index: c.kernel for c in incoming(model, "2:1", top=99)}
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        plain[0].weight.copy_(plain[0].weight[order])
        plain[2].weight.copy_(plain[2].weight[:, order])
    moved = HookedModel(plain, (2, 9, 9))
    for c in incoming(moved, "2:1", top=99):
        assert torch.equal(c.kernel, before[int(order[c.source.index])])


def through(norm: Any, weight: Tensor) -> Tensor:
    """Weights that read what a LayerNorm returns, as they read its input: the mean is subtracted first."""
    scaled = norm.weight[:, None] * weight
    return (scaled - scaled.mean(0)).detach()


def test_composition_scores_by_definition(bridge: HookedModel) -> None:
    b: Any = bridge.module
    before, after = b.blocks[0].ln1, b.blocks[1].ln1
    for i, j in itertools.product(range(4), range(4)):
        ov0 = through(before, b.W_V[0, i]) @ b.W_O[0, i]
        qk = through(after, b.W_Q[1, j]) @ through(after, b.W_K[1, j]).T
        ov1 = through(after, b.W_V[1, j]) @ b.W_O[1, j]
        expected = torch.stack(
            [
                (ov0 @ qk).norm() / ov0.norm() / qk.norm(),
                (qk @ ov0.T).norm() / ov0.norm() / qk.norm(),
                (ov0 @ ov1).norm() / ov0.norm() / ov1.norm(),
            ]
        )
        connections = outgoing(bridge, Unit("blocks.0.attn.hook_z", i), top=99)
        kernel = next(c.kernel for c in connections if c.target.index == j)
        torch.testing.assert_close(kernel, expected.detach())


def test_neuron_virtual_weights_by_definition(bridge: HookedModel) -> None:
    b: Any = bridge.module
    connections = outgoing(bridge, "blocks.0.mlp.hook_post:7", top=999)
    for c in connections:
        if c.target.site == "hook_unembed":
            expected = b.W_out[0, 7] @ through(b.ln_final, b.W_U)[:, c.target.index]
        else:
            expected = b.W_out[0, 7] @ through(b.blocks[1].ln2, b.W_in[1])[:, c.target.index]
        torch.testing.assert_close(c.kernel, expected.detach())
    assert {c.target.site for c in connections} == {"hook_unembed", "blocks.1.mlp.hook_post"}


def test_bad_input_is_named(branches: HookedModel) -> None:
    with pytest.raises(ValueError, match="units 0 to 5"):
        incoming(branches, "cat:6")
    with pytest.raises(KeyError, match="unknown site"):
        outgoing(branches, "dog:1")
    with pytest.raises(ValueError, match="top 0"):
        incoming(branches, "cat:1", top=0)


def test_head_circuits_by_definition(bridge: HookedModel) -> None:
    b: Any = bridge.module
    w_qk = through(b.blocks[1].ln1, b.W_Q[1, 2]) @ through(b.blocks[1].ln1, b.W_K[1, 2]).T
    w_ov = through(b.blocks[1].ln1, b.W_V[1, 2]) @ b.W_O[1, 2]
    w_u = through(b.ln_final, b.W_U)
    head = "blocks.1.attn.hook_z:2"
    attends = qk_circuit(bridge, head)
    assert attends.offsets == (-1, 0)
    for offset in attends.offsets:  # without rotary embeddings all are equal
        torch.testing.assert_close(attends.at(offset), w_qk.detach())
    torch.testing.assert_close(ov_circuit(bridge, head).matrix, w_ov.detach())
    by_token = qk_circuit(bridge, head, tokens=True, offset=-2)
    torch.testing.assert_close(by_token.at(-2), (b.W_E @ w_qk @ b.W_E.T).detach())
    torch.testing.assert_close(
        ov_circuit(bridge, head, tokens=True).matrix, (b.W_E @ w_ov @ w_u).detach()
    )
    read, written = neuron_directions(bridge, "blocks.0.mlp.hook_post:5")
    torch.testing.assert_close(read, through(b.blocks[0].ln2, b.W_in[0])[:, 5])
    torch.testing.assert_close(written, b.W_out[0, 5].detach())
    torch.testing.assert_close(
        direct_logits(bridge, "blocks.0.mlp.hook_post:5"), (b.W_out[0, 5] @ w_u).detach()
    )
    with pytest.raises(ValueError, match="is not a head"):
        qk_circuit(bridge, "blocks.0.mlp.hook_post:5")
    with pytest.raises(ValueError, match="offset 1 must be from -11 to 0"):
        qk_circuit(bridge, head, offset=1)
    with pytest.raises(
        ValueError,
        match=r"offset -3 of blocks.1.attn.hook_z:2 was not computed: expected one of -1, 0",
    ):
        attends.at(-3)


def test_head_circuits_of_the_hand_written_model() -> None:
    model = load_model("induction-by-hand")
    copies = ov_circuit(model, "blocks.1.attn.hook_z:0", tokens=True)
    torch.testing.assert_close(copies.matrix, 20 * torch.eye(64))
    attends = qk_circuit(model, "blocks.1.attn.hook_z:0", tokens=True)
    assert not attends.matrix.any(), "reads what head 0.0 wrote"


def test_image_models_have_no_heads(branches: HookedModel) -> None:
    with pytest.raises(ValueError, match="has no residual stream"):
        qk_circuit(branches, "cat:1")
