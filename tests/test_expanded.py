"""Expanded weights against finite differences and autograd, in float64."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.units import Unit
from circuits.weights import ExpandedWeights, expand_weights, incoming, raw_weights
from circuits.weights.factors import factorize
from tests.conftest import Branches, OwnNet, seeded

ACTIVATIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "gelu", "silu", "hardswish", "tanh", "softplus",
    "elu", "selu", "clamp", "sigmoid", "hardtanh",
}  # fmt: skip


class Linearised(torch.overrides.TorchFunctionMode):
    """The definition of mode linear: activation functions are the identity, a maximum an average of what is there,
    local response normalisation what it is near zero.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ACTIVATIONS:
            return args[0] * 1
        if name in ("max_pool1d", "max_pool2d"):
            names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
            given = dict(zip(names, args, strict=False)) | kwargs
            if name == "max_pool2d" and given.get("dilation", 1) == 1:
                return F.avg_pool2d(
                    given["input"], given["kernel_size"], given.get("stride"), given.get("padding", 0),
                    given.get("ceil_mode", False), count_include_pad=False,
                )  # fmt: skip
            pooled = F.max_pool1d if name == "max_pool1d" else F.max_pool2d
            return _averaged(given.pop("input"), lambda x: pooled(x, **given))
        if func is F.local_response_norm:
            k = kwargs.get("k", args[4] if len(args) > 4 else 1.0)
            beta = kwargs.get("beta", args[3] if len(args) > 3 else 0.75)
            return args[0] * k**-beta
        return func(*args, **kwargs)


def _averaged(x: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over the places that a maximum looks at: an output that rises with a place looks at it."""
    n = x[0, 0].numel()
    peaks = torch.eye(n, dtype=x.dtype).reshape(n, 1, *x.shape[2:])
    seen = pool(peaks).flatten(1)  # place x output
    made = x.flatten(2) @ (seen / seen.sum(0))
    return made.reshape(*x.shape[:2], *pool(x).shape[2:])


def doubled(model: HookedModel) -> HookedModel:
    aliases = {alias: site.name for site in model.sites for alias in site.aliases}
    return HookedModel(copy.deepcopy(model.module).double(), model.input, model.name, aliases)


def differences(
    model: HookedModel, source: str, expanded: ExpandedWeights, x: Tensor, step: float = 1.0
) -> Tensor:
    """Weights by pushing each number of the source's window: exact where all is linear."""
    at = tuple(expanded.at)
    units = list(expanded.units)
    offsets = expanded.weight.shape[expanded.weight.ndim - len(expanded.start) :]
    found = torch.zeros(len(units), len(expanded.sources), *offsets, dtype=torch.float64)

    def ask(change: Callable[[Tensor], Tensor]) -> Tensor:
        # as torch composes it: `Linearised` must see the normalisation
        read = model.run(
            x, read=[expanded.target], edits={source: change}, until=expanded.target, reference=True
        )
        axis = model.site(expanded.target).unit_axis
        return read[expanded.target][0].movedim(axis - 1, 0)[(units, *at)]

    axis = model.site(source).unit_axis
    for s, unit in enumerate(expanded.sources):
        for offset in itertools.product(*map(range, offsets)):
            place = tuple(a + b for a, b in zip(expanded.start, offset, strict=True))

            def pushed(value: Tensor, by: float, unit: int = unit, place: tuple = place) -> Tensor:
                value = value.clone()
                value[0].movedim(axis - 1, 0)[(unit, *place)] += by
                return value

            up, down = (ask(lambda v, by=by: pushed(v, by)) for by in (step, -step))
            found[(slice(None), s, *offset)] = (up - down) / (2 * step)
    return found


def assert_close(ours: Tensor, oracle: Tensor) -> None:
    """Equal to 1e-5 of the largest weight."""
    assert oracle.abs().max() > 0
    error = (ours.double() - oracle).abs().max() / oracle.abs().max()
    assert error < 1e-5, f"off by {error:.2e} of the largest weight"


class Plain(nn.Module):
    """Strided, dilated, grouped and padded convolutions with a ReLU after each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.a_relu = nn.ReLU(inplace=True)
        self.b = nn.Conv2d(6, 6, 3, stride=2, padding=2, dilation=2, groups=3)
        self.b_relu = nn.ReLU()
        self.c = nn.Conv2d(6, 5, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b_relu(self.b(self.a_relu(self.a(x)))))


class Pooled(nn.Module):
    """Max pooling with padding and ceil mode, LRN, average pooling, batch norm, global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 7, 3, padding=1)
        self.norm = nn.LocalResponseNorm(4, alpha=0.3, beta=0.75, k=2.0)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.b = nn.Conv2d(7, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.GELU()
        self.mean_pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(torch.relu(self.a(x))))
        x = self.mean_pool(self.act(self.bn(self.b(x))))
        return self.fc(x.mean((2, 3)))


CASES = [
    (Plain, (3, 13, 11), "a_relu", "c", None),
    (Plain, (3, 13, 11), "a", "c", (0, 0)),
    (Plain, (3, 13, 11), "a", "c", (6, 5)),
    (Pooled, (3, 14, 12), "a", "mean_pool", None),
    (Pooled, (3, 14, 12), "a", "mean_pool", (0, 0)),
    (Pooled, (3, 14, 12), "norm", "mean_pool", (2, 1)),
    (Pooled, (3, 14, 12), "pool", "fc", None),
    (Branches, (3, 8, 10), "stem_relu", "out_relu", None),
    (Branches, (3, 8, 10), "stem", "out_relu", (0, 4)),
    (Branches, (3, 8, 10), "pool", "fc", None),
    (Branches, (3, 8, 10), "left", "bn", (3, 0)),
]


@pytest.mark.parametrize(("kind", "shape", "source", "target", "at"), CASES)
def test_linear_mode_is_what_a_push_does(kind, shape, source, target, at) -> None:
    model = HookedModel(seeded(kind()), shape)
    ours = expand_weights(model, source, target, at=at)
    oracle = doubled(model)
    x = torch.randn(1, *shape, dtype=torch.float64)
    with Linearised():
        assert_close(ours.weight, differences(oracle, source, ours, x))


@pytest.mark.parametrize(("kind", "shape", "source", "target", "at"), CASES)
def test_gradients_are_those_of_autograd(kind, shape, source, target, at) -> None:
    model = doubled(HookedModel(seeded(kind()), shape))
    x = torch.randn(3, *shape, dtype=torch.float64)
    each = expand_weights(model, source, target, mode="example", examples=x, at=at)
    mean = expand_weights(model, source, target, mode="mean", examples=x, at=at)
    oracle = by_autograd(model, source, target, each, x)
    assert_close(each.weight, oracle)
    assert_close(mean.weight, oracle.mean(0))


def by_autograd(
    model: HookedModel, source: str, target: str, like: ExpandedWeights, x: Tensor
) -> Tensor:
    """One call of autograd a unit: example x target x source x offsets; nothing lies outside."""
    kept: list[Tensor] = []

    def started(value: Tensor) -> Tensor:
        kept.append(value.detach().clone().requires_grad_(True))
        return kept[0] * 1

    read = model.run(x, read=[target], edits={source: started}, until=target, grad=True)[target]
    values = read.movedim(model.site(target).unit_axis, 1)[(slice(None), slice(None), *like.at)]
    found = []
    for unit in like.units:
        (grad,) = torch.autograd.grad(values[:, unit].sum(), kept[0], retain_graph=True)
        found.append(grad.movedim(model.site(source).unit_axis, 1))
    whole = torch.stack(found, 1)
    size = like.weight.shape[like.weight.ndim - len(like.start) :]
    places = tuple(slice(a, a + n) for a, n in zip(like.start, size, strict=True))
    inside = whole[(slice(None), slice(None), slice(None), *places)]
    assert whole.abs().sum() == pytest.approx(inside.abs().sum().item()), (
        "weights outside the window"
    )
    return inside


class Between(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, step: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.turned = nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1)
        self.gate = nn.Conv2d(6, 6, 1)
        self.lstm, self.gru = nn.LSTM(6, 6, batch_first=True), nn.GRU(6, 6, 2, batch_first=True)
        self.cell = nn.LSTMCell(6, 6)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.step(self, self.a(x)))


LINEAR_STEPS: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "chunks": lambda n, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "parts of unequal size": lambda n, x: torch.cat(
        [p * i for i, p in enumerate(x.split([1, 2, 3], 1))], 1
    ),
    "stacked": lambda n, x: torch.stack([x, 2 * x], 1).flatten(1, 2)[:, 3:9],
    "transposed convolution": lambda n, x: n.turned(x),
    "enlarged": lambda n, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "reflected": lambda n, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "around": lambda n, x: F.pad(x, (1, 2, 0, 1), mode="circular"),
    "around, and cut": lambda n, x: F.pad(
        F.pad(x, (2, -3, -1, 1), "circular"), (1, 1, 0, 1), "replicate"
    ),
    "cut and padded": lambda n, x: F.pad(x, (1, -1, 2, 0), value=0.3),
    "reordered": lambda n, x: x[:, [0, 2, 4, 1, 3, 5]].flip(-1).roll(2, -1),
    "a constant for each channel": lambda n, x: 1 - x * torch.linspace(-1, 1, 6)[:, None, None] / 2,
    "mixed channels": lambda n, x: torch.einsum("bchw,dc->bdhw", x, n.gate.weight[:, :, 0, 0]),
    "average, cut windows": lambda n, x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0), ceil_mode=True),
    "average over what is inside": lambda n, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "a matrix, times a number": lambda n, x: (
        torch.addmm(
            torch.zeros(1, 1, dtype=x.dtype),
            x.permute(0, 2, 3, 1).reshape(-1, 6),
            n.gate.weight[:, :, 0, 0],
            alpha=2.0,
        )
        .reshape(len(x), 13, 12, 6)
        .permute(0, 3, 1, 2)
    ),
    "average by another number": lambda n, x: F.avg_pool2d(x, 2, divisor_override=3),
}


def filtered(n: Between, x: Tensor) -> Tensor:
    """GFNet: each frequency of each channel is multiplied by a complex number."""
    spectrum = torch.fft.rfft2(x, norm="ortho")
    weight = n.gate.weight.flatten()[: 2 * 6].reshape(6, 1, 1, 2)
    return torch.fft.irfft2(
        spectrum * torch.view_as_complex(weight) + spectrum, x.shape[-2:], norm="ortho"
    )


TRANSFORMS: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "filtered": filtered,
    "mixed by their spectrum": lambda n, x: torch.fft.fft(torch.fft.fft(x, dim=1), dim=-1).real,
    "one of two paths": lambda n, x: x + torch.fft.fft2(x).imag,
    "put together": lambda n, x: torch.view_as_real(
        torch.complex(x, 2 * x) * torch.tensor(0.3 - 0.5j, dtype=torch.complex128)
    ).sum(-1),
    "turned back": lambda n, x: torch.fft.ifft(torch.fft.fft(x).conj()).real,
}
OTHER_STEPS: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "squeeze and excitation": lambda n, x: x * torch.sigmoid(n.gate(x.mean((2, 3), keepdim=True))),
    "softmax": lambda n, x: x.softmax(1),
    "layer norm": lambda n, x: F.layer_norm(x, x.shape[1:]),
    "maximum of two": lambda n, x: torch.maximum(x, x.flip(1)),
    "adaptive maximum": lambda n, x: F.adaptive_max_pool2d(x, 3),
    "dilated maximum": lambda n, x: F.max_pool2d(x, 2, 2, 0, dilation=2),
    "leaky": lambda n, x: F.leaky_relu(x, 0.2),
    "in place": lambda n, x: F.silu(x, inplace=True),
    "leaky, in place": lambda n, x: F.leaky_relu_(x, 0.1),
    "cut off, in place": lambda n, x: F.hardtanh_(x),
    "half without gradient": lambda n, x: x + 2 * x.detach(),
    "a later part alone": lambda n, x: torch.cat([x.chunk(2, 1)[1]] * 2, 1),
    "square": lambda n, x: x * x,
    "spectrum": lambda n, x: torch.fft.fft2(x).abs(),
    "lstm": lambda n, x: x + n.lstm(x.mean(2).transpose(1, 2))[0].transpose(1, 2)[:, :, None],
    "last state of a gru": lambda n, x: (
        x + n.gru(x.mean(2).transpose(1, 2))[1][1, :, :, None, None]
    ),
    "rounded": lambda n, x: x + torch.div(x, 0.5, rounding_mode="trunc"),
}


@pytest.mark.parametrize("name", [*LINEAR_STEPS, *TRANSFORMS, *OTHER_STEPS])
def test_steps_of_many_kinds(name: str) -> None:
    net = seeded(Between((LINEAR_STEPS | TRANSFORMS | OTHER_STEPS)[name])).double()
    model = HookedModel(net, (3, 13, 12))
    x = torch.randn(2, 3, 13, 12, dtype=torch.float64)
    each = expand_weights(model, "a", "b", mode="example", examples=x)
    assert_close(each.weight, by_autograd(model, "a", "b", each, x))
    if name in LINEAR_STEPS:  # nothing depends on activations: all modes are one
        linear = expand_weights(model, "a", "b", apart=True)
        assert_close(linear.weight, each.weight[0].double())
        assert linear.positive is not None
        assert linear.negative is not None
        assert linear.positive.min() >= -1e-6
        assert linear.negative.max() <= 1e-6

    if name in TRANSFORMS:
        linear = expand_weights(model, "a", "b")
        assert_close(linear.weight, each.weight[0].double())
        with pytest.raises(
            ValueError, match="a sum with weights of both signs: expected apart=False"
        ):
            expand_weights(model, "a", "b", apart=True)


@pytest.mark.parametrize("name", ["lstm", "spectrum"])
def test_steps_without_a_linear_reading_are_refused(name: str) -> None:
    model = HookedModel(seeded(Between(OTHER_STEPS[name])).double(), (3, 13, 12))
    with pytest.raises(
        ValueError, match=f"operation {name.replace('spectrum', 'abs')} in mode linear"
    ):
        expand_weights(model, "a", "b")


PRECISION_STEPS: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "lstm": OTHER_STEPS["lstm"],
    "gru": OTHER_STEPS["last state of a gru"],
    "lstm cell": lambda n, x: x + n.cell(x.mean((2, 3)))[0][:, :, None, None],
    "convolution": lambda n, x: n.gate(x),
    "transposed convolution": lambda n, x: n.turned(x),
    "activations": lambda n, x: F.prelu(F.gelu(x), n.gate.bias),
    "normalised": lambda n, x: F.group_norm(x, 2, n.gate.bias, n.gate.bias),
    "autocast": lambda n, x: _autocast(n.gate, x),
}


def _autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
        return layer(x).to(x.dtype)


@pytest.mark.parametrize("name", PRECISION_STEPS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_pulled_back_through_parts_of_any_precision(name: str, kind) -> None:
    """A part in bfloat16 inside a model of float32, against autograd in float64."""
    step = PRECISION_STEPS[name]

    def mixed(n: Between, x: Tensor) -> Tensor:
        own = kind if x.dtype == torch.float32 and name != "autocast" else x.dtype
        return step(n, x.to(own)).to(x.dtype)

    model, exact = (seeded(Between(mixed)) for _ in range(2))
    exact = HookedModel(exact.double(), (3, 13, 12))
    if name != "autocast":
        for part in (model.gate, model.turned, model.lstm, model.gru, model.cell):
            part.to(kind)
    x = torch.randn(2, 3, 13, 12)
    ours = expand_weights(HookedModel(model, (3, 13, 12)), "a", "b", mode="example", examples=x)
    wanted = by_autograd(exact, "a", "b", ours, x.double())
    coarse = kind == torch.bfloat16 or name == "autocast"
    tolerance = (0.05 if coarse else 1e-5) * wanted.abs().max().item()
    torch.testing.assert_close(ours.weight.double(), wanted, rtol=0, atol=tolerance)


def test_in_place_steps_and_a_block_used_twice(own_net: HookedModel) -> None:
    model = doubled(own_net)
    x = torch.randn(2, *OwnNet.input_shape, dtype=torch.float64)
    ours = expand_weights(model, "relu", "fc", mode="example", examples=x)
    assert_close(ours.weight, by_autograd(model, "relu", "fc", ours, x))
    linear = expand_weights(model, "block.act@0", "block.act@1", at=(4, 5))
    with Linearised():
        assert_close(linear.weight, differences(model, "block.act@0", linear, x[:1]))


def test_input_is_a_source(branches: HookedModel) -> None:
    ours = expand_weights(branches, "input", "stem_relu", at=(3, 3))
    torch.testing.assert_close(ours.weight, branches.module.stem.weight)
    assert ours.start == (2, 2)


def test_positive_and_negative_paths_by_listing_them() -> None:
    """Two 1 x 1 layers: a path is one hidden unit."""
    model = HookedModel(
        seeded(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1))), (3, 4, 4)
    )
    ours = expand_weights(model, "input", "2", apart=True)
    first = model.module[0].weight[:, :, 0, 0]
    second = model.module[2].weight[:, :, 0, 0]
    paths = second[:, :, None] * first[None]  # target x hidden x source
    assert ours.positive is not None
    assert ours.negative is not None
    torch.testing.assert_close(ours.positive[..., 0, 0], paths.clamp_min(0).sum(1))
    torch.testing.assert_close(ours.negative[..., 0, 0], paths.clamp_max(0).sum(1))
    torch.testing.assert_close(ours.positive + ours.negative, ours.weight)


def test_paths_of_examples_are_kept_apart() -> None:
    """At real activations a path counts where its hidden unit is active."""
    net = seeded(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1)))
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    ours = expand_weights(
        HookedModel(net, (3, 4, 4)), "input", "2", mode="mean", examples=x, apart=True
    )
    active = (net[0](x)[0, :, 2, 2] > 0).float()[None, :, None]
    assert 0 < active.sum() < 5
    paths = active * net[2].weight[:, :, None, 0, 0] * net[0].weight[None, :, :, 0, 0]
    assert ours.positive is not None
    torch.testing.assert_close(ours.positive[..., 0, 0], paths.clamp_min(0).sum(1).detach())


def test_paths_kept_apart_through_branches_and_batch_norm(branches: HookedModel) -> None:
    """Positive paths of a network are those of a network of absolute weights, less the half sum."""
    ours = expand_weights(branches, "pool", "out_relu", apart=True)
    absolute = copy.deepcopy(branches.module)
    with torch.no_grad():
        for name, p in absolute.named_parameters():
            if name.endswith("weight"):
                p.abs_()
    wide = expand_weights(HookedModel(absolute, (3, 8, 10)), "pool", "out_relu")
    assert ours.positive is not None
    assert ours.negative is not None
    torch.testing.assert_close(ours.positive - ours.negative, wide.weight)
    assert (ours.positive >= 0).all()
    assert (ours.negative <= 0).all()
    assert ours.positive.sum() > 3 * ours.weight.sum().abs(), "the two nearly cancel here"


def test_sum_over_paths_is_the_expanded_weight() -> None:
    """Linear mode: the product of the layers' kernels (as convolutions) summed over hidden units."""
    module = seeded(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    )
    model = HookedModel(module, (3, 12, 12))
    ours = expand_weights(model, "input", "2")
    summed = torch.zeros(4, 3, 5, 5)
    for hidden in range(6):
        for a in range(3):
            for b in range(3):
                outer = module[2].weight[:, hidden, a, b].detach()
                summed[:, :, a : a + 3, b : b + 3] += (
                    outer[:, None, None, None] * module[0].weight[hidden].detach()
                )
    torch.testing.assert_close(ours.weight, summed)
    assert not ours.cut
    assert ours.start == (4, 4)
    assert ours.at == (6, 6)


def test_direct_weights_are_the_raw_ones(branches: HookedModel) -> None:
    (raw,) = raw_weights(branches, "cat", "out_relu")
    assert raw.layer == "inner"
    assert raw.units == tuple(range(6)) == raw.channels
    bn = branches.module.bn
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    torch.testing.assert_close(
        raw.weight, (branches.module.inner.weight * scale[:, None, None, None]).detach()
    )
    torch.testing.assert_close(raw.bias, (bn.bias - bn.running_mean * scale).detach())
    left, right = raw_weights(branches, "pool", "cat")
    assert (left.layer, left.units, left.channels) == ("left", (0, 1, 2, 3), (0, 1, 2, 3))
    assert (right.layer, right.units, right.channels) == ("right", (4, 5), (0, 1))
    torch.testing.assert_close(right.bias, branches.module.right.bias.detach())
    for unit in range(4):
        for c in incoming(branches, Unit("cat", unit), top=99):
            full = raw_weights(branches, "stem_relu", "cat")[0]
            assert torch.equal(full.weight[unit, c.source.index], c.kernel)


def test_a_window_cut_by_the_border_says_so(branches: HookedModel) -> None:
    assert expand_weights(branches, "pool", "out_relu").cut
    larger = expand_weights(HookedModel(seeded(Plain()), (3, 13, 11)), "a_relu", "c", size=(60, 60))
    assert not larger.cut


def test_save_load(branches: HookedModel, tmp_path: Path) -> None:
    ours = expand_weights(branches, "pool", "bn", units=[1, 4], sources=[0, 5], apart=True)
    ours.save(tmp_path / "w.safetensors")
    again = ExpandedWeights.load(tmp_path / "w.safetensors")
    for name in ("weight", "positive", "negative"):
        assert torch.equal(getattr(again, name), getattr(ours, name))
    for name in ("source", "target", "units", "sources", "at", "start", "mode", "model_hash"):
        assert getattr(again, name) == getattr(ours, name)
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no expanded weights"):
        ExpandedWeights.load(tmp_path / "other")


def test_units_and_sources_select(branches: HookedModel) -> None:
    everything = expand_weights(branches, "pool", "out_relu")
    some = expand_weights(branches, "pool", "out_relu", units=[5, 2], sources=[3])
    assert torch.equal(some.weight, everything.weight[[5, 2]][:, [3]])
    strongest = everything.connections(2, top=3)
    assert [c.norm for c in strongest] == sorted((c.norm for c in strongest), reverse=True)
    assert torch.equal(strongest[0].kernel, everything.weight[2, strongest[0].source.index])


def test_tokens_by_gradient(bridge: HookedModel) -> None:
    tokens = bridge.input.example(2)
    ours = expand_weights(
        bridge, "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_pre", mode="example", examples=tokens
    )
    oracle = by_autograd(bridge, ours.source, ours.target, ours, tokens)
    torch.testing.assert_close(ours.weight, oracle, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"mode linear.*modes 'mean' and 'example' can"):
        expand_weights(bridge, "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_pre", examples=tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out_relu", "stem"), "source out_relu comes after target stem"),
        (("left", "right"), "left and right are not connected"),
        (("cat", "cat"), "the same site"),
        (("cat", "dog"), "unknown site"),
    ],
)
def test_sites_that_do_not_fit(branches: HookedModel, arguments, message) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        expand_weights(branches, *arguments)


def test_bad_input_is_named(branches: HookedModel, bridge: HookedModel) -> None:
    for wrong, message in (
        ({"mode": "mean"}, "mode 'mean' needs examples"),
        ({"units": [6]}, "units: out_relu:6 does not exist: out_relu has units 0 to 5"),
        ({"sources": []}, "sources is empty"),
        ({"at": (9, 0)}, "at .9, 0. is not a position of out_relu: expected one of 4 x 5"),
        ({"examples": torch.zeros(1, 3, 8, 10)}, "examples are not used in mode 'linear'"),
    ):
        with pytest.raises(ValueError, match=message):
            expand_weights(branches, "cat", "out_relu", **wrong)
    with pytest.raises(ValueError, match=r"units of blocks.0.attn.hook_z are heads"):
        expand_weights(
            bridge, "blocks.0.attn.hook_z", "hook_unembed", mode="mean", examples=bridge.input.example(1)
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"directly .out_relu reads cat.: expand_weights"):
        raw_weights(branches, "stem", "out_relu")


def test_an_operation_without_a_linear_reading_is_named() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x * torch.sigmoid(x))

    model = HookedModel(seeded(Gated()), (3, 5, 5))
    with pytest.raises(ValueError, match=r"operation mul of two maps.*in mode linear"):
        expand_weights(model, "a", "b")
    x = torch.randn(2, 3, 5, 5)
    ours = expand_weights(model, "a", "b", mode="example", examples=x)
    torch.testing.assert_close(
        ours.weight, by_autograd(model, "a", "b", ours, x), rtol=1e-4, atol=1e-6
    )


def test_what_linear_mode_would_take_from_an_image_is_refused() -> None:
    """From the gate on, the map that it is multiplied by is a number of the image, not a weight."""

    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x * self.gate(x.mean((2, 3)))[:, :, None, None] + x)

    model = HookedModel(seeded(Excited()), (3, 5, 5))
    with pytest.raises(ValueError, match="mul with a tensor that depends on the input and not on"):
        expand_weights(model, "gate", "b")
    x = torch.randn(2, 3, 5, 5)
    ours = expand_weights(model, "gate", "b", mode="example", examples=x)
    torch.testing.assert_close(
        ours.weight, by_autograd(model, "gate", "b", ours, x), rtol=1e-4, atol=1e-6
    )


def test_writing_into_a_part_is_refused() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x[:, :2].relu_()
            return self.b(x)

    with pytest.raises(ValueError, match="a part was changed in place"):
        expand_weights(HookedModel(seeded(Parts()), (3, 5, 5)), "a", "b")


# --- real models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "units"),
    [("mixed3a", "mixed3b", [0, 130, 335, 400, 450]), ("conv2d2", "mixed3b", [5, 200, 335])],
)
def test_googlenet(assets: Path, source: str, target: str, units: list[int]) -> None:
    model = load_model("googlenet")
    ours = expand_weights(model, source, target, units=units, sources=[0, 7, 100])
    oracle = doubled(model)
    x = torch.zeros(1, 3, 224, 224, dtype=torch.float64)
    kept: list[Tensor] = []

    def started(value: Tensor) -> Tensor:
        kept.append(value.detach().requires_grad_(True))
        return kept[0] * 1

    with Linearised():
        cache = oracle.run(
            x, read=[target], edits={source: started}, until=target, grad=True, reference=True
        )
    for row, unit in enumerate(units):
        value = cache[target][0, unit, 14, 14]
        (grad,) = torch.autograd.grad(value, kept[0], retain_graph=True)
        size = ours.weight.shape[-2:]
        window = tuple(slice(a, a + n) for a, n in zip(ours.start, size, strict=True))
        assert_close(ours.weight[row], grad[0, [0, 7, 100]][(slice(None), *window)])
    images = Examples(model, "photos", 2).inputs
    middle = model.run(images, read=[target], until=target)[target][:, :, 14, 14]
    active = middle.sum(0).argsort(descending=True)[:4].tolist()
    each = expand_weights(model, source, target, units=active, mode="example", examples=images)
    assert_close(each.weight, by_autograd(doubled(model), source, target, each, images.double()))


def test_resnet_across_a_residual_block(assets: Path) -> None:
    model = load_model("cifar10-resnet20")
    source, target = "layer1.0", "layer1.1"
    ours = expand_weights(model, source, target, units=[0, 9], sources=[0, 3, 15])
    with Linearised():
        oracle = differences(
            doubled(model), source, ours, torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        )
    assert_close(ours.weight, oracle)


# --- factors -----------------------------------------------------------------------------------


def test_factors_find_the_groups_that_weights_were_made_of(branches: HookedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.zeros(3, 12)
    for k in range(3):
        groups[k, 4 * k : 4 * k + 4] = torch.rand(4, generator=generator) + 0.5
    maps = (
        torch.randn(3, 5, 3, 3, generator=generator)
        * torch.tensor([3.0, 2, 1])[:, None, None, None]
    )
    weight = torch.einsum("ks,ktyx->tsyx", groups, maps)
    made = dataclasses.replace(
        expand_weights(branches, "cat", "out_relu"),
        weight=weight, units=tuple(range(5)), sources=tuple(range(12)),
    )  # fmt: skip
    found = factorize(made, 3)
    torch.testing.assert_close(
        torch.from_numpy(found.reconstructed()).float(), weight, rtol=0.02, atol=0.02
    )
    assert found.shares[-1] > 0.999
    assert found.hidden < 0.02
    for k in range(3):
        cosines = groups @ torch.from_numpy(found.groups[k]).float() / groups.norm(dim=1)
        assert cosines.max() > 0.99, "each factor is one of the groups"
    fewer = factorize(made, 1)
    off = made.weight.numpy() - fewer.reconstructed()
    assert fewer.hidden == pytest.approx(abs(off).sum() / made.weight.abs().sum().item(), rel=1e-4)
    assert fewer.shares[0] < 0.95
    with pytest.raises(ValueError, match="k 13 must be 1 to 12"):
        factorize(made, 13)
