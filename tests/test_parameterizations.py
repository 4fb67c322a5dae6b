from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuits.featurevis.natural import NaturalImages
from circuits.featurevis.parameterizations import (
    MAKERS,
    Parameterization,
    color_matrix,
    drawn,
    fourier,
    maco,
    pixels,
    squashed,
    with_alpha,
)
from circuits.featurevis.transforms import (
    Blur,
    ColorShift,
    Compose,
    Crop,
    Jitter,
    Noise,
    Pad,
    Rotate,
    Scale,
    maco_standard,
    moved,
    standard,
)


def natural(channels: int = 3, size: tuple[int, int] = (12, 16)) -> NaturalImages:
    generator = torch.Generator().manual_seed(5)
    images = [torch.rand(channels, *size, generator=generator) for _ in range(6)]
    return NaturalImages.fit(images, "noise", "00")


def test_fourier_by_definition() -> None:
    made = fourier((2, 1, 6, 8), 0, [0, 1])
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
    torch.testing.assert_close(made.values()[:, 0].double(), values, atol=1e-5, rtol=0)


def gradient_is_right(made: Parameterization) -> None:
    """The gradient of every parameter against central differences, in float64."""
    for p in made.parameters:
        p.data = p.data.double()
    weight = torch.randn(made.image().shape, generator=torch.Generator().manual_seed(1)).double()

    def value() -> Tensor:
        alpha = made.alpha() if made.alpha else 1.0
        return (made.image() * weight * alpha).sum()

    grads = torch.autograd.grad(value(), made.parameters)
    generator = torch.Generator().manual_seed(2)
    for p, grad in zip(made.parameters, grads, strict=True):
        way = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            p += 1e-6 * way
            up = value()
            p -= 2e-6 * way
            down = value()
            p += 1e-6 * way
        expected = (grad * way).sum()
        torch.testing.assert_close((up - down) / 2e-6, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_gradients_of_parameterizations(name: str, channels: int) -> None:
    values = MAKERS[name]((2, channels, 8, 11), 3, [0, 1], "cpu")
    if name == "cppn":  # its last layer starts at zero, where nothing leads further
        with torch.no_grad():
            values.parameters[-1].normal_(generator=torch.Generator().manual_seed(0))
    gradient_is_right(squashed(values, color_matrix(channels)))


def test_gradients_of_maco_and_alpha() -> None:
    gradient_is_right(maco((2, 3, 12, 16), 0, [0, 1], natural()))
    colored = squashed(fourier((1, 3, 8, 8), 0, [0]), color_matrix(3))
    gradient_is_right(with_alpha(colored, fourier((1, 1, 8, 8), 1, [0])))


def test_images_come_from_streams_of_their_own() -> None:
    both, alone = drawn((4,), 7, [0, 3]), drawn((4,), 7, [3])
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(drawn((4,), 8, [3]), alone)


def test_shared_parts_move_together() -> None:
    own, common = pixels((3, 1, 4, 4), 0, [0, 1, 2]), pixels((1, 1, 4, 4), 1, [0])
    made = own + common
    assert made.values().shape == (3, 1, 4, 4)
    before = made.values().detach()
    with torch.no_grad():
        common.parameters[0] += 1.0
    torch.testing.assert_close(made.values().detach(), before + 1)


def test_natural_statistics_against_a_slow_oracle(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    mix = torch.tensor([[1.0, 0.2, 0.1], [0.3, 0.8, 0.0], [0.1, 0.1, 0.5]]) / 4
    noise = [torch.randn(3, 6, 7, generator=generator, dtype=torch.float64) for _ in range(5)]
    images = [torch.einsum("cd,dhw->chw", mix.double(), x) + 0.4 for x in noise]
    found = NaturalImages.fit(images, "mixed", "ab")
    flat = torch.stack(images).movedim(1, 0).flatten(1)
    mean = flat.mean(1)
    torch.testing.assert_close(found.mean.double(), mean, atol=1e-6, rtol=0)
    covariance = torch.cov(flat, correction=0)
    root = found.root.double()
    torch.testing.assert_close(root @ root.T, covariance, atol=1e-6, rtol=0)
    inverse = torch.linalg.inv(root)
    power = torch.zeros(3, 6, 4, dtype=torch.float64)
    for x in images:
        plain = torch.einsum("cd,dhw->chw", inverse, x - mean[:, None, None])
        power += torch.fft.rfft2(plain, norm="ortho").abs().square() / 5
    power[:, 0, 0] = 0
    torch.testing.assert_close(found.magnitude.double(), power.sqrt(), atol=1e-4, rtol=1e-4)
    found.save(tmp_path / "a.safetensors")
    again = NaturalImages.load(tmp_path / "a.safetensors")
    assert torch.equal(again.magnitude, found.magnitude)
    assert (again.data, again.data_hash, again.n) == ("mixed", "ab", 5)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        NaturalImages.load(tmp_path / "a.safetensors")
    kept = NaturalImages.kept(tmp_path / "a.safetensors", iter(images), "mixed", "ab")
    assert torch.equal(kept.root, found.root), "what cannot be read is fitted anew"
    assert NaturalImages.kept(tmp_path / "a.safetensors", iter([]), "mixed", "ab").n == 5


def test_natural_statistics_of_other_sizes_keep_their_power() -> None:
    found = natural(size=(32, 32))
    for size in ((32, 32), (16, 24), (64, 48)):
        at = found.magnitude_at(*size)
        assert at.shape == (3, size[0], size[1] // 2 + 1)
        # of white noise the orthonormal spectrum is flat, whatever the size
        assert at[:, 1:, 1:-1].mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (6, 7), (7, 6)])
def test_magnitudes_stay_at_their_frequencies(size: tuple[int, int]) -> None:
    fitted = natural(size=size)
    waves = torch.arange(size[1] // 2 + 1.0).expand(3, size[0], -1)  # cycles an image
    columns = replace(fitted, magnitude=waves).magnitude_at(14, 14)
    # Column k of 14 is k cycles in 14 pixels; none lies above the last that was fitted.
    expected = (torch.arange(8) * size[1] / 14).clamp(max=size[1] // 2)
    torch.testing.assert_close(columns[:, 1:], expected.expand(3, 13, -1))
    # Rows: |cycles an image| is the same for both signs, also where the highest ones meet.
    high = (torch.fft.fftfreq(size[0]) * size[0]).abs()[:, None].expand(3, -1, size[1] // 2 + 1)
    rows = replace(fitted, magnitude=high.contiguous()).magnitude_at(15, 14)[0, 1:, 1]
    torch.testing.assert_close(rows, rows.flip(0))
    lowest = torch.arange(1, 6) * size[0] / 15
    torch.testing.assert_close(rows[:5], lowest)
    other = (size[0], size[1] ^ 1)  # 6 and 7 have one number of columns
    assert fitted.magnitude_at(*size) is fitted.magnitude
    assert not torch.equal(fitted.magnitude_at(*other), fitted.magnitude)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.rand(3, 4, 4)], "1 found, at least 2"),
        ([torch.rand(3, 4, 4), torch.rand(3, 5, 4)], "differ in shape"),
        ([torch.ones(3, 4, 4)] * 3, "no contrast"),
    ],
)
def test_bad_images_have_no_statistics(images: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NaturalImages.fit(images, "these", "00")


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="have 3 channels: the model takes 5"):
        color_matrix(5, natural())


# --- transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        Jitter(3), Scale(), Rotate(), Pad(2), Crop(0.9, 0.5), Blur(), ColorShift(), Noise(),
        standard(12, 16), maco_standard(12, 16), Compose((Pad(3), Jitter(4), Blur(), Rotate())),
    ],
    ids=str,
)  # fmt: skip
def test_transforms_are_differentiable_and_seeded(transform) -> None:
    images = torch.rand(2, 3, 12, 16, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor) -> Tensor:
        return transform(x, torch.Generator().manual_seed(3), 0.5)

    assert torch.autograd.gradcheck(apply, (images,), atol=1e-6)
    assert torch.equal(apply(images), apply(images))
    if isinstance(transform, Compose):
        assert apply(images).shape == images.shape


def test_motions_in_a_row_are_one_motion() -> None:
    """Against moving a smooth image in two resamplings, each blurring it a little."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    image = (0.5 + 0.4 * torch.sin(3 * x + 1) * torch.cos(4 * y))[None, None]
    steps = (Rotate(40.0), Jitter(12), Scale(0.7, 1.4))
    once = Compose(steps)(image, torch.Generator().manual_seed(4))
    generator, by_step = torch.Generator().manual_seed(4), image
    for step in steps:
        by_step = step(by_step, generator)
    inside = (slice(None), slice(None), slice(20, 44), slice(20, 44))
    torch.testing.assert_close(once[inside], by_step[inside], atol=0.01, rtol=0)


def test_jitter_shifts_whole_pixels_and_lets_in_grey() -> None:
    image = torch.rand(1, 1, 8, 8)
    shift = torch.tensor([[1.0, 0, 2.0], [0, 1.0, 0.0], [0, 0, 1.0]])  # looks two to the right
    out = moved(image, shift)
    torch.testing.assert_close(out[..., :6], image[..., 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[..., 6:], torch.full((1, 1, 8, 2), 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pixels", [1, 7, 8])
def test_jitter_goes_as_far_either_way(pixels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shifts = torch.stack([Jitter(pixels).motion(generator)[:2, 2] for _ in range(300)])
    most = pixels // 2
    assert shifts.unique().tolist() == list(range(-most, most + 1))


def test_rotation_keeps_shapes_when_the_image_is_not_square() -> None:
    image = torch.zeros(1, 1, 40, 80)
    image[..., 18:22, 30:50] = 1  # a bar along x, 4 x 20
    angle = math.radians(90)
    cos, sin = math.cos(angle), math.sin(angle)
    turned = moved(image, torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]]))
    bar = turned[0, 0] > 0.75
    assert (bar.any(1).sum().item(), bar.any(0).sum().item()) == (20, 4)
