"""What changed: the scores of the same edges on two tasks, or in two models.

Scores are compared as shares of the whole effect, so that metrics of different size can stand next to each other. What
chance does is known by exchanging the two, each divided by its own effect: examples that both have (one task in two
models) keep their place and swap sides, other examples are dealt out again. The largest studentised difference of all
edges in each such draw gives p-values that hold for all of them together (max T, Westfall and Young 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from circuits.discovery.comparing import chance_jaccard, shared
from circuits.discovery.graphs import mask_of
from circuits.discovery.results import EdgeScores
from circuits.experiments.statistics import Interval, ends, mean_intervals, totals
from circuits.files import finite
from circuits.tables import Table, between

DRAWS = 1000
"""How many exchanges, and how many resamples for intervals."""

SIGNIFICANT = 0.05

_AT_ONCE = 100

_ROUNDING = 1e-6
"""A share that is smaller is rounding."""


@dataclass(frozen=True)
class Change:
    """What one edge, or one part, is worth on either side.

    Attributes:
        name: the edge, or the part.
        first: its score as a share of the first side's whole effect.
        second: the same on the second side.
        difference: second less first, with its interval.
        p: the p-value, corrected for all edges (or parts).
    """

    name: str
    first: float
    second: float
    difference: Interval
    p: float


@dataclass(frozen=True, eq=False)
class Contrast:
    """How the scores of edges differ between two tasks or two models.

    Attributes:
        first: what the first side is.
        second: what the second side is.
        paired: whether both sides have the same examples.
        correlation: the rank correlation of the two sides' mean scores over all edges.
        overlap: the Jaccard index of the strongest edges of either side, and of as many edges drawn at random.
        size: how many strongest edges these are.
        edges: every edge, the largest difference first.
        parts: every part that writes, by the sum of the scores of its edges.
        seed: of exchanges and resamples.
    """

    first: str
    second: str
    paired: bool
    correlation: float
    overlap: tuple[float, float]
    size: int
    edges: tuple[Change, ...]
    parts: tuple[Change, ...]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return finite(asdict(self))

    def tables(self, top: int) -> Iterator[Table | str]:
        """How much the two sides have in common, and the parts and edges that differ most."""
        yield (
            f"{self.first} and {self.second}: rank correlation of all {len(self.edges)} scores "
            f"{self.correlation:.2f}; of the {self.size} strongest edges of each, Jaccard {self.overlap[0]:.2f} (by "
            f"chance {self.overlap[1]:.2f})"
        )
        how = "paired by example" if self.paired else "on different examples"
        for kind, changes in (("part", self.parts), ("edge", self.edges)):
            sure = sum(c.p <= SIGNIFICANT for c in changes)
            rows = [
                (c.name, c.first, c.second, c.difference.value, between(c.difference.low, c.difference.high), c.p)
                for c in changes[:top]
            ]  # fmt: skip
            columns = (kind, self.first, self.second, "difference", "95 % interval", "p")
            title = (
                f"shares of the whole effect, {how}; {sure} of {len(changes)} {kind}s differ (p at most {SIGNIFICANT} "
                f"for all together, {DRAWS} exchanges, seed {self.seed})"
            )
            yield Table(columns, rows, title)


@dataclass(frozen=True, eq=False)
class _Side:
    """One side's scores, and its whole effect, summed by cluster."""

    sums: Float[np.ndarray, "cluster row"]
    effect: Float[np.ndarray, " cluster"]

    def shares(self, times: Float[np.ndarray, "draw cluster"]) -> Float[np.ndarray, "draw row"]:
        """Scores as shares of the effect, of each cluster as often as a draw has it."""
        return (times @ self.sums) / (times @ self.effect)[:, None]

    @property
    def parts(self) -> Float[np.ndarray, "cluster row"]:
        """Each cluster's part of the shares: their mean over clusters is the shares."""
        return self.sums / self.effect.mean()


def contrast(
    first: EdgeScores, second: EdgeScores, size: int, *, names: tuple[str, str] = ("first", "second"), seed: int = 0
) -> Contrast:  # fmt: skip
    """Compare the scores of the same edges on two tasks, or in two models.

    Args:
        first: scores by a method that estimates effects.
        second: scores by the same method, of the same edges.
        size: how many strongest edges count for the overlap.
        names: what the two sides are called.
        seed: of exchanges and resamples.

    Raises:
        ValueError: if the edges or methods differ, there are fewer than two independent examples on a side, or the
            whole effect of a side cannot be told from 0.
    """
    if first.edges != second.edges:
        raise ValueError(
            f"{names[1]} has {len(second.edges)} edges that are not those of {names[0]} ({len(first.edges)}): expected "
            "two models with the same parts"
        )
    for scores in (first, second):
        _ = scores.in_memory  # refused before names of all edges are made
    if first.method != second.method:
        raise ValueError(
            f"scores by {second.method} are not compared with scores by {first.method}: expected one method"
        )
    # The same examples in two models are paired.
    paired = first.record.task["task_hash"] == second.record.task["task_hash"]
    sources = [source for source, _ in first.edges]
    known = {source: i for i, source in enumerate(dict.fromkeys(sources))}
    member = np.zeros((len(known), len(sources)))
    member[[known[s] for s in sources], np.arange(len(sources))] = 1
    one, other = _side(first, names[0]), _side(second, names[1])
    edges = _changes([" -> ".join(e) for e in first.edges], one, other, paired, seed)
    by_part = [_Side(side.sums @ member.T, side.effect) for side in (one, other)]
    parts = _changes([*known], by_part[0], by_part[1], paired, seed)
    strongest = [mask_of(len(sources), s.order(n=size)) for s in (first, second)]
    return Contrast(
        names[0], names[1], paired, rank_correlation(first.mean, second.mean),
        (shared(*strongest), chance_jaccard(size, size, len(sources))), size, edges, parts, seed,
    )  # fmt: skip


def rank_correlation(a: Float[np.ndarray, " edge"], b: Float[np.ndarray, " edge"]) -> float:
    """Spearman's rank correlation of the scores of all edges; NaN if one side's are all the same."""
    x, y = (rankdata(side) for side in (a, b))
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else float("nan")


def _side(scores: EdgeScores, name: str) -> _Side:
    """Scores and the whole effect by cluster.

    Raises:
        ValueError: if the effect cannot be told from 0.
    """
    change = scores.corrupted - scores.clean
    sums, counts = totals(np.concatenate([scores.in_memory.T, change[None]]), None, scores.clusters)
    n = len(counts)
    if n < 2:
        raise ValueError(
            f"{name}: one independent example says nothing about chance; expected 2 or more"
        )
    (own,) = mean_intervals(change[None], scores.clusters, scores.record.seed)
    if not own.clear:
        raise ValueError(
            f"{name}: removing every edge moves {scores.metric} by {own.value:.3g} (95 % interval "
            f"{between(own.low, own.high)}), which cannot be told from 0, so no edge has a share of it"
        )
    return _Side(sums[:-1].T, sums[-1])


def _changes(names: list[str], one: _Side, other: _Side, paired: bool, seed: int) -> tuple[Change, ...]:  # fmt: skip
    rng = np.random.default_rng(seed)
    first, second = (side.shares(np.ones((1, len(side.effect))))[0] for side in (one, other))
    difference = second - first
    drawn = [
        rng.multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
        for n in (len(one.effect), len(other.effect))
    ]
    resampled = other.shares(drawn[0 if paired else 1]) - one.shares(drawn[0])
    low, high = ends(difference, resampled, min(len(one.effect), len(other.effect)))
    ps = (_swapped if paired else _dealt)(one.parts, other.parts, rng)
    return tuple(
        Change(
            names[i], float(first[i]), float(second[i]),
            Interval(float(difference[i]), float(low[i]), float(high[i])), float(ps[i]),
        )
        for i in np.argsort(-np.abs(difference), kind="stable").tolist()
    )  # fmt: skip


def _swapped(
    one: Float[np.ndarray, "cluster row"], other: Float[np.ndarray, "cluster row"], rng: np.random.Generator
) -> Float[np.ndarray, " row"]:  # fmt: skip
    """p-values when the two sides of each cluster are exchanged at random."""
    change = other - one
    n, squares = len(change), (change**2).sum(0)

    def statistic(signs: Float[np.ndarray, "draw cluster"]) -> Float[np.ndarray, "draw row"]:
        # Signs leave squares as they are, so that the variance follows from the mean.
        mean = signs @ change / n
        return _studentised(mean, (squares / n - mean**2) / max(1, n - 1))

    return _corrected(
        statistic(np.ones((1, n)))[0], lambda k: statistic(rng.choice([-1.0, 1.0], (k, n)))
    )


def _dealt(
    one: Float[np.ndarray, "cluster row"], other: Float[np.ndarray, "cluster row"], rng: np.random.Generator
) -> Float[np.ndarray, " row"]:  # fmt: skip
    """p-values when clusters are dealt out to the sides again, each side with its own variance (Janssen 1997)."""
    both, n_one = np.concatenate([one, other]), len(one)
    n = len(both)

    def statistic(side: Float[np.ndarray, "draw cluster"]) -> Float[np.ndarray, "draw row"]:
        means, variance = [], 0.0
        for drawn, k in ((side, n_one), (1 - side, n - n_one)):
            mean = drawn @ both / k
            means.append(mean)
            variance = variance + (drawn @ both**2 / k - mean**2) / max(1, k - 1)
        return _studentised(means[1] - means[0], variance)

    def dealt(k: int) -> Float[np.ndarray, "draw row"]:
        return statistic((np.argsort(rng.random((k, n)), axis=1) < n_one).astype(float))

    return _corrected(statistic((np.arange(n) < n_one).astype(float)[None])[0], dealt)


def _studentised(
    mean: Float[np.ndarray, "draw row"], variance: Float[np.ndarray, "draw row"]
) -> Float[np.ndarray, "draw row"]:
    """|t|, 0 where nothing differs: differences below the rounding of shares count as none."""
    return np.abs(mean) / np.sqrt(np.maximum(variance, 0) + _ROUNDING**2)


def _corrected(
    observed: Float[np.ndarray, " row"], draw: Callable[[int], Float[np.ndarray, "draw row"]]
) -> Float[np.ndarray, " row"]:
    """For each row how often the largest statistic of a draw reaches its own: (1 + k) / (1 + n)."""
    sizes = [min(_AT_ONCE, DRAWS - start) for start in range(0, DRAWS, _AT_ONCE)]
    largest = np.concatenate([draw(size).max(1) for size in sizes])
    # Slightly less, so that the same difference summed in another order counts as reaching it.
    reached = (largest[:, None] >= observed[None] * (1 - 1e-9)).sum(0)
    return (1 + reached) / (1 + DRAWS)
