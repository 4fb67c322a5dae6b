"""Random small changes of an image, so that a picture does not hang on single pixels (layer 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Generator, Tensor


@dataclass(frozen=True)
class RandomView:
    """Shift, scale and turn each image at random; what comes in from outside is grey.

    The standard set of lucid (jitter 8, scale 0.9-1.1, rotate up to 10 degrees, jitter 4) in a single
    resampling.

    Attributes:
        jitter: largest shift in pixels, along x and y.
        scales: smallest and largest factor.
        degrees: largest turn either way.
    """

    jitter: float = 12.0
    scales: tuple[float, float] = (0.9, 1.1)
    degrees: float = 10.0

    def __call__(
        self, images: Float[Tensor, "batch channel h w"], generator: Generator
    ) -> Float[Tensor, "batch channel h w"]:
        """Transform `images`; differentiable, random by `generator`."""
        n, _, height, width = images.shape
        u = torch.rand(n, 4, generator=generator) * 2 - 1
        low, high = self.scales
        scale = (low + high) / 2 + u[:, 0] * (high - low) / 2
        angle = torch.deg2rad(u[:, 1] * self.degrees)
        # an output pixel looks into the input at the inverse transform of its own place
        cos, sin = angle.cos() / scale, angle.sin() / scale
        shift_x, shift_y = u[:, 2] * self.jitter * 2 / width, u[:, 3] * self.jitter * 2 / height
        aspect = height / width
        rows = [cos, sin * aspect, shift_x, -sin / aspect, cos, shift_y]
        affine = rearrange(torch.stack(rows, dim=1), "b (r c) -> b r c", r=2).to(images)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        # grid_sample fills with zeros: sample the difference from grey
        moved = F.grid_sample(images - 0.5, grid, padding_mode="zeros", align_corners=False)
        return moved + 0.5
