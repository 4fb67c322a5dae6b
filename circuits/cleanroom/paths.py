"""Paths: what a unit looks for, as points in a row and how they are bent there.

Offsets are in pixels of the input, x to the right and y down; angles in degrees, counter-clockwise as seen. A
point's angle is where the path bulges there: the normal, which on an arc points away from its middle. The path
runs at a right angle to it. On a straight path both normals will do: what reads it has a period of 180 degrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_POINTS = 41


@dataclass(frozen=True, eq=False)
class Path:
    """Points at equal distances along a curve.

    Attributes:
        points: right and down from the unit's place, in pixels.
        normals: the angle at which the path bulges at each, in degrees.
    """

    points: Float[Tensor, "point 2"]
    normals: Float[Tensor, " point"]


def arc(bulge: float, radius: float, half: float) -> Path:
    """An arc whose middle is at the unit's place.

    The point t pixels from the middle is at angle bulge + t / radius of a circle about -radius * normal.

    Args:
        bulge: where its middle bulges: 90 is an arch.
        radius: in pixels.
        half: half of its length, in pixels; all of the circle if that is longer.

    >>> arc(90.0, 10.0, 5.0).points[20].tolist()
    [0.0, 0.0]
    """
    # Half of the circumference: an arc that is longer would run over itself.
    reach = min(half, math.pi * radius)
    t = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64)
    return _bent(bulge, radius, t)


def straight(orientation: float, half: float) -> Path:
    """A line at `orientation` whose middle is at the unit's place."""
    t = torch.linspace(-half, half, _POINTS, dtype=torch.float64)
    along = heading(torch.tensor(orientation, dtype=torch.float64))
    return Path(t[:, None] * along, torch.full((_POINTS,), orientation + 90, dtype=torch.float64))


def circle(radius: float) -> Path:
    """All of a circle about the unit's place."""
    # Without the last point, which would be the first again.
    normals = torch.arange(_POINTS, dtype=torch.float64) * (360 / _POINTS)
    return Path(radius * heading(normals), normals)


def s_shape(orientation: float, radius: float, half: float, mirrored: bool = False) -> Path:
    """Two arcs that meet at the unit's place, where they run at `orientation`, and bulge to opposite sides.

    Args:
        orientation: how the path runs where they meet.
        radius: of both arcs, in pixels.
        half: the length of each, in pixels.
        mirrored: a letter S bulges left above its middle; this one right.
    """
    side = -1.0 if mirrored else 1.0
    # Middles of equal pieces, so that the point where both arcs meet is not counted twice.
    t = (torch.arange(_POINTS // 2, dtype=torch.float64) + 0.5) * (half / (_POINTS // 2))
    ahead = _bent(orientation + 90 * side, radius, -side * t)
    behind = _bent(orientation - 90 * side, radius, -side * t)
    return Path(
        torch.cat([ahead.points, behind.points]), torch.cat([ahead.normals, behind.normals])
    )


def _bent(bulge: float, radius: float, t: Float[Tensor, " point"]) -> Path:
    """Points of a circle through the unit's place, t pixels counter-clockwise from there."""
    # t pixels along a circle are t / radius radians.
    normals = bulge + torch.rad2deg(t / radius)
    start = heading(torch.tensor(bulge, dtype=torch.float64))
    # From the point on the circle at `bulge`, which is moved to the unit's place (0, 0).
    return Path(radius * (heading(normals) - start), normals)


def heading(degrees: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape 2"]:
    """The unit vector at an angle; y grows downwards on the screen."""
    radians = torch.deg2rad(degrees)
    return torch.stack([radians.cos(), -radians.sin()], -1)
