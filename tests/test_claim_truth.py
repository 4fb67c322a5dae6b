"""Verdicts on networks whose circuits are known: the true circuit, and what is not quite it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from circuits.claims import TESTS, TaskSpec
from circuits.claims.parts import EdgeParts, Mask
from circuits.claims.subject import Subject, load_claims_task
from circuits.claims.verdicts import Level, Measured
from circuits.discovery import edge_graph
from circuits.discovery.truth import known_edges
from circuits.models.zoo.loading import load_model

LEVEL = Level(0.05, 3)

TABLE = {
    # what theory demands:    sufficient  necessary  minimal
    "true":                  ("holds",    "holds",   "holds"),
    "less its last edge":    ("refuted",  "refuted", "refuted"),
    "plus a dead edge":      ("holds",    "holds",   "refuted"),
    "other edges":           ("refuted",  "refuted", "refuted"),
    "complement":            ("refuted",  "refuted", "refuted"),
}  # fmt: skip
"""By circuit. Without the last edge nothing reaches the output, so that no part of what is left is needed; outside is
the last edge, which alone restores everything if it carries what it carried in the clean run. Random edges outside of
the true circuit neither carry nor take away anything."""

QUESTIONS = (("faithfulness", {}), ("knockout", {}), ("minimality", {"inflated": 0}))


@pytest.fixture(scope="module", params=["induction-by-hand", "addition-by-hand"])
def parts(request: pytest.FixtureRequest) -> EdgeParts:
    return EdgeParts(edge_graph(load_model(request.param)))


def circuits(parts: EdgeParts, seed: int) -> dict[str, Mask]:
    true = known_edges(parts.graph)
    assert true is not None
    rng = np.random.default_rng(seed)
    outside = rng.permutation(np.flatnonzero(~true))
    less, more, other = true.copy(), true.copy(), np.zeros_like(true)
    less[max(np.flatnonzero(true), key=lambda e: parts.graph.ends[e, 1])] = False
    more[outside[0]] = True
    other[outside[: true.sum()]] = True
    return {
        "true": true, "less its last edge": less, "plus a dead edge": more, "other edges": other, "complement": ~true,
    }  # fmt: skip


def verdict(subject: Subject, test: str, **given: object) -> str:
    made: Measured = TESTS[test].run(subject, TESTS[test].settings(given, test), LEVEL)
    assert Measured.from_dict(made.to_dict()).verdict(0.05) == made.verdict(0.05)
    return made.verdict(0.05)[0]


def check(parts: EdgeParts, seed: int) -> None:
    task = load_claims_task(parts.model, TaskSpec(examples=24, seed=seed))
    subject = Subject(parts.model, task, parts, seed=seed)
    for name, kept in circuits(parts, seed).items():
        own = replace(subject, kept=kept)
        found = tuple(verdict(own, test, **given) for test, given in QUESTIONS)
        assert found == TABLE[name], f"{name}, seed {seed}"


def test_the_verdict_is_the_one_that_theory_demands(parts: EdgeParts):
    check(parts, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(0, 50, 10))
def test_it_is_at_fifty_of_fifty_seeds(parts: EdgeParts, first: int):
    for seed in range(first, first + 10):
        check(parts, seed)
