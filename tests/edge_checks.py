"""What is asked of edges of every kind: that circuits are what they are by definition, and the two ends the runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.discovery import EdgeGraph, Runs
from circuits.discovery.searching import values_of
from circuits.tasks import Task
from tests.edge_oracle import Oracle


def both_ends(runs: Runs) -> Tensor:
    """The metric with every edge patched, and with none, of each example of a task of one batch, by one pass."""
    (pair,) = runs.pairs()
    n = len(runs.graph)
    return runs.patched(pair, torch.stack([torch.ones(n), torch.zeros(n)]))


def check_ends(graph: EdgeGraph, task: Task, metric: Callable[[Tensor], Tensor]) -> None:
    """Every edge patched is the corrupted run, and none the clean one, to the bit.

    Args:
        graph: the edges of a model of texts.
        task: one batch with counterparts.
        metric: the task's, from logits.
    """
    (pair,) = (runs := Runs(graph, task)).pairs()
    assert pair.part.counterparts is not None
    none, full = both_ends(runs)
    # In a batch of the same size, since other sizes round differently.
    times = 2 * graph.rows(graph.slopes)
    corrupted, clean = (
        metric(graph.model.logits(tokens.repeat(times, 1))).double()
        for tokens in (pair.part.counterparts, pair.part.inputs)
    )
    assert torch.equal(none, corrupted[: len(none)])
    assert torch.equal(full, clean[-len(none) :])


def check_circuits(runs: Runs, oracle: Oracle, circuits: Bool[np.ndarray, "circuit edge"]) -> None:
    """The metric of some circuits is what it is by definition, on each example."""
    edges = runs.graph.edges
    wanted = [
        oracle.circuit([e for e, kept in zip(edges, row, strict=True) if kept]) for row in circuits
    ]
    found = torch.from_numpy(values_of(runs, list(circuits)))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
