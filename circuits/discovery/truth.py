"""Edges that are known to compute a behaviour, and how well scores find them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from circuits.cleanroom import addition, induction
from circuits.discovery.graphs import LIMIT, EdgeGraph, Mask
from circuits.discovery.results import ranked
from circuits.files import finite

KNOWN = {"induction-by-hand": induction.TRUE_EDGES, "addition-by-hand": addition.TRUE_EDGES}
"""The edges of models whose weights were written by hand."""


@dataclass(frozen=True)
class Recovered:
    """How well a ranking of edges finds those that are known.

    Attributes:
        n_true: the number of edges that are known.
        n_edges: the number of all edges.
        auroc: the probability that an edge which is known ranks above one that is not, ties counted half.
        precision: the share of the `n_true` strongest edges that are known.
    """

    n_true: int
    n_edges: int
    auroc: float
    precision: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return finite(asdict(self) | {"precision_by_chance": self.n_true / self.n_edges})

    def lines(self) -> Iterator[str]:
        """How well, in words."""
        yield (
            f"{self.n_true} of {self.n_edges} edges are known to be true: AUROC {self.auroc:.3f} (by chance 0.5), "
            f"precision among the {self.n_true} strongest {self.precision:.2f} (by chance "
            f"{self.n_true / self.n_edges:.2f})"
        )


def recovered(worth: Float[np.ndarray, " edge"], truth: Mask) -> Recovered:
    """Compare a ranking of all edges with those that are known to be true.

    Args:
        worth: how important each edge is by its score.
        truth: which edges are true.

    Raises:
        ValueError: if none are, or all.
    """
    k, n = int(truth.sum()), len(truth)
    if not 0 < k < n:
        raise ValueError(f"truth: {k} of {n} edges are true; expected some and not all")
    # Of k true edges the smallest sum of ranks is k (k + 1) / 2, and the largest is k (n - k) more.
    auroc = (rankdata(worth)[truth].sum() - k * (k + 1) / 2) / (k * (n - k))
    return Recovered(k, n, float(auroc), float(truth[ranked(worth, k)].mean()))


def known_edges(graph: EdgeGraph, shift: int = 0) -> Mask | None:
    """Which edges of a model with weights written by hand do something; None of other models, or at a finer grain.

    Args:
        graph: the model's edges.
        shift: by how many positions the counterpart's position embedding is rolled: with 0 positions are the same in
            both runs, and edges from them carry nothing.
    """
    edges = KNOWN.get(graph.model.name)
    if edges is None or len(graph) > LIMIT or not set(edges) <= set(graph.edges):
        return None
    return graph.mask([edge for edge in edges if shift or edge[0] != "position"])
