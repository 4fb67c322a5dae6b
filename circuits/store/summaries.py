"""Summaries of activations, and the statistics that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

BINS = 64
"""Bins of a unit's histogram between its edges; one more on each side counts what lies beyond."""

TAIL = 0.1
"""The largest share of the histogram's activations that `fit_tail` takes as the tail."""


@dataclass(frozen=True, eq=False)
class Summary:
    """A summary of units over consecutive examples. NaN and infinite activations are counted and left out.

    Attributes:
        maximum: the largest activation over positions; NaN where none is finite.
        argmax: its index among the flattened positions; the first of ties.
        mean: the mean over positions; NaN where none is finite.
        center: the value about which sums are taken, close to the unit's mean.
        total: the sum of activation - center over examples and positions.
        square: the sum of (activation - center)^2.
        minimum: the smallest activation; inf where none is finite.
        positive: the number of activations above zero.
        count: the number of finite activations.
        nonfinite: the number of activations that are NaN or infinite.
        low: the first edge of a unit's histogram.
        high: the last edge; `BINS` equal bins lie between.
        histogram: counts below, between and above the edges, of a sample of positions.
        powers: sums of (activation - center) to the powers 1, 2, 3 and 4 over the same sample.
        saturated: the number of activations at the site's ceiling, if it has one.
    """

    maximum: Float[np.ndarray, "example unit"]
    argmax: Int[np.ndarray, "example unit"]
    mean: Float[np.ndarray, "example unit"]
    center: Float[np.ndarray, " unit"]
    total: Float[np.ndarray, " unit"]
    square: Float[np.ndarray, " unit"]
    minimum: Float[np.ndarray, " unit"]
    positive: Int[np.ndarray, " unit"]
    count: Int[np.ndarray, " unit"]
    nonfinite: Int[np.ndarray, " unit"]
    low: Float[np.ndarray, " unit"]
    high: Float[np.ndarray, " unit"]
    histogram: Int[np.ndarray, "unit bin"]
    powers: Float[np.ndarray, "power unit"]
    saturated: Int[np.ndarray, " unit"]

    @classmethod
    def empty(cls, n_examples: int, fixed: Mapping[str, np.ndarray]) -> Summary:
        """A summary to be filled, with given centers and edges."""
        units = len(fixed["center"])
        return cls(
            maximum=np.full((n_examples, units), np.nan, np.float32),
            argmax=np.zeros((n_examples, units), np.int32),
            mean=np.full((n_examples, units), np.nan, np.float32),
            total=np.zeros(units),
            square=np.zeros(units),
            minimum=np.full(units, np.inf, np.float32),
            positive=np.zeros(units, np.int64),
            count=np.zeros(units, np.int64),
            nonfinite=np.zeros(units, np.int64),
            histogram=np.zeros((units, BINS + 2), np.int64),
            powers=np.zeros((4, units)),
            saturated=np.zeros(units, np.int64),
            **{name: fixed[name] for name in FIXED},
        )

    def of_units(self, units: slice) -> Summary:
        """The summary of some of the units; its arrays are views."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return Summary(**{k: v[..., units] if k in LAST else v[units] for k, v in arrays.items()})

    def density(self) -> Float[np.ndarray, " unit"]:
        """The share of finite activations above zero; NaN where there is none."""
        return _ratio(self.positive, self.count)

    def saturation(self) -> Float[np.ndarray, " unit"]:
        """The share of finite activations at the site's ceiling; NaN where none is finite."""
        return _ratio(self.saturated, self.count)

    def moments(self) -> tuple[Float[np.ndarray, " unit"], Float[np.ndarray, " unit"]]:
        """Mean and standard deviation over examples and positions; NaN where none is finite."""
        offset = _ratio(self.total, self.count)
        # E[(x - c)^2] - E[x - c]^2; rounding can make it slightly negative for a constant unit.
        variance = np.maximum(_ratio(self.square, self.count) - offset**2, 0.0)
        return self.center + offset, np.sqrt(variance)


LAST = ("maximum", "argmax", "mean", "powers")
"""The fields of a summary with units on the last axis; in all other fields they are on the first."""

PER_EXAMPLE = ("maximum", "argmax", "mean")
"""The fields of a summary with a row for each example."""

WHOLE = ("argmax", "positive", "count", "nonfinite", "histogram", "saturated")
"""The fields of a summary that hold whole numbers."""

FIXED = ("center", "low", "high")
"""The fields of a summary that all shards of a store have in common."""


def _ratio(part: Any, whole: Any) -> Float[np.ndarray, " unit"]:
    out = np.full(len(whole), np.nan)
    return np.divide(part, whole, out=out, where=np.asarray(whole) > 0)


def edges(low: float, high: float) -> Float[np.ndarray, " edge"]:
    """The edges of a histogram's inner bins."""
    return low + (high - low) * np.linspace(0, 1, BINS + 1)


def histogram_range(
    least: Float[np.ndarray, " unit"], most: Float[np.ndarray, " unit"]
) -> tuple[Float[np.ndarray, " unit"], Float[np.ndarray, " unit"]]:
    """The first and last edge of each unit's histogram: twice the smallest and largest activation, and 0 in between.

    Units without a finite activation get 0 to 1. Edges are exact in float32.
    """
    seen = np.isfinite(least) & np.isfinite(most)
    top = float(np.finfo(np.float32).max) / 4  # wider ranges have no width in float32
    # Twice, since the range is set from six examples and all others have to fit; below zero only if the unit can go
    # there, so that after a ReLU no bins are wasted.
    low = np.where(seen, np.clip(2.0 * least.astype(np.float64), -top, 0.0), 0.0)
    high = np.where(seen, np.clip(2.0 * most.astype(np.float64), 0.0, top), 1.0)
    low, high = low.astype(np.float32), high.astype(np.float32)
    wide = high - low > 1e-30  # bins of narrower ranges have no width in float32
    return low, np.where(wide, high, low + np.float32(1.0)).astype(np.float32)


def skewness_and_kurtosis(powers: Float[np.ndarray, " power"], n: int) -> tuple[float, float]:
    """The third and fourth standardised moments (the kurtosis of a normal distribution is 3).

    Args:
        powers: the sums of the first four powers of the numbers, about any value.
        n: how many numbers there are.

    Returns:
        Skewness and kurtosis; NaN if there is no number, or they are all equal.

    >>> skewness_and_kurtosis(np.array([0.0, 4.0, 0.0, 4.0]), 4)
    (0.0, 1.0)
    """
    if n == 0:
        return float("nan"), float("nan")
    m1, m2, m3, m4 = (powers / n).tolist()
    variance = m2 - m1**2
    if variance <= 1e-12 * max(m2, 1e-300):
        return float("nan"), float("nan")
    # Central moments from those about another value: E[(x - m)^3] and E[(x - m)^4], multiplied out.
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return third / variance**1.5, fourth / variance**2


@dataclass(frozen=True)
class TailFit:
    """An exponential distribution fitted to a unit's largest activations.

    Attributes:
        threshold: where the tail begins, an edge of the histogram.
        rate: the rate of the exponential: the share of the tail above `threshold + x` is exp(-rate x). NaN if it
            cannot be fitted.
        error: the standard error of the rate for independent activations (positions of one example are correlated,
            so the true error is larger).
        distance: the largest difference between the tail's cumulative distribution and the fitted one
            (Kolmogorov-Smirnov); 0 is a perfect fit.
        count: the number of activations in the tail.
        share: their share of all that the histogram counts.
    """

    threshold: float
    rate: float
    error: float
    distance: float
    count: int
    share: float


def fit_tail(edges: Float[np.ndarray, " edge"], histogram: Int[np.ndarray, " bin"]) -> TailFit:
    """Fit an exponential to the upper tail of a histogram, which is at most `TAIL` of all counts.

    This is maximum likelihood for binned counts: over equal bins of width w an exponential distribution is geometric,
    and the open last bin is censored. With k_i counts in bin i of n and K beyond them, the probability to stop in a
    bin is p = sum(k_i) / (sum(k_i (i + 1)) + n K), and the rate is -ln(1 - p) / w. Curve neurons have such tails
    (Cammarata et al. 2020, "Curve Detectors").
    """
    total = int(histogram.sum())
    inner, beyond = histogram[1:-1].astype(np.float64), float(histogram[-1])
    above = np.append(np.cumsum(inner[::-1])[::-1] + beyond, beyond)  # counts at or above an edge
    # Only positive activations: after a ReLU, the many zeros would be no exponential.
    fitting = np.flatnonzero((above <= TAIL * total) & (edges >= 0))
    start = int(fitting[0]) if len(fitting) else BINS
    threshold, count = float(edges[start]), int(above[start])
    share = count / total if total else float("nan")
    tail, nan = inner[start:], float("nan")
    stopped, n = float(tail.sum()), len(tail)
    # Over bins of one width w an exponential is geometric: an activation that got as far as the threshold ends in each
    # bin with probability p = 1 - exp(-rate w). One that ends in the k-th bin made k trials, one beyond the last bin n
    # without ending (it is censored). The likelihood p^stopped (1 - p)^(trials - stopped) is largest at p = stopped /
    # trials.
    trials = float((tail * np.arange(1, n + 1)).sum()) + n * beyond
    if stopped == 0 or stopped == trials:  # nothing to fit, or all of it in one bin
        return TailFit(threshold, nan, nan, nan, count, share)
    # The variance of p is p^2 (1 - p) / stopped (from the Fisher information); the rate's follows with its derivative
    # by p, 1 / ((1 - p) w).
    p, width = stopped / trials, float(edges[1] - edges[0])
    # The share of an exponential that has ended by the end of each bin, for the Kolmogorov-Smirnov distance.
    fitted = 1 - (1 - p) ** np.arange(1, n + 1)
    distance = float(np.abs(np.cumsum(tail) / count - fitted).max())
    error = float(np.sqrt(p**2 * (1 - p) / stopped) / (1 - p) / width)
    # p = 1 - exp(-rate w), hence rate = -log(1 - p) / w.
    return TailFit(threshold, float(-np.log1p(-p) / width), error, distance, count, share)
