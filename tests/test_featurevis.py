from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from circuits.edits.operators import zero
from circuits.edits.recipes import edited
from circuits.featurevis.gradients import _RedirectedReLU, redirected_relus
from circuits.featurevis.parameterizations import fourier_image
from circuits.featurevis.render import visualize, visualize_units
from circuits.featurevis.transforms import RandomView
from circuits.models.adapter import HookedModel
from circuits.models.loading import load_model
from tests.conftest import seeded


def test_fourier_image_by_definition() -> None:
    made = fourier_image(2, 1, 6, 8, torch.Generator().manual_seed(0))
    (spectrum,) = made.parameters
    values = torch.zeros(2, 6, 8, dtype=torch.float64)
    for v in range(6):
        for u in range(8):
            fy, fx = (v if v <= 3 else v - 6) / 6, (u if u <= 4 else u - 8) / 8
            scale = (6 * 8) ** 0.5 / max((fy**2 + fx**2) ** 0.5, 1 / 8) / 4
            # the missing half of a real image's spectrum is the conjugate of the other
            a, b = (v, u) if u <= 4 else (-v % 6, 8 - u)
            coefficient = torch.view_as_complex(spectrum.detach().double())[:, 0, a, b]
            coefficient = coefficient if u <= 4 else coefficient.conj()
            y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
            phase = 2 * torch.pi * (v * y / 6 + u * x / 8)
            wave = torch.polar(torch.ones(6, 8), phase).to(torch.complex128)
            values += (coefficient[:, None, None] * scale * wave).real / (6 * 8)
    # columns 0 and 4 carry both halves themselves: irfft2 keeps only their Hermitian part
    torch.testing.assert_close(made.image()[:, 0].double(), values.sigmoid(), atol=1e-5, rtol=0)


def test_random_view_without_randomness_is_the_identity() -> None:
    images = torch.rand(2, 3, 12, 20)
    still = RandomView(jitter=0.0, scales=(1.0, 1.0), degrees=0.0)
    torch.testing.assert_close(still(images, torch.Generator()), images, atol=1e-5, rtol=0)


def test_random_view_keeps_shapes_square_when_the_image_is_not() -> None:
    image = torch.zeros(1, 1, 40, 80)
    image[..., 18:22, 30:50] = 1  # a bar along x, 4 x 20
    turned = RandomView(jitter=0.0, scales=(1.0, 1.0), degrees=90.0)

    # find a seed whose turn is close to a quarter
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        angle = (torch.rand(1, 4, generator=generator) * 2 - 1)[0, 1].item() * 90
        if abs(abs(angle) - 90) < 1:
            break
    out = turned(image, torch.Generator().manual_seed(seed))[0, 0] > 0.5
    rows, columns = out.any(1).sum().item(), out.any(0).sum().item()
    assert abs(rows - 20) <= 2, "the bar keeps its length in pixels"
    assert columns <= 6


def test_random_view_gradient_is_right() -> None:
    view = RandomView(jitter=1.0)
    images = torch.rand(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: view(x, torch.Generator().manual_seed(3)), (images,), atol=1e-6
    )


def test_redirected_relu_helps_only_dead_examples() -> None:
    x = torch.tensor([[-1.0, 2.0], [-1.0, -2.0]], requires_grad=True)
    out = _RedirectedReLU.apply(x)
    assert out.tolist() == [[0.0, 2.0], [0.0, 0.0]]
    (-out.sum()).backward()
    assert x.grad.tolist() == [[0.0, -1.0], [-1.0, -1.0]]


def _fail_inside(net: nn.Sequential) -> None:
    with redirected_relus(net):
        assert not net[0].inplace
        raise RuntimeError("inside")


def test_redirected_relus_restore_the_modules() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU())
    with pytest.raises(RuntimeError, match="inside"):
        _fail_inside(net)
    assert [m.inplace for m in net] == [True, False]
    assert not net[0]._forward_hooks


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
    with edited(own_net, [zero("relu:0")]), redirected_relus(own_net.module):
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
    for unit, designed in ((0, 0.0), (3, 45.0), (6, 90.0), (9, 135.0)):
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
    ],
)
def test_bad_requests_are_named(own_net: HookedModel, options, error, message) -> None:
    with pytest.raises(error, match=message):
        visualize(own_net, **options)


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
    ("how", "message"), [("nan", "not a finite number"), ("cut", "no gradient")]
)
def test_broken_models_are_named(how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize(HookedModel(Broken(how), (3, 16, 16)), "conv:1", steps=3)


@pytest.mark.slow
def test_googlenet_curve_unit_shows_its_curve(assets: Path) -> None:
    model = load_model("googlenet")
    picture = visualize(model, "mixed3b:335", steps=64, size=112)
    assert picture.activation > 100 * max(picture.start, 0.1), (
        "as strong as the best photographs' maxima"
    )
