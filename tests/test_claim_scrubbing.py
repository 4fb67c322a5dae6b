"""Causal scrubbing: the right hypothesis loses nothing, a wrong one does, and one that makes no sense is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.claims import TESTS, TaskSpec
from circuits.claims.abstraction.scrubbing import Hypothesis, Scrubbing, node_of
from circuits.claims.subject import Subject, load_claims_task
from circuits.claims.verdicts import Level, Measured
from circuits.discovery import edge_graph
from circuits.discovery.streams import StreamGraph
from circuits.environment import TRUST_PYTHON
from circuits.models.zoo.loading import load_model

INDUCTION = [
    "position -> 0.0.q", "position -> 0.0.k", "token -> 0.0.v", "token -> 1.0.q", "0.0 -> 1.0.k", "token -> 1.0.v",
    "1.0 -> logits",
]  # fmt: skip
ADDITION = ["token -> 0.0.v", "0.0 -> mlp:0", "mlp:0 -> logits"]


def subject_of(name: str, examples: int) -> Subject:
    model = load_model(name)
    return Subject(model, load_claims_task(model, TaskSpec(examples=examples)))


@pytest.fixture(scope="module")
def induction() -> Subject:
    return subject_of("induction-by-hand", 120)


@pytest.fixture(scope="module")
def addition() -> Subject:
    return subject_of("addition-by-hand", 500)


def scrubbed(subject: Subject, **given: Any) -> Measured:
    test = TESTS["scrubbing"]
    made = test.run(subject, test.settings(given, "scrubbing"), Level(0.05, 1))
    assert Measured.from_dict(made.to_dict()).verdict(0.05) == made.verdict(0.05)
    return made


def test_the_right_hypothesis_recovers_all_and_a_wrong_one_less(induction: Subject):
    right = scrubbed(
        induction, algorithm="induction", edges=INDUCTION, variables=["1.0: copied"], draws=2
    )
    assert abs(right.quantities[0].value - 1) < 1e-6
    assert right.verdict(0.05)[0] == "holds"
    # Without the head of the layer before, keys come from a random example.
    less = [e for e in INDUCTION if not e.startswith("0.0") and "-> 0.0" not in e]
    wrong = scrubbed(
        induction, algorithm="induction", edges=less, variables=["1.0: copied"], draws=2
    )
    assert 0.2 < wrong.quantities[0].value < 0.8
    assert wrong.verdict(0.05)[0] == "refuted"
    # Another head carries nothing: as good as random examples.
    other = scrubbed(induction, algorithm="induction", edges=["1.1 -> logits"], draws=2)
    assert abs(other.quantities[0].value) < 0.3
    assert other.verdict(0.05)[0] == "refuted"


def test_a_variable_may_be_resampled_where_it_is_the_same(addition: Subject):
    made = scrubbed(addition, algorithm="addition", edges=ADDITION, variables=["mlp:0: sum"])
    assert made.quantities[0].value > 0.995
    assert made.verdict(0.05)[0] == "holds"
    found = re.fullmatch("mlp:0 may come from ([0-9.]+) examples with the same sum", made.notes[2])
    assert found is not None
    assert float(found[1]) > 2


@pytest.fixture
def halves(addition: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """With an algorithm in a file, half.py:f, that names both numbers."""
    monkeypatch.setenv(TRUST_PYTHON, "1")
    (tmp_path / "half.py").write_text(
        "def f(inputs, let):\n    return (let('first', inputs[0]) + let('second', inputs[1])) % 113\n"
    )
    return replace(addition, folder=tmp_path)


def test_a_variable_that_says_too_little_is_refuted(halves: Subject):
    made = scrubbed(halves, algorithm="half.py:f", edges=ADDITION, variables=["mlp:0: first"])
    assert made.quantities[0].value < 0.5
    assert made.verdict(0.05)[0] == "refuted"
    # The answer says as much as the sum.
    made = scrubbed(halves, algorithm="half.py:f", edges=ADDITION, variables=["mlp:0: answer"])
    assert made.verdict(0.05)[0] == "holds"


def test_plain_hooks_recover_the_same(halves: Subject):
    """The same from the definition: the model's own hooks, sums of what parts write, and the same draws."""
    draws, subject = 2, halves
    made = scrubbed(
        subject, algorithm="half.py:f", edges=ADDITION, variables=["mlp:0: first"], draws=draws
    )
    tokens = torch.tensor([subject.test.examples.tokens(i) for i in range(len(subject.test))])
    sums = ((tokens[:, 0] + tokens[:, 1]) % 113).numpy()
    first = tokens[:, 0].numpy()
    module: Any = subject.model.module
    w = {name: value.detach() for name, value in subject.model.parameters.items()}
    names = (
        "blocks.0.attn.hook_z",
        "blocks.0.hook_resid_mid",
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_resid_post",
    )
    kept: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[[Tensor, Any], None]:
        return lambda value, hook: kept.update({name: value.clone()})

    with torch.no_grad():
        module.run_with_hooks(tokens, fwd_hooks=[(name, noting(name)) for name in names])
    z, middle, written, after = (kept[name] for name in names)
    head = z[:, :, 0] @ w["blocks.0.attn.o.weight"][:, :10].T

    def loss(stream: Tensor) -> np.ndarray:
        logits = (stream @ w["unembed.weight"].T).double()  # its biases are 0
        return -logits.log_softmax(-1)[np.arange(len(sums)), sums].numpy()

    rng, n = np.random.default_rng(subject.seed), len(sums)
    random, scrub = np.zeros(n), np.zeros(n)
    for _ in range(draws):
        random += loss(after[rng.integers(n, size=n), -1]) / draws
        like = np.array([rng.choice(np.flatnonzero(first == a)) for a in first])
        rng.integers(n, size=n)  # all that the head reads comes from the example itself
        given = middle[(r := rng.integers(n, size=n))] - head[r] + head[like]
        hidden = (given @ w["blocks.0.mlp.in.weight"].T + w["blocks.0.mlp.in.bias"]).relu()
        mlp = hidden @ w["blocks.0.mlp.out.weight"].T + w["blocks.0.mlp.out.bias"]
        last = rng.integers(n, size=n)
        scrub += loss((after[last] - written[last] + mlp)[:, -1]) / draws
    recovered = (random.mean() - scrub.mean()) / (random.mean() - loss(after[:, -1]).mean())
    assert abs(recovered - made.quantities[0].value) < 1e-5
    assert 0.01 < abs(recovered) < 0.5


def test_examples_are_drawn_from_those_with_the_same_value(addition: Subject):
    graph = edge_graph(addition.model)
    assert isinstance(graph, StreamGraph)
    hypothesis = Hypothesis.parse(["mlp:0 -> logits"], ["mlp:0: x"])
    one = Scrubbing(graph, hypothesis, torch.zeros(6, 3, dtype=torch.int64), {"x": list("aabbbc")})
    drawn = np.array(
        [one.equivalent("mlp:0", np.arange(6), np.random.default_rng(i)) for i in range(60)]
    )
    assert [set(column.tolist()) for column in drawn.T] == [{0, 1}] * 2 + [{2, 3, 4}] * 3 + [{5}]
    assert one.equivalent("0.0", np.array([3, 1]), np.random.default_rng(0)).tolist() == [3, 1]


BAD = [
    (
        ["0.0 -> 1.0.k", "1.0 -> 0.0.q", "1.0 -> logits"],
        [],
        "the hypothesis has a cycle: 1.0 <- 0.0 <- 1.0",
    ),
    (["0.0 -> 1.0.k"], [], "node '0.0' leads along no edges of the hypothesis to the logits"),
    (["1.0 -> logits"], ["1.1: copied"], "node '1.1' leads along no edges"),
    (["1.0"], [], "edge '1.0': expected SOURCE -> TARGET"),
    (["1.0 -> logits"], ["1.0 copied"], "variable '1.0 copied': expected NODE: VARIABLE"),
    (["1.7 -> logits"], [], "unknown node of induction-by-hand '1.7'"),
    (["1.0 -> logits", "0.0 -> 1.0"], [], "unknown edge of induction-by-hand '0.0 -> 1.0'"),
    (
        ["1.0 -> logits"],
        ["1.0: copid"],
        "unknown variable of algorithm 'induction' 'copid': did you mean copied",
    ),
]


@pytest.mark.parametrize(("edges", "variables", "said"), BAD)
def test_a_hypothesis_that_makes_no_sense_is_refused(
    induction: Subject, edges: list[str], variables: list[str], said: str
):
    with pytest.raises((KeyError, ValueError), match=re.escape(said)):
        scrubbed(induction, algorithm="induction", edges=edges, variables=variables)


def test_queries_keys_and_values_belong_to_their_head():
    assert [node_of(t) for t in ("1.0.k", "mlp:0", "logits", "0.12.v")] == [
        "1.0",
        "mlp:0",
        "logits",
        "0.12",
    ]
