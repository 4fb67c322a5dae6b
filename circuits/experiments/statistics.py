"""The one module of statistics: intervals, p-values, paired tests, and correction for many tests, over scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 1000
LEVEL = 0.95

Correction = Literal["holm", "benjamini-hochberg"]
"""Holm (1979) bounds the chance of any false finding, Benjamini and Hochberg (1995) the share of false ones."""

Alternative = Literal["two-sided", "greater"]
"""Whether a change counts as large either way, or only upwards."""

_AT_ONCE = 4096
"""So many changes of sign are made at a time."""

_TIE = 1e-9
"""Two changes that differ by less than this share of the larger count as equal."""


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval.

    Attributes:
        value: of the sample itself.
        low: lower end of the 95 % interval; NaN where the sample says nothing about the spread.
        high: its upper end.
    """

    value: float
    low: float
    high: float


def totals(
    values: Float[np.ndarray, "... example"],
    weights: Float[np.ndarray, " example"] | None,
    clusters: Sequence[int] | None,
) -> tuple[Float[np.ndarray, "... cluster"], Float[np.ndarray, " cluster"]]:
    """Weighted sums of values and sums of weights, by cluster."""
    n = values.shape[-1]
    weights = np.ones(n) if weights is None else np.asarray(weights, float)
    ids = (
        np.arange(n)
        if clusters is None
        else np.unique(np.asarray(clusters), return_inverse=True)[1]
    )
    member = np.zeros((n, int(ids.max()) + 1 if n else 0))
    member[np.arange(n), ids] = 1
    return (values * weights) @ member, weights @ member


def interval(
    values: Float[np.ndarray, " example"],
    *,
    weights: Float[np.ndarray, " example"] | None = None,
    clusters: Sequence[int] | None = None,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """An interval for the mean, by the percentile bootstrap over clusters (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: one an example.
        weights: of each example in the mean; all equal if None.
        clusters: a number for each example; examples that share one are drawn together, since they are not
            independent. Each example by itself if None.
        seed: of the resamples.
        level: how often such an interval is to hold the mean, in 0..1.
        resamples: how many.

    Returns:
        Its ends; NaN where there are fewer than two clusters, which say nothing about the spread.
    """
    sums, counts = totals(np.asarray(values, float), weights, clusters)
    if len(counts) < 2 or not np.isfinite(sums).all():
        return float("nan"), float("nan")
    if np.ptp(sums / counts) == 0:
        return float(sums[0] / counts[0]), float(sums[0] / counts[0])
    found = stats.bootstrap(
        (sums, counts), lambda s, c, axis=-1: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        method="percentile", confidence_level=level, n_resamples=resamples, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def resampled(
    values: Float[np.ndarray, "row example"],
    *,
    weights: Float[np.ndarray, " example"] | None = None,
    clusters: Sequence[int] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Float[np.ndarray, "resample row"]:
    """Means of several numbers over the same resampled clusters, for intervals of what is computed from them.

    NaN where there are fewer than two clusters, which say nothing about the spread.
    """
    sums, counts = totals(np.asarray(values, float), weights, clusters)
    n = len(counts)
    if n < 2:
        return np.full((resamples, len(sums)), np.nan)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    return (drawn @ sums.T) / (drawn @ counts)[:, None]


def percentiles(drawn: Float[np.ndarray, " resample"], level: float = LEVEL) -> tuple[float, float]:
    """The ends of the middle share of some resampled numbers; NaN if none is a number."""
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(
    change: float,
    null: Sequence[float] | Float[np.ndarray, " draw"],
    alternative: Alternative = "two-sided",
) -> float:
    """The permutation p-value (1 + k) / (1 + n) (Phipson and Smyth 2010).

    Args:
        change: what was measured.
        null: the change that each of n random draws made; k of them are at least as large. A draw that is not finite
            counts as larger.
        alternative: whether large is either way, or upwards only.

    Returns:
        At least `least_p(n)`; NaN if there is no draw, or the change is not finite.

    >>> p_value(3.0, [1.0, -4.0, 2.0])
    0.5
    >>> p_value(3.0, [1.0, -4.0, 2.0], "greater")
    0.25
    """
    drawn, own = np.asarray(null, float), change
    if alternative == "two-sided":
        drawn, own = np.abs(drawn), abs(change)
    if not len(drawn) or not np.isfinite(change):
        return float("nan")
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
    """The two-sided p-value of a paired test of a mean of 0, by random changes of sign (Fisher 1935).

    Of differences that are 0 or 1 either way this is McNemar's test.
    """
    some = np.asarray(differences, float)
    some = some[some != 0]
    if not len(some):
        return 1.0
    found = stats.permutation_test(
        (some,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def paired_ps(
    differences: Float[np.ndarray, "row example"],
    clusters: Sequence[int] | None = None,
    *,
    seed: int = 0,
    resamples: int = 9999,
) -> Float[np.ndarray, " row"]:
    """`paired_p` of many rows at once, over the same changes of sign; examples of a cluster change sign together.

    Args:
        differences: NaN where a row has no such example.
        clusters: a number for each example; each by itself if None.
        seed: of the changes of sign; with few clusters all there are are taken instead.
        resamples: how many.

    Returns:
        At least 1 / (1 + resamples), or 2 / 2^n for n clusters; NaN for a row without examples.

    >>> paired_ps(np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])).tolist()
    [0.25, 1.0]
    """
    rows = np.asarray(differences, float)
    sums, _ = totals(np.nan_to_num(rows), None, clusters)
    n = sums.shape[-1]
    exact = 2**n <= resamples
    if exact:
        signs = 1.0 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, n))
    observed = np.abs(sums.sum(-1)) * (1 - _TIE)
    at_least = np.zeros(len(rows), int)
    for start in range(0, len(signs), _AT_ONCE):
        at_least += (np.abs(signs[start : start + _AT_ONCE] @ sums.T) >= observed).sum(0)
    p = at_least / len(signs) if exact else (1 + at_least) / (1 + resamples)
    return np.where(np.isnan(rows).all(-1), np.nan, p)


def corrected(
    p_values: Sequence[float] | Float[np.ndarray, " test"], method: Correction = "holm"
) -> tuple[float, ...]:
    """P-values corrected for their number.

    >>> corrected([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    p = np.asarray(p_values, float)
    if not len(p):
        return ()
    if method == "benjamini-hochberg":
        return tuple(stats.false_discovery_control(p).tolist())
    order = p.argsort(kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    made = np.empty(len(p))
    made[order] = np.minimum(stepped, 1)
    return tuple(made.tolist())
