"""Finding curve detectors by their tuning alone, and how a family of them covers the circle."""

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
    """A unit's tuning to curves, compared with lines and stripes.

    Attributes:
        tuning: the tuning to curves.
        line_peak: the largest response to a line.
        grating_peak: the largest response to a grating.
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
        """The unit."""
        return self.tuning.unit

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON, without the tuning curve."""
        m = self.tuning.measures
        return {
            "unit": str(self.unit), "preferred": m.direction.value, "preferred_low": m.direction.low,
            "preferred_high": m.direction.high, "peak": m.peak.value, "fwhm": m.fwhm.value,
            "fwhm_low": m.fwhm.low, "fwhm_high": m.fwhm.high,
            "echo": m.echo.value, "echo_low": m.echo.low, "echo_high": m.echo.high,
            "circular_variance": m.circular_variance.value, "radius": self.tuning.radius,
            "line_peak": self.line_peak, "grating_peak": self.grating_peak,
            "is_curve_unit": self.is_curve_unit, "why_not": self.why_not,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class JointTuning:
    """The tuning of several units together.

    Attributes:
        angles: in degrees.
        strongest: at each angle the largest response of any unit, as a share of that unit's peak.
        coverage: the smallest of these: near 1 if some unit is tuned to every angle.
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
    fwhm: tuple[float, float] = (10.0, 90.0),
    echo: float = 0.2,
    variance: float = 0.3,
    over_lines: float = 1.2,
    size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[CurveUnit]:
    """Find curve detectors by their responses to drawings alone; the most selective come first.

    Args:
        model: a model of images.
        site: the site to search.
        units: the units to test; by default all.
        step: the step between angles, in degrees.
        least: the smallest peak, as a share of the 90th percentile of all units' peaks.
        fwhm: the smallest and largest full width at half maximum, in degrees.
        echo: the largest echo: the response to the opposite angle over the peak.
        variance: the largest circular variance.
        over_lines: the least ratio of the peak for curves to that for lines and to that for gratings.
        size: the size of the images; see `radial_tuning`.
        seed: the seed of the bootstrap.
        progress: called with the images done, and about how many there are.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no photographs, or a unit does not exist.
    """
    place = model.site(site)
    chosen = [place.unit(u) for u in (range(place.n_units) if units is None else units)]
    curves = radial_tuning(model, chosen, step=step, size=size, seed=seed, progress=progress)
    lines, stripes = (
        # Coarser than for curves, since only the peaks are used.
        radial_tuning(model, chosen, shape, step=15.0, size=size, seed=seed)
        for shape in ("line", "grating")
    )
    # Relative to the strongest units of the site: activations have no common scale. Not to the maximum, which one unit
    # may hold far above all others.
    peaks = np.array([t.measures.peak.value for t in curves])
    floor = least * float(np.quantile(peaks, 0.9)) if len(peaks) else 0.0
    found = []
    for tuning, line, stripe in zip(curves, lines, stripes, strict=True):
        m, rivals = tuning.measures, (line.measures.peak.value, stripe.measures.peak.value)
        # Each criterion is negated as a whole, so that a measure that is NaN does not meet it.
        reasons = (
            (not m.peak.value > max(floor, 0.0), "hardly responds to curves"),
            (
                not m.peak.value >= over_lines * max(*rivals, 0.0),
                "responds to lines or stripes as well",
            ),
            (not m.echo.value <= echo, "echo"),
            (not fwhm[0] <= m.fwhm.value <= fwhm[1], "full width at half maximum"),
            (not m.circular_variance.value <= variance, "circular variance"),
        )
        why = next((reason for fails, reason in reasons if fails), "")
        found.append(CurveUnit(tuning, *rivals, not why, why))
    return sorted(found, key=_by_selectivity)


def _by_selectivity(found: CurveUnit) -> tuple[bool, float]:
    """For sorting: curve units first, the most selective (of the smallest circular variance) before the rest."""
    variance = found.tuning.measures.circular_variance.value
    return not found.is_curve_unit, float(np.nan_to_num(variance, nan=2))


def joint_tuning(tunings: Sequence[RadialTuning]) -> JointTuning:
    """Measure how the tuning curves of a family cover the circle.

    Raises:
        ValueError: if there is no tuning, or angles differ.
    """
    if not tunings or any(len(t.angles) != len(tunings[0].angles) for t in tunings):
        raise ValueError(
            f"tunings ({len(tunings)}) are empty or at different angles: expected at least one, all at the same angles"
        )
    # Relative to each unit's own peak, since a strong unit would otherwise seem to cover the angles of all others.
    shares = np.stack([t.mean.clip(min=0) / max(t.mean.max(), 1e-12) for t in tunings])
    strongest = shares.max(0)
    # A line or grating turned by 180 degrees is the same again.
    period = 360.0 if all(t.shape == "curve" for t in tunings) else 180.0
    directions = [t.measures.direction.value % period for t in tunings]
    preferred = np.sort([d for d in directions if not np.isnan(d)])  # silent units have none
    gaps = (
        # The gap across 0: from the last preferred angle to the first one a period later.
        np.diff(np.append(preferred, preferred[0] + period))
        if len(preferred)
        else np.array([period])
    )
    return JointTuning(tunings[0].angles, strongest, float(strongest.min()), float(gaps.max()))
