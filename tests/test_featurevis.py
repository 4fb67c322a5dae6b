from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from circuits.edits.activations import zero
from circuits.edits.recipes import edited
from circuits.featurevis.gradients import RedirectedGradients, _RedirectedReLU
from circuits.featurevis.natural import NaturalImages
from circuits.featurevis.objectives import alignment, channel, interpolation
from circuits.featurevis.optimizing import _step_seed
from circuits.featurevis.pictures import Picture, read_facts
from circuits.featurevis.render import Settings, visualize, visualize_units
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.normalisation import FastNormalisation
from circuits.models.zoo.loading import load_model
from circuits.stimuli.drawing import curves
from tests.conftest import seeded


def test_redirected_relu_helps_only_dead_examples() -> None:
    x = torch.tensor([[-1.0, 2.0], [-1.0, -2.0]], requires_grad=True)
    out = _RedirectedReLU.apply(x)
    assert out.tolist() == [[0.0, 2.0], [0.0, 0.0]]
    (-out.sum()).backward()
    assert x.grad.tolist() == [[0.0, -1.0], [-1.0, -1.0]]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 9])
def test_local_response_norm_is_torchs(size: int) -> None:
    x = torch.randn(2, 7, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = F.local_response_norm(x, size, 0.5, 0.6, 2.0)
    with FastNormalisation():
        found = F.local_response_norm(x, size, 0.5, 0.6, 2.0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    want, got = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (expected, found))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_waking_holds_for_functions_and_modules_and_ends() -> None:
    x = torch.full((1, 2), -1.0, requires_grad=True)
    for relu in (nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.Tensor.relu):
        with RedirectedGradients():
            (gradient,) = torch.autograd.grad(-relu(x * 1).sum(), x)
        assert gradient.tolist() == [[-1.0, -1.0]], relu
        (gradient,) = torch.autograd.grad(-relu(x * 1).sum(), x)
        assert gradient.tolist() == [[0.0, 0.0]], "as before"


def test_a_silent_unit_wakes_up() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    seeded(net)
    with torch.no_grad():
        net[0].bias.fill_(-0.8)
    model = HookedModel(net, (3, 24, 24))
    picture = visualize(model, "1:2", steps=60)
    assert picture.start == 0
    assert picture.activation > 0.1


def test_edits_hold_while_silent_units_are_woken(own_net: HookedModel) -> None:
    x = own_net.input.example(1)
    with edited(own_net, [zero("relu:0")]), RedirectedGradients():
        assert not own_net.run(x, read=["relu"])["relu"][:, 0].any()


def test_pictures_of_an_own_model(own_net: HookedModel) -> None:
    pictures = visualize_units(own_net, ["relu:1", "block.conv@1:6", "fc:2"], steps=30)
    for picture in pictures:
        assert picture.image.shape == (5, 40, 56)
        assert 0 <= picture.image.min() <= picture.image.max() <= 1
        assert picture.activation > picture.start
        x = own_net.input.normalize(picture.image[None])
        value = own_net.run(x, read=[picture.unit.site])[picture.unit.site][0, picture.unit.index]
        assert value.mean().item() == pytest.approx(picture.activation, rel=1e-3)


def test_same_seed_same_picture(own_net: HookedModel) -> None:
    first, again = (visualize(own_net, "relu:3", steps=10, seed=4) for _ in range(2))
    other = visualize(own_net, "relu:3", steps=10, seed=5)
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)


def test_clean_room_line_shows_its_orientation() -> None:
    """The picture's own gradients say the orientation that the unit was written for."""
    model = load_model("cleanroom")
    for unit, designed in ((3, 45.0), (6, 90.0)):
        image = visualize(model, f"line:{unit}", steps=48).image.mean(0)
        gx, gy = image[1:-1, 2:] - image[1:-1, :-2], image[2:, 1:-1] - image[:-2, 1:-1]
        # structure tensor; lines run across the gradient, and y points down
        across = 0.5 * torch.atan2(2 * (gx * gy).sum(), (gx * gx - gy * gy).sum())
        seen = (90 - torch.rad2deg(across).item()) % 180
        assert abs((seen - designed + 90) % 180 - 90) < 15


def test_saved_picture_carries_its_metadata(own_net: HookedModel, tmp_path: Path) -> None:
    picture = visualize(own_net, "relu:3", steps=5)
    picture.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        facts = json.loads(image.text["circuits"])
        assert image.size == (56, 40)
    assert facts == picture.metadata()
    assert facts["model_hash"] == own_net.hash
    assert facts["unit"] == "relu:3"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unit": "relu:9"}, ValueError, "units 0 to 7"),
        ({"unit": "nope:1"}, KeyError, "unknown site"),
        ({"unit": "relu:1", "steps": 0}, ValueError, "steps 0"),
        ({"unit": "relu:1", "seed": 10**20}, ValueError, "seed 10"),
        ({"unit": "relu:1", "seed": -1}, ValueError, "seed -1"),
        ({"unit": "relu:1", "size": 4}, ValueError, "expected 8 to 4096"),
        ({"unit": "relu:1", "param": "waves"}, KeyError, "unknown param"),
        ({"unit": "relu:1", "param": "maco"}, ValueError, "needs the spectrum"),
        ({"unit": "relu:1", "views": 0}, ValueError, "views 0"),
        ({"unit": "relu:1", "learning_rate": 0.0}, ValueError, "learning_rate 0"),
        ({"unit": "relu:1", "thresholds": (999,)}, ValueError, "threshold 999"),
    ],
)
def test_bad_requests_are_named(own_net: HookedModel, options, error, message) -> None:
    with pytest.raises(error, match=message):
        visualize(own_net, options.pop("unit"), **options)


def test_tokens_have_no_pictures(bridge: HookedModel) -> None:
    with pytest.raises(ValueError, match="takes tokens"):
        visualize(bridge, "hook_unembed:1")


class Broken(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x / 0 * 0 if self.how == "nan" else x.detach())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "not a finite number at step 1: the first site with NaN or infinity is conv"),
        ("cut", "no gradient"),
    ],
)
def test_broken_models_are_named(how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize(HookedModel(Broken(how), (3, 16, 16)), "conv:1", steps=3)


def test_googlenet_curve_unit_shows_its_curve(assets: Path) -> None:
    model = load_model("googlenet")
    picture = visualize(model, "mixed3b:335", steps=64, size=112)
    assert picture.activation > 100 * max(picture.start, 0.1), (
        "as strong as the best photographs' maxima"
    )


class Patches(nn.Module):
    """The shape of a vision transformer: patches, attention over them, no map."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.mlp = nn.Linear(16, 32)
        self.gelu = nn.GELU()
        self.out = nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=2)
        x = x + (q @ k.transpose(1, 2) / 4).softmax(2) @ v
        x = x + self.out(self.gelu(self.mlp(x)))
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("net", "shape", "unit"),
    [
        (nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3)), (1, 28, 28), "3:5"),
        (nn.Sequential(nn.Conv2d(12, 6, 3), nn.ReLU()), (12, 32, 32), "1:2"),
        (nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU()), (3, 24, 60), "1:1"),
        (Patches(), (3, 32, 48), "gelu:7"),
        (Patches(), (3, 32, 32), "head:3"),
    ],
    ids=["mnist-shaped", "twelve channels", "not square", "vit mlp", "vit logit"],
)  # fmt: skip
def test_any_shape_of_model_needs_no_flags(net: nn.Module, shape, unit: str) -> None:
    model = HookedModel(seeded(net, 3), shape)
    plain, diverse = (
        visualize(model, unit, steps=40),
        visualize_units(model, [unit], steps=8, diverse=2),
    )
    assert plain.image.shape == shape
    assert plain.activation > plain.start
    assert len(diverse) == 2
    assert visualize(model, unit, steps=20, negative=True).activation < plain.activation


def test_cifar_resnet(assets: Path) -> None:
    model = load_model("cifar10-resnet20")
    excited = visualize(model, "layer3.0.relu2:11", steps=48)
    least = visualize(model, "layer3.0.relu2:11", steps=48, negative=True)
    assert excited.activation > 2 * excited.start
    assert least.objective == "-layer3.0.bn2:11", "the part of the sum that the block computes"
    assert least.activation < least.start


def test_negative_is_the_unit_before_its_relu(own_net: HookedModel) -> None:
    picture = visualize(own_net, "relu:3", steps=30, negative=True)
    assert picture.objective == "-stem:3"
    assert picture.activation < picture.start
    x = own_net.input.normalize(picture.image[None])
    value = own_net.run(x, read=["stem"])["stem"][0, 3].mean().item()
    assert value == pytest.approx(picture.activation, rel=1e-3)


def test_a_picture_depends_on_its_company_by_rounding_alone(own_net: HookedModel) -> None:
    alone = visualize(own_net, "relu:3", steps=6)
    three = ["relu:1", "block.conv@1:6", "relu:3"]
    among = visualize_units(own_net, three, steps=6)[2]
    torch.testing.assert_close(among.image, alone.image, atol=1e-4, rtol=0)
    assert (alone.metadata()["made_together"], among.metadata()["made_together"]) == (1, 3)
    again = visualize_units(own_net, three, steps=6)[2]
    assert torch.equal(again.image, among.image)
    assert again.metadata() == among.metadata()
    assert again.metadata()["threads"] == torch.get_num_threads()


def test_long_objectives_have_file_names_of_their_own(own_net: HookedModel) -> None:
    made = visualize(own_net, "relu:3", steps=1)
    ends = ("plain", "cosine", "plain ")
    names = {replace(made, unit=None, objective="direction " * 9 + end).file_name() for end in ends}
    assert len(names) == 3
    assert max(map(len, names)) < 80


def test_thresholds_stops_and_progress(own_net: HookedModel) -> None:
    told: list[int] = []
    whole = visualize(own_net, "relu:3", steps=10, thresholds=(4, 10))
    assert sorted(whole.at) == [4, 10]
    assert torch.equal(whole.at[10], whole.image)

    def stop(done: int, total: int) -> bool:
        told.append(done)
        return done < 4

    stopped = visualize(own_net, "relu:3", steps=10, progress=stop)
    assert (stopped.steps, told) == (4, [1, 2, 3, 4])
    assert torch.equal(stopped.image, whole.at[4])


def test_diverse_pictures_are_less_alike() -> None:
    model = load_model("shapes")
    unit, site = "mixed3b:200", model.site("mixed3b")

    def alike(images: Tensor) -> float:
        x = model.run(model.input.normalize(images), read=[site])[site].flatten(2)
        gram = F.normalize((x @ x.transpose(1, 2)).flatten(1), dim=1)
        return float((gram @ gram.T - torch.eye(len(gram))).sum() / (len(gram) * (len(gram) - 1)))

    diverse = torch.stack([p.image for p in visualize_units(model, [unit], steps=24, diverse=3)])
    seeds = torch.stack([visualize(model, unit, steps=24, seed=s).image for s in range(3)])
    assert alike(diverse) < alike(seeds) - 0.1


def test_maco_keeps_the_spectrum_of_natural_images() -> None:
    model = load_model("shapes")
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(4)]
    natural = NaturalImages.fit(images, "noise", "00")
    picture = visualize(model, "mixed3a:100", steps=12, param="maco", natural=natural)
    values = 0.5 + torch.logit(picture.image.double()) / 4 - natural.mean.double()[:, None, None]
    uncorrelated = torch.einsum("cd,dhw->chw", torch.linalg.inv(natural.root.double()), values)
    found = torch.fft.rfft2(uncorrelated, norm="ortho").abs()
    inner = found[:, 1:32, 1:32], natural.magnitude[:, 1:32, 1:32].double()
    torch.testing.assert_close(*inner, atol=1e-3, rtol=1e-3)
    assert picture.alpha is not None
    assert picture.to_pil().mode == "RGBA"
    assert picture.activation > picture.start


def test_transparency_is_optimised_too() -> None:
    model = load_model("shapes")
    picture = visualize(model, "mixed3b:200", steps=24, alpha=True)
    assert picture.alpha is not None
    assert picture.alpha.std() > 0.05, "some of it matters more than the rest"


def test_webp_carries_its_metadata(own_net: HookedModel, tmp_path: Path) -> None:
    picture = visualize(own_net, "relu:3", steps=3)
    picture.save(tmp_path / "a.webp", {"more": 1})
    assert read_facts(tmp_path / "a.webp") == picture.metadata() | {"more": 1}
    with pytest.raises(ValueError, match=r"must end in \.png or \.webp"):
        picture.save(tmp_path / "a.jpg")


def test_settings_and_their_keys_follow_each_other(own_net: HookedModel) -> None:
    spec = own_net.input
    same = Settings(size=(40, 56)).key(spec), Settings().key(spec)
    assert same[0] == same[1]
    assert (
        len({Settings(**o).key(spec) for o in ({}, {"seed": 1}, {"steps": 9}, {"alpha": True})})
        == 4
    )


def test_an_interpolation_lines_up_where_parts_are_shared(own_net: HookedModel) -> None:
    between = interpolation(own_net, "relu:1", "relu:3") - 0.1 * alignment(own_net, "relu")
    series = visualize_units(own_net, [between], images=4, steps=24, shared=True)
    x = own_net.input.normalize(torch.stack([p.image for p in series]))
    values = own_net.run(x, read=["relu"])["relu"].mean((2, 3))
    assert values[0, 1] > values[-1, 1], "the first shows one unit"
    assert values[-1, 3] > values[0, 3], "the last the other"

    def steps_apart(pictures: list[Picture]) -> float:
        images = torch.stack([p.image for p in pictures])
        return float((images[1:] - images[:-1]).square().mean())

    alone = visualize_units(
        own_net, [interpolation(own_net, "relu:1", "relu:3")], images=4, steps=24
    )
    assert steps_apart(series) < steps_apart(alone)


def test_objectives_can_be_visualized(own_net: HookedModel) -> None:
    both = channel(own_net, "relu:1") + 0.5 * channel(own_net, "relu:2")
    picture = visualize(own_net, both, steps=12)
    assert picture.unit is None
    assert picture.objective == "(relu:1 + (relu:2 * 0.5))"
    assert picture.activation > picture.start


def test_bfloat16_pictures_report_in_float32() -> None:
    model = load_model("shapes")
    half = visualize(model, "mixed3b:200", steps=4, precision="bfloat16")
    assert not torch.equal(half.image, visualize(model, "mixed3b:200", steps=4).image)
    x = model.input.normalize(half.image[None])
    value = model.run(x, read=["mixed3b"])["mixed3b"][0, 200].mean().item()
    assert value == pytest.approx(half.activation, rel=1e-3, abs=1e-3)


@pytest.mark.nightly
def test_curve_units_of_googlenet_show_their_orientation(assets: Path) -> None:
    """Ten units of mixed3b's 5x5 branch, found by their tuning to drawn curves: the orientation of each
    picture's own gradients is the unit's preferred one within 20 degrees.
    """
    model = load_model("googlenet")
    bulges = torch.arange(0, 360, 15.0)
    answers = torch.stack([_answers(model, bulges, radius) for radius in (30.0, 45.0, 65.0)]).mean(
        0
    )
    ways = torch.polar(torch.ones(24), torch.deg2rad(bulges))[:, None]
    pointing = (answers * ways).sum(0) / answers.sum(0).clamp_min(1e-6)
    chosen = (pointing.abs() * (answers.amax(0) > 200)).argsort(descending=True)[:10]
    units = [f"mixed3b:{320 + u}" for u in chosen.tolist()]
    pictures = visualize_units(model, units, steps=96, size=160)
    for u, picture in zip(chosen.tolist(), pictures, strict=True):
        preferred = math.degrees(float(pointing[u].angle()))
        apart = abs((_gradient_orientation(picture.image) - preferred + 90) % 180 - 90)
        assert apart <= 20, f"{picture.unit}: {apart:.0f} degrees from {preferred:.0f}"
    ways = pointing[chosen] / pointing[chosen].abs()
    assert ways.mean().abs() < 0.5, "they point all around"


def _answers(model: HookedModel, bulges: Tensor, radius: float) -> Tensor:
    """The largest activations of the branch near the middle of drawn curves, orientation x unit."""
    found = []
    for foreground, background in ((0.0, 1.0), (1.0, 0.0), (0.2, 0.6)):
        drawn = curves(
            bulges, torch.full((len(bulges),), radius), size=128, thickness=4.0,
            foreground=foreground, background=background,
        )  # fmt: skip
        x = model.input.normalize(drawn.expand(-1, 3, -1, -1))
        maps = model.run(x, read=["mixed3b"], until="mixed3b")["mixed3b"][:, 320:416]
        middle = maps.shape[-1] // 2
        near = slice(middle - 3, middle + 3)
        found.append(maps[:, :, near, near].amax((2, 3)))
    return torch.stack(found).mean(0)


def _gradient_orientation(image: Tensor) -> float:
    """The main direction of gradients in degrees, from the structure tensor of the image blurred a little."""
    grey = torch.from_numpy(gaussian_filter(image.mean(0).numpy(), 3.0))
    gx, gy = grey[1:-1, 2:] - grey[1:-1, :-2], -(grey[2:, 1:-1] - grey[:-2, 1:-1])
    doubled = torch.atan2(2 * (gx * gy).sum(), (gx * gx - gy * gy).sum())
    return math.degrees(float(doubled)) / 2 % 180


def test_steps_of_other_seeds_have_other_transforms() -> None:
    large = 2**32 + 5
    some = [
        (0, 3891, 16),
        (1, 0, 0),
        (0, 257, 0),
        (0, 256, 257),
        (large, 0, 0),
        (5, 0, 1),
        (5, 1, 0),
    ]
    assert len({_step_seed(*each) for each in some}) == len(some)
