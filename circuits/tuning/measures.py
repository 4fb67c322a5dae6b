"""Measures of a tuning curve: preferred angle, full width at half maximum, echo, circular variance.

They are those of Cammarata et al. 2020, "Curve Detectors", and its supplements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float

from circuits.experiments.statistics import Interval, percentiles, resampled

Angles = Float[np.ndarray, " angle"]
Curves = Float[np.ndarray, "*curve angle"]
Numbers = Float[np.ndarray, "*curve"]
"""One number for each curve."""


@dataclass(frozen=True)
class TuningMeasures:
    """The measures of a tuning curve over a full turn, with intervals by bootstrap over replicates.

    Attributes:
        preferred: the angle with the largest response, in degrees.
        peak: the response there.
        fwhm: the full width at half maximum, in degrees: of the range around it in which responses are at least half
            of the peak.
        echo: the largest response at 180 +- 45 degrees from it, over the peak.
        circular_variance: 0 if all of the response is at one angle, 1 if it is the same everywhere (negative
            responses count as 0).
        direction: the angle of the mean response vector, which depends less on noise than the preferred angle.
        n_replicates: the number of replicates; with a single one, intervals are the value itself.
        seed: the seed of the bootstrap.
    """

    preferred: Interval
    peak: Interval
    fwhm: Interval
    echo: Interval
    circular_variance: Interval
    direction: Interval
    n_replicates: int
    seed: int


def preferred(angles: Angles, curves: Curves) -> Numbers:
    """The angle with the largest response; the first of ties.

    >>> float(preferred(np.array([0.0, 90.0, 180.0, 270.0]), np.array([0.0, 3.0, 1.0, 0.0])))
    90.0
    """
    return np.asarray(angles[curves.argmax(-1)])


def fwhm(angles: Angles, curves: Curves) -> Numbers:
    """The full width at half maximum: of the connected range about the peak with at least half of its response.

    Between angles, responses are taken to lie on a line.

    Returns:
        The width in degrees; 360 where no response is below half of the peak, NaN without a positive one.

    >>> float(fwhm(np.arange(0.0, 360.0, 10.0), np.eye(36)[3]))
    10.0
    """
    n, peak = len(angles), curves.max(-1)
    top = np.asarray(curves.argmax(-1))[..., None]
    steps = sum(
        _steps_to_half(np.take_along_axis(curves, (top + way * np.arange(n)) % n, -1))
        for way in (1, -1)
    )
    return np.where(peak > 0, np.where(np.isfinite(steps), steps * 360.0 / n, 360.0), np.nan)


def _steps_to_half(curves: Curves) -> Numbers:
    """How many steps curves that begin at their peak take to fall to half of it; infinite if they never do."""
    half = curves[..., :1] / 2
    low = curves < half
    # `argmax` of booleans is the first that is true. The peak itself is not, unless it is negative.
    first = np.maximum(low.argmax(-1)[..., None], 1)
    inside, outside = (np.take_along_axis(curves, k, -1) for k in (first - 1, first))
    # On the line from (first - 1, inside) to (first, outside) the response is `half` after this share of the step.
    share = (inside - half) / np.where(inside > outside, inside - outside, 1.0)
    return np.where(low.any(-1), (first - 1 + share)[..., 0], np.inf)


def echo(angles: Angles, curves: Curves) -> Numbers:
    """The largest response at 180 +- 45 degrees from the peak, over the peak; NaN without a peak.

    >>> float(echo(np.arange(0.0, 360.0, 90.0), np.array([4.0, 0.0, 1.0, 0.0])))
    0.25
    """
    peak = curves.max(-1)
    # 0 is the opposite angle: with an angle 180 degrees from the peak, (180) % 360 - 180 = 0.
    apart = (angles - preferred(angles, curves)[..., None]) % 360 - 180
    opposite = np.where(np.abs(apart) <= 45, curves, 0.0).max(-1)
    return np.where(peak > 0, np.maximum(opposite, 0.0) / np.where(peak > 0, peak, 1.0), np.nan)


def circular_variance(angles: Angles, curves: Curves, period: float = 360.0) -> Numbers:
    """1 - the length of the mean response vector; NaN without a response.

    For a period of 180 degrees, angles are doubled, so that they go once around the circle.

    >>> even = np.array([1.0, 1.0, 1.0, 1.0])
    >>> round(float(circular_variance(np.array([0.0, 90.0, 180.0, 270.0]), even)), 6)
    1.0
    """
    # A period of half a turn is stretched to a whole one; otherwise the vectors of 0 and 180 degrees, the same line,
    # would cancel.
    return np.asarray(1 - np.abs(_vector(angles * (360 / period), curves)))


def direction(angles: Angles, curves: Curves, period: float = 360.0) -> Numbers:
    """The angle of the mean response vector, from 0 to the period."""
    turned = np.rad2deg(np.angle(_vector(angles * (360 / period), curves))) % 360
    return np.asarray(turned * period / 360)


def _vector(angles: Angles, curves: Curves) -> Complex[np.ndarray, "*curve"]:
    """The mean of the angles as points of the complex unit circle, weighted by responses; NaN without a response."""
    # Negative responses have no direction: their weight would point the other way.
    responses = curves.clip(min=0)
    total = np.asarray(responses.sum(-1))
    summed = (responses * np.exp(1j * np.deg2rad(angles))).sum(-1)
    return np.where(total > 0, summed / np.where(total > 0, total, 1.0), np.nan)


def measure_tuning(
    angles: Angles,
    curves: Float[np.ndarray, "replicate angle"] | Angles,
    resamples: int = 500,
    seed: int = 0,
    period: float = 360.0,
) -> TuningMeasures:
    """Compute the measures of a tuning curve, with intervals by bootstrap over replicates.

    Args:
        angles: in degrees, equally spaced over a full turn.
        curves: the response at each angle; measures are those of the mean over replicates.
        resamples: the number of bootstrap samples.
        seed: the seed of the bootstrap.
        period: 180 for stimuli that are the same after half a turn (lines): these have no echo, and a direction from
            0 to 180.

    Raises:
        ValueError: if angles are not a full turn in equal steps, or there is not one finite response for each.
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
    k = len(replicates)
    # Row 0 is the mean over all replicates; each further row is that of a bootstrap sample.
    means = replicates.mean(0, keepdims=True)
    if k > 1:
        drawn = resampled(replicates.T, seed=seed, resamples=resamples)
        means = np.concatenate([means, drawn])

    def interval(
        found: Numbers, around: float = 0.0, within: tuple[float, float] = (-np.inf, np.inf)
    ) -> Interval:
        value, drawn = float(found[0]), found[1:] if k > 1 else found
        # Angles wrap around: percentiles are taken of the signed difference from the value, the short way round.
        if around:
            drawn = value + (drawn - value + around / 2) % around - around / 2
            within = (value - around / 2, value + around / 2)
        if k < 2:
            return Interval(value, *percentiles(drawn))
        return Interval.of(value, drawn, k, within)

    return TuningMeasures(
        interval(preferred(angles, means), around=period), interval(means.max(1)),
        interval(fwhm(angles, means), within=(0, 360)),
        # With a period of half a turn the opposite angle is the same stimulus.
        interval(echo(angles, means) if period == 360 else np.full(len(means), np.nan), within=(0, 1)),
        interval(circular_variance(angles, means, period), within=(0, 1)),
        interval(direction(angles, means, period), around=period), k, seed,
    )  # fmt: skip
