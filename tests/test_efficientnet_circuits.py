"""Weights and interventions on EfficientNet-Lite, against the same network written in plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.attribution import attribute, relevance
from circuits.cli.main import run
from circuits.discovery import discover, edge_graph, score_edges
from circuits.edits import Recipe, bake, edited, read_edit, save_baked, zero
from circuits.examples import Examples
from circuits.experiments import Variant, null_of
from circuits.experiments.ablation import ablate
from circuits.families import find_families, orbit_for
from circuits.means import activities
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo.efficientnet import VARIANTS, blocks, stream_names
from circuits.models.zoo.loading import load_model
from circuits.sae import ArrayRows, Hyperparameters, Schedule, train
from circuits.saliency import saliency_map
from circuits.tasks.builtin import task_from_pairs
from circuits.tasks.images import ImagePairs
from circuits.tasks.metrics import UnitActivation
from circuits.units import Unit
from circuits.weights import (
    build_graph,
    expand_weights,
    incoming,
    incoming_through,
    outgoing,
    raw_weights,
)

NAME = "efficientnet-lite0"
BLOCKS = blocks(VARIANTS[NAME])
close = torch.testing.assert_close

Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model(NAME)


@pytest.fixture(scope="module")
def double(model: HookedModel) -> HookedModel:
    """In float64, where a gradient at a corner of ReLU6 is on the same side in both networks."""
    return HookedModel(
        deepcopy(model.module).double(), model.input, NAME, stream_names(VARIANTS[NAME])
    )


@pytest.fixture(scope="module")
def photos(model: HookedModel) -> Examples:
    return Examples(model, "photos", 4)


@pytest.fixture(scope="module")
def small(double: HookedModel) -> HookedModel:
    """In float64 and for images of 96 x 96 pixels, for what needs many passes."""
    assert isinstance(double.input, ImageInput)
    spec = replace(double.input, height=96, width=96)
    return HookedModel(double.module, spec, NAME, stream_names(VARIANTS[NAME]))


@pytest.fixture(scope="module")
def x(small: HookedModel) -> Tensor:
    """Two small photographs as the model takes them."""
    return small.fitted(Examples(small, "photos", 2).inputs)


def plain(
    weights: Mapping[str, Tensor],
    x: Tensor,
    changes: Mapping[str, Change] | None = None,
    gate: Change = lambda x: x.clamp(0, 6),
) -> dict[str, Tensor]:
    """Every site's tensor, by the network written in plain torch; changes are made at sites on the way.

    Args:
        weights: the network's parameters.
        x: images.
        changes: by site, the function from its tensor to that which the network goes on with.
        gate: the nonlinearity.
    """
    found: dict[str, Tensor] = {}

    def at(name: str, value: Tensor) -> Tensor:
        found[name] = (changes or {}).get(name, lambda value: value)(value)
        return found[name]

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        w = weights[f"{name}.weight"]
        # "SAME": as many zeros as the last window needs, the odd one behind.
        need = [max((-(-n // stride) - 1) * stride + w.shape[2] - n, 0) for n in x.shape[2:]]
        sides = [side for n in reversed(need) for side in (n // 2, n - n // 2)]
        groups = x.shape[1] // w.shape[1]
        return at(
            name, F.conv2d(F.pad(x, sides), w, weights[f"{name}.bias"], stride, groups=groups)
        )

    x = at("stem", gate(conv("stem_pre_relu", x, 2)))
    for b in BLOCKS:
        y = x
        if b.expand > 1:
            y = at(f"{b.name}_expand", gate(conv(f"{b.name}_expand_pre_relu", y)))
        y = at(f"{b.name}_depthwise", gate(conv(f"{b.name}_depthwise_pre_relu", y, b.stride)))
        y = conv(f"{b.name}_project", y)
        x = at(b.name, x + y) if b.adds else y
    x = at("head", gate(conv("head_pre_relu", x)))
    at("logits", x.mean((2, 3)) @ weights["logits.weight"].T + weights["logits.bias"])
    return found


def weights_of(model: HookedModel) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in model.module.state_dict().items()}


def put(value: Tensor) -> Change:
    return lambda _: value


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("input", "stem"), ("stem", "block1a_depthwise"), ("block1a_depthwise", "block1a_project"),
        ("block1a_project", "block2a_expand"), ("block2b_expand", "block2b_depthwise"),
        ("block2b", "block3a_expand_pre_relu"), ("block3a_expand", "block3a_depthwise"),
        ("block6d", "block7a_expand"), ("block7a_project", "head"), ("head", "logits"),
    ],
)  # fmt: skip
def test_weights_of_a_layer_are_its_own(model: HookedModel, source: str, target: str) -> None:
    own = weights_of(model)
    layer = target if f"{target}.weight" in own else f"{target}_pre_relu"
    stored, bias = own[f"{layer}.weight"], own[f"{layer}.bias"]
    (found,) = raw_weights(model, source, target)
    assert found.lost == ()
    close(found.bias, bias, rtol=0, atol=0)
    if "depthwise" in target:
        apart = found.weight[range(len(stored)), range(len(stored))]
        close(apart, stored[:, 0], rtol=0, atol=0)
        assert found.weight.count_nonzero() == stored.count_nonzero()
    else:
        close(found.weight, stored.reshape(found.weight.shape), rtol=0, atol=0)
    unit = Unit(target, 5)
    strongest = incoming(model, unit, top=3)
    norms = (
        found.weight[5].flatten(1).norm(dim=1) if found.weight.ndim > 2 else found.weight[5].abs()
    )
    order = norms.argsort(descending=True, stable=True)
    assert [c.source for c in strongest] == [Unit(source, int(i)) for i in order[: len(strongest)]]
    for c in strongest:
        close(c.kernel, found.weight[5, c.source.index], rtol=0, atol=0)


def test_a_residual_sum_is_written_by_every_block_that_adds_to_it(model: HookedModel) -> None:
    own = weights_of(model)
    writers = ("block6a", "block6b", "block6c", "block6d")
    for target in ("block6d", "block6b"):
        found = incoming(model, f"{target}:7", top=6000)
        before = writers[: writers.index(target) + 1]
        assert {c.source.site for c in found} == {f"{b}_depthwise" for b in before}
        for c in found[:20]:
            layer = c.source.site.replace("depthwise", "project")
            close(c.kernel, own[f"{layer}.weight"][7, c.source.index], rtol=0, atol=0)
    # What a block adds is written by that block alone.
    alone = incoming(model, "block6d_project:7", top=6000)
    assert {c.source.site for c in alone} == {"block6d_depthwise"}
    # Both are read by the expand convolution behind the sum, with the same weights: a sum mixes no channels.
    added, summed = (outgoing(model, f"{s}:7", top=5) for s in ("block6d_project", "block6d"))
    close([c.kernel for c in added], [c.kernel for c in summed], rtol=0, atol=0)
    assert [c.target for c in added] == [c.target for c in summed]
    assert all(c.target.site == "block7a_expand" for c in summed)


EXPANDED = [
    ("block2a", "block2b_depthwise_pre_relu"),  # through an expand unit and a depthwise one
    ("block2b", "block3a_depthwise"),  # the same with stride 2 and asymmetric padding
    ("input", "block1a_depthwise"),
    ("block2b_expand", "block2b"),
    ("block5a", "block5c"),  # along the sums and through two blocks at once
    ("block5b_project", "block6a_expand_pre_relu"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), EXPANDED)
@pytest.mark.parametrize("mode", ["linear", "mean"])
def test_expanded_weights_are_the_gradient(
    double: HookedModel, photos: Examples, source: str, target: str, mode: str
) -> None:
    x = double.fitted(photos.inputs[:2])
    if mode == "linear":
        found = expand_weights(double, source, target, units=[3, 11])
        x = x[:1]
    else:
        found = expand_weights(double, source, target, units=[3, 11], mode="mean", examples=x)
    wanted = gradient(double, x, source, target, [3, 11], found.at, linear=mode == "linear")
    window = tuple(
        slice(a, a + n) for a, n in zip(found.start, found.weight.shape[2:], strict=True)
    )
    largest = float(wanted.abs().max())
    assert largest > 0
    inside = wanted[:, :, window[0], window[1]]
    close(found.weight.double(), inside, rtol=0, atol=1e-6 * largest)
    outside = wanted.clone()
    outside[:, :, window[0], window[1]] = 0
    assert float(outside.abs().max()) <= 1e-6 * largest


def gradient(
    model: HookedModel, x: Tensor, source: str, target: str, units: list[int], at: tuple[int, ...], linear: bool
) -> Tensor:  # fmt: skip
    """The mean gradient over images of a target's units at one place by a source: unit x source x y x x."""
    name = model.site(source).name if source != "input" else source
    weights, target = weights_of(model), model.site(target).name
    start = (x if source == "input" else plain(weights, x)[name]).clone().requires_grad_(True)
    gate: Change = (lambda x: x) if linear else (lambda x: x.clamp(0, 6))
    if source == "input":
        end = plain(weights, start, gate=gate)[target]
    else:
        end = plain(weights, x, {name: put(start)}, gate)[target]
    values = end[(slice(None), slice(None), *at)].sum(0)
    return torch.stack(
        [torch.autograd.grad(values[u], start, retain_graph=True)[0].mean(0) for u in units]
    )


# --- what changes when a unit does ---------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["block2b", "block2b_project", "block3b_expand", "block3b_depthwise"]
)
def test_attributions_are_those_of_plain_torch(small: HookedModel, x: Tensor, place: str) -> None:
    """Of a sum and of what its last block adds they differ: the rest of the sum does not pass that."""
    weights = weights_of(small)
    own = plain(weights, x)[place].requires_grad_(True)
    value = plain(weights, x, {place: put(own)})["logits"][:, 281]
    (slopes,) = torch.autograd.grad(value.sum(), own)
    made = attribute(small, x, "class:281", place, check=0)
    close(made.target_values, value, rtol=1e-9, atol=1e-9)
    close(made.values, own * slopes, rtol=0, atol=1e-9)

    n = own.shape[1]
    units = (0, n // 2, n - 1)
    with torch.no_grad():
        off = {u: plain(weights, x, {place: without(u)})["logits"] for u in units}
    for unit in units:
        with edited(small, [read_edit(small, f"scale {place}:{unit} factor=0")]):
            close(small.logits(x), off[unit], rtol=0, atol=1e-9)
    if n <= 24:
        lost = attribute(small, x[:1], "class:281", place, "ablation", check=0).units()[0]
        for unit in units:
            close(lost[unit], value[0] - off[unit][0, 281], rtol=0, atol=1e-9)


def without(unit: int) -> Change:
    """The function that sets a unit to zero."""

    def change(value: Tensor) -> Tensor:
        kept = torch.ones(value.shape[1], dtype=value.dtype)
        kept[unit] = 0
        return value * kept[:, None, None]

    return change


@pytest.mark.nightly
def test_integrated_gradients_at_a_residual_sum_add_up(small: HookedModel, x: Tensor) -> None:
    weights = weights_of(small)
    made = attribute(small, x, "class:281", "block6d", "integrated_gradients", steps=32, check=0)
    assert made.residual is not None
    off = plain(weights, x, {"block6d": torch.zeros_like})["logits"][:, 281]
    on = plain(weights, x)["logits"][:, 281]
    close(made.units().sum(1) + made.residual, on - off, rtol=1e-9, atol=1e-9)
    assert bool((made.residual.abs() < 0.01 * (on - off).abs()).all())


def test_an_ablation_report_holds_the_divergence_of_plain_torch(
    model: HookedModel, photos: Examples
) -> None:
    group = ["block3b:3", "block3b_expand:7"]
    report = ablate(model, group, photos, n_random=2, later="block4a_expand", top=2)
    weights = weights_of(model)
    changes = {"block3b": without(3), "block3b_expand": without(7)}
    with torch.no_grad():
        intact, changed = plain(weights, photos.inputs), plain(weights, photos.inputs, changes)
    before, after = (run["logits"].double().log_softmax(1) for run in (intact, changed))
    divergence = (before.exp() * (before - after)).sum(1).mean()
    assert report.effects["kl"].change == pytest.approx(float(divergence), rel=1e-3)
    for d in report.downstream:
        means = [
            run["block4a_expand"][:, d.unit.index].double().mean() for run in (intact, changed)
        ]
        assert d.intact == pytest.approx(float(means[0]), rel=1e-4)
        assert d.change == pytest.approx(float(means[1] - means[0]), rel=1e-3)


def test_saliency_is_the_gradient(small: HookedModel, x: Tensor) -> None:
    own = x.clone().requires_grad_(True)
    run = plain(weights_of(small), own)
    value, maps = run["logits"][:, 281], run["block3b"][:, 5].flatten(1)
    for target, wanted in (("class:281", value), ("block3b:5", maps.amax(1))):
        (slopes,) = torch.autograd.grad(wanted.sum(), own, retain_graph=True)
        made = saliency_map(small, x, target, "gradient")
        close(made.target_values, wanted, rtol=0, atol=1e-9)
        close(made.values, slopes, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "place",
    [
        "block3b",
        *(
            pytest.param(p, marks=pytest.mark.nightly)
            for p in ("input", "block3b_project", "block3b_expand")
        ),
    ],
)
def test_relevance_is_conserved(small: HookedModel, x: Tensor, place: str) -> None:
    """Under epsilon a nonlinearity passes on its value by its argument, held fixed: x f(x) / x."""
    weights = weights_of(small)
    for rule in ("epsilon", "gamma", "z_plus", "gradient"):
        made = relevance(small, x, "class:281", place, rule=rule)
        total = made.units().sum(1) + sum(made.parts.values())
        close(total, made.target_values, rtol=1e-6, atol=1e-6)
    own = plain(weights, x)[place] if place != "input" else x
    own = own.clone().requires_grad_(True)

    def scaled(z: Tensor) -> Tensor:
        return z * (z.clamp(0, 6) / torch.where(z == 0, 1, z)).detach()

    changes = {} if place == "input" else {place: put(own)}
    run = plain(weights, own if place == "input" else x, changes, scaled)
    (slopes,) = torch.autograd.grad(run["logits"][:, 281].sum(), own)
    made = relevance(small, x, "class:281", place, rule="epsilon")
    close(made.values, own * slopes, rtol=1e-6, atol=1e-9)


# --- edits and autoencoders ------------------------------------------------------------------------


EDITS = {
    "scale_weights into=block2b_expand:3 from=block2a:1,2 factor=0.5": (
        "block2b_expand_pre_relu", (3, [1, 2]), 0.5),
    "scale_weights into=block3b_depthwise:7 factor=0": ("block3b_depthwise_pre_relu", (7,), 0.0),
    "scale_weights into=block3b_project:1 from=block3b_depthwise:0-9 factor=-1": (
        "block3b_project", (1, range(10)), -1.0),
}  # fmt: skip


def test_edits_are_baked_saved_and_loaded(
    model: HookedModel, photos: Examples, tmp_path: Path
) -> None:
    recipe = Recipe.of(model, [read_edit(model, text) for text in EDITS])
    weights = {k: v.clone() for k, v in weights_of(model).items()}
    for layer, index, factor in EDITS.values():
        weights[f"{layer}.weight"][index] *= factor
    wanted = plain(weights, photos.inputs)["logits"]
    start = model.hash
    with edited(model, recipe):
        inside = model.logits(photos.inputs)
    close(inside, wanted, rtol=0, atol=1e-4)
    assert float((inside - model.logits(photos.inputs)).abs().max()) > 0.01
    assert model.hash == start
    made = bake(model, recipe)
    assert torch.equal(made.logits(photos.inputs), inside)
    save_baked(made, tmp_path / "baked.safetensors", model, recipe)
    loaded = load_model(NAME, tmp_path / "baked.safetensors")
    assert loaded.hash == made.hash
    assert torch.equal(loaded.logits(photos.inputs), inside)


@pytest.mark.parametrize("place", ["block3b", "block3b_project", "block3b_expand"])
def test_an_autoencoder_is_trained_and_attached(
    model: HookedModel, photos: Examples, place: str
) -> None:
    x = photos.inputs[:2]
    maps = model.run(x, read=[place])[place]
    rows = maps.movedim(1, -1).flatten(0, -2)
    settings = Hyperparameters("topk", 32, k=8, lr=1e-3)
    untrained, code = (
        train(ArrayRows(rows.numpy()), settings, Schedule(steps, batch=256))[""]
        for steps in (1, 60)
    )
    missed = [float((rows - c(rows)).square().sum()) for c in (untrained, code)]
    assert missed[1] < 0.8 * missed[0]
    own = model.attach(code, "x", place)
    close(own.logits(x), model.logits(x), rtol=0, atol=1e-4)
    # Without a latent, the site holds that much less of the latent's direction.
    latents = own.run(x, read=["sae/x"])["sae/x"]
    most = int(latents.sum((0, 2, 3)).argmax())
    moved = maps - latents[:, most, None] * code.W_dec[most][:, None, None]
    with edited(own, [read_edit(own, f"scale sae/x:{most} factor=0")]):
        found = own.logits(x)
    wanted = plain(weights_of(model), x, {place: put(moved)})["logits"]
    close(found, wanted, rtol=0, atol=1e-3)
    assert float((found - model.logits(x)).abs().max()) > 0.01


# --- graphs, circuits, families --------------------------------------------------------------------


@pytest.mark.nightly
def test_the_graph_holds_the_weights(model: HookedModel, tmp_path: Path) -> None:
    with build_graph(model, tmp_path) as store:
        for unit in ("block3b_depthwise:3", "block3b_expand:3", "block4a_expand:3"):
            around = store.neighbourhood(unit, top=4)
            found = [*incoming(model, unit, 4), *outgoing(model, unit, 4)]
            for c in found:
                data = around.edges[c.source, c.target, f"weight:{c.layer}"]
                close(torch.tensor(data["kernel"]), c.kernel, rtol=0, atol=0)


@pytest.mark.nightly
def test_a_circuit_of_channels_is_scored_as_plain_torch_patches_it(small: HookedModel) -> None:
    """An edge from `block2a_project` to `block3a_expand` passes the sum `block2b`, which multiplies it by nothing."""
    sites = [
        "block2a_project:0-1", "block2b_expand:0-1", "block2b_depthwise:0-1", "block2b_project:0-1",
        "block3a_expand:0-1",
    ]  # fmt: skip
    graph, spec = edge_graph(small, sites), small.input
    assert isinstance(spec, ImageInput)
    pixels = spec.restore(Examples(small, "photos", 4).inputs)
    pairs = ImagePairs("photographs", pixels, pixels.flip(0), tuple("abcd"), "another")
    task = task_from_pairs(small, pairs).with_metric(UnitActivation.named(small, "logits:281"))
    found = discover(graph, task, "exact", size=4, n_random=0, n_curves=0, check=0)
    assert 1 <= len(found.evaluation.edges) < len(graph.ends)
    scores, weights = score_edges(graph, task, "exact"), weights_of(small)
    names = [tuple(map(str, edge)) for edge in scores.edges]
    clean, other = (
        plain(weights, small.fitted(spec.normalize(p))) for p in (pixels, pixels.flip(0))
    )
    for source, target in [
        ("block2a_project:1", "block2b_expand:0"), ("block2a_project:1", "block3a_expand:1"),
        ("block2b_project:0", "block3a_expand:1"),
    ]:  # fmt: skip
        (a, s), (b, t) = ((name, int(i)) for name, i in (n.split(":") for n in (source, target)))
        given = clean[f"{b}_pre_relu"].clone()
        given[:, t] += (other[a] - clean[a])[:, s] * weights[f"{b}_pre_relu.weight"][t, s]
        x = small.fitted(spec.normalize(pixels))
        after = plain(weights, x, {f"{b}_pre_relu": put(given)})
        change = (after["logits"] - clean["logits"])[:, 281]
        own = scores.of(np.array([names.index((source, target))]))[:, 0]
        np.testing.assert_allclose(own, change.numpy(), rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_families_are_found_among_expand_units(small: HookedModel) -> None:
    """Their members agree as much as their answers in plain torch do, turned by their phases."""
    found = find_families(
        small, "block2a_expand", units=range(32), threshold=0.5, least=3, permutations=9, size=64
    )
    assert len(found) >= 1
    orbit = orbit_for(small, "rotation", 64)
    n, steps = orbit.images.shape[:2]
    assert isinstance(small.input, ImageInput)
    with torch.no_grad():
        shown = small.fitted(small.input.normalize(orbit.images.flatten(0, 1)))
        before = [plain(weights_of(small), p)["block2a_expand_pre_relu"] for p in shown.split(32)]
        maps = torch.cat(before).clamp(min=0)  # tuning is measured as if nothing were cut off at 6
    # Of a map of 32 x 32 places, a fifth in the middle: 6 x 6.
    seen = maps[:, :, 13:19, 13:19].amax((2, 3)).unflatten(0, (n, steps)).permute(2, 0, 1)
    changes = seen - seen.mean(2, keepdim=True)
    members = [m.unit.index for m in found[0].members]
    pairs = [
        max(cosine(changes[a], changes[b].roll(-shift, 1)) for shift in range(steps))
        for a, b in combinations(members, 2)
    ]
    assert np.mean(pairs) == pytest.approx(found[0].score, abs=1e-4)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


# --- depthwise units and their gates ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "expand", "source"),
    [
        ("block2b_depthwise:5", "block2b_expand", "block2a_project"),
        ("block3a_depthwise:7", "block3a_expand", "block2b"),  # stride 2, asymmetric padding
        ("block3b_depthwise_pre_relu:100", "block3b_expand", "block3a_project"),
        ("block6d_depthwise:9", "block6d_expand", "block6c"),
    ],
)
def test_a_depthwise_unit_is_built_from_what_its_expand_unit_reads(
    model: HookedModel, photos: Examples, unit: str, expand: str, source: str
) -> None:
    own, target = weights_of(model), model.unit(unit)
    assert [c.source for c in incoming(model, unit)] == [Unit(expand, target.index)]
    found = incoming_through(model, unit, 400, photos)
    assert found is not None
    depthwise = own[f"{target.site.removesuffix('_pre_relu')}_pre_relu.weight"][target.index, 0]
    row = own[f"{expand}_pre_relu.weight"][target.index, :, 0, 0]
    products = row[:, None, None] * depthwise
    assert not found.cut
    assert len(found.connections) == row.count_nonzero()
    for c in found.connections:
        assert (c.target, c.source.site, c.through) == (target, source, (expand,))
        largest = float(products.abs().max())
        close(c.kernel, products[c.source.index], rtol=0, atol=1e-6 * largest)
    order = products.flatten(1).norm(dim=1).argsort(descending=True)
    assert [c.source.index for c in found.connections[:3]] == order[:3].tolist()
    (gate,) = found.gates
    given = plain(own, photos.inputs)[f"{expand}_pre_relu"][:, target.index]
    assert gate.unit == Unit(expand, target.index)
    assert gate.n == given.numel()
    assert gate.open == float(((given > 0) & (given < 6)).double().mean())
    assert gate.full == float((given >= 6).double().mean())


def test_the_first_depthwise_units_are_built_from_the_image(
    model: HookedModel, photos: Examples
) -> None:
    """A kernel of 3 x 3 over one of 3 x 3 with stride 2 has 7 x 7 weights, in steps of two."""
    found = incoming_through(model, "block1a_depthwise:5", 3, photos)
    assert found is not None
    own = weights_of(model)
    stem, depthwise = own["stem_pre_relu.weight"][5], own["block1a_depthwise_pre_relu.weight"][5, 0]
    wanted = torch.zeros(3, 7, 7)
    for y in range(3):
        for x in range(3):
            wanted[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3] += depthwise[y, x] * stem
    for c in found.connections:
        assert c.source.site == "input"
        close(c.kernel, wanted[c.source.index], rtol=0, atol=1e-6 * float(wanted.abs().max()))
    (gate,) = found.gates
    given = plain(own, photos.inputs)["stem_pre_relu"][:, 5]
    assert gate.open == pytest.approx(float(((given > 0) & (given < 6)).double().mean()), abs=1e-5)
    assert gate.full == pytest.approx(float((given >= 6).double().mean()), abs=1e-5)
    assert gate.full
    assert gate.open
    assert 0 < gate.full < gate.open < 1


def test_the_command_says_what_the_expand_unit_reads_and_how_often_it_is_open(capsys: Any) -> None:
    words = [
        "weights",
        NAME,
        "block1a_depthwise:5",
        "--data",
        "photos",
        "--limit",
        "4",
        "--top",
        "3",
    ]
    assert run([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [c["source"] for c in facts["incoming"]] == ["stem:5"]
    (gate,) = facts["incoming_through"]["gates"]
    found = facts["incoming_through"]["connections"]
    assert {c["source"] for c in found} == {"input:0", "input:1", "input:2"}
    assert facts["examples"]["data"] == "photos"
    assert run(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "block1a_depthwise:5, further back: what it is built from through stem:5, open" in said
    assert f"at its upper bound at {gate['full']:.1%}" in said


@pytest.mark.parametrize("unit", ["block2b_expand:3", "block2b_project:3", "block2b:3", "stem:5"])
def test_units_that_read_several_have_nothing_further_back(model: HookedModel, unit: str) -> None:
    assert incoming_through(model, unit) is None
    assert len(incoming(model, unit)) > 1


def test_dead_channels_are_counted_and_never_twins(model: HookedModel, photos: Examples) -> None:
    sites = {"stem": 4, "block1a_depthwise": 4}
    seen = activities(model, list(sites), photos)
    runs = plain(weights_of(model), photos.inputs)
    for site, n in sites.items():
        maps = runs[site].movedim(1, 0).flatten(1)
        dead = (maps.amax(1) == maps.amin(1)).nonzero()[:, 0].tolist()
        assert len(dead) == n
        assert np.flatnonzero(~seen[site].alive).tolist() == dead
        alive = next(i for i in range(32) if i not in dead)
        null = null_of(model, Variant("x", (zero(f"{site}:{alive}"),)), photos, n=19)
        assert len(null.units) == 19
        assert not {u.index for (u,) in null.units} & {alive, *dead}
        assert f"({n} of 32 units of {site} are dead)" in null.is_
