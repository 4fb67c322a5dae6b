"""Invariances of curve detectors: to contrast, colour, fill, thickness and corners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.stimuli.patterns import arcs
from circuits.tuning.radial import RadialTuning
from circuits.tuning.responding import responses
from circuits.units import Unit

Aspect = Literal["contrast", "colour", "fill", "thickness", "corner"]
"""Contrast from light on dark (-1) to dark on light (1); the hue of the curve in degrees; a line (0), a dark (1) or a
light (-1) filled disk; thickness relative to the default; from an arc (0) to an angle (1)."""

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)


@dataclass(frozen=True, eq=False)
class Invariance:
    """A unit's responses to curves of its preferred angle and radius, as one aspect of them changes.

    Attributes:
        unit: the unit.
        aspect: what changes.
        values: the values of the aspect.
        responses: the activations at the preferred angle.
        opposite: the activations at the opposite angle, at which the unit should be silent.
        kept: the smallest response over the largest: 1 if the aspect does not matter.
        model_hash: the hash of the model.
    """

    unit: Unit
    aspect: Aspect
    values: tuple[float, ...]
    responses: Float[np.ndarray, " value"]
    opposite: Float[np.ndarray, " value"]
    kept: float
    model_hash: str

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        return vars(self) | {
            "unit": str(self.unit),
            "values": list(self.values),
            "responses": self.responses.tolist(),
            "opposite": self.opposite.tolist(),
        }


def invariance(
    model: HookedModel, tunings: Sequence[RadialTuning], aspects: Sequence[Aspect] = ASPECTS
) -> list[Invariance]:
    """Measure how the responses of curve units change with each aspect.

    Args:
        model: the model that the tunings belong to.
        tunings: tunings to curves.
        aspects: the aspects to change.

    Raises:
        ValueError: if an aspect is unknown, or a tuning is not to curves or belongs to other weights.
    """
    for aspect in aspects:
        if aspect not in ASPECTS:
            raise ValueError(f"aspect {aspect!r} is not one of {', '.join(ASPECTS)}")
    found = []
    model_hash = model.hash
    for tuning in tunings:
        if tuning.shape != "curve" or tuning.model_hash != model_hash:
            raise ValueError(
                f"tuning of {tuning.unit} is to a {tuning.shape}, with model {tuning.model_hash[:16]}: expected a "
                f"tuning to a curve, with model {model_hash[:16]}"
            )
        angle = tuning.measures.preferred.value
        for aspect in aspects:
            values = _VALUES[aspect]
            both = [
                responses(
                    model, tuning.unit.site,
                    (_DRAWN[aspect](a, value, tuning) for value in values),
                )[:, tuning.unit.index].double().numpy()
                # The opposite curve runs the same way in the middle and bends to the other side: a unit that responds
                # to both responds to the edge rather than to the bend.
                for a in (angle, angle + 180)
            ]  # fmt: skip
            peak = both[0].max()
            # The smallest over the largest response: 1 if the aspect makes no difference.
            kept = float(both[0].min() / peak) if peak > 0 else float("nan")
            found.append(
                Invariance(tuning.unit, aspect, values, both[0], both[1], kept, model_hash)
            )
    return found


_VALUES: dict[Aspect, tuple[float, ...]] = {
    "contrast": (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0),
    "colour": (0.0, 60.0, 120.0, 180.0, 240.0, 300.0),
    "fill": (0.0, 1.0, -1.0),
    "thickness": (0.5, 1.0, 1.5, 2.0, 3.0),
    "corner": (0.0, 0.25, 0.5, 0.75, 1.0),
}


def _curve(angle: float, tuning: RadialTuning, **options: Any) -> Tensor:
    """One curve of the tuning's radius; `thick` is relative to the default thickness."""
    thick = options.pop("thick", 1.0) * max(2.0, tuning.size / 32)
    return arcs(torch.tensor([angle]), tuning.radius, tuning.size, thickness=thick, **options)


def _hue(degrees: float) -> tuple[float, float, float]:
    """A saturated colour of the colour wheel, with red at 0."""
    # Each channel is a trapezium of the hue: |h/60 - 3| - 1, cut to 0..1, for red; green and blue are shifted by 4 and
    # 2 sixths of a turn.
    return tuple(min(1.0, max(0.0, abs((degrees / 60 + k) % 6 - 3) - 1)) for k in (0, 4, 2))  # type: ignore[return-value]


_DRAWN: dict[Aspect, Callable[[float, float, RadialTuning], Tensor]] = {
    "contrast": lambda a, v, t: _curve(a, t, ink=0.5 - v / 2, paper=0.5 + v / 2),
    "colour": lambda a, v, t: _curve(a, t, ink=_hue(v), paper=0.5),
    "fill": lambda a, v, t: _curve(
        a, t, filled=v != 0, ink=0.0 if v >= 0 else 1.0, paper=1.0 if v >= 0 else 0.0
    ),
    "thickness": lambda a, v, t: _curve(a, t, thick=v),
    "corner": lambda a, v, t: _curve(a, t, corner=v),
}
