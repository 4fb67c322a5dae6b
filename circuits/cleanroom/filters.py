"""Kernels written by hand: Gabor filters and oriented strokes, from formulas alone.

Offsets are in pixels, x to the right and y down; angles in degrees, counter-clockwise as seen.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Float[Tensor, "size size"]


def axes(size: int, orientation: float) -> tuple[Kernel, Kernel]:
    """Offsets of a kernel's pixels along a line at `orientation` and across it."""
    offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    angle = math.radians(orientation)
    # on the screen y grows downwards, so a line at `angle` points along (cos, -sin)
    along = x * math.cos(angle) - y * math.sin(angle)
    across = x * math.sin(angle) + y * math.cos(angle)
    return along, across


def gabor(size: int, orientation: float, phase: float, wavelength: float, sigma: float) -> Kernel:
    """A Gabor filter: a cosine across lines at `orientation` under a Gaussian window.

    g = exp(-(u^2 + v^2) / 2 sigma^2) cos(2 pi v / wavelength + phase), u along and v across, made to
    sum to zero (a uniform patch gives no response) and to unit norm.
    """
    along, across = axes(size, orientation)
    window = torch.exp(-(along**2 + across**2) / (2 * sigma**2))
    wave = torch.cos(2 * math.pi * across / wavelength + math.radians(phase))
    # subtracting the windowed mean, not a constant, keeps the filter zero at its border
    kernel = window * (wave - (window * wave).sum() / window.sum())
    # Length 1: every orientation answers its own pattern with the same strength, whatever the grid does to it.
    return kernel / kernel.norm()


def stroke(size: int, orientation: float, length: float, width: float, flanks: float) -> Kernel:
    """A bar at `orientation` with opposed flanks: a Gaussian along, a difference of Gaussians across.

    The flanks, twice as wide, take away the share `flanks` of what the bar gives in sum: with 1 a
    texture of parallel lines gives no response at all, with 0 it gives as much as a line does.
    """
    along, across = axes(size, orientation)
    envelope = torch.exp(-(along**2) / (2 * length**2))
    center = envelope * torch.exp(-(across**2) / (2 * width**2))
    surround = envelope * torch.exp(-(across**2) / (2 * (2 * width) ** 2))
    # `flanks` is the share of the bar's weight that is taken away on both sides of it: with 1 the kernel sums to zero.
    return center - surround * (flanks * center.sum() / surround.sum())
