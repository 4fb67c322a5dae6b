"""Whether the same circuit is found again on other examples of the same task.

Scores are kept by example, so that another draw of examples needs no second run of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from circuits.discovery.comparing import chance_jaccard, shared
from circuits.discovery.graphs import Edge, Mask
from circuits.discovery.results import EdgeScores
from circuits.discovery.stored import StoredScores
from circuits.files import finite

DRAWS = 100
"""How many bootstraps are searched."""

STABLE = 0.8
"""The mean Jaccard index of bootstraps from which a search counts as stable (a bar that Méloux et al. propose)."""

Choose = Callable[[Float[np.ndarray, " edge"]], Mask]
"""A search: from the mean score of each edge to the edges that are kept."""


@dataclass(frozen=True, eq=False)
class SearchStability:
    """How much circuits that were found on other draws of the examples have in common.

    Attributes:
        shares: for each edge of the circuit, the share of bootstraps in which it was found.
        jaccard: the mean Jaccard index of two bootstraps: the share of the edges of either that are in both.
        halves: the mean Jaccard index of circuits found on two halves of the examples without one in common.
        by_chance: that of two random circuits of these sizes, about.
        draws: how many bootstraps there were.
        n_clusters: the number of independent examples that were drawn from.
    """

    shares: dict[Edge, float]
    jaccard: float
    halves: float
    by_chance: float
    draws: int
    n_clusters: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return finite({
            "jaccard": self.jaccard, "halves": self.halves, "by_chance": self.by_chance, "draws": self.draws,
            "n_clusters": self.n_clusters,
            "shares": [{"edge": " -> ".join(e), "share": s} for e, s in self.shares.items()],
        })  # fmt: skip

    def lines(self) -> Iterator[str]:
        """How stable the circuit is, in words."""
        always = sum(share >= 0.95 for share in self.shares.values())
        word = "stable" if self.jaccard >= STABLE else "not stable"
        yield (
            f"{word}: circuits of {self.draws} bootstraps have a mean Jaccard index of {self.jaccard:.2f}, of disjoint "
            f"halves {self.halves:.2f} (by chance {self.by_chance:.2f}); {always} of {len(self.shares)} edges are in "
            "95 % of them or more"
        )


def stability(
    scores: EdgeScores,
    circuit: Mask,
    choose: Choose,
    draws: int = DRAWS,
    seed: int = 0,
) -> SearchStability:
    """Search again on bootstraps of the examples, and on disjoint halves.

    Examples of one template instance are drawn together, since they are not independent.

    Args:
        scores: the scores by example.
        circuit: the edges that were found on all examples.
        choose: the search.
        draws: how many bootstraps.
        seed: of the draws.

    Raises:
        ValueError: if there are fewer than two independent examples, or fewer than two draws.
    """
    _, clusters = np.unique(np.asarray(scores.clusters), return_inverse=True)
    n = int(clusters.max()) + 1
    if n < 2 or draws < 2:
        raise ValueError(
            f"stability needs at least 2 draws of at least 2 independent examples: got {draws} of {n}"
        )
    member = np.zeros((n, len(clusters)))
    member[clusters, np.arange(len(clusters))] = 1
    values, counts = scores.values, member.sum(1)
    sums = None if isinstance(values, StoredScores) else member @ values
    rng = np.random.default_rng(seed)

    def found(times: Float[np.ndarray, " cluster"]) -> Mask:
        total = values.summed(times @ member) if isinstance(values, StoredScores) else times @ sums
        return choose(total / (times @ counts))

    # Of each draw the edges that were found; all others are in none of them.
    which = [
        np.flatnonzero(found(rng.multinomial(n, np.full(n, 1 / n)).astype(float)))
        for _ in range(draws)
    ]
    own = np.flatnonzero(circuit)
    used = np.unique(np.concatenate([own, *which]))
    drawn = np.stack([np.isin(used, some, assume_unique=True) for some in which])
    halves = []
    for _ in range(max(1, draws // 10)):
        first = np.zeros(n)
        first[rng.permutation(n)[: n // 2]] = 1
        halves.append(shared(found(first), found(1 - first)))
    size = float(drawn.sum(1).mean())
    shares = drawn[:, np.searchsorted(used, own)].mean(0).tolist()
    return SearchStability(
        {scores.edges[e]: s for e, s in zip(own.tolist(), shares, strict=True)}, _mean_jaccard(drawn),
        float(np.mean(halves)), chance_jaccard(size, size, len(circuit)), draws, n,
    )  # fmt: skip


def _mean_jaccard(circuits: Bool[np.ndarray, "circuit edge"]) -> float:
    """The mean Jaccard index of every two circuits."""
    both = circuits.astype(float) @ circuits.T
    sizes = np.diag(both)
    either = sizes[:, None] + sizes[None] - both
    pairs = np.triu_indices(len(circuits), 1)
    return float((both[pairs] / np.maximum(either[pairs], 1)).mean())
