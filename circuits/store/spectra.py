"""The spectrum of a unit's activations: their density, what each range contributes to the mean, and examples.

After Cammarata et al. 2020, "Curve Detectors": the density of activations p(x) has an exponential tail, and x p(x)
shows which activations make up the expected value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.store.reading import ActivationStore, Example, UnitStatistics
from circuits.tables import Table
from circuits.units import Unit


@dataclass(frozen=True)
class Bin:
    """A range of activations.

    Attributes:
        low: the lower end.
        high: the upper end.
        density: the probability density of activations in the range.
        contribution: what activations in the range add to the mean of positive activations: the integral of x p(x).
        n_examples: the number of examples with their largest activation in the range.
        examples: some of these, drawn at random; the strongest first.
    """

    low: float
    high: float
    density: float
    contribution: float
    n_examples: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A unit's activations on a dataset, from its smallest to its largest.

    Attributes:
        unit: the unit.
        statistics: its moments, and the exponential fitted to the tail.
        bins: ranges of equal width between the histogram's edges; the outer ones include what lies beyond.
        above_two: the share of the sum of positive activations that comes from activations more than two standard
            deviations above the mean.
        data: the name of the dataset.
        model_hash: the hash of the weights.
        seed: the seed of the draw of examples.
    """

    unit: Unit
    statistics: UnitStatistics
    bins: tuple[Bin, ...]
    above_two: float
    data: str
    model_hash: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        s = self.statistics
        keys = (
            "mean", "std", "skewness", "kurtosis", "minimum", "maximum", "density", "count", "nonfinite"
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
                    "low": b.low, "high": b.high, "density": b.density, "contribution": b.contribution,
                    "n_examples": b.n_examples,
                    "examples": [
                        {"index": e.index, "name": e.name, "value": e.value, "position": list(e.position)}
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
                f"{b.low:.3g} to {b.high:.3g}", b.density, b.contribution, b.n_examples,
                "\n".join(f"{e.value:.3g}  {texts.get(e.index, e.name)}" for e in b.examples),
            )
            for b in reversed(self.bins) if b.density or b.n_examples
        ]  # fmt: skip
        s = self.statistics
        title = f"{self.unit} on {self.data}, {s.count} activations (seed {self.seed})"
        note = (
            f"mean {s.mean:.4g}, std {s.std:.4g}, above zero {s.density:.2%}; tail falls by exp(-{s.tail.rate:.3g} x), "
            f"distance {s.tail.distance:.3f}; {self.above_two:.0%} of the positive mean is above two std"
        )
        columns = (
            "activation",
            "p(x)",
            "x p(x)",
            "examples with their largest here",
            "some of them",
        )
        yield Table(columns, rows, title, note)


def spectrum(
    store: ActivationStore, unit: Unit, bins: int = 16, k: int = 4, seed: int = 0
) -> Spectrum:
    """Compute a unit's spectrum from a store.

    Args:
        store: a store with the unit's site.
        unit: the unit.
        bins: the number of ranges, which must divide the histogram's 64 bins.
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
    edges, counts = statistics.edges, statistics.histogram.astype(np.float64)
    n = max(1.0, counts.sum())
    inner = counts[1:-1].copy()
    centers = (edges[1:] + edges[:-1]) / 2
    own = inner * centers
    # Activations in a bin count as its center; those beyond the edges as halfway between the edge and the extreme.
    below, above = counts[0], counts[-1]
    inner[0], inner[-1] = inner[0] + below, inner[-1] + above
    if below:
        own[0] += below * (statistics.minimum + edges[0]) / 2
    if above:
        own[-1] += above * (statistics.maximum + edges[-1]) / 2
    if statistics.minimum >= 0 and edges[0] <= 0 < edges[1]:
        # After a ReLU most of the lowest bin is exactly zero, not its center: it gets what the mean leaves for it.
        own[0] = min(own[0], max(0.0, statistics.mean * n - own[1:].sum()))
    per = 64 // bins
    joined = inner.reshape(bins, per).sum(1)
    mass = own.clip(min=0).reshape(bins, per).sum(1)
    # Every per-th edge: for 16 ranges edges 0, 4, 8 … 64.
    borders = edges[::per]
    groups = _drawn(store, unit, borders, k, seed)
    widths = np.diff(borders)
    made = tuple(
        Bin(
            float(borders[i]), float(borders[i + 1]), float(joined[i] / n / max(widths[i], 1e-30)),
            float(mass[i] / n), groups[i][0], groups[i][1],
        )
        for i in range(bins)
    )  # fmt: skip
    total = own.clip(min=0).sum()
    # By the centers of bins, to the width of one bin.
    high = own.clip(min=0)[centers > statistics.mean + 2 * statistics.std].sum()
    p = store.provenance
    share = float(high / total) if total > 0 else float("nan")
    return Spectrum(unit, statistics, made, share, p.data, p.model_hash, seed)


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
