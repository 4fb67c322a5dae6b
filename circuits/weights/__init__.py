"""Weights between units: of single layers, expanded through everything in between, and factored."""

from circuits.weights.connections import Connection, both_ways, incoming, outgoing
from circuits.weights.expanded import ExpandedWeights, expand_weights
from circuits.weights.factors import Factors, factorize
from circuits.weights.graphs import build_graph, expanded_block
from circuits.weights.heads import (
    Composition,
    OVCircuit,
    QKCircuit,
    direct_logits,
    head_composition,
    neuron_directions,
    ov_circuit,
    qk_circuit,
)
from circuits.weights.live import LiveGraph
from circuits.weights.lone import Gate, Through, gate_on, incoming_through
from circuits.weights.raw import LayerWeights, connected_pairs, raw_weights
from circuits.weights.token_pairs import TokenPair, TokenPairs, joined_tokens, written_logits

__all__ = [
    "Composition",
    "Connection",
    "ExpandedWeights",
    "Factors",
    "Gate",
    "LayerWeights",
    "LiveGraph",
    "OVCircuit",
    "QKCircuit",
    "Through",
    "TokenPair",
    "TokenPairs",
    "both_ways",
    "build_graph",
    "connected_pairs",
    "direct_logits",
    "expand_weights",
    "expanded_block",
    "factorize",
    "gate_on",
    "head_composition",
    "incoming",
    "incoming_through",
    "joined_tokens",
    "neuron_directions",
    "outgoing",
    "ov_circuit",
    "qk_circuit",
    "raw_weights",
    "written_logits",
]
