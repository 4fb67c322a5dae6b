"""Scores of edges, by example, with where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from circuits.discovery.graphs import LIMIT, Edge
from circuits.discovery.stored import StoredScores
from circuits.experiments.outcomes import Record
from circuits.experiments.statistics import Interval, mean_intervals
from circuits.files import finite
from circuits.tables import Table, between

Ranking = Literal["absolute", "signed"]
"""By size, or with those first whose removal makes the metric worse."""

SIZES = {
    "weights": "norm of the path's weight matrix",
    "activations": "root mean square of what the source adds to what the target is given",
}
"""Methods whose scores are sizes, by what they are the size of: they have no sign, and estimate no change of a metric.
"""

UNESTIMATED = ("exact", "random", *SIZES)
"""Methods whose scores are no estimates of an effect: they have no completeness residual, and nothing to be checked
against."""

_LISTED = 1000
"""How many edges of a large graph are listed."""


def importance(
    mean: Float[np.ndarray, " edge"], better: int, ranking: Ranking
) -> Float[np.ndarray, " edge"]:
    """How important each edge is by its mean score: its size, or how much worse its removal makes the metric.

    Where neither direction of the metric is better, more counts as better.

    Raises:
        ValueError: if the ranking is unknown.
    """
    if ranking == "absolute":
        return np.abs(mean)
    if ranking == "signed":
        return -(better or 1) * mean
    raise ValueError(f"ranking {ranking!r}: expected absolute or signed")


def ranked(worth: Float[np.ndarray, " edge"], n: int | None = None) -> np.ndarray:
    """The edges' numbers, the most important first, or the first n of them; equals keep the order of the graph."""
    if n is None or len(worth) <= LIMIT or n >= len(worth):
        return np.argsort(-worth, kind="stable")[:n]
    # Of a large graph only those are sorted that are asked for.
    some = np.flatnonzero(worth >= np.partition(worth, len(worth) - n)[len(worth) - n])
    return some[np.argsort(-worth[some], kind="stable")][:n]


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """What each edge is worth on each example.

    A score is the change of the metric when the edge carries what it carries in the other run, or an estimate of it. An
    edge that speaks for the answer has a negative score under a metric of which more is better. Those of `SIZES` are no
    changes.

    Attributes:
        method: how they were computed.
        settings: with which settings.
        edges: the names of each edge's source and target.
        values: the scores, example x edge; of a large graph they lie in files.
        clean: the metric on each example, with no edge patched.
        corrupted: the metric with every edge patched.
        input_edges: the numbers of the edges that leave the model's input; what these carry adds up to the whole change
            of the input.
        metric: the metric's name.
        unit: its unit.
        better: 1 if more of it is better, -1 if less is.
        clusters: a number for each example, shared by those that are not independent.
        record: model, task, seed and versions.
        notes: what is said of the scores as a whole.
    """

    method: str
    settings: Mapping[str, Any]
    edges: Sequence[Edge]
    values: Float[np.ndarray, "example edge"] | StoredScores
    clean: Float[np.ndarray, " example"]
    corrupted: Float[np.ndarray, " example"]
    input_edges: tuple[int, ...]
    metric: str
    unit: str
    better: int
    clusters: tuple[int, ...]
    record: Record
    notes: tuple[str, ...] = field(default=())

    @property
    def mean(self) -> Float[np.ndarray, " edge"]:
        """The mean score of each edge over examples."""
        if isinstance(self.values, StoredScores):
            return self.values.mean
        return self.values.mean(0, dtype=np.float64)

    def of(self, edges: np.ndarray) -> Float[np.ndarray, "example chosen"]:
        """The scores of some edges by example."""
        if isinstance(self.values, StoredScores):
            return self.values.of(edges)
        return self.values[:, edges]

    @property
    def in_memory(self) -> Float[np.ndarray, "example edge"]:
        """The scores of all edges by example.

        Raises:
            ValueError: if they lie in files.
        """
        if isinstance(self.values, StoredScores):
            raise ValueError(
                f"scores of {len(self.edges)} edges lie in files, and what is asked for needs all of them at once: "
                f"expected a graph of at most {LIMIT} edges"
            )
        return self.values

    def order(self, ranking: Ranking = "absolute", n: int | None = None) -> np.ndarray:
        """The edges' numbers, the most important first, or the first n; equals keep the order of the graph."""
        return ranked(self.worth(ranking), n)

    def worth(self, ranking: Ranking = "absolute") -> Float[np.ndarray, " edge"]:
        """How important each edge is.

        Raises:
            ValueError: if the ranking is unknown, or `signed` for scores that have no sign.
        """
        if ranking == "signed" and self.method in SIZES:
            raise ValueError(
                f"ranking signed: scores by {self.method} have no sign; expected absolute"
            )
        return self.importance(self.mean, ranking)

    def importance(
        self, mean: Float[np.ndarray, " edge"], ranking: Ranking
    ) -> Float[np.ndarray, " edge"]:
        """How important each edge is by another mean of its scores, such as that of a bootstrap."""
        return importance(self.sign * mean, self.better, ranking)

    @property
    def completeness(self) -> float:
        """The completeness residual: how far the scores of the input's edges are from adding up to the whole effect.

        |sum of scores - (m(0) - m(N))| / |m(0) - m(N)|; for exact integration along a path between the inputs it is
        zero (Sundararajan et al. 2017). NaN if there is no effect, or scores are no estimates.
        """
        if self.method in UNESTIMATED:
            return float("nan")
        whole = float((self.corrupted - self.clean).mean())
        made = float(self.mean[list(self.input_edges)].sum())
        return abs(made - whole) / abs(whole) if whole else float("nan")

    def intervals(self, edges: np.ndarray) -> list[Interval]:
        """The mean scores of some edges with 95 % intervals (over clusters of examples)."""
        return mean_intervals(self.of(edges).T, self.clusters, self.record.seed)

    def to_dict(self, top: int | None = None) -> dict[str, Any]:
        """As JSON has it, the most important edges first; None for what is not finite.

        Args:
            top: how many edges; all if None, or 1,000 of a large graph.
        """
        if top is None and isinstance(self.values, StoredScores):
            top = _LISTED
        order = self.order(n=top)
        rows = [
            {"source": self.edges[e][0], "target": self.edges[e][1], "score": i.value, "low": i.low, "high": i.high}
            for e, i in zip(order.tolist(), self.intervals(order), strict=True)
        ]  # fmt: skip
        return finite({
            "method": self.method, "settings": dict(self.settings), "metric": self.metric, "unit": self.unit,
            "clean": float(self.clean.mean()), "corrupted": float(self.corrupted.mean()),
            "completeness_residual": self.completeness, "n_edges": len(self.edges), "edges": rows,
            "notes": list(self.notes), "record": asdict(self.record),
        })  # fmt: skip

    @property
    def sign(self) -> int:
        """1 if a score is the change of the metric by removing an edge, -1 if it is that by restoring one."""
        return -1 if self.settings.get("direction") == "denoising" else 1

    @property
    def _doing(self) -> str:
        """What is done to an edge, in words."""
        if self.sign < 0:
            return "restoring an edge where every edge is removed"
        return "removing an edge"

    def tables(self, top: int) -> Iterator[Table | str]:
        """The edges with the largest scores, and what is said of all."""
        # Effects of single edges need not add up: what is left over is no error of theirs.
        order = self.order(n=top)
        rows = [
            (" -> ".join(self.edges[e]), i.value, between(i.low, i.high))
            for e, i in zip(order.tolist(), self.intervals(order), strict=True)
        ]
        change = f"change of {self.metric} ({self.unit or 'its own unit'}) by {self._doing}"
        title = (
            f"{self.method}: {SIZES.get(self.method, change)}; {len(rows)} of {len(self.edges)} edges, "
            f"{self.record.measured_on}, seed {self.record.seed}"
        )
        yield Table(("edge", "score", "95 % interval"), rows, title)
        yield (
            f"{self.metric}: {self.clean.mean():.4g} intact, {self.corrupted.mean():.4g} with every edge removed"
            + (
                ""
                if self.method in UNESTIMATED
                else f"; completeness residual {self.completeness:.2g}"
            )
        )
        yield from self.notes
