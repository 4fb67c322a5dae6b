"""Claims that are proved: every input is enumerated."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits.claims import TESTS, TaskSpec
from circuits.claims.abstraction.specification import domain, tokens_of
from circuits.claims.parts import EdgeParts
from circuits.claims.subject import Subject, load_claims_task
from circuits.claims.verdicts import Level, Measured
from circuits.discovery import edge_graph
from circuits.discovery.truth import known_edges
from circuits.environment import TRUST_PYTHON
from circuits.models.zoo.loading import load_model


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = load_model("addition-by-hand")
    parts = EdgeParts(edge_graph(model), batch=512)
    return Subject(
        model, load_claims_task(model, TaskSpec(examples=20)), parts, known_edges(parts.graph)
    )


def proved(subject: Subject, **given: Any) -> Measured:
    test = TESTS["specification"]
    return test.run(subject, test.settings(given, "specification"), Level(0.05, 5))


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_model_circuit_and_sum_are_the_same_on_every_input(subject: Subject, ablation: str):
    made = proved(
        subject, algorithm="addition", tokens=["0-112", "0-112", "113"], ablation=ablation
    )
    assert [(q.value, q.n, q.exact) for q in made.quantities] == [(1.0, 113**2, True)] * 2
    assert made.verdict(0.05)[0] == "holds"
    assert made.notes[0] == "model = addition: proved on all 12769 inputs, not sampled"
    assert made.notes[1].startswith(
        f"circuit ({ablation} ablation) = addition: proved on all 12769 inputs"
    )
    assert Measured.from_dict(made.to_dict()).verdict(0.05) == made.verdict(0.05)


def test_one_wrong_input_refutes(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TRUST_PYTHON, "1")
    (tmp_path / "nearly.py").write_text(
        "def f(inputs, let):\n    a, b, p = inputs\n    return (a + b + (a == 100 and b == 50)) % p\n"
    )
    own = replace(subject, kept=None, parts=None, folder=tmp_path)
    made = proved(own, algorithm="nearly.py:f", tokens=["0-112", "0-112", "113"])
    assert made.quantities[0].value == 1 - 1 / 113**2
    assert made.verdict(0.05) == (
        "refuted",
        "share of all inputs on which the model gives the algorithm's answer 0.9999 (exactly) is outside the claimed "
        "at least 1",
    )
    assert "on 1 of all 12769 inputs, such as '100 50 113'" in made.notes[0]


def test_a_circuit_without_its_last_edge_is_refuted(subject: Subject):
    _, kept = subject.circuit
    less = kept.copy()
    less[np.flatnonzero(kept)[-1]] = False
    made = proved(replace(subject, kept=less), algorithm="addition", tokens=["3-9", "5-20", "113"])
    assert made.quantities[0].value == 1.0
    assert made.quantities[1].value < 0.2
    assert made.verdict(0.05)[0] == "refuted"


def test_the_models_own_pass_says_the_same(subject: Subject):
    """First choices of one plain pass over every input."""
    texts = torch.tensor(domain(subject.model, ["0-112", "0-112", "113"]))
    module: Any = subject.model.module
    with torch.no_grad():
        first = module(texts)[:, -1].argmax(-1)
    right = (first == (texts[:, 0] + texts[:, 1]) % 113).double().mean()
    made = proved(
        replace(subject, kept=None, parts=None),
        algorithm="addition",
        tokens=["0-112", "0-112", "113"],
    )
    assert abs(float(right) - made.quantities[0].value) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["0-x"], "tokens '0-x': expected tokens of one position, such as 0-112 or 1,4-6"),
        (["9-3"], "tokens '9-3': expected tokens"),
        (["0-999999999"], "expected tokens of one position"),
        (["0-114", "1", "2"], "tokens: 114, expected 0 to 113"),
        (["0-112"] * 3, "tokens: they make 1442897 texts, expected at most 200000"),
        (["0"] * 4, "tokens: 4 positions, expected 1 to 3"),
    ],
)
def test_what_cannot_be_enumerated_is_refused(subject: Subject, tokens: list[str], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        proved(subject, algorithm="addition", tokens=tokens)
    assert tokens_of("3, 1-2,3") == (3, 1, 2)
