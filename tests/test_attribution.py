from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.attribution import (
    Attribution,
    Passes,
    Target,
    attribute,
    channel_groups,
    direct_logit_attribution,
    parse_target,
    relevance,
)
from circuits.attribution.channels import check_by_ablation
from circuits.attribution.propagation import SINGLE_NUMBERS, RelevanceRule
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.saliency import (
    METHODS,
    cams,
    extremal,
    extremal_channels,
    meaningful,
    saliency_map,
    surrogates,
)
from circuits.saliency.perturbations import hard, shown_by
from circuits.tasks.targets import output_site
from circuits.units import Unit
from tests.conftest import Branches, seeded
from tests.vision_transformer import VisionTransformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # captum's own deprecations
    import captum.attr as captum

close = torch.testing.assert_close


@pytest.fixture
def double() -> HookedModel:
    """Branches in float64, so that a gradient at a ReLU's corner is on the same side everywhere."""
    return HookedModel(seeded(Branches()).double(), (3, 8, 10))


@pytest.fixture
def images(double: HookedModel) -> Tensor:
    return double.fitted(double.input.example(3, seed=1))


def hooks(model: HookedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


# --- equal to captum ---------------------------------------------------------------------------


def theirs(name: str, model: HookedModel, x: Tensor, top: Tensor) -> Tensor:
    net, own = model.module, x.clone().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        match name:
            case "gradient":
                return captum.Saliency(net).attribute(own, top, abs=False)
            case "gradient_x_input":
                return captum.InputXGradient(net).attribute(own, top)
            case "guided_backprop":
                return captum.GuidedBackprop(net).attribute(own, top)
            case "integrated_gradients":
                return captum.IntegratedGradients(net).attribute(own, target=top, n_steps=50)
            case _:
                made = captum.Occlusion(net).attribute(x, (3, 4, 4), strides=(3, 3, 3), target=top)
                return made[:, :1]


@pytest.mark.parametrize(
    "method",
    ["gradient", "gradient_x_input", "guided_backprop", "integrated_gradients", "occlusion"],
)
def test_input_attribution_equals_captum(double: HookedModel, images: Tensor, method: str) -> None:
    options = {"occlusion": {"window": 4, "stride": 3}, "integrated_gradients": {"tolerance": None}}
    made = saliency_map(double, images, "top", method, batch=4, **options.get(method, {}))
    top = double.logits(images).argmax(1)
    peer = theirs(method, double, images, top)
    close(made.values, peer.double(), rtol=1e-6, atol=1e-6 if peer.dtype == torch.float32 else 1e-9)
    close(made.target_values, double.logits(images).amax(1))


def test_layer_attribution_equals_captum(double: HookedModel, images: Tensor) -> None:
    net, top = double.module, double.logits(images).argmax(1)
    layer = net.get_submodule("cat")
    made = attribute(double, images, "top", "cat", check=0)
    close(made.values, captum.LayerGradientXActivation(net, layer).attribute(images, top))
    blank = double.run(torch.zeros_like(images[:1]), read=["cat"])["cat"][0]
    whole = attribute(
        double,
        images,
        "top",
        "cat",
        "integrated_gradients",
        check=0,
        tolerance=None,
        baseline=blank,
    )
    close(whole.values, captum.LayerIntegratedGradients(net, layer).attribute(images, target=top))
    cam = cams.grad_cam(Passes(double, images, "top", "out_relu"))
    close(
        cam[:, None], captum.LayerGradCam(net, net.get_submodule("out_relu")).attribute(images, top)
    )


# --- slow oracles ------------------------------------------------------------------------------


def test_kernel_shap_over_all_subsets_is_shapley(double: HookedModel, images: Tensor) -> None:
    pieces = torch.zeros(3, 8, 10, dtype=torch.long)
    pieces[:, :4, 5:], pieces[:, 4:, :5], pieces[:, 4:, 5:] = 1, 2, 3
    passes = Passes(double, images, "class:1")
    found = surrogates.kernel_shap(passes, pieces, samples=14)
    for example, x in enumerate(images):

        def value(shown: set[int], x: Tensor = x) -> float:
            mask = torch.isin(pieces[0], torch.tensor(sorted(shown), dtype=torch.long))
            return float(double.logits((x * mask)[None])[0, 1])

        for piece in range(4):
            orders = list(itertools.permutations(range(4)))
            gains = [
                value({*order[: order.index(piece)], piece}) - value({*order[: order.index(piece)]})
                for order in orders
            ]
            got = float(found[example, 0][pieces[0] == piece][0])
            assert got == pytest.approx(np.mean(gains), abs=1e-5)


def test_lime_is_a_weighted_ridge_regression(double: HookedModel, images: Tensor) -> None:
    from sklearn.linear_model import Ridge

    pieces = surrogates.superpixels(images, 9)
    n = int(pieces[0].max()) + 1
    found = surrogates.lime(Passes(double, images[:1], "class:0"), pieces[:1], samples=80, seed=3)
    z = np.random.default_rng(3).integers(0, 2, (80, n)).astype(float)
    z[0] = 1
    shown = torch.tensor(z)[:, pieces[0]][:, None] * images[0]
    y = double.logits(shown)[:, 0].numpy()
    cosine = z.sum(1) / (np.sqrt(z.sum(1) * n) + 1e-300)
    weights = np.sqrt(np.exp(-((1 - cosine) ** 2) / 0.25**2))
    fit = Ridge(alpha=1.0).fit(z, y, sample_weight=weights)
    own = [float(found[0, 0][pieces[0] == k][0]) for k in range(n)]
    np.testing.assert_allclose(own, fit.coef_, atol=1e-5)


def test_integrated_gradients_are_the_mean_gradient_on_the_way(
    double: HookedModel, images: Tensor
) -> None:
    made = saliency_map(double, images[:1], "class:2", "integrated_gradients", steps=64)
    x = images[:1]
    total = torch.zeros_like(x)
    for way in ((torch.arange(4000, dtype=x.dtype) + 0.5) / 4000).split(250):
        points = (x * way[:, None, None, None]).requires_grad_(True)
        output = double.run(points, grad=True).output[:, 2]
        total += torch.autograd.grad(output.sum(), points)[0].sum(0, keepdim=True)
    close(made.values, x * total / 4000, rtol=0.02, atol=0.01)
    difference = double.logits(x)[0, 2] - double.logits(x * 0)[0, 2]
    assert abs(float(made.residual[0])) <= 0.01 * abs(float(difference))
    close(made.values.sum() + made.residual[0], difference)


def test_smoothed_gradients_are_moments_of_noisy_ones(double: HookedModel, images: Tensor) -> None:
    x = images[1]
    noise = torch.randn(6, *x.shape, generator=torch.Generator().manual_seed(4))
    points = (x + 0.2 * (x.max() - x.min()) * noise).requires_grad_(True)
    (each,) = torch.autograd.grad(double.run(points, grad=True).output[:, 1].sum(), points)
    options = {"samples": 6, "noise": 0.2, "seed": 4, "batch": 6}
    expected = {
        "smoothgrad": each.mean(0),
        "smoothgrad_squared": each.square().mean(0),
        "vargrad": each.var(0, correction=0),
    }
    for method, value in expected.items():
        made = saliency_map(double, images, "class:1", method, **options)
        close(made.values[1], value)
        again = saliency_map(double, images[1:2], "class:1", method, **options)
        close(again.values[0], made.values[1]), "its noise does not depend on its company"
    other = saliency_map(double, images, "class:1", "smoothgrad", **(options | {"seed": 5}))
    assert not torch.equal(other.values[1], expected["smoothgrad"])


def test_grad_cams_by_their_formulas(double: HookedModel, images: Tensor) -> None:
    cache = double.run(images, read=["out_relu"])
    a = cache["out_relu"].detach().requires_grad_(True)
    value = double.run(images, edits={"out_relu": lambda _: a * 1}, grad=True).output[:, 0]
    (g,) = torch.autograd.grad(value.sum(), a)
    passes = Passes(double, images, "class:0", "out_relu")
    close(cams.grad_cam(passes), (g.mean((2, 3), keepdim=True) * a).sum(1))
    below = 2 * g**2 + a.sum((2, 3), keepdim=True) * g**3
    alpha = torch.where(below == 0, 0, g**2 / below)
    plus = ((alpha * g.relu()).sum((2, 3), keepdim=True) * a).sum(1)
    close(cams.grad_cam_plus_plus(passes), plus)
    close(cams.smooth_grad_cam_plus_plus(passes, samples=3, noise=0.0), plus)
    large = saliency_map(double, images, "class:0", "grad_cam", site="out_relu")
    close(
        large.values.amax((2, 3))[:, 0],
        cams.grad_cam(passes).relu().amax((1, 2)),
        rtol=0.2,
        atol=0.1,
    )


def plain_cam(
    module: nn.Module, inner: nn.Module, images: Tensor, unit: int
) -> tuple[Tensor, Tensor]:
    """A module's output and its gradient, from torch's own hooks."""
    seen: list[Tensor] = []
    with inner.register_forward_hook(lambda _, __, output: seen.append(output)):
        value = module(images)[:, unit].sum()
    return seen[0].detach(), torch.autograd.grad(value, seen[0])[0]


@pytest.mark.parametrize("read", ["class", "mean"])
@pytest.mark.parametrize(("registers", "last"), [(0, False), (2, False), (1, True)])
def test_grad_cam_of_a_vision_transformer(
    read: Literal["class", "mean"], registers: int, last: bool
) -> None:
    """Its tokens put back into the map of patches, without the class token and registers."""
    module = seeded(VisionTransformer(read, registers, last)).double()
    model = HookedModel(module, VisionTransformer.input_shape)
    images = torch.rand(
        2, *VisionTransformer.input_shape, generator=torch.Generator().manual_seed(0)
    )
    images = images.double()
    # A head that reads the class token leaves no gradient at the other tokens behind the last attention.
    site = "blocks.1.norm1" if read == "class" else "norm"
    a, g = plain_cam(module, module.get_submodule(site), images, 3)
    start = 0 if last else 1 + registers
    a, g = (t[:, start : start + 12].transpose(1, 2).unflatten(2, (3, 4)) for t in (a, g))
    cam = (a * g.mean((2, 3), keepdim=True)).sum(1)
    close(cams.grad_cam(Passes(model, images, "class:3", site)), cam)
    found = saliency_map(model, images, "class:3", "grad_cam")
    assert found.settings["site"] == site
    size = VisionTransformer.input_shape[1:]
    shown = torch.nn.functional.interpolate(cam.relu()[:, None], size, mode="bilinear")
    close(found.values, shown)
    if read == "class":
        with pytest.raises(
            ValueError, match="site norm: no gradient leads from the target to the t"
        ):
            saliency_map(model, images, "class:3", "grad_cam", site="norm")


class Ended(nn.Module):
    """A stem, layers on maps or on tokens, and an end of mixed tokens: a CNN's pooling by attention or a resampler."""

    def __init__(self, on: str, layers: int) -> None:
        super().__init__()
        self.on, self.stem = on, nn.Conv2d(3, 6, 4, 4)
        make = (lambda: nn.Conv2d(6, 6, 1)) if on == "maps" else (lambda: nn.LayerNorm(6))
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.mix, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.on == "maps":
            for layer in self.layers:
                x = layer(x)
        x = x.flatten(2).transpose(1, 2)
        x = self.mix(x + x.mean(1, keepdim=True))  # no token of one patch alone
        if self.on == "tokens":
            for layer in self.layers:
                x = layer(x)
        return self.head(x.square().mean(1))


def test_the_last_map_of_a_network_that_ends_in_mixed_tokens() -> None:
    pooled = HookedModel(seeded(Ended("maps", 6)), (3, 12, 16))
    assert cams.last_map(pooled, parse_target(pooled, "class:1")).name == "layers.5"
    mixed = HookedModel(seeded(Ended("tokens", 6)), (3, 12, 16))
    with pytest.raises(ValueError, match=r"tokens that cannot be put back into a map, .* name the"):
        cams.last_map(mixed, parse_target(mixed, "class:1"))


def test_the_last_map_is_not_a_linear_layer_over_tokens() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6)
            self.score, self.head = nn.Linear(6, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.norm(self.stem(x).flatten(2).transpose(1, 2))
            return self.head(self.score(tokens).square().mean(1))

    model = HookedModel(seeded(Scored()), (3, 12, 16))
    assert cams.last_map(model, parse_target(model, "class:1")).name == "norm"


class ChannelsLast(nn.Module):
    """Channels-last maps, as Swin has, with other lengths of all axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x).permute(0, 2, 3, 1)).square().mean((1, 2)))


def test_grad_cam_of_channels_last_maps() -> None:
    module = seeded(ChannelsLast()).double()
    model = HookedModel(module, (3, 12, 16))
    images = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)).double()
    a, g = plain_cam(module, module.norm, images, 1)
    assert cams.last_map(model, parse_target(model, "class:1")).name == "norm"
    close(
        cams.grad_cam(Passes(model, images, "class:1", "norm")), (a * g.mean((1, 2), True)).sum(3)
    )


def test_tokens_that_are_no_map_are_refused() -> None:
    class Mixed(VisionTransformer):
        """Its tokens are mixed before a module shows them."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = self.blocks((x + x.roll(1, 1)) / 2)
            return self.head(self.norm(x).mean(1))

    model = HookedModel(seeded(Mixed()), VisionTransformer.input_shape)
    images = model.input.example(1)
    with pytest.raises(ValueError, match=r"cannot be put back into a map.*name the site"):
        saliency_map(model, images, "class:3", "grad_cam")
    with pytest.raises(ValueError, match="site norm: its 12 tokens are not one for each of the 12"):
        saliency_map(model, images, "class:3", "grad_cam", site="norm")
    found = saliency_map(model, images, "class:3", "grad_cam", site="patches")
    assert found.settings["site"] == "patches"
    zero = seeded(VisionTransformer())
    torch.nn.init.zeros_(zero.head.weight)
    model = HookedModel(zero, VisionTransformer.input_shape)
    with pytest.raises(ValueError, match="output head has no gradient at any of its tokens"):
        saliency_map(model, images, "class:3", "grad_cam")


def test_occlusion_by_hand() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((2, 3)).repeat(1, 2)

    model = HookedModel(Sum(), (1, 4, 4))
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    made = saliency_map(model, x, "class:0", "occlusion", window=2, stride=2).values[0, 0]
    blocks = torch.tensor([[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15.0]])
    close(made, blocks.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_rise_finds_the_pixels_that_count() -> None:
    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0, :8, :8].sum((1, 2)), x.sum((1, 2, 3)) * 0], 1)

    model = HookedModel(Corner(), (1, 32, 32))
    heat = saliency_map(model, torch.ones(1, 1, 32, 32), "class:0", "rise", samples=400).heat()[0]
    assert heat[:8, :8].mean() > 1.2 * heat[16:, 16:].mean()


# --- relevance ---------------------------------------------------------------------------------


def _propagated(layers: list[nn.Linear], x: np.ndarray, rule: str, gamma: float) -> np.ndarray:
    """Relevance of the inputs of a chain of linear layers and ReLUs for output 0, by the rules' definitions."""
    activations = [x]
    for layer in layers[:-1]:
        w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        activations.append(np.maximum(w @ activations[-1] + b, 0))
    last = layers[-1]
    z = last.weight.detach().numpy() @ activations[-1] + last.bias.detach().numpy()
    relevance = np.zeros_like(z)
    relevance[0] = z[0]
    for layer, a in zip(layers[::-1], activations[::-1], strict=True):
        w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        out = np.zeros_like(a)
        for j in range(len(w)):
            shares = np.zeros_like(a)
            bias = b[j]
            own = sum(a[i] * w[j, i] for i in range(len(a))) + b[j]
            if rule == "epsilon":
                shares = a * w[j]
            elif rule == "z_plus":
                shares = np.array(
                    [
                        max(a[i], 0) * max(w[j, i], 0) + min(a[i], 0) * min(w[j, i], 0)
                        for i in range(len(a))
                    ]
                )
                bias = max(b[j], 0)
            else:
                strong = (lambda v: max(v, 0)) if own >= 0 else (lambda v: min(v, 0))
                shares = np.array(
                    [a[i] * w[j, i] + gamma * strong(a[i] * w[j, i]) for i in range(len(a))]
                )
                bias = b[j] + gamma * strong(b[j])
            if relevance[j]:
                out += shares / (shares.sum() + bias) * relevance[j]
        relevance = out
    return relevance


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z_plus"])
def test_relevance_follows_its_rules(rule: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3)]
    net = nn.Sequential(
        nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]
    ).double()
    model = HookedModel(net, (1, 2, 3))
    x = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    made = relevance(model, x, "class:0", rule=rule, gamma=0.3)
    for example in range(2):
        expected = _propagated(layers, x[example].flatten().numpy(), rule, 0.3)
        np.testing.assert_allclose(made.values[example].flatten().numpy(), expected, rtol=1e-6)
    assert float(made.residual.abs().max()) < 1e-6


@pytest.mark.parametrize("rule", ["gradient", "epsilon", "gamma", "z_plus"])
@pytest.mark.parametrize("site", ["input", "stem_relu", "cat", "bn"])
def test_relevance_is_conserved(double: HookedModel, images: Tensor, rule: str, site: str) -> None:
    made = relevance(double, images, "top", site, rule=rule)
    if rule == "gradient":  # not through the response normalisation
        made = relevance(double, images, "top", "cat", rule=rule)
    total = made.units().sum(1) + sum(made.parts.values())
    close(total, made.target_values, rtol=1e-6, atol=1e-6)
    if site == "bn" and rule != "gradient":
        assert made.parts["elsewhere"].abs().min() > 1e-3, "what is added to it"


@pytest.mark.parametrize(
    "bend",
    [nn.ReLU6(), nn.Hardtanh(-0.2, 0.5), nn.Threshold(0.1, 0.7), nn.Hardsigmoid(), nn.Softshrink(0.2), nn.ReLU6(True)],
    ids=str,
)  # fmt: skip
def test_the_offsets_of_what_is_linear_piece_by_piece_are_biases(bend: nn.Module) -> None:
    """f(x) = slope x + offset on each piece: under the rule `gradient` nothing is missing."""
    net = seeded(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 9), bend, nn.Linear(9, 3, bias=False))
    ).double()
    model = HookedModel(net, (3, 2, 2))
    x = model.fitted(model.input.example(4, seed=2)) * 20
    made = relevance(model, x, "class:1", rule="gradient")
    close(made.residual, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    own = x.clone().requires_grad_(True)
    (slopes,) = torch.autograd.grad(net(own)[:, 1].sum(), own)
    close(made.values, x * slopes, rtol=0, atol=1e-9)
    # By hand: the weights behind times what each number holds beyond slope x, and the biases before times the slope.
    z = (x.flatten(1) @ net[1].weight.T + net[1].bias).requires_grad_(True)
    (by_z,) = torch.autograd.grad(bend(z * 1).sum(), z)
    offsets = (bend(z * 1) - by_z * z + by_z * net[1].bias) @ net[3].weight[1]
    close(made.parts["biases"], offsets.detach(), rtol=0, atol=1e-9)
    assert float(made.parts["biases"].abs().min()) > 0.01


BENT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "clamp": (lambda z: z.clamp(-0.2, 0.5), lambda z: z.clamp(-0.2, 0.5)),
    "relu twice in place": (lambda z: F.relu(F.relu(z), True).relu_(), F.relu),
    "in place, not assigned": (
        lambda z: (F.leaky_relu_(z, 0.1), z)[1],
        lambda z: F.leaky_relu(z, 0.1),
    ),
    "product in place": (lambda z: (z + 0).mul_(torch.tanh(z)), lambda z: z * torch.tanh(z)),
    "gated linear unit": (lambda z: F.glu(z, 1), lambda z: z[:, :3] * torch.sigmoid(z[:, 3:])),
    "normalised": (lambda z: F.normalize(z, dim=1), lambda z: z / z.norm(dim=1, keepdim=True)),
    "square root": (lambda z: z.square().sqrt(), torch.abs),
    "times a reciprocal root": (
        lambda z: z * (z.var(1, keepdim=True) + 1e-5).rsqrt(),
        lambda z: z / (z.var(1, keepdim=True) + 1e-5).sqrt(),
    ),
    "times a negative power": (
        lambda z: z * (2 * (z.square().mean(1) + 1e-5)[:, None] ** -0.5),
        lambda z: 2 * z / (z.square().mean(1, keepdim=True) + 1e-5).sqrt(),
    ),
    "times one by a norm": (
        lambda z: z * (1 / z.norm(dim=1, keepdim=True)),
        lambda z: z / z.norm(dim=1, keepdim=True),
    ),
    "one by": (lambda z: 1 / z, lambda z: 1 / z),
}


class Summed(nn.Module):
    """A convolution, a function, a mean, a linear layer."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.step, self.fc = nn.Conv2d(1, 4, (1, 2)), step, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.step(self.conv(x)[:, :, 0]).mean(-1))


def assert_adds_up(step: Callable[[Tensor], Tensor], rule: Any = "epsilon") -> None:
    net = seeded(Summed(step)).double()
    x = torch.randn(2, 1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = HookedModel(net, (1, 1, 6))
    made = relevance(model, x, "class:1", rule=rule)
    close(made.target_values, model.logits(x)[:, 1], rtol=1e-9, atol=1e-9)
    assert bool((made.residual.abs() < 1e-5 * made.target_values.abs()).all())


EXTRA = {
    "threshold": (0.4, 0.2), "pow": (1.5,), "float_power": (1.5,), "atan2": (0.3,), "arctan2": (0.3,),
    "remainder": (0.3,), "fmod": (0.3,), "__mod__": (0.3,), "clamp": (0.3, 0.6), "clip": (0.3, 0.6),
    "clamp_min": (0.4,), "clamp_max": (0.4,), "mvlgamma": (2,), "multigammaln": (2,),
}  # fmt: skip
"""What functions of single numbers take besides the number."""


@pytest.mark.parametrize(
    "name", [*SINGLE_NUMBERS.split(), "pow", "float_power", "reciprocal", "rsqrt"]
)
def test_relevance_adds_up_through_functions_of_single_numbers(name: str) -> None:
    low = {"acosh": 1.1, "arccosh": 1.1, "mvlgamma": 1.0, "multigammaln": 1.0}.get(name, 0.1)
    for holder in (torch, Tensor, torch.special, F):
        function = getattr(holder, name, None)
        if function is None:
            continue
        extra: Any = EXTRA.get(name, ())
        if name in ("atan2", "arctan2"):
            extra = (torch.tensor(0.3, dtype=torch.float64),)
        if name == "polygamma":
            ordered = (
                (lambda z, f=function: f(z, 1))
                if holder is Tensor
                else (lambda z, f=function: f(1, z))
            )
            assert_adds_up(lambda z, f=ordered: f(low + 0.8 * z.sigmoid()))
        else:
            assert_adds_up(lambda z, f=function, e=extra: f(low + 0.8 * z.sigmoid(), *e))


V = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
WITH_CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rsub": lambda z: torch.rsub(z, 1),
    "subtract": lambda z: torch.subtract(z, other=V, alpha=2),
    "a sum in place": lambda z: (z + 0).__iadd__(V),
    "addcmul, first": lambda z: torch.addcmul(V, z, V),
    "addcmul, last": lambda z: z.addcmul(V, V, value=2),
    "addcdiv": lambda z: torch.addcdiv(z, V, V + 1),
    "index_add": lambda z: z.index_add(2, torch.tensor([0, 1]), V[:2].expand(*z.shape[:2], 2)),
    "index_copy": lambda z: z.index_copy(2, torch.tensor([0, 1]), V[:2].expand(*z.shape[:2], 2)),
    "index_fill": lambda z: z.index_fill(2, torch.tensor([0]), 1.5),
    "index_put": lambda z: z.index_put((torch.arange(len(z)),), V),
    "scatter": lambda z: z.scatter(2, torch.zeros(*z.shape[:2], 1, dtype=torch.long), 1.5),
    "masked_scatter": lambda z: z.masked_scatter(z > 0, V.expand_as(z)),
    "maximum": lambda z: torch.maximum(z, V),
    "minimum": lambda z: z.minimum(other=V),
    "max of two": lambda z: torch.max(z, V),
    "max over an axis": lambda z: z + z.max(1, keepdim=True)[0],
    "pad": lambda z: F.pad(z, (1, 1), value=1.0),
    "a layer that pads": lambda z: nn.ConstantPad1d(1, 0.7)(z),
    "lerp, start": lambda z: torch.lerp(V, z, 0.3),
    "lerp, end": lambda z: z.lerp(V, 0.3),
    "diff": lambda z: torch.diff(z, prepend=torch.ones_like(z[:, :, :1])),
    "baddbmm": lambda z: torch.baddbmm(V[:4], z, torch.ones_like(z).mT),
}
COMPOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "one by": lambda z: 1 / (z + 9),
    "constants by": lambda z: torch.true_divide(V, z + 9),
    "a constant to the power": lambda z: 2.0**z,
    "power in place": lambda z: (z.abs() + 1).__ipow__(0.5),
    "value at zero": lambda z: F.relu(z).cosh(),
    "root of zero": lambda z: F.relu(z).sqrt(),
    "logsumexp": lambda z: z + z.logsumexp(1, keepdim=True),
    "log_softmax": lambda z: F.log_softmax(z, 1),
    "logaddexp": lambda z: torch.logaddexp(z, V),
    "softmin": lambda z: F.softmin(z, 1) * z,
    "addcmul of two": lambda z: torch.addcmul(V, z, z.sin()),
    "lerp by an activation": lambda z: torch.lerp(z, V, z.sigmoid()),
    "multiply": lambda z: torch.multiply(input=z, other=z.sin()),
    "prod": lambda z: z.prod(-1, keepdim=True),
    "variance": lambda z: z + z.var(1, keepdim=True),
    "deviation": lambda z: z * V + z.std(1, keepdim=True),
    "mean and variance": lambda z: torch.var_mean(z, 1, keepdim=True)[0] + z,
    "norm alone": lambda z: z.norm(dim=1, keepdim=True).expand_as(z),
    "distance": lambda z: F.pairwise_distance(z, V.expand_as(z), eps=0.0)[..., None],
    "cosine": lambda z: F.cosine_similarity(z, V.expand_as(z), dim=-1)[..., None],
    "bilinear": lambda z: F.bilinear(z, z, V.expand(2, 5, 5), V[:2]),
    "root by place": lambda z: z * z.var(1).add(1e-5).rsqrt()[:, None] * V,
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_CONSTANTS)
def test_relevance_adds_up_with_constants(name: str) -> None:
    for rule in ("epsilon", "gradient"):
        assert_adds_up(WITH_CONSTANTS[name], rule)


@pytest.mark.parametrize("name", COMPOSED)
def test_relevance_adds_up_through_functions_of_several_numbers(name: str) -> None:
    assert_adds_up(COMPOSED[name])


@pytest.mark.parametrize("name", BENT)
def test_relevance_through_functions_and_in_place(name: str) -> None:
    """Each unit passes its relevance on as if it were a multiple of its input; a product halves it."""
    step, plain = BENT[name]

    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 6)
            self.b = nn.Linear(3 if name == "gated linear unit" else 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(step(self.a(x.flatten(1))))

    net = seeded(Bent()).double()
    x = torch.randn(2, 1, 1, 5, dtype=torch.float64)
    made = relevance(HookedModel(net, (1, 1, 5)), x, "class:1", rule="epsilon")
    for i in range(2):
        z = net.a(x[i].flatten()[None])
        out = (plain(z) * net.b.weight[1])[0]
        # What leaves a unit comes in at it, or half of it at each factor.
        share = torch.cat([out, out]) / 2 if name == "gated linear unit" else out
        expected = (share / z[0]) @ (net.a.weight * x[i].flatten())
        torch.testing.assert_close(made.values[i].flatten(), expected)
    assert float(made.residual.abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["gru", "lstm_cell"])
def test_relevance_has_no_rule_for_recurrent_layers(name: str) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)
            self.b = nn.GRU(3, 2, batch_first=True) if name == "gru" else nn.LSTMCell(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            given = self.a(x.flatten(1, 2))
            return self.b(given)[0][:, -1] if name == "gru" else self.b(given[:, -1])[0] + 0

    model = HookedModel(seeded(Read()).double(), (1, 3, 4))
    x = model.input.example(2).double()
    with pytest.raises(
        ValueError, match=rf"recurrent layer {name} has no rule 'epsilon': expected rule 'g"
    ):
        relevance(model, x, "class:1", "a")
    made = relevance(model, x, "class:1", "a", rule="gradient")
    direct = attribute(model, x, "class:1", "a", method="activation_x_gradient", check=0)
    close(made.values, direct.values)


def test_what_torch_cannot_differentiate_is_said() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Tanh(), nn.ReLU(inplace=True), nn.Flatten())
    model = HookedModel(seeded(net), (3, 2, 2))
    with pytest.raises(ValueError, match="overwrites the result of Tanh in place"):
        relevance(model, model.input.example(1), "class:1", rule="gradient")
    with pytest.raises(ValueError, match="overwrites the result of Tanh in place"):
        attribute(model, model.input.example(1), "class:1", "0")


def test_relevance_of_concepts_adds_up(double: HookedModel, images: Tensor) -> None:
    whole = relevance(
        double, images, "class:1", rule="z_plus", through=[f"cat:{i}" for i in range(6)]
    )
    parts = [
        relevance(double, images, "class:1", rule="z_plus", through=[f"cat:{i}"]) for i in range(6)
    ]
    close(sum(p.values for p in parts), whole.values)
    assert parts[0].residual is None
    assert parts[0].settings["through"] == "cat:0"


def test_weights_times_activations_and_bias_are_the_pre_activation(
    double: HookedModel, images: Tensor
) -> None:
    made = relevance(double, images, Target("bn", 2, at=(1, 3)), "cat", rule="gradient")
    h = double.run(images, read=["cat", "bn"])
    bn = double.module.get_submodule("bn")
    scale = (bn.weight[2] / (bn.running_var[2] + bn.eps).sqrt()).item()
    kernel = double.module.get_submodule("inner").weight[2].detach() * scale
    around = h["cat"][:, :, 0:3, 2:5]
    terms = around * kernel
    close(made.values[:, :, 0:3, 2:5], terms)
    bias = (bn.bias[2] - bn.running_mean[2] * scale).detach()
    close(made.parts["biases"], bias.expand(3))
    close(terms.sum((1, 2, 3)) + bias, h["bn"][:, 2, 1, 3])
    assert float(made.residual.abs().max()) < 1e-9


def test_relevance_of_a_transformer_is_conserved(bridge: HookedModel) -> None:
    tokens = bridge.input.example(3)
    for site in ("hook_embed", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"):
        made = relevance(bridge, tokens, "top", site)
        assert float(made.residual.abs().max()) < 1e-4 * max(
            1, float(made.target_values.abs().max())
        )


def cat(cls: Tensor, x: Tensor) -> Tensor:
    return torch.cat([cls.expand(len(x), -1, -1), x], 1)


def cat_by_name(cls: Tensor, x: Tensor) -> Tensor:
    return torch.concat(tensors=(cls.expand(len(x), -1, -1), x), dim=1)


def stack(cls: Tensor, x: Tensor) -> Tensor:
    return torch.stack([cls[:, 0].expand(len(x), -1), *x.unbind(1)], 1)


def written_last(cls: Tensor, x: Tensor) -> Tensor:
    out = torch.full((len(x), 5, 8), torch.nan, dtype=x.dtype)
    out[:, 1:] = x
    out[:, 0] = cls[:, 0]
    return out


def written_first(cls: Tensor, x: Tensor) -> Tensor:
    out = torch.empty(len(x), 5, 8, dtype=x.dtype)
    out[:, 0] = cls[:, 0]
    out[:, 1:] = x
    return out


def padded_where(cls: Tensor, x: Tensor) -> Tensor:
    first = torch.arange(5)[:, None] == 0
    return torch.where(first, cls, torch.nn.functional.pad(x, (0, 0, 1, 0)))


def filled(cls: Tensor, x: Tensor) -> Tensor:
    first = torch.arange(5)[:, None] == 0
    made = torch.nn.functional.pad(x, (0, 0, 1, 0)).masked_fill(first, 2.0)
    return made + (cls - 2) * first  # 2 in the place of the class token, and what it lacks


class Joined(nn.Module):
    """A linear model of a class token and four patches, joined by a function, so that every part is known."""

    input_shape = (3, 4, 4)

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join
        self.patches, self.head = nn.Conv2d(3, 8, 2, 2, bias=False), nn.Linear(8, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(self.cls, self.patches(x).flatten(2).transpose(1, 2))
        return self.head(x.mean(1))


@pytest.mark.parametrize("rule", ["gradient", "epsilon"])
@pytest.mark.parametrize(
    "join", [cat, cat_by_name, stack, written_last, written_first, padded_where, filled]
)
def test_a_class_token_is_counted_however_it_enters(
    join: Callable[[Tensor, Tensor], Tensor], rule: RelevanceRule
) -> None:
    module = seeded(Joined(join)).double()
    model = HookedModel(module, Joined.input_shape)
    x = torch.rand(3, *Joined.input_shape, generator=torch.Generator().manual_seed(0)).double()
    made = relevance(model, x, "class:2", rule=rule)
    row = module.head.weight[2].detach()
    from_token = row @ module.cls[0, 0].detach() / 5 + module.head.bias[2].detach()
    close(made.parts["biases"], from_token.expand(3))
    patches = module.patches(x).detach().sum((2, 3)) / 5
    close(made.units().sum(1), patches @ row)


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z_plus"])
@pytest.mark.parametrize("read", ["class", "mean"])
@pytest.mark.parametrize("site", ["input", "blocks.0", "blocks.1.norm1"])
def test_relevance_of_a_vision_transformer_is_conserved(
    rule: RelevanceRule, read: Literal["class", "mean"], site: str
) -> None:
    model = HookedModel(seeded(VisionTransformer(read, 2)), VisionTransformer.input_shape)
    made = relevance(model, model.input.example(3), "class:3", site, rule=rule)
    close(made.units().sum(1) + sum(made.parts.values()), made.target_values, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_position_embeddings_of_an_image_model_are_parameters() -> None:
    """CLIP looks them up by number, which is no token of the input."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config: Any = CLIPVisionConfig
    module = CLIPVisionModelWithProjection(
        config(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8,
               patch_size=4, projection_dim=4)
    )  # fmt: skip
    model = HookedModel(seeded(module), (3, 8, 8))
    site = next(s.name for s in model.sites if s.name.endswith("layers.1.layer_norm1"))
    for place in ("input", site):
        made = relevance(model, model.input.example(2), f"{output_site(model).name}:1", place)
        total = made.units().sum(1) + sum(made.parts.values())
        close(total, made.target_values, rtol=0, atol=1e-5)
        if place == "input":
            assert not made.parts["elsewhere"].any()


# --- channels ----------------------------------------------------------------------------------


def test_a_pass_begins_at_the_site_only_where_all_depends_on_it(
    branches: HookedModel, bridge: HookedModel
) -> None:
    x = branches.input.example(4)
    seen: list[int] = []
    for site, alone in (("cat", True), ("out_relu", True), ("left_relu", False), ("bn", False)):
        passes = Passes(branches, x, "top", site, batch=3)
        assert passes.alone is alone, site
        points = passes.points * 0.5
        given = branches.run(x, edits={site: lambda v: v * 0.5}).output
        close(passes.value(points, torch.arange(4)), given[torch.arange(4), passes.aim.indices])
        order = torch.tensor([2, 0, 0, 3, 1])
        close(passes.value(points[order], order), passes.value(points, torch.arange(4))[order])
        seen.append(len(points))
    tokens = bridge.input.example(2)
    assert Passes(bridge, tokens, "top", "blocks.1.hook_resid_pre").alone
    assert not Passes(bridge, tokens, "top", "blocks.0.attn.hook_z").alone


def test_no_pass_is_larger_than_asked(branches: HookedModel) -> None:
    sizes: list[int] = []
    handle = branches.module.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    x = branches.input.example(3)
    try:
        attribute(branches, x, "top", "cat", "integrated_gradients", steps=40, batch=5)
        attribute(branches, x, "top", "cat", "ablation", batch=2)
        saliency_map(branches, x, "top", "rise", samples=30, cells=3, batch=5)
        saliency_map(branches, x, "top", "smoothgrad", samples=30, batch=5)
        saliency_map(branches, x, "top", "occlusion", window=2, stride=1, batch=5)
    finally:
        handle.remove()
    assert max(sizes) <= 5
    assert hooks(branches) == 0


def test_ablation_is_what_the_target_loses(branches: HookedModel) -> None:
    x = branches.input.example(2)
    made = attribute(branches, x, "class:1", "cat", "ablation", check=6)
    for unit in range(6):

        def without(value: Tensor, unit: int = unit) -> Tensor:
            return value.index_fill(1, torch.tensor([unit]), 0)

        lost = branches.logits(x)[:, 1] - branches.logits(x, edits={"cat": without})[:, 1]
        close(made.units()[:, unit], lost, rtol=1e-4, atol=1e-4)
    assert made.check is not None
    assert made.check.correlation == pytest.approx(1.0)
    passes = Passes(branches, x, "class:1", "cat")
    noise = torch.linspace(-1e-7, 1e-7, 6) * passes.values.abs().max()
    noisy = check_by_ablation(passes, made.units() + noise, n=6)
    assert noisy.correlation == pytest.approx(1.0), "what is rounding alone has no rank"
    mean = attribute(branches, x, "class:1", "cat", "ablation", baseline="mean", check=0)
    assert not torch.allclose(mean.values, made.values)


def test_targets_inside_the_network(branches: HookedModel) -> None:
    x = branches.input.example(2)
    cache = branches.run(x, read=["bn"])
    places = cache["bn"][:, 3].flatten(1).argmax(1)
    made = attribute(branches, x, "bn:3", "cat", check=0)
    assert made.aims == tuple(f"bn:3@{p // 5},{p % 5}" for p in places.tolist())
    close(made.target_values, cache["bn"][:, 3].amax((1, 2)))
    fixed = attribute(branches, x, "bn:3@0,2", "cat", check=0)
    close(fixed.target_values, cache["bn"][:, 3, 0, 2])
    assert fixed.values[..., 2:, :].abs().max() == 0, "a 3x3 kernel sees no further"
    each = attribute(branches, x, Target("fc", (2, 0)), "cat", check=0)
    close(each.target_values, branches.logits(x)[[0, 1], [2, 0]])
    between = attribute(branches, x, Target("fc", 1, against=0), "cat", check=0)
    logits = branches.logits(x)
    close(between.target_values, logits[:, 1] - logits[:, 0])
    probable = attribute(branches, x, Target("fc", 1, quantity="probability"), "cat", check=0)
    close(probable.target_values, logits.softmax(1)[:, 1])


def test_in_place_and_reused_modules(own_net: HookedModel) -> None:
    x = own_net.input.example(2)
    for site in ("stem", "block.act@0", "block.act@1"):
        made = attribute(own_net, x, "class:2", site, "integrated_gradients", check=4)
        change = own_net.logits(x)[:, 2] - own_net.logits(x, edits={site: torch.zeros_like})[:, 2]
        close(made.units().sum(1) + made.residual, change, rtol=1e-3, atol=1e-4)
    guided = saliency_map(own_net, x, "class:2", "guided_backprop")
    assert guided.values.abs().max() > 0
    assert hooks(own_net) == 0


def test_groups_of_channels_split_a_linear_effect() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    model = HookedModel(net, (1, 12, 12))
    passes = Passes(model, model.input.example(3), "class:0", "1")
    found = channel_groups(passes, 6)
    close(found.effects, found.removed, rtol=1e-3, atol=1e-4)
    assert found.hidden < 0.01
    assert found.maps.shape == (3, 6, 10, 10)
    with pytest.raises(ValueError, match=r"^k 7 must be from 1 to 6"):
        channel_groups(passes, 7)


def test_saved_and_read_again(branches: HookedModel, tmp_path: Path) -> None:
    made = attribute(branches, branches.input.example(2), "top", "cat", "relevance")
    made.save(tmp_path / "a.safetensors")
    again = Attribution.load(tmp_path / "a.safetensors")
    assert again.to_dict() == made.to_dict()
    close(again.values, made.values)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a saved attribution"):
        Attribution.load(tmp_path / "a.safetensors")


# --- bad input ---------------------------------------------------------------------------------


def test_bad_input_is_named(branches: HookedModel, bridge: HookedModel) -> None:
    x = branches.input.example(2)
    with pytest.raises(ValueError, match=r"'class:3' is out of range: expected class:0 to 2"):
        attribute(branches, x, "class:3", "cat")
    with pytest.raises(ValueError, match=r"unit cat:6 does not exist"):
        saliency_map(branches, x, "cat:6", "gradient")
    with pytest.raises(ValueError, match=r"examples have 9 x 10 pixels.*takes 8 x 10"):
        saliency_map(branches, torch.zeros(1, 3, 9, 10), "top", "gradient")
    resized = saliency_map(branches, torch.rand(1, 3, 16, 20), "top", "gradient", size="resize")
    assert resized.values.shape == (1, 3, 8, 10)
    with pytest.raises(ValueError, match="no gradient leads from stem:0 to site cat"):
        attribute(branches, x, "stem:0", "cat")
    with pytest.raises(ValueError, match="no gradient leads from stem:0 to site cat"):
        relevance(branches, x, "stem:0", "cat")
    with pytest.raises(ValueError, match="position 9 along y is out of range: expected -4 to 3"):
        attribute(branches, x, "bn:0@9,0", "cat")
    with pytest.raises(ValueError, match=r"position \(1,\) does not fit the axes"):
        attribute(branches, x, "bn:0@1", "cat")
    with pytest.raises(ValueError, match="target has 3 indices for 2 examples"):
        attribute(branches, x, Target("fc", (0, 1, 2)), "cat")
    with pytest.raises(
        TypeError, match="has no option 'samples': expected blank, steps, tolerance"
    ):
        saliency_map(branches, x, "top", "integrated_gradients", samples=3)
    with pytest.raises(ValueError, match="window 9 must be 1 to 8"):
        saliency_map(branches, x, "top", "occlusion", window=9)
    with pytest.raises(ValueError, match=r"target 'what' is not one of top, class:NAME"):
        parse_target(branches, "what")
    with pytest.raises(ValueError, match="takes tokens"):
        saliency_map(bridge, bridge.input.example(2), "top", "gradient")
    with pytest.raises(ValueError, match="site 'cat': only class activation maps"):
        saliency_map(branches, x, "top", "gradient", site="cat")
    with pytest.raises(ValueError, match="has no ReLU before stem:0"):
        saliency_map(branches, x, "stem:0", "guided_backprop")
    assert hooks(branches) == 0


def test_every_method_explains_classes_and_units(branches: HookedModel) -> None:
    x = branches.input.example(2)
    few = {"samples": 8}
    options: dict[str, dict] = {
        "smoothgrad": few, "vargrad": few, "smoothgrad_squared": few, "lime": few | {"segments": 6},
        "kernel_shap": few | {"segments": 6}, "rise": few | {"cells": 3},
        "occlusion": {"window": 3, "stride": 2}, "smooth_grad_cam_plus_plus": few,
    }  # fmt: skip
    for method in METHODS:
        for target, site in (("top", None), ("bn:1", "cat")):
            at = {"site": site} if "cam" in method and site else {}
            made = saliency_map(branches, x, target, method, **options.get(method, {}), **at)
            again = saliency_map(branches, x, target, method, **options.get(method, {}), **at)
            assert torch.equal(made.values, again.values), method
            assert made.heat().shape == (2, 8, 10)
            assert bool(torch.isfinite(made.values).all())
            assert made.model_hash == branches.hash


# --- perturbations -----------------------------------------------------------------------------


class Patch(nn.Module):
    """Class 0 is how bright and sharp a patch is, class 1 the rest."""

    def forward(self, x: Tensor) -> Tensor:
        rough = (x[:, :, 1:, 1:] - x[:, :, :-1, :-1]).square().mean(1)
        patch = rough[:, 8:24, 40:56].mean((1, 2))
        return torch.stack([patch, rough.mean((1, 2))], 1)


def test_extremal_masks_cover_what_counts() -> None:
    model = HookedModel(Patch(), (3, 64, 64))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = extremal(model, x, "class:0", area=0.1, steps=100, step=4, sigma=8.0)
    kept = found.masks
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    close(kept.mean((1, 2, 3)), torch.full((2,), 0.1), atol=1e-3, rtol=0)
    assert kept[:, 0, 8:24, 40:56].mean() > 0.8
    assert (found.values > 2 * found.random).all()
    assert (found.blank < 0.2 * found.intact).all()
    gone = extremal(model, x, "class:0", area=0.1, variant="delete", steps=100, step=4, sigma=8.0)
    assert (gone.values < 0.5 * gone.random).all()
    goal = Passes(model, x, "class:0")
    assert (shown_by(goal, kept) > shown_by(goal, kept.flip(3))).all()


def test_meaningful_masks_are_small_and_in_place() -> None:
    model = HookedModel(Patch(), (3, 64, 64))
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = meaningful(model, x, "class:0", steps=80, cells=16)
    inside = found.masks[0, 0, 8:24, 40:56].mean()
    assert inside > 0.5
    assert found.masks.mean() < 0.5 * inside
    assert found.values[0] < 0.5 * found.intact[0]


def test_extremal_channels_are_the_largest_terms() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 20, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 2)
    )
    model = HookedModel(net, (1, 12, 12))
    x = model.input.example(3)
    terms = attribute(model, x, "class:0", "1", check=0).units()
    found = extremal_channels(model, x, "class:0", "1", area=0.2)
    chosen = hard(found.masks, 0.2).bool()
    best = terms.topk(4, 1).values.sum(1)
    close((terms * chosen).sum(1), best, rtol=0.1, atol=1e-3)
    assert (found.values > found.random).all()


# --- transformers ------------------------------------------------------------------------------


def test_direct_logit_attribution_sums_to_the_logit(bridge: HookedModel) -> None:
    tokens = bridge.input.example(4)
    for target in ("top", "token:3", "token:3@0", Target("hook_unembed", 3, against=5)):
        found = direct_logit_attribution(bridge, tokens, target)
        close(found.values.sum(1), found.logits, rtol=1e-4, atol=1e-5)
        assert float(found.residual.abs().max()) < 1e-5
    cache = bridge.run(tokens, read=["blocks.0.attn.hook_z"])
    assert "blocks.0.attn.hook_z:3" in found.names
    assert cache["blocks.0.attn.hook_z"].shape[2] == 4


def test_direct_logits_of_a_head_are_what_removing_it_takes_directly() -> None:
    model = load_model(
        "induction-by-hand"
    )  # it has no normalisation: parts can be taken out one by one
    tokens = Examples(model, "repeats", 4).inputs
    found = direct_logit_attribution(model, tokens)
    part = found.values[:, found.names.index("blocks.1.attn.hook_z:0")]
    without = model.logits(
        tokens, edits={"blocks.1.attn.hook_z": lambda z: z.index_fill(2, torch.tensor([0]), 0)}
    )
    top = model.logits(tokens)[:, -1].argmax(1)
    lost = found.logits - without[torch.arange(4), -1, top]
    close(part, lost, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["induction", "stories260k", "induction-infinite"])
def test_heads_and_neurons_are_ranked_as_ablation_does(name: str, request) -> None:
    if name != "induction":
        request.getfixturevalue("assets")
    model = load_model(name)
    if name == "stories260k":
        texts = ["Once upon a time there was a little", "Lily and Ben went to the park and"]
        tokens = torch.tensor([model.input.encode(t)[:8] for t in texts])
        sites = ["blocks.2.attn.hook_z", "blocks.4.mlp.hook_post"]
    else:
        tokens = Examples(model, "repeats", 4).inputs[:, : model.input.n_ctx]
        sites = ["blocks.1.attn.hook_z"]
    for site in sites:
        made = attribute(model, tokens, "top", site, "integrated_gradients", check=32)
        assert made.check is not None
        assert made.check.correlation > max(0.5, made.check.chance), (site, made.check)


# --- real photographs --------------------------------------------------------------------------


def test_googlenet_equals_captum_and_is_complete(assets: Path) -> None:
    single = load_model("googlenet")
    x = Examples(single, f"folder:{assets / 'images/imagenet500'}", 2).inputs
    # in float32 rounding puts some ReLU of a quarter of the images on its other side
    model = HookedModel(copy.deepcopy(single.module).double(), single.input)
    x, net = x.double(), model.module
    top = model.logits(x).argmax(1)
    for method in ("gradient", "gradient_x_input", "guided_backprop"):
        made = saliency_map(model, x, "top", method).values
        peer = theirs(method, model, x, top).detach()
        assert float((made - peer).abs().max() / peer.abs().max()) < 1e-5, method
    layer = net.get_submodule("mixed4c")
    made = attribute(model, x, "top", "mixed4c", check=0).values
    peer = captum.LayerGradientXActivation(net, layer).attribute(x, top).detach()
    assert float((made - peer).abs().max() / peer.abs().max()) < 1e-5
    whole = attribute(model, x, "top", "mixed4c", "integrated_gradients", check=0)
    gained = whole.target_values - model.logits(x, edits={"mixed4c": torch.zeros_like})[[0, 1], top]
    assert bool((whole.residual.abs() <= 0.01 * gained.abs()).all())
    units = relevance(model, x, "mixed4c:20@5,5", "mixed4a", rule="gradient")
    assert float((units.residual.abs() / units.target_values.abs().clamp_min(1)).max()) < 1e-4
    pre = relevance(
        model, x, "mixed3b_3x3_pre_relu:9@14,14", "mixed3b_3x3_bottleneck", rule="gradient"
    )
    bias = net.get_submodule("mixed3b_3x3_pre_relu").bias[9].detach()
    close(pre.units().sum(1) + bias, pre.target_values, rtol=1e-5, atol=1e-3)


def test_units_parse_as_targets(branches: HookedModel) -> None:
    assert parse_target(branches, "cat:2") == Target("cat", 2)
    made = replace(parse_target(branches, "class:1", against="class:0"), quantity="probability")
    assert str(made) == "p(fc:1 - fc:0)"
    assert (
        attribute(branches, branches.input.example(1), Unit("bn", 0), "cat", check=0).target
        == "bn:0"
    )


class Odd(nn.Module):
    """What relevance should not lose: attention, group norm, in-place activations, constants, a look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.act = nn.SiLU(inplace=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.place = nn.Embedding(16, 8)
        self.out = nn.Linear(8, 3)
        self.register_buffer("shift", torch.full((3,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x - 0.2)))
        tokens = x.flatten(2).transpose(1, 2) + self.place(torch.arange(16))
        mixed, _ = self.attention(tokens, tokens, tokens)
        return self.out((tokens + mixed).mean(1)) + 1.0 - self.shift


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z_plus"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_relevance_accounts_for_attention_norms_and_constants(rule: str, n: int) -> None:
    model = HookedModel(seeded(Odd()), (3, 4, 4))
    x = model.input.example(n)
    made = relevance(model, x, "class:1", rule=rule)
    assert float(made.residual.abs().max()) < 1e-3 * float(made.target_values.abs().max())
    close(made.target_values, model.logits(x)[:, 1])
    alone = relevance(model, x[:1], "class:1", rule=rule)
    close(alone.parts["biases"], made.parts["biases"][:1], rtol=1e-3, atol=1e-4)


def test_results_do_not_depend_on_the_batch(branches: HookedModel) -> None:
    x = branches.input.example(3)
    for method, options in (("rise", {"samples": 20, "cells": 3}), ("smoothgrad", {"samples": 7})):
        one = saliency_map(branches, x, "top", method, batch=3, seed=2, **options)
        other = saliency_map(branches, x, "top", method, batch=8, seed=2, **options)
        close(one.values, other.values, rtol=1e-4, atol=1e-5)


def test_a_position_for_each_example(branches: HookedModel) -> None:
    x = branches.input.example(2)
    made = attribute(branches, x, Target("bn", 1, at=((0, 1), (2, 3))), "cat", check=0, batch=1)
    cache = branches.run(x, read=["bn"])["bn"]
    close(made.target_values, torch.stack([cache[0, 1, 0, 1], cache[1, 1, 2, 3]]))
    assert made.aims == ("bn:1@0,1", "bn:1@2,3")
    with pytest.raises(ValueError, match="target has 3 positions for 2 examples"):
        attribute(branches, x, Target("bn", 1, at=((0, 1), (2, 3), (0, 0))), "cat")


def test_names_of_several_classes_are_refused() -> None:
    net = seeded(Branches())
    model = HookedModel(net, (3, 8, 10), classes=("crane", "dog", "crane"))
    with pytest.raises(ValueError, match="class 'crane' is the name of 0 and 2: give its number"):
        parse_target(model, "class:crane")
    assert parse_target(model, "class:dog").index == 1
