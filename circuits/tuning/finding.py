"""Finding curve units by tuning alone, and how a family of them covers the circle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.tuning.radial import RadialTuning, radial_tuning
from circuits.units import Unit


@dataclass(frozen=True, eq=False)
class CurveUnit:
    """A unit's tuning to curves beside that to lines and stripes.

    Attributes:
        tuning: to curves.
        line_peak: its largest response to a line.
        grating_peak: and to a grating.
        is_curve_unit: whether it meets all criteria of `find_curve_units`.
        why_not: the first criterion that it does not meet; empty if it meets all.
    """

    tuning: RadialTuning
    line_peak: float
    grating_peak: float
    is_curve_unit: bool
    why_not: str

    @property
    def unit(self) -> Unit:
        """Which."""
        return self.tuning.unit

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without the curve."""
        m = self.tuning.measures
        return {
            "unit": str(self.unit), "preferred": m.direction.value, "preferred_low": m.direction.low,
            "preferred_high": m.direction.high, "peak": m.peak.value, "half_width": m.half_width.value,
            "half_width_low": m.half_width.low, "half_width_high": m.half_width.high,
            "echo": m.echo.value, "echo_low": m.echo.low, "echo_high": m.echo.high,
            "circular_variance": m.circular_variance.value, "radius": self.tuning.radius,
            "line_peak": self.line_peak, "grating_peak": self.grating_peak,
            "is_curve_unit": self.is_curve_unit, "why_not": self.why_not,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class JointTuning:
    """Several units' tuning together.

    Attributes:
        angles: in degrees.
        strongest: at each angle the largest response of any unit, each in shares of its own peak.
        coverage: the smallest of these: near 1 if every angle is some unit's own.
        largest_gap: the widest arc without a preferred angle, in degrees.
    """

    angles: Float[np.ndarray, " angle"]
    strongest: Float[np.ndarray, " angle"]
    coverage: float
    largest_gap: float


def find_curve_units(
    model: HookedModel,
    site: str,
    units: Sequence[int] | None = None,
    *,
    step: float = 5.0,
    least: float = 0.4,
    half_width: tuple[float, float] = (10.0, 90.0),
    echo: float = 0.2,
    variance: float = 0.3,
    over_lines: float = 1.2,
    size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[CurveUnit]:
    """Which units are curve detectors, by their responses to drawings alone; the most selective first.

    Args:
        model: of images.
        site: where to look.
        units: among which; all if not given.
        step: from angle to angle, in degrees.
        least: the smallest peak, as a share of the 90th percentile of the units' peaks.
        half_width: the narrowest and widest.
        echo: the largest response opposite, over the peak.
        variance: the largest circular variance.
        over_lines: how many times the peak for lines, and for gratings, that for curves must be.
        size: of the images; see `radial_tuning`.
        seed: of the bootstrap.
        progress: called with images done and about how many there are.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no photographs, or a unit does not exist.
    """
    place = model.site(site)
    chosen = [place.unit(u) for u in (range(place.n_units) if units is None else units)]
    curves = radial_tuning(model, chosen, step=step, size=size, seed=seed, progress=progress)
    lines, stripes = (
        radial_tuning(model, chosen, shape, step=15.0, size=size, seed=seed)
        for shape in ("line", "grating")
    )
    peaks = np.array([t.measures.peak.value for t in curves])
    floor = least * float(np.quantile(peaks, 0.9)) if len(peaks) else 0.0
    found = []
    for tuning, line, stripe in zip(curves, lines, stripes, strict=True):
        m = tuning.measures
        others = max(line.measures.peak.value, stripe.measures.peak.value, 0.0)
        reasons = (
            (not m.peak.value > max(floor, 0.0), "hardly responds to curves"),
            (not m.peak.value >= over_lines * others, "responds to lines or stripes as well"),
            (not m.echo.value <= echo, "echo"),
            (not half_width[0] <= m.half_width.value <= half_width[1], "half-width"),
            (not m.circular_variance.value <= variance, "circular variance"),
        )
        why = next((reason for fails, reason in reasons if fails), "")
        found.append(
            CurveUnit(tuning, line.measures.peak.value, stripe.measures.peak.value, not why, why)
        )
    return sorted(
        found,
        key=lambda c: (
            not c.is_curve_unit,
            np.nan_to_num(c.tuning.measures.circular_variance.value, nan=2),
        ),
    )


def joint_tuning(tunings: Sequence[RadialTuning]) -> JointTuning:
    """How a family's tuning curves cover the circle.

    Raises:
        ValueError: if there is no tuning, or angles differ.
    """
    if not tunings or any(len(t.angles) != len(tunings[0].angles) for t in tunings):
        raise ValueError("tunings: expected at least one, all at the same angles")
    shares = np.stack([t.mean.clip(min=0) / max(t.mean.max(), 1e-12) for t in tunings])
    strongest = shares.max(0)
    period = 360.0 if all(t.shape == "curve" for t in tunings) else 180.0
    directions = [t.measures.direction.value % period for t in tunings]
    preferred = np.sort([d for d in directions if not np.isnan(d)])  # silent units have none
    gaps = (
        np.diff(np.append(preferred, preferred[0] + period))
        if len(preferred)
        else np.array([period])
    )
    return JointTuning(tunings[0].angles, strongest, float(strongest.min()), float(gaps.max()))
