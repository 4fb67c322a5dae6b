"""The spectrum of a unit's activations: their density, what each range contributes to the mean, and examples.

After Cammarata et al. 2020, "Curve Detectors": the density of activations p(x) has an exponential tail, and x p(x)
shows which activations make up the expected value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import chi2

from circuits.store.reading import ActivationStore, Example, UnitStatistics
from circuits.store.summaries import BINS
from circuits.tables import Table
from circuits.units import Unit


@dataclass(frozen=True)
class Bin:
    """A range of activations.

    Attributes:
        low: the lower end.
        high: the upper end.
        density: the probability density of activations in the range.
        seen: how many of the positions that the histogram looks at are in the range. If these are a sample, a density
            of 0 does not mean that the range is empty: see `Spectrum.density_below`.
        contribution: what activations in the range add to the mean of positive activations: the integral of x p(x).
        n_examples: the number of examples with their largest activation in the range.
        examples: some of these, drawn at random; the strongest first.
    """

    low: float
    high: float
    density: float
    seen: int
    contribution: float
    n_examples: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A unit's activations on a dataset, from its smallest to its largest.

    Attributes:
        unit: the unit.
        statistics: its moments, and the exponential fitted to the tail.
        bins: ranges from the smallest activation to the largest, which are exact. The inner borders are equally spaced
            edges of the histogram; the outer ranges end at the extremes.
        above_two: the share of the sum of positive activations that comes from activations more than two standard
            deviations above the mean.
        data: the name of the dataset.
        model_hash: the hash of the model.
        seed: the seed of the draw of examples.
    """

    unit: Unit
    statistics: UnitStatistics
    bins: tuple[Bin, ...]
    above_two: float
    data: str
    model_hash: str
    seed: int

    @property
    def sampled(self) -> bool:
        """Whether densities are of a random sample of each example's positions, and not of all."""
        return self.statistics.looked_at < self.statistics.count

    def density_below(self, one: Bin) -> float:
        """What the density of a range is below (95 %), by the positions in it among those that were looked at.

        If there are none among n, the share is below about 3 / n (the rule of three): with a larger share, n draws miss
        it with a probability of less than (1 - 3 / n)^n, which is 5 %. Of k it is the same bound for a Poisson count.
        The density itself if all positions were looked at.
        """
        if not self.sampled:
            return one.density
        most = float(chi2.ppf(0.95, 2 * (one.seen + 1))) / 2 / max(1, self.statistics.looked_at)
        return most / max(one.high - one.low, 1e-30)

    @property
    def looks_at(self) -> str:
        """What densities are of, in words."""
        s = self.statistics
        if not self.sampled:
            return f"all {s.count:,} positions"
        return (
            f"{s.looked_at:,} of {s.count:,} positions, drawn at random, and each example's largest"
        )

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        s = self.statistics
        keys = (
            "mean", "std", "skewness", "kurtosis", "minimum", "maximum", "density", "count", "nonfinite",
            "looked_at", "saturated",
        )  # fmt: skip
        return {
            "unit": str(self.unit), "data": self.data, "model_hash": self.model_hash, "seed": self.seed,
            "statistics": {k: getattr(s, k) for k in keys},
            "tail": {
                "threshold": s.tail.threshold, "rate": s.tail.rate, "error": s.tail.error,
                "distance": s.tail.distance, "count": s.tail.count, "share": s.tail.share,
            },
            "above_two_deviations": self.above_two,
            "bins": [
                {
                    "low": b.low, "high": b.high, "density": b.density, "seen": b.seen,
                    "density_below": self.density_below(b), "contribution": b.contribution,
                    "n_examples": b.n_examples,
                    "examples": [
                        {
                            "index": e.index, "name": e.name, "value": e.value, "position": list(e.position),
                            "before": e.before,
                        }
                        for e in b.examples
                    ],
                }
                for b in self.bins
            ],
        }  # fmt: skip

    def tables(self, texts: Mapping[int, str]) -> Iterator[Table]:
        """The ranges, highest first, with examples by name, or by text where there is one for its index."""
        rows = [
            (
                f"{b.low:.3g} to {b.high:.3g}", *self._measured(b), b.n_examples,
                "\n".join(f"{e}  {texts.get(e.index, e.name)}" for e in b.examples),
            )
            for b in reversed(self.bins)
        ]  # fmt: skip
        s = self.statistics
        title = f"{self.unit} on {self.data}: p(x) of {self.looks_at} (seed {self.seed})"
        note = (
            f"mean {s.mean:.4g}, std {s.std:.4g}, above zero {100 * s.density:.3g} %; "
            f"tail falls by exp(-{s.tail.rate:.3g} x), distance {s.tail.distance:.3f}; "
            f"{self.above_two:.0%} of the positive mean is above two std"
        )
        if s.saturated is not None:
            note += f"; at the ceiling {100 * s.saturated:.3g} %"
        if any(not b.density for b in self.bins) and self.sampled:
            note += f"; <: below 3 in the {s.looked_at:,} positions drawn, of which none is in the range (95 %)"
        columns = (
            "activation",
            "p(x)",
            "x p(x)",
            "examples with their largest here",
            "some of them",
        )
        yield Table(columns, rows, title, note)

    def _measured(self, one: Bin) -> tuple[float | str, float | str]:
        """The density of a range and what it contributes, as a table has them."""
        if one.density or not self.sampled:
            return one.density, one.contribution
        bound, width = self.density_below(one), one.high - one.low
        return f"< {bound:.2g}", f"< {max(0.0, bound * width * one.high):.2g}"


def spectrum(
    store: ActivationStore, unit: Unit, bins: int = 16, k: int = 4, seed: int = 0
) -> Spectrum:
    """Compute a unit's spectrum from a store.

    Args:
        store: a store with the unit's site.
        unit: the unit.
        bins: the number of ranges, which must divide the histogram's 64 bins. Ranges above the largest activation
            or below the smallest are left out, so that there may be fewer.
        k: the number of examples to draw from each range.
        seed: the seed of the draw.

    Raises:
        KeyError: if the site was not recorded.
        ValueError: if there is no such unit, or `bins` does not divide 64, or `k` is negative.
    """
    # The histogram has 64 bins, of which each range takes a whole number.
    if bins < 2 or 64 % bins:
        raise ValueError(f"bins {bins} must divide 64: expected 2, 4, 8, 16, 32 or 64")
    if k < 0:
        raise ValueError(f"k {k} must be 0 or more")
    statistics = store.statistics(unit)
    shares, edges = _shares(statistics, store.largest(unit))
    centers = (edges[1:] + edges[:-1]) / 2
    own = shares * centers
    # `[0]` lies below the histogram, `[1]` is its first bin.
    if statistics.minimum >= 0 and edges[1] <= 0 < edges[2]:
        # After a ReLU most of the lowest bin is exactly zero, not its center: it gets what the mean leaves for it.
        own[1] = min(own[1], max(0.0, statistics.mean - own[2:].sum()))
    borders, first = _borders(statistics, bins)
    # Sums of the fine bins from the first one of each range to that of the next.
    seen, joined, mass = (
        np.add.reduceat(x, first) for x in (statistics.histogram, shares, own.clip(min=0))
    )
    groups = _drawn(store, unit, borders, k, seed)
    made = tuple(
        Bin(
            low, high, float(joined[i] / max(high - low, 1e-30)), int(seen[i]), float(mass[i]), *groups[i]
        )
        for i, (low, high) in enumerate(pairwise(borders.tolist()))
    )  # fmt: skip
    total = own.clip(min=0).sum()
    # By the centers of bins, to the width of one bin.
    high = own.clip(min=0)[centers > statistics.mean + 2 * statistics.std].sum()
    p = store.provenance
    share = float(high / total) if total > 0 else float("nan")
    return Spectrum(unit, statistics, made, share, p.data, p.model_hash, seed)


def _shares(
    statistics: UnitStatistics, largest: Float[np.ndarray, " example"]
) -> tuple[Float[np.ndarray, " bin"], Float[np.ndarray, " border"]]:
    """The share of all activations in each bin of a histogram, and the borders of these bins.

    The outermost bins, which count what lies beyond the edges, end at the smallest and the largest activation.

    Args:
        statistics: of the unit.
        largest: the unit's largest activation on each example, which is exact.
    """
    counts = statistics.histogram
    n = max(1, int(counts.sum()))
    # The share at or above each edge. Of a rare unit's strongest activations a sample of positions may have none; but
    # each example proves one activation, its largest. So the share is at least that of examples that reach the edge
    # among all positions. The larger of two falling functions falls, and so no difference of two edges is negative.
    above = np.append(counts[::-1].cumsum()[::-1] / n, 0.0)
    finite = np.sort(largest[np.isfinite(largest)])
    reached = len(finite) - np.searchsorted(finite, statistics.edges, side="left")
    above[1:-1] = np.maximum(above[1:-1], reached / max(1, statistics.count))
    low, high = statistics.minimum, statistics.maximum
    if not np.isfinite(low):  # no activation at all
        low, high = statistics.edges[0], statistics.edges[-1]
    borders = np.concatenate([[low], statistics.edges.clip(low, high), [high]])
    return above[:-1] - above[1:], borders


def _borders(
    statistics: UnitStatistics, bins: int
) -> tuple[Float[np.ndarray, " border"], Int[np.ndarray, " range"]]:
    """The borders of ranges, and the first bin of the histogram in each; bin 0 lies below its edges."""
    edges = statistics.edges
    low, high = statistics.minimum, statistics.maximum
    if not low < high:  # one number everywhere, or none: a range of one bin's width
        low = low if np.isfinite(low) else float(edges[0])
        high = low + float(edges[1] - edges[0])
    per = BINS // bins
    # Every per-th edge: for 16 ranges edges 4, 8 … 60; the bin above edge i has the number i + 1.
    inner = np.arange(per, BINS, per)
    inner = inner[(edges[inner] > low) & (edges[inner] < high)]
    return np.concatenate([[low], edges[inner], [high]]), np.append(0, inner + 1)


def _drawn(
    store: ActivationStore, unit: Unit, borders: Float[np.ndarray, " border"], k: int, seed: int
) -> list[tuple[int, tuple[Example, ...]]]:
    """The number of examples with their largest activation in each range, and some of them, drawn at random."""
    ranked = store.top_examples(unit, len(store.provenance.examples))
    values = np.array([e.value for e in ranked])
    # Activations beyond the edges belong to the outermost ranges, as in the counts above.
    which = np.clip(np.searchsorted(borders, values, side="right") - 1, 0, len(borders) - 2)
    generator = np.random.default_rng(seed)
    found = []
    for i in range(len(borders) - 1):
        mine = np.flatnonzero(which == i)
        chosen = np.sort(generator.choice(mine, min(k, len(mine)), replace=False))
        found.append((len(mine), tuple(ranked[j] for j in chosen.tolist())))
    return found
