"""Random circuits, against which a found one is compared."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from circuits.discovery.graphs import EdgeGraph

Mask = Bool[np.ndarray, " edge"]

_ROUNDS = 30
"""How often edges that lie on no path are drawn again."""


def random_circuit(graph: EdgeGraph, circuit: Mask, rng: np.random.Generator) -> Mask:
    """A random circuit of the same size, with as many edges between any two kinds of parts, layer by layer.

    Edges that lie on no path from the model's input to its output are drawn again, up to a number of times; in small
    circuits a few may stay.

    Args:
        graph: the model's edges.
        circuit: the circuit that it is to be like.
        rng: the source of randomness.
    """
    classes = graph.classes
    members = {c: np.flatnonzero(classes == c) for c in np.unique(classes[circuit]).tolist()}
    wanted = {c: int(circuit[own].sum()) for c, own in members.items()}
    kept = np.zeros(len(graph), bool)
    for round_ in range(_ROUNDS):
        for c, own in members.items():
            missing = wanted[c] - int(kept[own].sum())
            kept[rng.choice(own[~kept[own]], missing, replace=False)] = True
        connected = graph.connected(kept)
        if (connected == kept).all() or round_ == _ROUNDS - 1:
            break
        kept = connected
    return kept
