"""How much two circuits have in common, and how much two of their sizes have by chance."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from circuits.discovery.graphs import Edge
from circuits.files import finite
from circuits.tables import Table


def jaccard(first: Collection[Edge], second: Collection[Edge]) -> float:
    """The edges of both circuits, as a share of the edges of either; 0 if neither has any."""
    a, b = set(first), set(second)
    return len(a & b) / max(1, len(a | b))


def shared(first: Bool[np.ndarray, " edge"], second: Bool[np.ndarray, " edge"]) -> float:
    """The same, of circuits given by which edges they keep."""
    return float((first & second).sum() / max(1, (first | second).sum()))


def chance_jaccard(first: float, second: float, n_edges: int) -> float:
    """About the Jaccard index of circuits of two sizes whose edges are drawn at random from a number of edges.

    Of a and b edges among n, a b / n are drawn twice on average.
    """
    twice = first * second / max(1, n_edges)
    return twice / max(1e-12, first + second - twice)


@dataclass(frozen=True)
class Comparison:
    """What two circuits of a model have in common.

    Attributes:
        both: the edges of both.
        only_first: the edges of the first alone.
        only_second: those of the second alone.
        n_edges: the number of edges of the whole graph.
    """

    both: tuple[Edge, ...]
    only_first: tuple[Edge, ...]
    only_second: tuple[Edge, ...]
    n_edges: int

    @property
    def jaccard(self) -> float:
        """The edges of both, as a share of the edges of either."""
        return jaccard(self.both + self.only_first, self.both + self.only_second)

    @property
    def by_chance(self) -> float:
        """That of two circuits of these sizes whose edges are drawn at random."""
        a, b = len(self.both) + len(self.only_first), len(self.both) + len(self.only_second)
        return chance_jaccard(a, b, self.n_edges)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return finite({
            "jaccard": self.jaccard, "by_chance": self.by_chance, "n_edges": self.n_edges,
            "both": [list(e) for e in self.both], "only_first": [list(e) for e in self.only_first],
            "only_second": [list(e) for e in self.only_second],
        })  # fmt: skip

    def tables(self, top: int) -> Iterator[Table | str]:
        """How much they share, and which edges only one has."""
        if not (self.only_first or self.only_second):
            yield (
                f"the same circuit: all {len(self.both)} edges are in both, nothing differs: Jaccard 1 (by chance "
                f"{self.by_chance:.2f})"
            )
            return
        yield (
            f"{len(self.both)} edges in both, {len(self.only_first)} only in the first, {len(self.only_second)} only "
            f"in the second: Jaccard {self.jaccard:.2f} (by chance {self.by_chance:.2f})"
        )
        rows = [(" -> ".join(e), "first") for e in self.only_first[:top]]
        rows += [(" -> ".join(e), "second") for e in self.only_second[:top]]
        yield Table(("edge", "only in the"), rows, "edges that one circuit lacks")


def compare_circuits(first: Sequence[Edge], second: Sequence[Edge], n_edges: int) -> Comparison:
    """Compare two circuits of one model at one grain.

    Args:
        first: the edges of one.
        second: the edges of the other.
        n_edges: the number of edges of the whole graph.
    """
    there = set(second)
    both = tuple(e for e in first if e in there)
    own = set(both)
    return Comparison(
        both,
        tuple(e for e in first if e not in own),
        tuple(e for e in second if e not in own),
        n_edges,
    )
