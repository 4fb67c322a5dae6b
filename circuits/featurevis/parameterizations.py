"""Images as functions of the numbers that are optimised (layer 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

COLOR_CORRELATION = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
"""Square root of the covariance of colours in ImageNet, as lucid has it (Olah et al. 2017)."""


@dataclass(frozen=True, eq=False)
class Parameterization:
    """A batch of images that can be optimised.

    Attributes:
        parameters: what the optimiser changes.
        image: makes the images from them, in 0..1.
    """

    parameters: list[Tensor]
    image: Callable[[], Float[Tensor, "batch channel h w"]]


def fourier_image(
    batch: int,
    channels: int,
    height: int,
    width: int,
    generator: Generator,
    sd: float = 0.01,
    device: torch.device | None = None,
) -> Parameterization:
    """Images by their spectrum, so that a step changes all scales alike (Olah et al. 2017).

    Amplitudes are divided by the frequency, as in natural images; three channels are decorrelated
    colours. Conventions of lucid: initial sd 0.01, scale 1 / max(f, 1 / max(h, w)), division by 4,
    then a sigmoid.

    Args:
        batch: how many images.
        channels: of each.
        height: in pixels.
        width: in pixels.
        generator: draws the start; each image from its own stream, so that it does not depend on
            what it is optimised together with.
        sd: of the starting spectrum.
        device: where to work.
    """
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.rfftfreq(width)[None, :]
    frequency = torch.hypot(fy, fx)
    scale = math.sqrt(height * width) / frequency.clamp_min(1 / max(height, width)) / 4
    shape = (batch, channels, height, fx.shape[1], 2)
    spectrum = torch.randn(shape, generator=generator) * sd
    spectrum = spectrum.to(device).requires_grad_(True)
    scale = scale.to(device)
    mix = _color_matrix().to(device) if channels == 3 else None

    def image() -> Tensor:
        values = torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(height, width))
        if mix is not None:
            values = torch.einsum("bchw,dc->bdhw", values, mix)
        return values.sigmoid()

    return Parameterization([spectrum], image)


def _color_matrix() -> Float[Tensor, "3 3"]:
    """The correlation of colours, divided by its largest column norm."""
    return COLOR_CORRELATION / COLOR_CORRELATION.norm(dim=0).max()
