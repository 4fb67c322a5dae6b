"""Connections of odd architectures against what an impulse really does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from circuits.edits.activations import zero
from circuits.edits.recipes import edited
from circuits.edits.records import read_edit
from circuits.edits.weights import layer_named
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Unit
from circuits.weights import incoming, outgoing, raw_weights
from tests.conftest import seeded


class Odd(nn.Module):
    """Two feature maps `r` and `s` (4 channels), a join, and a convolution `h` that reads it."""

    def __init__(self, join: Callable[[Odd, Tensor, Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.r, self.s = nn.ReLU(), nn.ReLU()
        self.bn, self.bn8 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.join = join
        self.h = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.join(self, self.r(self.a(x)), self.s(self.b(x))))


def cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1)


JOINS = {
    "constant channels in front": (lambda n, r, s: cat(torch.ones(len(r), 2, 9, 9), r), 6),
    "the same map twice": (lambda n, r, s: cat(r, r), 8),
    "halves of two maps": (lambda n, r, s: cat(r[:, :2], s[:, 1:3]), 4),
    "every second channel": (lambda n, r, s: r[:, ::2], 2),
    "difference": (lambda n, r, s: r - s, 4),
    "weighted sum": (lambda n, r, s: torch.add(r, s, alpha=0.25), 4),
    "batch norm before the layer": (lambda n, r, s: n.bn(r), 4),
    "a map and its batch norm": (lambda n, r, s: r + n.bn(r), 4),
    "two batch norms": (lambda n, r, s: n.bn8(cat(n.bn(r), s)), 8),
    "constant factor": (lambda n, r, s: 0.5 * (r * 2.5) / 2, 4),
    "padded channels": (lambda n, r, s: F.pad(r, (0, 0, 0, 0, 1, 2)), 7),
    "sum of two": (lambda n, r, s: r + s, 4),
}


@pytest.mark.parametrize("name", JOINS)
def test_an_impulse_does_what_the_connections_say(name: str) -> None:
    join, channels = JOINS[name]
    module = seeded(Odd(join, channels))
    with torch.no_grad():  # all active, so that an impulse of one passes every ReLU whole
        module.a.bias.fill_(9)
        module.b.bias.fill_(9)
    model = HookedModel(module, (3, 9, 9))
    x = model.input.example(1)
    base = model.run(x, read=["h"])["h"]
    seen = {c: k for t in range(3) for k, c in _kernels(incoming(model, Unit("h", t), 99), t)}
    for site in ("r", "s"):
        for index in range(4):

            def nudged(value: Tensor, index: int = index) -> Tensor:
                value = value.clone()
                value[0, index, 4, 4] += 1
                return value

            response = (model.run(x, read=["h"], edits={site: nudged})["h"] - base)[0]
            there = {c.target.index: c.kernel for c in outgoing(model, Unit(site, index), 99)}
            for target in range(3):
                kernel = response[target, 3:6, 3:6].flip(0, 1)  # a convolution mirrors
                expected = torch.zeros(3, 3)
                for found in (
                    there.get(target, expected),
                    seen.get((f"{site}:{index}", target), expected),
                ):
                    torch.testing.assert_close(found, kernel, rtol=1e-3, atol=2e-4)


def _kernels(connections, target: int):
    return [(c.kernel, (str(c.source), target)) for c in connections]


def test_both_arms_of_a_u_are_read() -> None:
    class U(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
            self.b, self.s = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()
            self.up = nn.Upsample(scale_factor=2)
            self.h = nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            r = self.r(self.a(x))
            return self.h(torch.cat([self.up(self.s(self.b(r))), r], dim=1))

    model = HookedModel(seeded(U()), (3, 8, 8))
    sources = {str(c.source): c.kernel for c in incoming(model, "h:1", top=99)}
    assert set(sources) == {f"{site}:{i}" for site in "rs" for i in range(4)}
    weight = model.module.h.weight
    assert torch.equal(sources["s:2"], weight[1, 2])
    assert torch.equal(sources["r:2"], weight[1, 6])


def test_a_gate_is_not_taken_for_what_it_gates() -> None:
    gated = Odd(lambda n, r, s: s.mean((2, 3), keepdim=True).sigmoid() * r, 4)
    model = HookedModel(seeded(gated), (3, 9, 9))
    assert {c.source.site for c in incoming(model, "h:1", top=99)} == {"r"}
    two = HookedModel(seeded(Odd(lambda n, r, s: r * s, 4)), (3, 9, 9))
    with pytest.raises(ValueError, match="reads what comes through Mul, which is not followed"):
        incoming(two, "h:1")  # a product of equals is a unit of its own


def test_a_mean_over_channels_connects_nothing() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
            self.h = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.r(self.a(x)).mean((1, 2)))

    with pytest.raises(ValueError, match="which writes h:1, reads what comes through Convolution"):
        incoming(HookedModel(seeded(Mean()), (3, 8, 8)), "h:1")


def test_connections_follow_the_weights(branches: HookedModel) -> None:
    def norms() -> list[float]:
        return [c.norm for c in incoming(branches, "bn:1", top=99)]

    before = norms()
    with torch.no_grad():
        branches.module.bn.weight.mul_(10)
    assert norms() == pytest.approx([10 * n for n in before], rel=1e-4)
    with torch.no_grad():
        branches.module.inner.weight.mul_(2)
    assert norms() == pytest.approx([20 * n for n in before], rel=1e-4)


def test_weights_are_not_asked_for_inside_an_edit(branches: HookedModel) -> None:
    with (
        edited(branches, [zero("cat:1")]),
        pytest.raises(ValueError, match="outside the edit"),
    ):
        incoming(branches, "bn:1")
    assert incoming(branches, "bn:1")


def test_what_cannot_be_followed_is_named() -> None:
    """A summand through an operation that mixes channels is missing from the raw weights, which say so."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(x + x.flip(1))

    (weights,) = raw_weights(HookedModel(seeded(Half()), (3, 5, 5)), "a", "c")
    assert weights.lost == ("Flip",)


# --- layers that use other weights than `module.weight` ---------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


class Own(nn.Module):
    """A layer that is a function of its own parameter."""

    def __init__(self, shape: tuple[int, ...], call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(*shape))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w)


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, **{"padding": 1, **options})


def parametrised(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Tripled())
    return layer


def last(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: call(x.permute(0, 2, 3, 1), w).permute(0, 3, 1, 2)


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
    "old spectral norm": lambda: nn.utils.spectral_norm(conv()),
    "parametrised": lambda: parametrised(conv()),
    "pruned": lambda: prune.l1_unstructured(conv(), "weight", 0.5),
    "standardised": lambda: Standardised(4, 6, 3, padding=1),
}
GIVEN: dict[str, Callable[[], nn.Module]] = {
    "around": lambda: conv(padding_mode="circular"),
    "mirrored": lambda: conv(padding_mode="reflect"),
    "repeated": lambda: conv(padding_mode="replicate", groups=2),
    "function": lambda: Own((6, 2, 3, 3), lambda x, w: F.conv2d(x, w, padding=1, groups=2)),
    "function, padded": lambda: Own((6, 4, 3, 3), lambda x, w: F.conv2d(F.pad(x, [1] * 4), w)),
    "channels last": lambda: Own((6, 4), last(F.linear)),
    "product": lambda: Own((4, 6), last(torch.matmul)),
    "product with a transposed": lambda: Own((6, 4), last(lambda x, w: x @ w.T)),
    "mixed from the left": lambda: Own(
        (6, 4), lambda x, w: (w @ x.flatten(2)).unflatten(2, x.shape[2:])
    ),
}
TURNED: dict[str, Callable[[], nn.Module]] = {
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, padding=1),
    "transposed, groups": lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2),
    "function, transposed": lambda: Own(
        (4, 6, 3, 3), lambda x, w: F.conv_transpose2d(x, w, padding=1)
    ),
}


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.r, self.layer = nn.Conv2d(2, 4, 1), nn.ReLU(), layer
        self.out, self.head = nn.ReLU(), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.layer(self.r(self.stem(x)))))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", [*COMPUTED, *GIVEN, *TURNED])
def test_weights_are_those_that_the_pass_uses(name: str, train: bool) -> None:
    """A push at the source shows them; asking for them changes nothing."""
    net = seeded(Around((COMPUTED | GIVEN | TURNED)[name]())).double().train(train)
    model = HookedModel(net, (2, 7, 8))
    before, key = {k: v.clone() for k, v in net.state_dict().items()}, model.hash
    (ours,) = raw_weights(model, "r", "out")
    x = model.input.example(1).double()

    def site(target: str, push: Tensor) -> Tensor:
        return model.run(x, read=[target], edits={"r": lambda v: v + push})[target][0]

    zero_ = torch.zeros(1, 4, 7, 8, dtype=torch.float64)
    for channel in range(4):
        push = zero_.clone()
        push[0, channel, 3, 3] = 1
        effect = site("layer", push) - site("layer", zero_)
        # As a cross-correlation, the source is at offset (1, 1) of the target in the middle.
        kernel = effect[:, 2:5, 2:5].flip(1, 2)
        found = ours.weight[:, channel]
        if found.ndim == 1:
            found = F.pad(found[:, None, None], [1] * 4)
        torch.testing.assert_close(found, kernel)
    assert model.hash == key
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    strongest = incoming(model, "out:2", top=1)[0]
    torch.testing.assert_close(strongest.kernel, ours.weight[2, strongest.source.index])


@pytest.mark.parametrize("name", GIVEN)
def test_functions_of_a_parameter_are_edited(name: str) -> None:
    model = HookedModel(seeded(Around(GIVEN[name]())), (2, 7, 8))
    x = model.input.example(1)
    with edited(model, [read_edit(model, "scale_weights into=out:1")]):
        silent = model.run(x, read=["out"])["out"][0]
    plain = model.run(x, read=["out"])["out"][0]
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(silent[others], plain[others])
    assert not torch.allclose(silent[1], plain[1])
    assert float(silent[1].std()) < 1e-6, "only the bias is left"


def test_computed_weights_are_not_edited() -> None:
    model = HookedModel(seeded(Around(COMPUTED["pruned"]())), (2, 7, 8))
    with (
        pytest.raises(
            ValueError, match="weights that are computed from other weights are not foll"
        ),
        edited(model, [read_edit(model, "scale_weights into=out:1")]),
    ):
        pass
    with pytest.raises(KeyError, match="there are stem, head; a layer whose weights are computed"):
        layer_named(model.matrices, "layer")


class Scaled(nn.Module):
    """A product of a person's that scales what it multiplies and what it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out, self.head = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Linear(6, 2)
        self.w, self.b = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.stem(x).mean((2, 3))
        return self.head(self.out(torch.addmm(self.b, pooled, self.w, alpha=2.0, beta=0.5)))


def test_scaled_products_have_scaled_weights_and_are_not_edited() -> None:
    model = HookedModel(seeded(Scaled()), (2, 7, 8))
    layer = next(layer for layer in model.weight_layers if layer.name == "addmm")
    w, b = (model.parameters[name].detach() for name in "wb")
    assert torch.equal(layer.rows(torch.arange(6)), 2 * w.T)
    assert layer.bias is not None
    assert torch.equal(layer.bias, b / 2)
    with pytest.raises(ValueError, match="no layer writes out"):
        read_edit(model, "scale_weights into=out:1 bias=true")


def test_what_no_layer_writes_is_refused() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.mixed, self.c = nn.Conv2d(3, 4, 1), nn.Identity(), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).cumsum(1)
            return self.c(x) + self.mixed(x * 2).mean()

    model = HookedModel(seeded(Summed()), (3, 5, 5))
    with pytest.raises(ValueError, match=r"no convolution or linear layer of Summed .* mixed:1"):
        incoming(model, "mixed:1")
    with pytest.raises(
        ValueError, match=r"layer c of Summed, which writes c:1, reads what .* Cumsum"
    ):
        incoming(model, "c:1")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_of_a_strided_transposed_convolution(groups: int) -> None:
    """A cross-correlation with the kernel over the input with zeros between its places."""
    layer = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=groups)
    model = HookedModel(seeded(Around(layer)).double(), (2, 5, 6))
    (ours,) = raw_weights(model, "r", "out")
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    apart = x.new_zeros(1, 4, 9, 11)
    apart[:, :, ::2, ::2] = x
    # kernel - 1 - padding around it, and the output padding at the end
    oracle = F.conv2d(F.pad(apart, (1, 2, 1, 2)), ours.weight.double(), layer.bias)
    torch.testing.assert_close(layer(x), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [nn.LayerNorm(5), nn.GroupNorm(1, 5)])
def test_gains_of_norms_are_multiplied_in(norm: nn.Module) -> None:
    """What they divide by depends on the example, and is the same for all channels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm, nn.Linear(5, 2)
    )
    gain = torch.tensor([1.0, -2.0, 10.0, 0.0, 0.5])
    with torch.no_grad():
        net.get_parameter("3.weight").copy_(gain)
    model = HookedModel(net, (3, 8, 8))
    found = {c.source.index: c.total for c in incoming(model, "4:1") if c.source.site == "0"}
    wanted = net.get_parameter("4.weight").detach()[1] * gain
    for index, total in found.items():
        assert total == pytest.approx(float(wanted[index]), rel=1e-5)
    assert set(found) >= {0, 1, 2, 4}


def test_what_else_a_layer_reads_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.b(x)
            return self.head(self.a(x).mean((2, 3)) + (gate * gate.sigmoid()).mean((2, 3)))

    torch.manual_seed(0)
    assert {c.source.site for c in incoming(HookedModel(Gated(), (3, 4, 4)), "head:1")} == {"a"}
    assert (
        "layer head of Gated also reads what comes through Mul, which is not followed"
        in caplog.text
    )
