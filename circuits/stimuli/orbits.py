"""Orbits: stimuli in every step of a transformation, by which families of units are found.

Two units are transformed copies of each other if one responds to step k of every image as the other does to step
k + shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.stimuli.drawing import (
    curves,
    fill,
    grating,
    grid,
    heading,
    paint,
    segment_distance,
    stroke,
)  # fmt: skip

Transformation = Literal["rotation", "mirror", "scale", "hue"]
"""Images are rotated (degrees), mirrored left to right (0, 1), enlarged (by a factor) or shifted in hue (degrees)."""


@dataclass(frozen=True, eq=False)
class Orbit:
    """Images in every step of a transformation.

    Attributes:
        transformation: the transformation.
        images: the images, in 0..1.
        steps: the value of each step, in degrees or as a factor.
        cyclic: whether the first step comes after the last one again.
        central: whether the content is in the middle of the images, so that units should be read there.
    """

    transformation: Transformation
    images: Float[Tensor, "stimulus step 3 h w"]
    steps: tuple[float, ...]
    cyclic: bool
    central: bool


def rotations(size: int, steps: int = 24) -> Orbit:
    """Draw arcs of four radii, lines, edges and gratings, dark and light, at every angle.

    The angle is that of the normal: an arc bulges there, an edge gets lighter or darker in that direction, and lines
    and stripes run at a right angle to it.

    Args:
        size: the height and width in pixels, with which the drawings scale.
        steps: the number of angles in a full turn.
    """
    angles = torch.arange(steps) * (360.0 / steps)
    points = grid(size, size)
    thick = max(1.5, size / 56)
    greys = ((0.0, 1.0), (1.0, 0.0), (0.2, 0.6))
    drawn = []
    for radius in (0.07, 0.13, 0.2, 0.29):
        radii = torch.full((steps,), radius * size)
        drawn += [
            curves(angles, radii, size, thick, foreground=ink, background=paper)
            for ink, paper in greys
        ]
    # Long enough that the ends of the line are outside of the image at every angle.
    far = 2.0 * size * heading(angles + 90)
    line = segment_distance(points, -far, far)
    edge = (points * heading(angles)[:, None, None]).sum(-1)
    for ink, paper in greys[:2]:
        for wide in (thick * 0.75, thick * 2):
            drawn.append(_painted(stroke(line, torch.full((steps,), wide)), ink, paper))
        drawn.append(_painted(fill(edge), 0.5 * ink + 0.1, 0.5 * paper + 0.1))
    for wavelength in (0.03, 0.045, 0.07):
        waves = torch.full((steps,), max(3.0, wavelength * size))
        drawn += [
            grating(points, angles + 90, waves, torch.full((steps,), phase))[:, None].expand(
                -1, 3, -1, -1
            )
            for phase in (0.0, 180.0)
        ]
    return Orbit("rotation", torch.stack(drawn), tuple(angles.tolist()), cyclic=True, central=True)


def _painted(coverage: Tensor, ink: float, paper: float) -> Tensor:
    """Grey images with a shape in another grey."""
    blank = torch.full((len(coverage), 3, *coverage.shape[1:]), paper)
    return paint(blank, coverage, torch.full((len(coverage), 3), ink))


def mirrors(images: Float[Tensor, "stimulus 3 h w"]) -> Orbit:
    """Images and their mirror images, left to right."""
    both = torch.stack([images, images.flip(-1)], dim=1)
    return Orbit("mirror", both, (0.0, 1.0), cyclic=True, central=False)


def scales(images: Float[Tensor, "stimulus 3 h w"], steps: int = 7, ratio: float = 2**0.5) -> Orbit:
    """Images enlarged about their middle, by `ratio` from step to step; the first step is the images themselves.

    What grows beyond the frame is cut off.
    """
    h, w = images.shape[-2:]
    factors = [ratio**k for k in range(steps)]
    made = []
    for factor in factors:
        ch, cw = max(2, round(h / factor)), max(2, round(w / factor))
        top, left = (h - ch) // 2, (w - cw) // 2
        cut = images[..., top : top + ch, left : left + cw]
        made.append(F.interpolate(cut, (h, w), mode="bilinear", antialias=True))
    return Orbit(
        "scale", torch.stack(made, 1).clamp(0, 1), tuple(factors), cyclic=False, central=True
    )


def hues(images: Float[Tensor, "stimulus 3 h w"], steps: int = 12) -> Orbit:
    """Images with their colours rotated about the grey axis."""
    angles = [360.0 / steps * k for k in range(steps)]
    turned = [torch.einsum("cd,sdhw->schw", _about_grey(angle), images) for angle in angles]
    return Orbit(
        "hue", torch.stack(turned, 1).clamp(0, 1), tuple(angles), cyclic=True, central=False
    )


def _about_grey(degrees: float) -> Float[Tensor, "3 3"]:
    """The rotation matrix of (red, green, blue) about the axis (1, 1, 1), by Rodrigues' formula."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    third, root = (1 - cos) / 3, sin / math.sqrt(3)
    return torch.tensor(
        [
            [cos + third, third - root, third + root],
            [third + root, cos + third, third - root],
            [third - root, third + root, cos + third],
        ]
    )
