"""Parameterizations: images as functions of the parameters that are optimised.

`Values` are unbounded and can be added, which is how images share parts; `squashed` turns them into pictures in 0..1.
`maco` makes pictures in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.featurevis.natural import COLOR_CORRELATION, NaturalImages, normalised_colors

Shape = tuple[int, int, int, int]
"""Images, channels, height, width."""

Device = torch.device | str

SD = 0.01
"""Standard deviation of the initial parameters, as in lucid."""


@dataclass(frozen=True, eq=False)
class Parameterization:
    """A batch of images that can be optimised.

    Attributes:
        parameters: the tensors that the optimiser changes.
        image: makes the images from them, in 0..1.
        learning_rate: a suitable learning rate.
        alpha: makes the opacity of each pixel, in 0..1, if that is optimised too.
        traced: whether opacity is the gradient's size summed over the steps (MACO).
    """

    parameters: list[Tensor]
    image: Callable[[], Float[Tensor, "batch channel h w"]]
    learning_rate: float = 0.1
    alpha: Callable[[], Float[Tensor, "batch 1 h w"]] | None = None
    traced: bool = False


@dataclass(frozen=True, eq=False)
class Values:
    """Unbounded values of images, as functions of parameters.

    Attributes:
        parameters: the tensors that the optimiser changes.
        values: makes the values from them.
        learning_rate: a suitable learning rate.
    """

    parameters: list[Tensor]
    values: Callable[[], Float[Tensor, "batch channel h w"]]
    learning_rate: float = 0.1

    def __add__(self, other: Values) -> Values:
        """The sum, image by image; a single image is shared by all of the other's."""
        # The more careful of two rates: the part with the higher one only learns more slowly, the other might diverge.
        rate = min(self.learning_rate, other.learning_rate)
        return Values(
            [*self.parameters, *other.parameters], lambda: self.values() + other.values(), rate
        )


def drawn(
    shape: Sequence[int],
    seed: int,
    streams: Sequence[int],
    device: Device = "cpu",
    uniform: bool = False,
) -> Tensor:
    """Random numbers, each image from its own stream, so that an image does not depend on the others in its batch.

    Args:
        shape: the shape of one image's numbers.
        seed: the common seed.
        streams: one number for each image; equal numbers give equal images.
        device: the device to move them to; they are drawn on the CPU, so that they are the same on every device.
        uniform: draw uniformly from -pi to pi instead of from a normal distribution.
    """
    found = []
    for stream in streams:
        # A large prime apart, so that images 0, 1, 2, … of one seed are not those of the next seed shifted by one.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
        if uniform:
            found.append((torch.rand(tuple(shape), generator=generator) * 2 - 1) * math.pi)
        else:
            found.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(found).to(device)


@recording_gradients()
def pixels(
    shape: Shape, seed: int, streams: Sequence[int], device: Device = "cpu", sd: float = SD
) -> Values:
    """Each value is a parameter of its own."""
    own = (drawn(shape[1:], seed, streams, device) * sd).requires_grad_(True)
    return Values([own], lambda: own)


@recording_gradients()
def fourier(
    shape: Shape, seed: int, streams: Sequence[int], device: Device = "cpu", sd: float = SD
) -> Values:
    """Images parameterized by their spectrum, so that a step changes all scales equally (Olah et al. 2017).

    Amplitudes are divided by the frequency, as in natural images. Conventions of lucid: initial standard deviation
    0.01, scale 1 / max(f, 1 / max(h, w)) times sqrt(h w), division by 4.
    """
    # A real image has a conjugate-symmetric spectrum, so half of it (rfft) is enough. 1 / max(h, w) is the lowest
    # frequency that fits the image, in place of 0 for the constant part.
    _, channels, height, width = shape
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.rfftfreq(width)[None, :]
    frequency = torch.hypot(fy, fx)
    # irfft2 divides by h w; with coefficients of variance 1 at all h w frequencies, a pixel then has a standard
    # deviation of about 1 / sqrt(h w), which the factor undoes. The 4 is lucid's.
    scale = math.sqrt(height * width) / frequency.clamp_min(1 / max(height, width)) / 4
    start = drawn((channels, height, fx.shape[1], 2), seed, streams, device) * sd
    spectrum = start.requires_grad_(True)

    def values() -> Tensor:
        waves = torch.view_as_complex(spectrum) * scale.to(spectrum)
        return torch.fft.irfft2(waves, s=(height, width))

    return Values([spectrum], values)


@recording_gradients()
def laplacian(
    shape: Shape,
    seed: int,
    streams: Sequence[int],
    device: Device = "cpu",
    sd: float = SD,
    levels: int = 4,
) -> Values:
    """A sum of images at halved resolutions, enlarged bilinearly (lucid: `laplacian_pyramid`)."""
    _, channels, height, width = shape
    parts = []
    for level in range(levels):
        # height >> level halves it `level` times: 224, 112, 56, 28.
        size = (channels, max(1, height >> level), max(1, width >> level))
        # Another seed for every level, else a small level would begin with the numbers that the larger one begins with.
        part = drawn(size, seed + level, streams, device) * sd
        parts.append(part.requires_grad_(True))

    def values() -> Tensor:
        whole = [
            F.interpolate(p, (height, width), mode="bilinear", align_corners=False)
            for p in parts[1:]
        ]
        return torch.stack([parts[0], *whole]).sum(0)

    return Values(parts, values, learning_rate=0.05)


@recording_gradients()
def cppn(
    shape: Shape,
    seed: int,
    streams: Sequence[int],
    device: Device = "cpu",
    layers: int = 8,
    width: int = 24,
) -> Values:
    """A network for each image that maps a pixel's coordinates to its value (lucid: `cppn`, Stanley 2007).

    Coordinates run from -sqrt(3) to sqrt(3), which gives them variance 1. There are `layers` layers of `width`
    channels, each followed by the composite nonlinearity [a / 0.67, a^2 / 0.6] with a = atan(x), scaled to about unit
    variance; the last layer starts at 0.
    """
    _, channels, height, across = shape
    y, x = (torch.linspace(-1, 1, n) * math.sqrt(3) for n in (height, across))
    place = torch.stack(torch.broadcast_tensors(y[:, None], x[None, :])).flatten(1)
    weights, biases = [], []
    inputs = 2
    for layer in range(layers):
        # 1 / sqrt(inputs) keeps a sum of that many terms of unit variance at unit variance.
        weight = drawn((width, inputs), seed + layer, streams, device) / math.sqrt(inputs)
        weights.append(weight.requires_grad_(True))
        biases.append(torch.zeros(len(streams), width, 1, device=device).requires_grad_(True))
        inputs = 2 * width
    # At 0 all images start grey, whatever the layers before draw.
    last = torch.zeros(len(streams), channels, inputs, device=device).requires_grad_(True)

    def values() -> Tensor:
        h = place.to(last).expand(len(streams), -1, -1)
        for weight, bias in zip(weights, biases, strict=True):
            a = torch.atan(torch.bmm(weight, h) + bias)
            h = torch.cat([a / 0.67, a * a / 0.6], 1)
        return torch.bmm(last, h).unflatten(2, (height, across))

    return Values([*weights, *biases, last], values, learning_rate=0.003)


def color_matrix(channels: int, natural: NaturalImages | None = None) -> Tensor | None:
    """The matrix that mixes uncorrelated channels into colours: fitted, or ImageNet's for three channels, or None.

    Raises:
        ValueError: if it was fitted to images with another number of channels.
    """
    if natural is not None:
        if len(natural.mean) != channels:
            raise ValueError(
                f"images {natural.data} have {len(natural.mean)} channels: the model takes {channels}"
            )
        return normalised_colors(natural.root)
    return normalised_colors(COLOR_CORRELATION) if channels == 3 else None


def squashed(values: Values, colors: Float[Tensor, "channel channel"] | None) -> Parameterization:
    """Pictures in 0..1: channels are mixed into colours, followed by a sigmoid."""

    def image() -> Tensor:
        found = values.values()
        if colors is not None:
            # colour d = sum over c of M_dc value_c: correlated colours from uncorrelated channels, as M M' is the
            # covariance.
            found = torch.einsum("bchw,dc->bdhw", found, colors.to(found))
        return found.sigmoid()

    return Parameterization(values.parameters, image, values.learning_rate)


def with_alpha(colored: Parameterization, values: Values) -> Parameterization:
    """Pictures with transparency, from values with one channel."""
    parameters = [*colored.parameters, *values.parameters]
    return Parameterization(
        parameters, colored.image, colored.learning_rate, lambda: values.values().sigmoid()
    )


@recording_gradients()
def maco(
    shape: Shape,
    seed: int,
    streams: Sequence[int],
    natural: NaturalImages,
    device: Device = "cpu",
) -> Parameterization:
    """MACO: images with the magnitude spectrum of natural images, of which only the phase is optimised (Fel et al.
    2023).

    The magnitudes never change, so that the picture cannot fill up with frequencies that natural images lack. Values
    are mean + root x waves, mapped to 0..1 by a sigmoid.

    Raises:
        ValueError: if the natural images have another number of channels.
    """
    # sigmoid(4 (v - 1/2)) has slope 1 at v = 1/2: near the middle, colours stay those of the natural images.
    _, channels, height, width = shape
    color_matrix(channels, natural)  # same number of channels
    phase = drawn((channels, height, width // 2 + 1), seed, streams, device, uniform=True)
    phase.requires_grad_(True)
    magnitude = natural.magnitude_at(height, width)

    def image() -> Tensor:
        # `ortho` as in the fit of the magnitudes: another normalisation would scale the contrast by sqrt(h w).
        waves = torch.polar(magnitude.to(phase).expand_as(phase), phase)
        found = torch.fft.irfft2(waves, s=(height, width), norm="ortho")
        found = torch.einsum("bchw,dc->bdhw", found, natural.root.to(found))
        found = found + natural.mean.to(found)[:, None, None]
        return torch.sigmoid(4 * (found - 0.5))

    # A phase has a period of 2 pi, so that a rate of 1.0 is a moderate turn (Fel et al. 2023).
    return Parameterization([phase], image, learning_rate=1.0, traced=True)


MAKERS: dict[str, Callable[[Shape, int, Sequence[int], Device], Values]] = {
    "fourier": fourier,
    "pixel": pixels,
    "laplacian": laplacian,
    "cppn": cppn,
}
"""The parameterizations that need nothing but a shape and a seed, by name."""

PARAMS = (*MAKERS, "maco")
