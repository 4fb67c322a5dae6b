from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.examples import Examples
from circuits.featurevis.badges import NaturalResponses, natural_responses, reliability
from circuits.featurevis.render import Settings, visualize_units
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.randomizing import randomized
from circuits.models.zoo.inception import InceptionNet
from circuits.models.zoo.loading import load_model

SETTINGS = Settings(steps=48)


@pytest.fixture(scope="module")
def shapes() -> HookedModel:
    return load_model("shapes")


@pytest.fixture(scope="module")
def photos(shapes: HookedModel) -> Examples:
    return Examples(shapes, "photos", 120)


@pytest.fixture(scope="module")
def natural(shapes: HookedModel, photos: Examples) -> NaturalResponses:
    return natural_responses(shapes, "mixed3a", photos)


def test_randomized_shuffles_and_leaves_the_model_alone(own_net: HookedModel) -> None:
    before = own_net.hash
    other, again = randomized(own_net, 3), randomized(own_net, 3)
    assert own_net.hash == before
    assert other.hash == again.hash != before
    for (name, a), b in zip(
        own_net.module.state_dict().items(), other.module.state_dict().values(), strict=True
    ):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values), name
    assert [s.name for s in other.sites] == [s.name for s in own_net.sites]


def test_natural_responses_are_the_models(
    shapes: HookedModel, photos: Examples, natural: NaturalResponses
) -> None:
    a = shapes.run(photos.inputs, read=["mixed3a"])["mixed3a"]
    torch.testing.assert_close(torch.from_numpy(natural.maximum), a.amax((2, 3)))
    at = a[5, 100].argmax().item()
    place = ((at // a.shape[3] + 0.5) / a.shape[2], (at % a.shape[3] + 0.5) / a.shape[3])
    assert natural.places[5, 100].tolist() == pytest.approx(place)
    assert natural.layers[-1].name == "mixed3a_pool_reduce"
    assert all(m.shape[-1] <= 28 for m in natural.maps.values())


def test_an_examples_own_image_takes_the_natural_way(
    shapes: HookedModel, photos: Examples, natural: NaturalResponses
) -> None:
    """The measure itself: a unit's second best example scores near 1, a blank image far below."""
    from circuits.featurevis.badges import _picture_scores

    spec = shapes.input
    best, blank = [], []
    for unit in range(96, 144, 6):
        top = int((-natural.maximum[:, unit]).argsort()[1])
        own = _picture_scores(shapes, photos.load(top), shapes.unit(f"mixed3a:{unit}"), natural, 0)
        grey = torch.full((3, spec.height, spec.width), 0.5)
        none = _picture_scores(shapes, grey, shapes.unit(f"mixed3a:{unit}"), natural, 0)
        best.append(own.natural)
        blank.append(none.natural)
        assert 0 < own.reached <= 1
    assert sorted(best)[len(best) // 2] > 0.8
    assert sorted(blank)[len(blank) // 2] < 0.3


class Misled(nn.Module):
    """A network of which one unit also looks for a pattern that photographs never show.

    After the silent units of Geirhos et al. 2023: on photographs it does what it did, and its picture
    shows the pattern.
    """

    def __init__(self, net: InceptionNet, unit: int, photos: Tensor, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.net, self.unit = net, unit
        blocks = torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(4)).sign()
        pattern = F.interpolate(
            blocks, scale_factor=3
        )  # large enough to bear being turned a little
        self.pattern = nn.Conv2d(3, 1, 21, stride=2, padding=10)
        self.relu, self.seen = nn.LeakyReLU(0.003), nn.Identity()
        with torch.no_grad():
            self.pattern.weight.copy_(pattern - pattern.mean((2, 3), keepdim=True))
            self.pattern.bias.zero_()
            self.pattern.bias.fill_(-float(self.pattern(photos).max()))  # silent, by a hair

    def forward(self, x: Tensor) -> Tensor:
        secret = self.relu(self.pattern(x))
        for layer in self.net.layers[:5]:  # up to mixed3a
            x = self.net._run(layer, x)
        more = F.adaptive_max_pool2d(secret, x.shape[-2:])
        one = torch.zeros(1, x.shape[1], 1, 1)
        one[0, self.unit] = self.strength
        return self.seen(x + one * more)


def test_a_misleading_unit_is_flagged(shapes: HookedModel, photos: Examples) -> None:
    settings = Settings(steps=64)
    unit, x = 120, photos.inputs
    assert isinstance(shapes.module, InceptionNet)
    nets = [Misled(copy.deepcopy(shapes.module), unit, x, strength) for strength in (0.0, 20.0)]
    judged = []
    for net in nets:
        model = HookedModel(net.eval(), shapes.input)
        natural = natural_responses(model, "seen", photos)
        pictures = visualize_units(model, [f"seen:{unit}"], **settings.options())
        judged.append((natural.maximum, reliability(model, pictures, natural, settings)[0]))
    (before, honest), (after, misleading) = judged
    same = np.corrcoef(before[:, unit], after[:, unit])[0, 1]
    assert same > 0.95, "on photographs it does what it did"
    assert not honest.flags, honest
    assert any("far outside" in flag for flag in misleading.flags), misleading


def separated(model: HookedModel, site: str, units: list[int], natural, settings) -> float:
    """The share of units whose picture scores higher than the one made on shuffled weights."""
    pictures = visualize_units(model, [f"{site}:{u}" for u in units], **settings.options())
    found = reliability(model, pictures, natural, settings, seed=1)
    for badge in found:
        assert set(badge.to_dict()) >= {"reached", "held_out", "seeds", "natural", "randomized"}
        assert 0 <= badge.score <= 1
    return sum(b.score > b.randomized_score for b in found) / len(found)


def test_badges_separate_on_the_built_in_model(
    shapes: HookedModel, natural: NaturalResponses
) -> None:
    units = list(range(0, 160, 32))
    assert separated(shapes, "mixed3a", units, natural, Settings(steps=24)) >= 0.75


@pytest.mark.nightly
def test_badges_separate_units_of_googlenet(assets: Path) -> None:
    model = load_model("googlenet")
    images = Examples(model, f"folder:{assets / 'images' / 'imagenet500'}", 96, how="first")
    natural = natural_responses(model, "mixed3b", images)
    settings = Settings(steps=64, size=96)
    units = list(range(0, 480, 40)) + list(range(330, 416, 24))
    assert separated(model, "mixed3b", sorted(set(units)), natural, settings) >= 0.9


def test_too_few_images_and_wrong_pictures_are_named(
    shapes: HookedModel, photos: Examples, natural: NaturalResponses
) -> None:
    with pytest.raises(ValueError, match="there are 8, expected at least 9"):
        natural_responses(shapes, "mixed3a", photos.subset(range(8)))
    picture = visualize_units(shapes, ["conv2d0:1"], steps=1)
    with pytest.raises(ValueError, match="expected one of a unit of mixed3a"):
        reliability(shapes, picture, natural, SETTINGS)
