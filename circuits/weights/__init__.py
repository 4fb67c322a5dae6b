"""Weights between units: raw, expanded through what lies between, and in factors (layer 4)."""

from circuits.weights.connections import Connection, incoming, outgoing
from circuits.weights.expanded import ExpandedWeights, expand_weights
from circuits.weights.raw import LayerWeights, connected_pairs, raw_weights

__all__ = [
    "Connection",
    "ExpandedWeights",
    "LayerWeights",
    "connected_pairs",
    "expand_weights",
    "incoming",
    "outgoing",
    "raw_weights",
]
