"""What a summary of a site holds, how summaries join, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

BINS = 64
"""Bins of a unit's histogram between its recorded edges; one more on each side takes the rest."""

TAIL = 0.1
"""The share of the looked-at activations, at most, whose distribution `fit_tail` describes."""


@dataclass(frozen=True, eq=False)
class Summary:
    """Units over a run of examples. NaN and infinite activations are counted, and left out.

    Attributes:
        maximum: the largest activation over positions; NaN where none is finite.
        argmax: where it is, as an index into the flattened positions; the first of equals.
        mean: over positions; NaN where none is finite.
        center: the value about which sums are taken, per unit: close to its mean.
        total: sum of activation - center over examples and positions.
        square: sum of its square.
        minimum: the smallest activation; inf where none is finite.
        positive: how many are above zero.
        count: how many finite activations there are.
        nonfinite: how many are NaN or infinite.
        low: the first edge of a unit's histogram.
        high: its last edge; `BINS` equal bins lie between.
        histogram: counts below, in and above the edges, of the positions looked at.
        powers: sums of (activation - center) to the powers 1, 2, 3, 4 over the positions looked at.
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

    @classmethod
    def empty(cls, n_examples: int, fixed: Mapping[str, np.ndarray]) -> Summary:
        """Of examples that have not been seen, about these centers and edges."""
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
            **{name: fixed[name] for name in FIXED},
        )

    def of_units(self, units: slice) -> Summary:
        """Of some of the units; the arrays are views."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return Summary(**{k: v[..., units] if k in LAST else v[units] for k, v in arrays.items()})

    def density(self) -> Float[np.ndarray, " unit"]:
        """The share of finite activations above zero; NaN where there is none."""
        return _ratio(self.positive, self.count)

    def moments(self) -> tuple[Float[np.ndarray, " unit"], Float[np.ndarray, " unit"]]:
        """Mean and standard deviation over examples and positions; NaN where none is finite."""
        offset = _ratio(self.total, self.count)
        variance = np.maximum(_ratio(self.square, self.count) - offset**2, 0.0)
        return self.center + offset, np.sqrt(variance)


LAST = ("maximum", "argmax", "mean", "powers")
"""The fields of a summary whose last axis is that of the units; it is the first of all others."""

PER_EXAMPLE = ("maximum", "argmax", "mean")
"""The fields of a summary that have a row an example."""

FIXED = ("center", "low", "high")
"""The fields that are the same for all summaries of a store."""


def _ratio(part: Any, whole: Any) -> Float[np.ndarray, " unit"]:
    out = np.full(len(whole), np.nan)
    return np.divide(part, whole, out=out, where=np.asarray(whole) > 0)


def edges(low: float, high: float) -> Float[np.ndarray, " edge"]:
    """The edges of a histogram's inner bins."""
    return low + (high - low) * np.linspace(0, 1, BINS + 1)


def histogram_range(
    least: Float[np.ndarray, " unit"], most: Float[np.ndarray, " unit"]
) -> tuple[Float[np.ndarray, " unit"], Float[np.ndarray, " unit"]]:
    """First and last edge of each unit's histogram: a range, twice as wide, with 0.

    Units of which no finite activation was seen get 0 to 1. What is returned has float32 precision.
    """
    seen = np.isfinite(least) & np.isfinite(most)
    top = float(np.finfo(np.float32).max) / 4  # wider ranges have no width in float32
    low = np.where(seen, np.clip(2.0 * least.astype(np.float64), -top, 0.0), 0.0)
    high = np.where(seen, np.clip(2.0 * most.astype(np.float64), 0.0, top), 1.0)
    low, high = low.astype(np.float32), high.astype(np.float32)
    wide = high - low > 1e-30  # bins of narrower ranges have no width in float32
    return low, np.where(wide, high, low + np.float32(1.0)).astype(np.float32)


def skewness_and_kurtosis(powers: Float[np.ndarray, " power"], n: int) -> tuple[float, float]:
    """Standardised third and fourth moments (kurtosis of a normal distribution: 3).

    Args:
        powers: sums of the first four powers, about any value.
        n: how many numbers went into them.

    Returns:
        NaN, NaN if there is none, or they are all equal.

    >>> skewness_and_kurtosis(np.array([0.0, 4.0, 0.0, 4.0]), 4)
    (0.0, 1.0)
    """
    if n == 0:
        return float("nan"), float("nan")
    m1, m2, m3, m4 = (powers / n).tolist()
    variance = m2 - m1**2
    if variance <= 1e-12 * max(m2, 1e-300):
        return float("nan"), float("nan")
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return third / variance**1.5, fourth / variance**2


@dataclass(frozen=True)
class TailFit:
    """An exponential distribution fitted to a unit's largest activations.

    Attributes:
        threshold: where the tail begins: an edge of the histogram.
        rate: of the fall: the share above `threshold + x` is exp(-rate x). NaN if it cannot be told.
        error: standard error of the rate, if the activations were independent (they are not quite:
            positions of one example are alike).
        distance: the largest gap between the tail's distribution and the fitted one
            (Kolmogorov-Smirnov); 0 is a perfect fit.
        count: activations in the tail.
        share: of all that were looked at.
    """

    threshold: float
    rate: float
    error: float
    distance: float
    count: int
    share: float


def fit_tail(edges: Float[np.ndarray, " edge"], histogram: Int[np.ndarray, " bin"]) -> TailFit:
    """Fit an exponential to the upper tail of a histogram, at most `TAIL` of all counts.

    Maximum likelihood from binned counts: with equal bins of width w an exponential becomes a
    geometric distribution over bins, of which the last, open one is censored. With k_i counts in bin
    i and K beyond the n inner bins, the chance p to stop in a bin is
    sum(k_i) / (sum(k_i (i + 1)) + n K), the rate -ln(1 - p) / w. Distill's Curve Detectors (2020,
    "The Dataset Analysis of curve neurons") found the tails of curve neurons to fall like this.
    """
    total = int(histogram.sum())
    inner, beyond = histogram[1:-1].astype(np.float64), float(histogram[-1])
    above = np.append(np.cumsum(inner[::-1])[::-1] + beyond, beyond)  # counts at or above an edge
    fitting = np.flatnonzero((above <= TAIL * total) & (edges >= 0))
    start = int(fitting[0]) if len(fitting) else BINS
    threshold, count = float(edges[start]), int(above[start])
    share = count / total if total else float("nan")
    tail, nan = inner[start:], float("nan")
    stopped, n = float(tail.sum()), len(tail)
    trials = float((tail * np.arange(1, n + 1)).sum()) + n * beyond
    if stopped == 0 or stopped == trials:  # nothing to fit, or all of it in one bin
        return TailFit(threshold, nan, nan, nan, count, share)
    p, width = stopped / trials, float(edges[1] - edges[0])
    fitted = 1 - (1 - p) ** np.arange(1, n + 1)
    distance = float(np.abs(np.cumsum(tail) / count - fitted).max())
    error = float(np.sqrt(p**2 * (1 - p) / stopped) / (1 - p) / width)
    return TailFit(threshold, float(-np.log1p(-p) / width), error, distance, count, share)
