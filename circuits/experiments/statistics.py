"""The package's statistics: bootstrap intervals, p-values, paired tests and corrections for many tests, based on
scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

RESAMPLES = 1000
LEVEL = 0.95

UNBOUNDED = (-np.inf, np.inf)

Correction = Literal["holm", "benjamini-hochberg"]
"""Holm (1979) controls the chance of any false positive, Benjamini and Hochberg (1995) the share of false positives."""

Alternative = Literal["two-sided", "greater"]
"""Whether changes in both directions count as large, or only increases."""

_SIGNS_AT_ONCE = 4096
"""How many sign flips are computed at a time, to bound memory."""

_TIE = 1e-9
"""Two changes that differ by less than this share of the larger one count as equal: sums round differently."""


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval.

    Attributes:
        value: the sample's own value.
        low: lower end of the 95 % interval; NaN if the sample says nothing about the spread.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(
        cls,
        value: float,
        drawn: Float[np.ndarray, " resample"],
        n: int,
        within: tuple[float, float] = UNBOUNDED,
    ) -> Interval:
        """A number with the interval that resamples of n clusters give it, see `ends`."""
        low, high = ends(np.array([value], float), drawn[:, None], n, within=within)
        return cls(value, float(low[0]), float(high[0]))

    @property
    def clear(self) -> bool:
        """Whether the number can be told from 0: its interval is known and does not hold 0."""
        return self.low > 0 or self.high < 0


UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))
"""The interval of a number that is not defined."""


def expansion(n: Int[np.ndarray, "*row"], level: float = LEVEL) -> Float[np.ndarray, "*row"]:
    """By how much intervals of a bootstrap over n clusters are too short: t sqrt(n / (n - 1)) / z.

    Resamples of n clusters vary as if the variance were divided by n instead of n - 1, and their percentiles take the
    spread for known: a quantile z of the normal distribution, not t of Student's with n - 1 degrees of freedom
    (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3). NaN below two clusters.

    >>> expansion(np.array([2, 4, 10, 100])).round(2).tolist()
    [9.17, 1.87, 1.22, 1.02]
    """
    quantile, some = (1 + level) / 2, np.where(n < 2, np.nan, n)
    wide = stats.t.ppf(quantile, some - 1) / stats.norm.ppf(quantile) * np.sqrt(some / (some - 1))
    return np.asarray(wide)


def ends(
    values: Float[np.ndarray, " row"],
    drawn: Float[np.ndarray, "resample row"],
    n: Int[np.ndarray, " row"] | int,
    level: float = LEVEL,
    within: tuple[float, float] = UNBOUNDED,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Both ends of intervals, by the expanded percentile bootstrap: the distances of percentiles from the value, times
    `expansion`.

    Hesterberg (2015) takes percentiles further out; of few clusters there are none. Ratios of means of 4, 6, 10 and 30
    skewed clusters lie in 91 to 94 % of such 95 % intervals, those of normal ones in 95 %; in 79, 83, 88 and 92 % of
    the intervals between percentiles alone.

    Args:
        values: the sample's own values.
        drawn: those of resamples; what is NaN says nothing.
        n: the number of clusters that were resampled, or that each row has.
        level: the intended share of such intervals that hold the true value, in 0..1.
        within: the least and the largest possible value, where intervals end: expanded ones may go beyond.

    Returns:
        Lower and upper ends; NaN where nothing is known of the spread.
    """
    found = np.full((2, len(values)), np.nan)
    wide = expansion(np.broadcast_to(n, values.shape), level)
    known = ~np.isnan(drawn).all(0) & ~np.isnan(wide)
    if known.any():
        some = np.nanquantile(drawn[:, known], [(1 - level) / 2, (1 + level) / 2], axis=0)
        found[:, known] = values[known] + wide[known] * (some - values[known])
    low, high = np.clip(found, *within)
    return low, high


def n_clusters(clusters: Sequence[int]) -> int:
    """The number of independent clusters among examples."""
    return len(set(clusters))


def totals(
    values: Float[np.ndarray, "... example"],
    weights: Float[np.ndarray, " example"] | None,
    clusters: Sequence[int] | None,
) -> tuple[Float[np.ndarray, "... cluster"], Float[np.ndarray, " cluster"]]:
    """Weighted sums of values and sums of weights, by cluster."""
    # A mean over examples is sum(sums) / sum(counts). Resampling clusters only needs these two numbers for each.
    n = values.shape[-1]
    weights = np.ones(n) if weights is None else np.asarray(weights, float)
    ids = (
        np.arange(n)
        if clusters is None
        else np.unique(np.asarray(clusters), return_inverse=True)[1]
    )
    # A matrix of 0 and 1, so that sums by cluster are one product for all rows of values.
    member = np.zeros((n, int(ids.max()) + 1 if n else 0))
    member[np.arange(n), ids] = 1
    return (values * weights) @ member, weights @ member


def cluster_means(
    values: Float[np.ndarray, " example"], clusters: Sequence[int]
) -> Float[np.ndarray, " cluster"]:
    """The mean of each cluster.

    >>> cluster_means(np.array([1.0, 3.0, 5.0]), [7, 7, 9]).tolist()
    [2.0, 5.0]
    """
    sums, counts = totals(np.asarray(values, float), None, clusters)
    return sums / counts


def interval(
    values: Float[np.ndarray, " example"],
    *,
    weights: Float[np.ndarray, " example"] | None = None,
    clusters: Sequence[int] | None = None,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    within: tuple[float, float] = UNBOUNDED,
) -> tuple[float, float]:
    """An interval for the mean, by the expanded percentile bootstrap over clusters (see `ends`).

    Args:
        values: one value for each example.
        weights: the weight of each example in the mean; all equal if None.
        clusters: a number for each example; examples that share one are drawn together, since they are not
            independent. Each example is a cluster of its own if None.
        seed: seed of the resamples.
        level: the intended share of such intervals that contain the mean, in 0..1.
        resamples: the number of resamples.
        within: the least and the largest possible mean.

    Returns:
        The ends of the interval; NaN with fewer than two clusters, which say nothing about the spread.
    """
    sums, counts = totals(np.asarray(values, float), weights, clusters)
    # One cluster resampled is always itself: an interval of no width would claim certainty.
    if len(counts) < 2 or not np.isfinite(sums).all():
        return float("nan"), float("nan")
    # Clusters that all have the same mean: scipy would warn about a degenerate distribution.
    if np.ptp(sums / counts) == 0:
        return float(sums[0] / counts[0]), float(sums[0] / counts[0])
    found = stats.bootstrap(
        (sums, counts), lambda s, c, axis=-1: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        method="percentile", confidence_level=level, n_resamples=resamples, rng=np.random.default_rng(seed),
    ).bootstrap_distribution  # fmt: skip
    value = np.array([sums.sum() / counts.sum()])
    low, high = ends(value, found[:, None], len(counts), level, within)
    return float(low[0]), float(high[0])


def resampled(
    values: Float[np.ndarray, "row example"],
    *,
    weights: Float[np.ndarray, " example"] | None = None,
    clusters: Sequence[int] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Float[np.ndarray, "resample row"]:
    """Means of several quantities over the same resamples of clusters, for intervals of what is computed from them.

    NaN with fewer than two clusters, which say nothing about the spread.
    """
    # How often each of n clusters is drawn in n draws with replacement is multinomial: one matrix product instead of
    # an index for each draw.
    sums, counts = totals(np.asarray(values, float), weights, clusters)
    n = len(counts)
    if n < 2:
        return np.full((resamples, len(sums)), np.nan)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    # Each resample has its own total weight, as it may draw large clusters more often than small ones.
    return (drawn @ sums.T) / (drawn @ counts)[:, None]


def mean_intervals(
    values: Float[np.ndarray, "row example"], clusters: Sequence[int], seed: int
) -> list[Interval]:
    """The mean of each row with its interval, over the same resamples of clusters.

    Args:
        values: in any unit, one for each example.
        clusters: a number for each example, shared by those that are not independent.
        seed: of the resamples.
    """
    drawn, n = resampled(values, clusters=clusters, seed=seed), n_clusters(clusters)
    means = values.mean(1, dtype=np.float64).tolist()
    return [Interval.of(mean, drawn[:, i], n) for i, mean in enumerate(means)]


def percentiles(drawn: Float[np.ndarray, " resample"], level: float = LEVEL) -> tuple[float, float]:
    """The percentiles of resampled numbers between which the given share of them lies; NaN if all are NaN."""
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    # A resample without any example that has a value is NaN and says nothing.
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(
    change: float,
    null: Sequence[float] | Float[np.ndarray, " draw"],
    alternative: Alternative = "two-sided",
) -> float:
    """The permutation p-value (1 + k) / (1 + n) (Phipson and Smyth 2010).

    Args:
        change: the measured change.
        null: the change that each of n random draws made; k of them are at least as large. A draw that is NaN counts
            as larger.
        alternative: whether changes in both directions count as large, or only increases.

    Returns:
        At least `least_p(n)`; NaN if there are no draws or the change is not finite.

    >>> p_value(3.0, [1.0, -4.0, 2.0])
    0.5
    >>> p_value(3.0, [1.0, -4.0, 2.0], "greater")
    0.25
    """
    drawn, own = np.asarray(null, float), change
    # Sizes are compared, as a random edit that helps by as much as ours hurts is as far from no effect.
    if alternative == "two-sided":
        drawn, own = np.abs(drawn), abs(change)
    if not len(drawn) or not np.isfinite(change):
        return float("nan")
    # "Not smaller" instead of "at least as large": comparisons with NaN are false, and a NaN has to count against us.
    at_least = int((~(drawn < own - abs(own) * _TIE)).sum())
    return (1 + at_least) / (1 + len(drawn))


def least_p(n: int) -> float:
    """The smallest p-value that n random draws can give.

    >>> least_p(99)
    0.01
    """
    return 1 / (1 + n)


def paired_p(
    differences: Float[np.ndarray, " example"], *, seed: int = 0, resamples: int = 9999
) -> float:
    """The two-sided p-value of a paired test that the mean is 0, by random sign flips (Fisher 1935).

    For differences of -1, 0 and 1 this is McNemar's test. A difference that is NaN is left out.
    """
    # Differences of 0 are the same with either sign. Without them few enough may be left to try every combination.
    some = np.asarray(differences, float)
    some = some[some != 0]
    return float(paired_ps(some[None], seed=seed, resamples=resamples)[0]) if len(some) else 1.0


def paired_ps(
    differences: Float[np.ndarray, "row example"],
    clusters: Sequence[int] | None = None,
    *,
    seed: int = 0,
    resamples: int = 9999,
) -> Float[np.ndarray, " row"]:
    """`paired_p` for many rows at once, over the same sign flips; examples of a cluster flip together.

    Args:
        differences: NaN where a row lacks an example.
        clusters: a number for each example; each is a cluster of its own if None.
        seed: seed of the sign flips; with few clusters all possible flips are used instead.
        resamples: the number of sign flips.

    Returns:
        At least 1 / (1 + resamples), or 2 / 2^n for n clusters; NaN for a row without examples.

    >>> paired_ps(np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])).tolist()
    [0.25, 1.0]
    """
    rows = np.asarray(differences, float)
    # NaN counts as no difference.
    sums, _ = totals(np.nan_to_num(rows), None, clusters)
    n = sums.shape[-1]
    # Under the null the sign of each cluster's sum is arbitrary. All 2^n sign patterns give the exact p-value, which
    # needs no 1 + in it, as the observed pattern is one of them.
    # With 13 clusters there are 8192 sign patterns: fewer than would be drawn.
    exact = 2**n <= resamples
    if exact:
        # Bits as signs: pattern 5 = 101 in binary turns the first and the third cluster.
        signs = 1.0 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, n))
    # Slightly less, so that the observed pattern itself, summed in another order, always counts as reaching it.
    observed = np.abs(sums.sum(-1)) * (1 - _TIE)
    at_least = np.zeros(len(rows), int)
    for start in range(0, len(signs), _SIGNS_AT_ONCE):
        at_least += (np.abs(signs[start : start + _SIGNS_AT_ONCE] @ sums.T) >= observed).sum(0)
    p = at_least / len(signs) if exact else (1 + at_least) / (1 + resamples)
    return np.where(np.isnan(rows).all(-1), np.nan, p)


def residuals(
    values: Float[np.ndarray, "... example"], clusters: Sequence[int] | None = None
) -> tuple[
    Float[np.ndarray, "..."], Float[np.ndarray, "... cluster"], Float[np.ndarray, " cluster"]
]:
    """Means over examples, by how much each cluster's sum differs from what they predict, and the clusters' sizes."""
    sums, counts = totals(np.asarray(values, float), None, clusters)
    means = np.asarray(sums.sum(-1) / counts.sum())
    return means, sums - means[..., None] * counts, counts


def standard_error(
    residuals: Float[np.ndarray, "... cluster"], counts: Float[np.ndarray, " cluster"]
) -> Float[np.ndarray, "..."]:
    """The standard error of means: that of a ratio of sums over clusters, linearised (Cochran 1977, section 6.3).

    Args:
        residuals: those of at least two clusters, see `residuals`.
        counts: the clusters' sizes.
    """
    n = len(counts)
    return np.asarray(np.sqrt(n / (n - 1) * (residuals**2).sum(-1)) / counts.sum())


def mean_ps(
    values: Float[np.ndarray, "row example"], clusters: Sequence[int] | None = None
) -> Float[np.ndarray, " row"]:
    """Two-sided p-values of t-tests that means are 0, over clusters of examples.

    For n clusters it has n - 1 degrees of freedom and the `standard_error` of a ratio of sums; for clusters of one size
    this is the t-test of their means.

    Args:
        values: one value for each example.
        clusters: a number for each example; each is a cluster of its own if None.

    Returns:
        0 where all clusters have the same mean and it is not 0, 1 where it is; NaN with fewer than two clusters.
    """
    mean, left, counts = residuals(values, clusters)
    n = len(counts)
    if n < 2:
        return np.full(len(mean), np.nan)
    error = standard_error(left, counts)
    # Where clusters differ by rounding alone, the error is rounding too.
    t = np.divide(np.abs(mean), error, out=np.full(len(mean), np.inf), where=error > 0)
    return np.where(mean == 0, 1.0, 2 * stats.t.sf(t, n - 1))


def corrected(
    p_values: Sequence[float] | Float[np.ndarray, " test"], method: Correction = "holm"
) -> tuple[float, ...]:
    """P-values corrected for the number of tests.

    >>> corrected([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    p = np.asarray(p_values, float)
    if not len(p):
        return ()
    if method == "benjamini-hochberg":
        return tuple(stats.false_discovery_control(p).tolist())
    # Holm: the i-th smallest of m p-values (from 0) is multiplied by m - i; none may be below the one before it.
    order = p.argsort(kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    made = np.empty(len(p))
    made[order] = np.minimum(stepped, 1)
    return tuple(made.tolist())
