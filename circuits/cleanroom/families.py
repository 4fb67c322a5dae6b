"""Families: what hand-written units look for, and the same turned, mirrored, scaled or recoloured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Feature:
    """What one unit looks for.

    Attributes:
        kind: in a word or two: "line", "curve".
        angle: how it is turned, in degrees, counter-clockwise: how a line or Gabor runs, where a curve bulges.
        period: the angle after which it is itself again; 0 if turning does not change it.
        radius: of what is bent, in pixels; 0 for what is not.
        phase: of a Gabor, in degrees: 0 is a light line, 180 a dark one, the others are edges.
        colour: red, green and blue weights of a colour contrast; empty for grey.
        mirrored: the other hand of what has two.
    """

    kind: str
    angle: float = 0.0
    period: float = 0.0
    radius: float = 0.0
    phase: float | None = None
    colour: tuple[float, ...] = ()
    mirrored: bool = False

    @property
    def name(self) -> str:
        """As people read it.

        >>> Feature("curve", 45.0, 360.0, 34.0).name
        'curve 45°, radius 34'
        """
        hand = "mirrored " if self.mirrored else ""
        turned = f" {self.angle:g}°" if self.period else ""
        scaled = f", radius {self.radius:g}" if self.radius else ""
        shifted = "" if self.phase is None else f", phase {self.phase:g}°"
        return f"{hand}{self.kind}{turned}{scaled}{shifted}"

    def turned(self, degrees: float) -> Feature:
        """The same, turned counter-clockwise."""
        return replace(self, angle=(self.angle + degrees) % self.period)


def rotations(feature: Feature, n: int) -> tuple[Feature, ...]:
    """A family: a feature at `n` angles, equally far apart over its period, itself first."""
    return tuple(feature.turned(feature.period * k / n) for k in range(n))


def angles_of(family: tuple[Feature, ...]) -> Float[Tensor, " unit"]:
    """The angle at which each unit of a family bulges: a line's is at a right angle to how it runs."""
    # A line at 0 degrees runs to the right and bulges, either way, up or down.
    across = 90.0 if family[0].period == 180 else 0.0
    return torch.tensor([f.angle + across for f in family], dtype=torch.float64)
