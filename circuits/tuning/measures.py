"""What a tuning curve comes to: preferred value, half-width, echo, circular variance (layer 4).

As in Cammarata et al. 2020, "Curve Detectors", and its supplements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Curves = Float[np.ndarray, "replicate angle"]
Curve = Float[np.ndarray, " angle"]


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval.

    Attributes:
        value: of the mean curve.
        low: the 2.5th percentile over resampled replicates; the value itself where there is one replicate.
        high: the 97.5th.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TuningMeasures:
    """A tuning curve over a full turn, in numbers.

    Attributes:
        preferred: the angle with the largest response, in degrees.
        peak: the response there.
        half_width: how many degrees around it respond with at least half of that.
        echo: the largest response opposite, 180 +- 45 degrees away, over the peak.
        circular_variance: 0 if all of the response is at one angle, 1 if it is even (negative responses
            count as none).
        direction: the angle of the mean response vector, which noise moves less than the peak.
        n_replicates: stimuli that differ in what should not matter.
        seed: of the bootstrap.
    """

    preferred: Interval
    peak: Interval
    half_width: Interval
    echo: Interval
    circular_variance: Interval
    direction: Interval
    n_replicates: int
    seed: int


def preferred(angles: Curve, curve: Curve) -> float:
    """The angle with the largest response, the first of equals.

    >>> preferred(np.array([0.0, 90.0, 180.0, 270.0]), np.array([0.0, 3.0, 1.0, 0.0]))
    90.0
    """
    return float(angles[int(curve.argmax())])


def half_width(angles: Curve, curve: Curve) -> float:
    """Degrees around the peak, without a gap, that respond with at least half of it; NaN without a peak.

    The full width at half of the maximum, in steps of the curve: what the articles plot as half-width.

    >>> half_width(np.arange(0.0, 360.0, 10.0), np.eye(36)[3])
    10.0
    """
    peak = curve.max()
    if not peak > 0:
        return float("nan")
    n = len(curve)
    high = curve >= peak / 2
    if high.all():
        return 360.0
    # begin at the peak and walk both ways
    from_peak = np.roll(high, -int(curve.argmax()))
    right, left = int(np.argmin(from_peak)), int(np.argmin(from_peak[::-1]))
    return (right + left) * 360.0 / n


def echo(angles: Curve, curve: Curve) -> float:
    """The largest response 180 +- 45 degrees from the peak, over the peak; NaN without a peak.

    >>> echo(np.arange(0.0, 360.0, 90.0), np.array([4.0, 0.0, 1.0, 0.0]))
    0.25
    """
    peak = curve.max()
    if not peak > 0:
        return float("nan")
    apart = (angles - angles[int(curve.argmax())] - 180 + 180) % 360 - 180
    return float(max(0.0, curve[np.abs(apart) <= 45].max()) / peak)


def circular_variance(angles: Curve, curve: Curve, period: float = 360.0) -> float:
    """1 - the length of the mean response vector; NaN without a response.

    For what is itself again after half a turn, angles are doubled.

    >>> round(circular_variance(np.array([0.0, 90.0, 180.0, 270.0]), np.array([1.0, 1.0, 1.0, 1.0])), 6)
    1.0
    """
    vector = _vector(angles * (360 / period), curve)
    return float("nan") if np.isnan(vector) else float(1 - abs(vector))


def direction(angles: Curve, curve: Curve, period: float = 360.0) -> float:
    """The angle of the mean response vector, from 0 to the period."""
    turned = float(np.rad2deg(np.angle(_vector(angles * (360 / period), curve))) % 360)
    return turned * period / 360


def _vector(angles: Curve, curve: Curve) -> complex:
    responses = curve.clip(min=0)
    total = responses.sum()
    if total <= 0:
        return complex("nan")
    return complex((responses * np.exp(1j * np.deg2rad(angles))).sum() / total)


def measure_tuning(
    angles: Curve,
    curves: Curves | Curve,
    resamples: int = 500,
    seed: int = 0,
    period: float = 360.0,
) -> TuningMeasures:
    """The measures of a tuning curve, with bootstrap intervals over replicates.

    Args:
        angles: in degrees, equally spaced over a full turn.
        curves: a response at each angle; replicates differ in what should not matter. Measures are of
            their mean.
        resamples: of the replicates.
        seed: of the bootstrap.
        period: 180 for what is itself again after half a turn (lines): it has no echo, and its direction is
            from 0 to 180.

    Raises:
        ValueError: if angles are not a full turn in equal steps, or there are not as many responses, or one
            is not finite.
    """
    replicates = np.atleast_2d(np.asarray(curves, np.float64))
    angles = np.asarray(angles, np.float64)
    n = len(angles)
    if n < 4 or not np.allclose(np.diff(angles), 360 / n):
        raise ValueError(f"angles {angles[:3]} … must be a full turn in equal steps, at least four")
    if replicates.shape[1] != n or not np.isfinite(replicates).all():
        raise ValueError(
            f"curves of shape {replicates.shape}: expected a finite response at each of {n} angles"
        )
    generator = np.random.default_rng(seed)
    k = len(replicates)
    rows = generator.integers(0, k, (resamples if k > 1 else 0, k))
    means = replicates[rows].mean(1) if len(rows) else replicates.mean(0)[None]
    mean = replicates.mean(0)

    def interval(measure: Callable[[Curve, Curve], float], around: float = 0.0) -> Interval:
        value = measure(angles, mean)
        drawn = np.array([measure(angles, row) for row in means])
        if around:  # percentiles of the difference, the short way round
            drawn = value + (drawn - value + around / 2) % around - around / 2
        if np.isnan(drawn).all():
            return Interval(value, float("nan"), float("nan"))
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        return Interval(value, float(low), float(high))

    def opposite(angles: Curve, curve: Curve) -> float:
        return echo(angles, curve) if period == 360 else float("nan")

    return TuningMeasures(
        interval(preferred, around=period), interval(lambda _, c: float(c.max())), interval(half_width),
        interval(opposite), interval(lambda a, c: circular_variance(a, c, period)),
        interval(lambda a, c: direction(a, c, period), around=period), k, seed,
    )  # fmt: skip
