"""Scores of edges against those that the authors' EAP-IG gave for the same models, recorded by
`benchmarks/peer_eap_ig.py --fixture`.

Random GPT-2, Llama and Gemma 2 of two layers, and three pairs of random texts (`benchmarks.peer_eap_ig.case`); snapshot
795f560 of the repository, its device set to the CPU, TransformerLens 2.16.1; six digits of each number.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from benchmarks.peer_eap_ig import (
    FAMILIES,
    METHODS,
    TOLERANCE,
    BeforeNorm,
    Case,
    case,
    difference,
    named_scores,
    ours,
)
from circuits.discovery.streams import StreamGraph

SCORES: dict[str, dict[str, dict[str, float]]] = json.loads(
    Path(__file__).with_name("peer_eap_ig.json").read_text()
)

found = cache(case)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_authors_code(family: str, method: str) -> None:
    made: Case = found(family)
    peer = SCORES[family][method]
    graph = BeforeNorm(made.model, "head")
    assert len(peer) == 110
    assert (
        difference(named_scores(graph, ours(made, graph, method, as_theirs=True)), peer)
        <= TOLERANCE
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_differ_only_where_heads_are_normalised_after_attention(family: str) -> None:
    made: Case = found(family)
    graph = StreamGraph(made.model, "head")
    peer = SCORES[family]["EAP-IG-inputs"]
    own = named_scores(graph, ours(made, graph, "EAP-IG-inputs"))
    heads = {e for e in peer if e.startswith("a") and family == "gemma"}
    rest = peer.keys() - heads
    assert max(abs(own[e] - peer[e]) for e in rest) <= TOLERANCE * max(map(abs, peer.values()))
    assert all(abs(own[e] - peer[e]) > 1e-6 for e in heads)
