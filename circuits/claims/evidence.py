"""What a sample says about one number: an interval, and the chance of such a sample if a claim about it were wrong.

A claim says that a number lies in a region. It *holds* when the whole interval lies inside the region, and is *refuted*
when the whole interval lies outside. Both are decided by p-values of which the interval is the inversion, so that one
correction for many tests serves the interval and the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

from circuits.experiments.statistics import (
    Interval,
    cluster_means,
    n_clusters,
    residuals,
    standard_error,
)

_SURE = 1e-12
"""Changes smaller than this share of the largest value are rounding."""


@dataclass(frozen=True)
class Region:
    """The values that a claim allows, ends included.

    >>> Region(0.9, 1.1), Region(low=0.5)
    (Region(low=0.9, high=1.1), Region(low=0.5, high=inf))
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"region {self.low} to {self.high}: expected the lower end first")

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


@runtime_checkable
class Evidence(Protocol):
    """What a sample says about a number."""

    @property
    def value(self) -> float:
        """The estimate."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """The number of examples, and how many of them are independent; zeros where nothing was sampled."""
        ...

    def above(self, bound: float) -> float:
        """The p-value of the test that the number is at most `bound`, against that it is larger."""
        ...

    def below(self, bound: float) -> float:
        """The p-value of the test that the number is at least `bound`, against that it is smaller."""
        ...

    def interval(self, level: float) -> tuple[float, float]:
        """The values that no two-sided test at this level rejects; NaN where the sample bounds none."""
        ...


def p_inside(evidence: Evidence, region: Region) -> float:
    """The p-value of the claim that a number lies in a region: the null hypothesis is that it lies outside.

    Two one-sided tests (Schuirmann 1987), doubled so that the claim holds exactly where the two-sided interval of the
    same level lies inside.
    """
    sides = [0.0]
    if not math.isinf(region.low):
        sides.append(evidence.above(region.low))
    if not math.isinf(region.high):
        sides.append(evidence.below(region.high))
    return float(np.minimum(1.0, 2 * np.max(sides)))  # NaN stays NaN


def p_outside(evidence: Evidence, region: Region) -> float:
    """The p-value against the claim: the null hypothesis is that the number lies in the region."""
    sides = [1.0]
    if not math.isinf(region.low):
        sides.append(evidence.below(region.low))
    if not math.isinf(region.high):
        sides.append(evidence.above(region.high))
    return float(np.minimum(1.0, 2 * np.min(sides)))


def is_clear(evidence: Evidence, level: float) -> bool:
    """Whether a number can be told from 0: its interval at this level is known and does not hold 0."""
    return Interval(evidence.value, *evidence.interval(level)).clear


@dataclass(frozen=True)
class _TTest:
    """Student's t-test of one estimate.

    Attributes:
        value: the estimate.
        error: its standard error; NaN if the sample says nothing about it, 0 if the sample has no spread.
        n: the number of independent examples; the test has n - 1 degrees of freedom.
    """

    value: float
    error: float
    n: int

    def above(self, bound: float) -> float:
        """See `Evidence.above`."""
        return self._tail(self._t(bound))

    def below(self, bound: float) -> float:
        """See `Evidence.below`."""
        return self._tail(-self._t(bound))

    def interval(self, level: float) -> tuple[float, float]:
        """See `Evidence.interval`; NaN where a sample without spread is too small for the level."""
        if math.isnan(self.error) or (self.error == 0 and 0.5**self.n > (1 - level) / 2):
            return math.nan, math.nan
        half = self.error * float(stats.t.ppf((1 + level) / 2, self.n - 1))
        return self.value - half, self.value + half

    def _t(self, bound: float) -> float:
        if self.error == 0:
            on_it = math.isclose(self.value, bound, rel_tol=1e-9, abs_tol=1e-12)
            return 0.0 if on_it else math.copysign(math.inf, self.value - bound)
        return (self.value - bound) / self.error

    def _tail(self, t: float) -> float:
        if math.isnan(self.error):
            return math.nan
        # Without spread the sample says no more than that all clusters lie on one side of the bound: the sign test. A
        # value on the bound itself counts as within the region.
        if self.error == 0:
            return 0.5**self.n if t >= 0 else 1.0
        return float(stats.t.sf(t, self.n - 1))


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean over examples that come in clusters: a t-test on the clusters' residuals.

    The standard error is that of a ratio of two totals by cluster, the sum of values and the number of examples (see
    `statistics.standard_error`); with one example in each cluster this is Student's t-test.

    Attributes:
        values: one for each example.
        clusters: a number for each example, shared by those that are not independent.
    """

    values: Float[np.ndarray, " example"]
    clusters: Sequence[int]

    @cached_property
    def _t(self) -> _TTest:
        mean, off, counts = residuals(self.values, self.clusters)
        n = len(counts)
        if n < 2:
            return _TTest(float(mean), math.nan, n)
        # What rounding leaves of values that are all the same is no spread.
        scale = _SURE * max(1e-300, float(np.abs(self.values).max())) * counts.max()
        off = np.where(np.abs(off) <= scale, 0.0, off)
        return _TTest(float(mean), float(standard_error(off, counts)), n)

    @property
    def size(self) -> tuple[int, int]:
        """See `Evidence.size`."""
        return len(self.values), n_clusters(self.clusters)

    @property
    def value(self) -> float:
        """The mean."""
        return self._t.value

    def above(self, bound: float) -> float:
        """See `Evidence.above`; NaN with fewer than two clusters."""
        return self._t.above(bound)

    def below(self, bound: float) -> float:
        """See `Evidence.below`; NaN with fewer than two clusters."""
        return self._t.below(bound)

    def interval(self, level: float) -> tuple[float, float]:
        """See `Evidence.interval`; NaN where a sample without spread is too small for the level."""
        return self._t.interval(level)


@dataclass(frozen=True, eq=False)
class Ratio:
    """A ratio of two means over the same examples, such as faithfulness, after Fieller (1954).

    That the ratio is `bound` means that `top - bound * bottom` has the mean 0, which `Mean` tests: no ratio of noisy
    numbers is formed, and the interval has its level however small the denominator.

    Attributes:
        top: the numerator on each example.
        bottom: the denominator on each example.
        clusters: a number for each example, shared by those that are not independent.
    """

    top: Float[np.ndarray, " example"]
    bottom: Float[np.ndarray, " example"]
    clusters: Sequence[int]

    @property
    def size(self) -> tuple[int, int]:
        """See `Evidence.size`."""
        return len(self.top), n_clusters(self.clusters)

    @property
    def value(self) -> float:
        """The ratio of the means."""
        return float(self.top.mean() / self.bottom.mean())

    @property
    def _sign(self) -> float:
        return math.copysign(1.0, float(self.bottom.mean()))

    def _at(self, bound: float) -> Mean:
        return Mean(self._sign * (self.top - bound * self.bottom), self.clusters)

    def above(self, bound: float) -> float:
        """See `Evidence.above`."""
        return self._at(bound).above(0)

    def below(self, bound: float) -> float:
        """See `Evidence.below`."""
        return self._at(bound).below(0)

    def interval(self, level: float) -> tuple[float, float]:
        """See `Evidence.interval`; NaN if the denominator cannot be told from 0 at this level."""
        if not is_clear(Mean(self.bottom, self.clusters), level):
            return math.nan, math.nan
        return _inverted(self, level, self.value)


def _inverted(evidence: Evidence, level: float, value: float) -> tuple[float, float]:
    """The interval of a test, by looking for the bounds at which its two one-sided p-values pass the level."""
    alpha = (1 - level) / 2
    return _edge(lambda b: evidence.above(b) - alpha, value, -1), _edge(
        lambda b: evidence.below(b) - alpha, value, 1
    )


def _edge(excess: Callable[[float], float], start: float, direction: int) -> float:
    """Where a p-value that falls on the way from an estimate in a direction passes the level."""
    step = 1e-6 * max(1.0, abs(start))
    while excess(start + direction * step) > 0:
        step *= 2
        if step > 1e12:
            return direction * math.inf
    if step == 1e-6 * max(1.0, abs(start)):  # the sample has no spread
        return start
    ends = sorted((start + direction * step / 2, start + direction * step))
    return float(optimize.root_scalar(excess, bracket=ends, xtol=1e-9).root)


@dataclass(frozen=True, eq=False)
class Share:
    """A probability, from outcomes of 1, 0 or anything between them (a tie counts one half): exact binomial tests.

    Examples of a cluster count together as their mean. Of all variables in 0..1 with a given mean, 1 and 0 alone vary
    most, so that the binomial distribution bounds the sum's (Hoeffding 1956); a fraction in the sum is rounded against
    the claim.

    Attributes:
        values: the outcome of each example.
        clusters: a number for each example, shared by those that are not independent.
    """

    values: Float[np.ndarray, " example"]
    clusters: Sequence[int]

    @cached_property
    def _sums(self) -> tuple[float, int]:
        """The sum of the clusters' means, and the number of clusters."""
        means = cluster_means(self.values, self.clusters)
        total = float(means.sum())
        if not math.isfinite(total):
            raise ValueError(
                "an outcome is not a number on some example: expected numbers from 0 to 1"
            )
        return round(total, 9), len(means)

    @property
    def size(self) -> tuple[int, int]:
        """See `Evidence.size`."""
        return len(self.values), n_clusters(self.clusters)

    @property
    def value(self) -> float:
        """The mean over clusters."""
        total, n = self._sums
        return total / n

    def above(self, bound: float) -> float:
        """See `Evidence.above`."""
        total, n = self._sums
        if bound < 0:
            return 0.0
        return float(stats.binom.sf(math.floor(total) - 1, n, min(bound, 1.0)))

    def below(self, bound: float) -> float:
        """See `Evidence.below`."""
        total, n = self._sums
        if bound > 1:
            return 0.0
        return float(stats.binom.cdf(math.ceil(total), n, max(bound, 0.0)))

    def interval(self, level: float) -> tuple[float, float]:
        """See `Evidence.interval`: Clopper and Pearson (1934)."""
        total, n = self._sums
        alpha, low, high = (1 - level) / 2, math.floor(total), math.ceil(total)
        return (
            float(stats.beta.ppf(alpha, low, n - low + 1)) if low else 0.0,
            float(stats.beta.ppf(1 - alpha, high + 1, n - high)) if high < n else 1.0,
        )


@dataclass(frozen=True, eq=False)
class Loss:
    """The mean of something lost, at most 1 an example, such as accuracy: a t-test that rare losses cannot pass.

    A sample without any loss has no spread, and yet one example in n may lose all. What is gained elsewhere is left out
    of the second, exact test, so that it errs on the safe side.

    Attributes:
        values: what each example loses, from -1 to 1.
        clusters: a number for each example, shared by those that are not independent.
    """

    values: Float[np.ndarray, " example"]
    clusters: Sequence[int]

    @cached_property
    def _both(self) -> tuple[Mean, Share]:
        """The t-test, and the exact test of what is lost alone."""
        return Mean(self.values, self.clusters), Share(np.clip(self.values, 0, 1), self.clusters)

    @property
    def value(self) -> float:
        """The mean loss."""
        return self._both[0].value

    @property
    def size(self) -> tuple[int, int]:
        """See `Evidence.size`."""
        return self._both[0].size

    def above(self, bound: float) -> float:
        """See `Evidence.above`."""
        return self._both[0].above(bound)

    def below(self, bound: float) -> float:
        """See `Evidence.below`: the larger p-value of the two tests."""
        return max(one.below(bound) for one in self._both)

    def interval(self, level: float) -> tuple[float, float]:
        """See `Evidence.interval`."""
        (low, high), (_, most) = (one.interval(level) for one in self._both)
        return low, max(high, most)


@dataclass(frozen=True, eq=False)
class Auroc:
    """The area under the ROC curve, with the variance of both samples (DeLong et al. 1988) and a t-test.

    Attributes:
        positive: the score of each example of the feature.
        negative: the score of each other example.
    """

    positive: Float[np.ndarray, " example"]
    negative: Float[np.ndarray, " other"]

    @cached_property
    def _t(self) -> _TTest:
        def placed(one: np.ndarray, others: np.ndarray) -> np.ndarray:
            others = np.sort(others)
            both = np.searchsorted(others, one, "left") + np.searchsorted(others, one, "right")
            return both / 2 / len(others)

        first, second = (
            placed(self.positive, self.negative),
            1 - placed(self.negative, self.positive),
        )
        n, m = len(first), len(second)
        if min(n, m) < 2:
            return _TTest(float(first.mean()), math.nan, min(n, m))
        error = math.sqrt(first.var(ddof=1) / n + second.var(ddof=1) / m)
        return _TTest(float(first.mean()), error, min(n, m))

    @property
    def value(self) -> float:
        """The share of pairs in which the example of the feature scores higher, ties one half."""
        return self._t.value

    @property
    def size(self) -> tuple[int, int]:
        """All examples, and the number of the rarer kind."""
        return len(self.positive) + len(self.negative), self._t.n

    def above(self, bound: float) -> float:
        """See `Evidence.above`."""
        return self._t.above(bound)

    def below(self, bound: float) -> float:
        """See `Evidence.below`."""
        return self._t.below(bound)

    def interval(self, level: float) -> tuple[float, float]:
        """See `Evidence.interval`."""
        low, high = self._t.interval(level)
        return max(low, 0.0), min(high, 1.0)


@dataclass(frozen=True, eq=False)
class Known:
    """A number that no sample stands between: it was computed over the whole domain, or of the weights alone.

    Attributes:
        value: the number.
    """

    value: float

    @property
    def size(self) -> tuple[int, int]:
        """Zeros: nothing was sampled."""
        return 0, 0

    def above(self, bound: float) -> float:
        """0 if the number is at least `bound`, else 1."""
        return 0.0 if self.value >= bound else 1.0

    def below(self, bound: float) -> float:
        """0 if the number is at most `bound`, else 1."""
        return 0.0 if self.value <= bound else 1.0

    def interval(self, level: float) -> tuple[float, float]:
        """The number itself."""
        return self.value, self.value
