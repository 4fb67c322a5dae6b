from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits.attribution import Attribution, Passes
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.randomizing import layers_in_order, randomized
from circuits.models.zoo.loading import load_model
from circuits.saliency import (
    agreement,
    card,
    infidelity,
    insertion_deletion,
    label_test,
    randomization_test,
    road,
    saliency_map,
    sensitivity_n,
)
from circuits.saliency.faithfulness import imputed, order_of
from circuits.saliency.sanity import ssim
from circuits.tasks.targets import Target


@pytest.fixture(scope="module")
def shapes() -> tuple[HookedModel, Tensor, Target]:
    model = load_model("shapes")
    x = Examples(model, "shapes", 6).inputs
    top = tuple(model.logits(x).argmax(1).tolist())
    return model, x, Target("logits", top)


def test_layers_come_in_the_order_they_run(branches: HookedModel, own_net: HookedModel) -> None:
    assert layers_in_order(branches) == ["stem", "left", "right", "inner", "bn", "fc"]
    assert layers_in_order(own_net) == ["stem", "block.conv", "fc"]


def test_shuffling_some_layers_leaves_the_others(branches: HookedModel) -> None:
    whole, top = randomized(branches, 3), randomized(branches, 3, ["fc", "bn"])
    own = branches.module.state_dict()
    for name, tensor in top.module.state_dict().items():
        same = name.rpartition(".")[0] not in ("fc", "bn")
        expected = own[name] if same else whole.module.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_what_ignores_the_model_fails_and_what_follows_it_passes(
    shapes: tuple[HookedModel, Tensor, Target],
) -> None:
    model, x, target = shapes

    def edges(some: HookedModel, images: Tensor) -> Attribution:
        """Looks like an explanation and has nothing to do with the model."""
        made = saliency_map(model, images, target, "gradient")
        return replace(made, values=images - images.roll(1, 3))

    deaf = randomization_test(model, x, edges, stages=4)
    assert deaf.kept == pytest.approx(1)
    assert deaf.passes is False
    plain = randomization_test(
        model, x, lambda m, i: saliency_map(m, i, target, "gradient"), stages=4
    )
    assert plain.passes is True
    assert plain.stages[-1].lowest == layers_in_order(model)[0]
    assert plain.stages[-1].layers == len(layers_in_order(model))
    each = randomization_test(
        model, x, lambda m, i: saliency_map(m, i, target, "gradient"), "independent", stages=4
    )
    assert each.passes is None
    assert sum(s.layers for s in each.stages) == len(layers_in_order(model))
    with pytest.raises(ValueError, match="expected at least two"):
        randomization_test(model, x[:1], edges)
    with pytest.raises(ValueError, match=r"^stages 3 must be even"):
        randomization_test(model, x, edges, stages=3)


def test_ssim_of_maps() -> None:
    a = np.random.default_rng(0).random((20, 20))
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, 3 * a + 1) == pytest.approx(1), "maps are stretched"
    assert ssim(a, np.zeros((20, 20))) == 0
    assert abs(ssim(a, np.random.default_rng(1).random((20, 20)))) < 0.3


def test_training_on_shuffled_labels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 2)
    )  # fmt: skip
    model = HookedModel(net, (1, 12, 12))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.rand(12, 1, 12, 12)
    labels = [int(image[0, :6].mean() > image[0, 6:].mean()) for image in x]
    target = Target(model.sites[-1].name, tuple(labels))
    found = label_test(
        model, x, labels, lambda m, i: saliency_map(m, i, target, "gradient"), steps=80
    )
    assert found.accuracy > 0.9
    assert found.accuracy_shuffled > 0.9
    assert found.kept < 0.5
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# --- faithfulness of what is known -------------------------------------------------------------


class Weighted(nn.Module):
    """A sum of pixels with known weights; class 1 is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 32))
        with torch.no_grad():
            self.weight[8:16, 8:16] = 1.0
            self.weight[20:24, 20:28] = -1.0

    def forward(self, x: Tensor) -> Tensor:
        total = (x[:, 0] * self.weight).sum((1, 2))
        return torch.stack([total, total * 0], 1)


@pytest.fixture
def weighted() -> tuple[Passes, Tensor, Tensor]:
    model = HookedModel(Weighted(), (1, 32, 32))
    x = 0.5 + 0.5 * torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    w = model.module.get_parameter("weight").detach()
    return Passes(model, x, "class:0"), x[:, 0] * w, w.expand(3, 1, 32, 32)


def test_true_attributions_are_faithful(weighted: tuple[Passes, Tensor, Tensor]) -> None:
    passes, true, slopes = weighted
    sums = sensitivity_n(passes, true, shares=(0.05, 0.3))
    assert min(sums.correlations) > 0.999
    assert max(map(abs, sums.random)) < 0.7
    good, shuffled = infidelity(passes, slopes)
    assert good < 1e-6
    assert shuffled > 0.5
    curves = insertion_deletion(passes, true)
    assert len(curves) == 6
    for curve in curves:
        if curve.blank == "blur":
            continue  # a blurred image has nearly the same sum
        better = curve.area - curve.area_random
        assert (better > 0) == (curve.kind == "insertion"), curve
    by_zero = next(c for c in curves if c.blank == "zero" and c.kind == "insertion")
    positive = true.clamp_min(0).flatten(1).sum(1).mean()
    assert max(by_zero.values) == pytest.approx(float(positive), rel=0.05)
    assert by_zero.values[-1] == pytest.approx(float(true.flatten(1).sum(1).mean()), rel=1e-4)
    with pytest.raises(ValueError, match=r"^heats of shape \(3, 31, 32\): expected \(3, 32, 32\)"):
        road(passes, true[:, 1:])


def test_imputed_pixels_solve_their_system() -> None:
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    plane = (2 * x + 3 * y)[None]
    gone = torch.zeros(12, 12, dtype=torch.bool)
    gone[3:8, 4:9] = True
    made = imputed(plane, gone, 0.0, torch.Generator())
    torch.testing.assert_close(made, plane, rtol=1e-4, atol=1e-3)  # a plane is its own mean
    everything = imputed(plane, torch.ones(12, 12, dtype=torch.bool), 0.0, torch.Generator())
    torch.testing.assert_close(everything, plane.mean().expand_as(plane))


def test_road_tells_a_map_from_its_reverse(shapes: tuple[HookedModel, Tensor, Target]) -> None:
    model, x, target = shapes
    passes = Passes(model, x, replace(target, quantity="probability"))
    heat = saliency_map(model, x, target, "occlusion", window=12, stride=6).heat()
    good, bad = road(passes, heat), road(passes, -heat)
    assert good.score > 0.05
    assert good.score > bad.score
    assert good == road(passes, heat), "by its seed"


def test_orders_and_agreement() -> None:
    heats = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    order = order_of(heats)
    assert (heats[0].flatten()[order[0]].diff() <= 0).all()
    names, table = agreement({"a": heats, "same": 2 * heats, "reverse": -heats})
    assert names == ["a", "same", "reverse"]
    np.testing.assert_allclose(table, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-9)


def test_a_card_holds_all_of_it(shapes: tuple[HookedModel, Tensor, Target], tmp_path: Path) -> None:
    model, x, _ = shapes
    made = card(model, x, "gradient_x_input", stages=2, steps=4, faithful=3)
    assert set(made.verdicts) == {"randomisation", "insertion", "deletion", "road"}
    assert set(made.verdicts.values()) <= {"passes", "fails", "unclear"}
    assert made.examples["n"] == 6
    made.save(tmp_path / "card.json")
    assert (tmp_path / "card.json").read_text().startswith("{")
    again = card(model, x, "gradient_x_input", stages=2, steps=4, faithful=3)
    assert again == made


@pytest.mark.nightly
def test_googlenet_reproduces_the_literature(assets: Path) -> None:
    """Adebayo et al. 2018: gradients and Grad-CAM change with the model, guided backpropagation hardly does."""
    model = load_model("googlenet")
    x = Examples(model, f"folder:{assets / 'images/imagenet500'}", 24).inputs
    target = Target("softmax2_pre_activation", tuple(model.logits(x).argmax(1).tolist()))
    for method, expected in (
        ("gradient", True), ("grad_cam", True), ("guided_backprop", False), ("guided_grad_cam", False),
    ):  # fmt: skip
        found = randomization_test(
            model, x, lambda m, i, method=method: saliency_map(m, i, target, method), stages=4
        )
        assert found.passes is expected, (method, found.kept)
