"""Random circuits, against which a found one is compared."""

from __future__ import annotations

import numpy as np

from circuits.discovery.graphs import EdgeGraph, Mask

_ROUNDS = 30
"""How often edges that lie on no path are drawn again."""


def random_circuit(graph: EdgeGraph, circuit: Mask, rng: np.random.Generator) -> Mask:
    """A random circuit of the same size, with as many edges between any two kinds of parts, layer by layer.

    Edges that lie on no path from the model's input to its output are drawn again, up to a number of times. What is
    left of them is taken out, and other edges between the same kinds of parts are drawn among those that lie on a path
    with the edges that stay; where there are none, they are drawn at random and lie on no path. In a graph of many
    channels most edges drawn at random lead nowhere, so that the last step is the usual one: it favours parts that the
    circuit has already.

    Args:
        graph: the model's edges.
        circuit: the circuit that it is to be like.
        rng: the source of randomness.
    """
    classes = graph.classes
    members = {c: np.flatnonzero(classes == c) for c in np.unique(classes[circuit]).tolist()}
    wanted = {c: int(circuit[own].sum()) for c, own in members.items()}
    kept = np.zeros(len(graph), bool)

    def drawn(some: Mask) -> Mask:
        """With as many of some edges as are missing, and there are, between each two kinds of parts."""
        more = kept.copy()
        for c, own in members.items():
            free, missing = own[some[own] & ~kept[own]], wanted[c] - int(kept[own].sum())
            more[rng.choice(free, min(missing, len(free)), replace=False)] = True
        return more

    every = np.ones(len(graph), bool)
    for _ in range(_ROUNDS):
        full = drawn(every)
        kept = graph.connected(full)
        if (kept == full).all():
            return kept
    while (more := drawn(graph.attachable(kept))).sum() > kept.sum():
        kept = more
    return drawn(every)
