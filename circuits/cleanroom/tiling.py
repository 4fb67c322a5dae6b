"""Tilings: the weights of a unit from a family of simpler units, laid along the path that it looks for.

A family holds one unit at every angle. Along the path each of its units gets weight by how its own angle
differs from the path's there: it is excited by those that the path excites and inhibited by the rest, in
particular by the opposed and the perpendicular.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.cleanroom.paths import Path

Weights = Float[Tensor, "source size size"]


@dataclass(frozen=True)
class Affinity:
    """How much weight a unit gets whose angle is d degrees away from the path's.

    exp(-d^2 / 2 excite^2), less what is inhibited: those around it, those opposed to it, and every unit alike. Each
    is a weight and a width, w exp(-d^2 / 2 s^2); the opposed are counted from half a period away: the
    perpendicular for lines, what is bent the other way for curves.

    Attributes:
        excite: how far, in degrees, the angles of units that are wanted may be from the path's.
        around: weight and width of inhibition about the same angle, wider than excitation: it sharpens.
        opposed: weight and width of inhibition about the angle half a period away.
        every: weight of inhibition at all angles: what excites all of them alike, noise or a dot, cancels.
    """

    excite: float
    around: tuple[float, float] = (0.0, 1.0)
    opposed: tuple[float, float] = (0.0, 1.0)
    every: float = 0.0

    def __call__(self, d: Float[Tensor, "*shape"], period: float) -> Float[Tensor, "*shape"]:
        """The weight at each difference, from -period / 2 to period / 2.

        >>> wanted = Affinity(10.0, opposed=(0.5, 20.0))
        >>> [round(float(w), 3) for w in wanted(torch.tensor([0.0, 90.0, -180.0]), 360.0)]
        [1.0, -0.0, -0.5]
        """
        away = d.abs() - period / 2
        return (
            _bump(d, 1.0, self.excite)
            - _bump(d, *self.around)
            - _bump(away, *self.opposed)
            - self.every
        )


def _bump(d: Float[Tensor, "*shape"], weight: float, width: float) -> Float[Tensor, "*shape"]:
    return weight * torch.exp(-(d**2) / (2 * width**2))


def differences(
    angles: Float[Tensor, " source"], normals: Float[Tensor, " point"], period: float
) -> Float[Tensor, "source point"]:
    """How far each unit's angle is from the path's, the short way round: -period / 2 to period / 2.

    >>> differences(torch.tensor([350.0]).double(), torch.tensor([10.0]).double(), 360).tolist()
    [[-20.0]]
    """
    # With a period of 180: 170 - 10 = 160 becomes (160 + 90) % 180 - 90 = -20.
    apart = angles[:, None] - normals[None, :]
    return (apart + period / 2) % period - period / 2


def tile(
    path: Path,
    angles: Float[Tensor, " source"],
    period: float,
    affinity: Affinity,
    *,
    size: int,
    step: float,
    width: float,
) -> Weights:
    """The kernel of a unit that looks for a path, over a family's maps.

    w[s, y, x] = mean over points p of affinity(angle_s - normal_p) G(place_yx - p), with G a Gaussian of
    `width` pixels whose sum over the plane is 1: an edge may be off the path by as much.

    Args:
        path: what the unit looks for.
        angles: of the family's units, in degrees.
        period: the angle after which they are themselves again: 180 for lines, 360 for curves.
        affinity: which of them are wanted.
        size: of the kernel, in positions.
        step: from position to position, in pixels.
        width: of the path, in pixels.
    """
    offset = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * step
    x = torch.exp(-((offset[None] - path.points[:, :1]) ** 2) / (2 * width**2))
    y = torch.exp(-((offset[None] - path.points[:, 1:]) ** 2) / (2 * width**2))
    wanted = affinity(differences(angles, path.normals, period), period)
    # 1 / (2 pi width^2) makes the Gaussian's integral 1, step^2 the sum over positions that are `step` pixels apart.
    area = step**2 / (2 * math.pi * width**2)
    return torch.einsum("sp,py,px->syx", wanted, y, x) * (area / len(path.points))
