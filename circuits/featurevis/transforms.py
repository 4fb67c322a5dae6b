"""Random small changes of an image, so that a picture does not hang on single pixels.

Each draws from the generator that it is given, once for the whole batch, so that a picture does not
depend on what it is made together with. Shifts, scalings and turns in a row become one resampling; what
comes in from outside is grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

GREY = 0.5


@runtime_checkable
class Transform(Protocol):
    """Changes images at random, differentiably.

    `progress` is how much of the optimisation is over, 0..1: some transforms change with it.
    """

    def __call__(
        self,
        images: Float[Tensor, "batch channel h w"],
        generator: Generator,
        progress: float = 0.0,
    ) -> Float[Tensor, "batch channel h2 w2"]:
        """Transform a batch of images in 0..1."""
        ...


Motion = Float[Tensor, "3 3"]
"""From a pixel's place in the output, about the middle, to where it comes from in the input."""


class _Moving:
    """What only moves pixels; several in a row are composed before anything is resampled."""

    def motion(self, generator: Generator) -> Motion:
        """Draw one."""
        raise NotImplementedError

    def __call__(
        self,
        images: Float[Tensor, "batch channel h w"],
        generator: Generator,
        progress: float = 0.0,
    ) -> Float[Tensor, "batch channel h w"]:
        """Move the images' pixels."""
        return moved(images, self.motion(generator))


@dataclass(frozen=True)
class Jitter(_Moving):
    """Shift by up to half of `pixels` either way, whole pixels: an odd number's half is rounded down."""

    pixels: int

    def motion(self, generator: Generator) -> Motion:
        """Draw a shift."""
        # Whole pixels, so that a jitter by itself moves an image without blurring it.
        most = self.pixels // 2
        shift = torch.randint(2 * most + 1, (2,), generator=generator) - most
        found = torch.eye(3)
        found[:2, 2] = shift.float()
        return found


@dataclass(frozen=True)
class Scale(_Moving):
    """Enlarge by a factor between `low` and `high`."""

    low: float = 0.9
    high: float = 1.1

    def motion(self, generator: Generator) -> Motion:
        """Draw a factor."""
        factor = self.low + float(torch.rand((), generator=generator)) * (self.high - self.low)
        # Motions map output to input: what shall look larger by a factor comes from a part smaller by it.
        return torch.diag(torch.tensor([1 / factor, 1 / factor, 1.0]))


@dataclass(frozen=True)
class Rotate(_Moving):
    """Turn by up to `degrees` either way."""

    degrees: float = 10.0

    def motion(self, generator: Generator) -> Motion:
        """Draw an angle."""
        angle = math.radians((float(torch.rand((), generator=generator)) * 2 - 1) * self.degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        return torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])


def moved(
    images: Float[Tensor, "batch channel h w"], motion: Motion
) -> Float[Tensor, "batch channel h w"]:
    """Resample images bilinearly, all by one motion in pixels."""
    height, width = images.shape[-2:]
    # torch's coordinates run from -1 to 1 along each axis
    # With corners not aligned, -1 and 1 are the image's edges, hence half a side is one unit. Motions are linear about
    # the middle in pixels; conjugating by `to_pixels` gives them in torch's units, also for images that are not square.
    to_pixels = torch.diag(torch.tensor([width / 2, height / 2, 1.0]))
    affine = (torch.linalg.inv(to_pixels) @ motion @ to_pixels)[:2].to(images)
    grid = F.affine_grid(affine[None], [1, *images.shape[1:]], align_corners=False)
    grid = grid.expand(len(images), -1, -1, -1)
    # grid_sample fills with zeros: sample the difference from grey
    return F.grid_sample(images - GREY, grid, padding_mode="zeros", align_corners=False) + GREY


@dataclass(frozen=True)
class Pad:
    """A grey border of `pixels`."""

    pixels: int
    value: float = GREY

    def __call__(
        self,
        images: Float[Tensor, "batch channel h w"],
        generator: Generator,
        progress: float = 0.0,
    ) -> Float[Tensor, "batch channel h2 w2"]:
        """Add the border."""
        return F.pad(images, [self.pixels] * 4, value=self.value)


@dataclass(frozen=True)
class Crop:
    """A random square part, enlarged to the whole: a share of the side around `first`, at the end `last`.

    Fel et al. 2023 (MACO): a share of 50 % of the side shrinking to 5 %; drawn within 5 % of it.
    """

    first: float = 0.5
    last: float = 0.05
    sd: float = 0.05

    def __call__(
        self,
        images: Float[Tensor, "batch channel h w"],
        generator: Generator,
        progress: float = 0.0,
    ) -> Float[Tensor, "batch channel h w"]:
        """Cut the part out and enlarge it."""
        drawn = torch.randn(3, generator=generator)
        share = self.first + (self.last - self.first) * progress + float(drawn[0]) * self.sd
        # A twentieth is the least: below that a crop is a few pixels enlarged to the whole.
        share = min(1.0, max(0.05, share))
        # A crop of the given share fits if its middle is at most (1 - share) / 2 from that of the image.
        middle = torch.rand(2, generator=generator) * (1 - share) - (1 - share) / 2
        height, width = images.shape[-2:]
        motion = torch.diag(torch.tensor([share, share, 1.0]))
        motion[0, 2], motion[1, 2] = middle[0] * width, middle[1] * height
        return moved(images, motion)


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur with a standard deviation of up to `sigma` pixels."""

    sigma: float = 1.0

    def __call__(
        self,
        images: Float[Tensor, "batch channel h w"],
        generator: Generator,
        progress: float = 0.0,
    ) -> Float[Tensor, "batch channel h w"]:
        """Blur along y and x."""
        sigma = self.sigma * float(torch.rand((), generator=generator))
        # Three standard deviations hold 99.7 % of the weight; reflection needs a border smaller than the image.
        reach = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
        if reach < 1:
            return images
        at = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-(at**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
        groups = images.shape[1]
        images = F.pad(images, [reach] * 4, mode="reflect")
        # A Gaussian of two dimensions is the product of two of one: 2 (2 r + 1) instead of (2 r + 1)^2 products a
        # pixel.
        images = F.conv2d(images, kernel[..., None, :], groups=groups)
        return F.conv2d(images, kernel[..., None], groups=groups)


@dataclass(frozen=True)
class ColorShift:
    """Add a random constant, normal with standard deviation `sd`, to each channel."""

    sd: float = 0.05

    def __call__(
        self,
        images: Float[Tensor, "batch channel h w"],
        generator: Generator,
        progress: float = 0.0,
    ) -> Float[Tensor, "batch channel h w"]:
        """Shift each channel."""
        shift = torch.randn(images.shape[1], 1, 1, generator=generator) * self.sd
        return images + shift.to(images)


@dataclass(frozen=True)
class Noise:
    """Add normal noise of standard deviation `sd` to each pixel."""

    sd: float = 0.08

    def __call__(
        self,
        images: Float[Tensor, "batch channel h w"],
        generator: Generator,
        progress: float = 0.0,
    ) -> Float[Tensor, "batch channel h w"]:
        """Add the noise, the same to each image."""
        noise = torch.randn(images.shape[1:], generator=generator) * self.sd
        return images + noise.to(images)


@dataclass(frozen=True)
class Compose:
    """Transforms one after another; the result has the size of what came in, cut or padded with grey."""

    steps: tuple[Transform, ...]

    def __call__(
        self,
        images: Float[Tensor, "batch channel h w"],
        generator: Generator,
        progress: float = 0.0,
    ) -> Float[Tensor, "batch channel h w"]:
        """Apply all."""
        size = tuple(images.shape[-2:])
        motion: Tensor | None = None
        for step in self.steps:
            # Each resampling blurs a little, and costs a pass: a run of motions is multiplied out and done once.
            if isinstance(step, _Moving):
                own = step.motion(generator)
                # the last step is nearest to the output: where a pixel comes from goes through it first
                motion = own if motion is None else motion @ own
                continue
            if motion is not None:
                images, motion = moved(images, motion), None
            images = step(images, generator, progress)
        if motion is not None:
            images = moved(images, motion)
        return _centered(images, size)


def _centered(images: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of images, with grey where they are too small."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        more = wanted - images.shape[axis]
        # Negative where there is too much: F.pad then cuts off. // rounds down, so that 5 to 2 is cut by 2 in front and
        # by 1 behind.
        before = more // 2
        pads = [before, more - before]
        if more:
            images = F.pad(images, pads if axis == -1 else [0, 0, *pads], value=GREY)
    return images


def standard(height: int, width: int) -> Compose:
    """lucid's set: jitter 8, scale 0.9-1.1, rotate 10 degrees, jitter 4; less for small images.

    Its padding by 12 grey pixels, which keeps jitter from cutting the image off, is not needed: what
    comes in from outside is grey.
    """
    # lucid's numbers are for 128 pixels; on an image of 32 a jitter of 8 would move a quarter of it.
    fits = min(1.0, min(height, width) / 128)
    jitters = (Jitter(max(1, round(8 * fits))), Jitter(max(1, round(4 * fits))))
    return Compose((jitters[0], Scale(0.9, 1.1), Rotate(10.0), jitters[1]))


def held_out() -> Compose:
    """Changes that no optimisation here sees: wider shifts and turns, blur and other colours."""
    return Compose((Jitter(24), Scale(0.8, 1.25), Rotate(20.0), Blur(1.5), ColorShift(0.05)))


NOTHING = Compose(())
"""Leaves images as they are."""


def maco_standard(height: int, width: int) -> Compose:
    """What MACO optimises under (Fel et al. 2023): crops of half the side shrinking to a twentieth, noise.

    Their images have well over a thousand pixels a side; of smaller ones, crops are as many pixels as a
    network needs.
    """
    side = min(height, width)
    # A share that is at least 224 (130 at the end) pixels, as far as the image has them.
    first, last = min(1.0, max(0.5, 224 / side)), min(1.0, max(0.05, 130 / side))
    return Compose((Crop(first, last), Noise(0.08)))
