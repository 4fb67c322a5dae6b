"""What units are tuned to, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxtyping import Float
from numpy import ndarray

from circuits.experiments.statistics import Interval
from circuits.tables import Table
from circuits.tuning.finding import CurveUnit, JointTuning
from circuits.tuning.heatmaps import HeatMap
from circuits.tuning.invariances import Invariance
from circuits.tuning.radial import RadialTuning


def tuning_table(found: Sequence[RadialTuning], title: str) -> Table:
    """What each unit prefers, and how sharply."""
    columns = (
        "unit", "peak", "in std", "at", "direction", "FWHM", "echo", "circular variance", "radius",
    )  # fmt: skip
    rows = [
        (
            t.unit, t.measures.peak.value, _over(t.measures.peak.value, t.deviation), t.measures.preferred.value,
            _interval(t.measures.direction), _interval(t.measures.fwhm), _interval(t.measures.echo),
            _interval(t.measures.circular_variance), t.radius,
        )
        for t in found
    ]  # fmt: skip
    first = found[0]
    intervals = f"95 % intervals over {first.measures.n_replicates} drawings (seed {first.seed})"
    data = (
        f"standard deviations are of {first.data}" if first.data
        else "no harvest of this site in the workspace: peaks are not given in standard deviations"
    )  # fmt: skip
    return Table(columns, rows, f"{title}; {intervals}", data)


def curve_units_table(found: Sequence[CurveUnit], title: str) -> Table:
    """Those that are curve detectors, and why the rest are not."""
    columns = (
        "unit", "direction", "FWHM", "echo", "circular variance", "peak", "lines", "gratings", "radius",
    )  # fmt: skip
    good = [c for c in found if c.is_curve_unit]
    rows = [
        (
            c.unit, _interval(m.direction), _interval(m.fwhm), _interval(m.echo), m.circular_variance.value,
            m.peak.value, c.line_peak, c.grating_peak, c.tuning.radius,
        )
        for c in good
        for m in (c.tuning.measures,)
    ]  # fmt: skip
    why = Counter(c.why_not for c in found if c.why_not)
    note = "not: " + ", ".join(f"{n} {reason}" for reason, n in why.items())
    title = f"{len(good)} curve units among {len(found)} {title}"
    return Table(columns, rows, title, note if why else "all of them are")


def heat_maps_table(found: Sequence[HeatMap], title: str) -> Table:
    """The curve that each unit responds to most."""
    rows = []
    for m in found:
        (angle, curvature), peak = m.best, float(m.responses.max())
        radius = "line" if curvature == 0 else f"{1 / curvature:.1f}"
        rows.append((m.unit, angle, radius, peak, _over(peak - m.mean, m.deviation)))
    return Table(("unit", "angle", "radius", "response", "in std"), rows, title)


def invariances_table(found: Sequence[Invariance], title: str) -> Table:
    """How much of each unit's response is left as each aspect changes."""
    rows = [
        (i.unit, i.aspect, i.kept, _listed(i.values, i.responses), _listed(i.values, i.opposite))
        for i in found
    ]
    columns = ("unit", "aspect", "kept", "responses", "at the opposite angle")
    return Table(columns, rows, title)


def together(joint: JointTuning) -> str:
    """How well several units cover all angles, in a line.

    >>> from numpy import zeros
    >>> together(JointTuning(zeros(1), zeros(1), 0.5, 30.0))
    'together: at every angle one responds with at least 0.50 of its peak; largest gap 30°'
    """
    return (
        f"together: at every angle one responds with at least {joint.coverage:.2f} of its peak; "
        f"largest gap {joint.largest_gap:.0f}°"
    )


def _over(value: float, deviation: float) -> float:
    """In standard deviations; NaN for a unit that never changes."""
    return value / deviation if deviation else float("nan")


def _listed(values: Sequence[float], responses: Float[ndarray, " value"]) -> str:
    return ", ".join(f"{v:g}: {r:.3g}" for v, r in zip(values, responses, strict=True))


def _interval(found: Interval) -> str:
    return f"{found.value:.3g} ({found.low:.3g}, {found.high:.3g})"
