"""Published tests of circuits: the equivalence test of Shi et al. (2024), and the test of independence by HSIC."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from circuits.experiments.statistics import cluster_means

_POWER = 0.8
_TRIALS = 40
_TRIED = tuple(round(0.05 * k, 2) for k in range(1, 20))
"""The correlations of which it is tried whether they would be seen."""


def shi_equivalence_p(
    wins: Float[np.ndarray, " example"], clusters: Sequence[int], eps: float
) -> float:
    """The p-value of Shi et al. (2024): sum of Bin(n, 1/2 + eps) over k with |k/n - 1/2| at least the observed.

    Its null hypothesis is that circuit and model are equivalent, so that little data always passes it.

    Args:
        wins: 1 where the circuit scores higher than the model, 0 where lower, 1/2 at a tie.
        clusters: a number for each example, shared by those that are not independent.
        eps: how far from one half is still equivalent.
    """
    means = cluster_means(wins, clusters)
    n = len(means)
    k = np.arange(n + 1)
    off = np.abs(k / n - 0.5) >= abs(means.sum() / n - 0.5) - 1e-12
    return float(min(1.0, stats.binom.pmf(k[off], n, 0.5 + eps).sum()))


def hsic_p(
    first: Float[np.ndarray, " example"],
    second: Float[np.ndarray, " example"],
    clusters: Sequence[int],
    draws: int,
    seed: int,
) -> tuple[float, float, tuple[float, ...]]:
    """A permutation test of whether two scores are independent, by the Hilbert-Schmidt independence criterion.

    Gretton et al. (2008), with Gaussian kernels whose width is the median distance. Clusters enter by their means and
    are permuted as a whole.

    Args:
        first: one score.
        second: the other, on the same examples.
        clusters: a number for each example, shared by those that are not independent.
        draws: permutations.
        seed: of the permutations.

    Returns:
        The statistic, its p-value (1 + k) / (1 + draws), and the statistics of the permutations.
    """
    x, y = (cluster_means(v, clusters) for v in (first, second))
    own, null = _hsic(x, y, draws, np.random.default_rng(seed))
    return own, (1 + int((null >= own * (1 - 1e-9)).sum())) / (1 + draws), tuple(null.tolist())


def _hsic(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], draws: int, rng: np.random.Generator
) -> tuple[float, Float[np.ndarray, " draw"]]:
    """The (biased) estimate of Gretton et al. (2008), tr(K H L H) / n^2, and that of each permutation."""
    n = len(x)
    K, L = _centred(_gram(x)), _gram(y)
    null = np.empty(draws)
    for i in range(draws):
        order = rng.permutation(n)
        null[i] = (K * L[np.ix_(order, order)]).sum() / n**2
    return float((K * L).sum() / n**2), null


def _gram(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n n"]:
    apart = np.abs(x[:, None] - x[None])
    width = float(np.median(apart[np.triu_indices(len(x), 1)])) or float(apart.max()) or 1.0
    return np.exp(-(apart**2) / (2 * width**2))


def _centred(K: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    return K - K.mean(0) - K.mean(1)[:, None] + K.mean()


def blind_below(
    score: Float[np.ndarray, " example"], clusters: Sequence[int], alpha: float, seed: int
) -> float:
    """The smallest correlation with a score that the test of independence detects with a power of .8.

    It is found by trying linear mixtures of the score's normal scores with Gaussian noise, on samples of this size.

    Args:
        score: the model's score.
        clusters: a number for each example, shared by those that are not independent.
        alpha: the level of the test.
        seed: of the noise and the permutations.

    Returns:
        A correlation from .05 to .95; 1 if none of them is detected.
    """
    x = cluster_means(score, clusters)
    n = len(x)
    if n < 4 or np.ptp(x) == 0:
        return 1.0
    ranks = stats.norm.ppf((stats.rankdata(x) - 0.5) / n)
    rng = np.random.default_rng(seed)
    draws = max(99, math.ceil(2 / alpha))
    # The null distribution hardly depends on the partner's values: one is drawn for all trials.
    _, null = _hsic(ranks, rng.permutation(ranks), draws, rng)
    bar = float(np.quantile(null, 1 - alpha))
    K = _centred(_gram(ranks))
    for r in _TRIED:
        noise = rng.standard_normal((_TRIALS, n))
        mixed = r * ranks + math.sqrt(1 - r**2) * noise
        seen = [float((K * _gram(row)).sum() / n**2) > bar for row in mixed]
        if np.mean(seen) >= _POWER:
            return r
    return 1.0
