"""Finer grains of a transformer's graph, against definitions: edges at spans of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.discovery import EdgeScores, Runs, discover, edge_graph, edges_of, score_edges
from circuits.discovery.spans import Spans
from circuits.discovery.streams import StreamGraph
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks import Task
from circuits.tasks.builtin import load_task
from tests.edge_oracle import Network, Oracle, See, TransformerEdges, Values, as_it_is, last_logits
from tests.plain_transformer import Edge
from tests.test_discovery import LAST, METHODS, weighed
from tests.test_paths import drawn, gpt2_like, llama_like, pairs

SPANS = {"0": [0], "1-3": [1, 2, 3], "4-": [4, 5, 6]}
"""Spans of texts of seven tokens."""


@dataclass
class SpannedEdges:
    """A network in which each span of a target's positions is a target of its own, `target@span`."""

    inner: Network
    edges: Sequence[Edge]

    @property
    def sites(self) -> Sequence[Sequence[str]]:
        return self.inner.sites

    def start(self, inputs: Tensor) -> Values:
        return self.inner.start(inputs)

    def run(
        self, start: Values, see: See = as_it_is, replaced: Values | None = None
    ) -> tuple[Tensor, Values]:
        def seen(target: str, values: Values) -> Values:
            own = {span: see(f"{target}@{span}", values) for span in SPANS}
            return {
                name: torch.cat([own[span][name][:, at] for span, at in SPANS.items()], 1)
                for name in values
            }

        return self.inner.run(start, seen, replaced)


@pytest.fixture(scope="module", params=[gpt2_like, llama_like])
def case(request: pytest.FixtureRequest) -> tuple[HookedModel, Task, Any]:
    model, plain = request.param()
    clean, corrupted = drawn()
    return model, pairs(model, clean, corrupted, weighed), plain


@pytest.fixture(scope="module")
def spanned(case: tuple[HookedModel, Task, Any]) -> tuple[StreamGraph, Task, Oracle]:
    model, task, plain = case
    graph = edge_graph(model, spans="0,1-3,4-")
    assert isinstance(graph, StreamGraph)
    whole = TransformerEdges(plain, edge_graph(model).edges)
    network = SpannedEdges(whole, graph.edges)
    return graph, task, Oracle(network, last_logits(LAST), *drawn())


def close(scores: EdgeScores, wanted: Tensor) -> None:
    found = torch.from_numpy(scores.values)
    assert wanted.abs().max() > 1e-3
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def the_runs_themselves(graph: StreamGraph, task: Task) -> None:
    """All edges patched are the other run and none the clean one, to the bit."""
    (pair,) = (runs := Runs(graph, task)).pairs()
    assert pair.part.counterparts is not None
    none, full = runs.patched(pair, torch.stack([torch.ones(len(graph)), torch.zeros(len(graph))]))
    clean, corrupted = (
        weighed(graph.model.logits(tokens.repeat(2, 1))).double()
        for tokens in (pair.part.inputs, pair.part.counterparts)
    )
    assert torch.equal(none, corrupted[: len(none)])
    assert torch.equal(full, clean[len(none) :])


# --- spans of positions --------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "given", "name", "args"), METHODS)
def test_edges_at_spans_score_what_their_definition_says(
    spanned: tuple[StreamGraph, Task, Oracle], method: Any, given: Any, name: str, args: Any
) -> None:
    graph, task, oracle = spanned
    assert oracle.network.edges == graph.edges
    close(score_edges(graph, task, method, **given), getattr(oracle, name)(*args))


def test_circuits_of_spans_carry_what_their_definition_says(
    spanned: tuple[StreamGraph, Task, Oracle],
) -> None:
    graph, task, oracle = spanned
    the_runs_themselves(graph, task)
    (pair,) = (runs := Runs(graph, task)).pairs()
    off = (torch.rand(5, len(graph), generator=torch.Generator().manual_seed(2)) < 0.5).float()
    off[4] = 0.3
    wanted = torch.stack([oracle.value(row.double()) for row in off])
    torch.testing.assert_close(runs.patched(pair, off), wanted, rtol=1e-4, atol=1e-5)
    # A target all of whose edges are patched at one span reads there what it read in the other run.
    whole = torch.tensor([float(t == "1.0.q@1-3") for _, t in graph.edges])[None]
    wanted = oracle.value(whole[0].double())
    torch.testing.assert_close(runs.patched(pair, whole)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "relp"]
)
def test_gradient_scores_of_an_edge_are_the_sum_over_its_spans(
    case: tuple[HookedModel, Task, Any], method: Any
) -> None:
    model, task, _ = case
    whole = score_edges(edge_graph(model), task, method)
    split = score_edges(edge_graph(model, spans="0,1-3,4-"), task, method)
    total = dict.fromkeys(whole.edges, 0.0)
    for (source, target), score in zip(split.edges, split.mean, strict=True):
        total[source, target.partition("@")[0]] += score
    np.testing.assert_allclose(list(total.values()), whole.mean, rtol=1e-4, atol=1e-7)
    assert len(split.edges) == 3 * len(whole.edges)


def test_sizes_and_weights_at_spans(case: tuple[HookedModel, Task, Any]) -> None:
    model, task, _ = case
    for method, power in (("weights", 1), ("activations", 2)):
        whole = score_edges(edge_graph(model), task, method).values
        split = score_edges(edge_graph(model, spans="0,1-3,4-"), task, method)
        targets = np.array([t.partition("@")[2] for _, t in split.edges])
        parts = [split.values[:, targets == span] for span in SPANS]
        if power == 1:
            for part in parts:
                np.testing.assert_allclose(np.sort(part), np.sort(whole))
        else:
            mean = sum(len(at) * p**2 for at, p in zip(SPANS.values(), parts, strict=True)) / 7
            np.testing.assert_allclose(
                np.sort(np.sqrt(mean).sum(1)), np.sort(whole.sum(1)), rtol=1e-5
            )


def texts(model: HookedModel, lengths: Sequence[int]) -> Task:
    """Texts of different lengths and their counterparts; the part `name` are the second and third token."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(1, 20, (2, n), generator=generator) for n in lengths]
    task = pairs(model, *drawn(len(lengths)), weighed)
    asked = tuple(
        replace(q, positions=(n - 1,), spans={"name": (1, 3)})
        for q, n in zip(task.questions, lengths, strict=True)
    )
    return replace(
        task, examples=Examples.given(model, [m[0] for m in made]), questions=asked,
        counterparts=Examples.given(model, [m[1] for m in made]),
    )  # fmt: skip


def test_spans_of_texts_of_different_lengths() -> None:
    model = load_model("induction")
    lengths = (5, 7, 4)
    task = replace(texts(model, lengths), metric=load_task(model, n=2).metric)
    task = replace(
        task, questions=tuple(replace(q, answers=((3,),), against=((4,),)) for q in task.questions)
    )
    parts = list(task.batches())
    for text, wanted in (
        ("0,1--2,-1", lambda n: [0, *[1] * (n - 2), 2]),
        ("0-1,2-", lambda n: [0, 0, *[1] * (n - 2)]),
        ("rest,name", lambda n: [0, 1, 1, *[0] * (n - 3)]),
        ("0,name,3-", lambda n: [0, 1, 1, *[2] * (n - 3)]),
    ):
        spans = Spans.parse(text)
        for part in parts:
            index = spans.index(task, part)
            for row, i in enumerate(part.which):
                assert index[row, : lengths[i]].tolist() == wanted(lengths[i])
    whole = score_edges(edge_graph(model), task, "eap").mean
    split = score_edges(edge_graph(model, spans="0,name,3-"), task, "eap").mean
    by_edge = np.zeros_like(whole)
    graph, finer = edge_graph(model), edge_graph(model, spans="0,name,3-")
    for (source, target), score in zip(finer.edges, split, strict=True):
        by_edge[graph.index((source, target.partition("@")[0]))] += score
    np.testing.assert_allclose(by_edge, whole, rtol=1e-3, atol=1e-6)


def test_a_circuit_of_spans_is_found_saved_and_drawn() -> None:
    model = load_model("induction")
    graph, task = edge_graph(model, spans="0,1-,"), load_task(model, n=16, seed=1)
    found = discover(graph, task, "eap", size=12, check=0, n_random=3, n_curves=1)
    edges = edges_of(found.circuit)
    assert all(t.endswith(("@0", "@1-")) for _, t in edges)
    drawn_ = {d["edge"] for *_, d in found.circuit.edges(data=True)}
    assert drawn_ == {" -> ".join(edge) for edge in edges}
    assert graph.kind("1.2.q@1-") == "q@1- of layer 1"
    assert graph.way(graph.targets.index("1.2.q@1-")) == "q@1-"
    assert str(graph.node("logits@0")) == str(edge_graph(model).node("logits"))


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ("0,2-", "span '2-' does not begin behind span '0'"),
        ("1-", "the first begins at 1"),
        ("0,1-4", "nothing holds the positions behind '1-4'"),
        ("0,1-4,4-", "span '4-' does not begin behind span '1-4'"),
        ("0-3,3-1,4-", "span '3-1' holds no position"),
        ("0,0,1-", "span '0' is given twice"),
        (",", "spans are empty"),
        ("a b,rest", "span 'a b': expected a name without spaces"),
    ],
)
def test_spans_that_do_not_hold_each_position_once_are_refused(spans: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Spans.parse(spans)
    assert "\n" not in str(caught.value)


def test_spans_that_do_not_fit_a_text_are_refused() -> None:
    model, _ = gpt2_like()
    for spans, lengths, said in (
        ("0-2,3--3,-2--1", (7, 4), r"position 2 of text .*, of 4 tokens, is in 0-2 and in -2--1"),
        ("0,name", (7,), r"position 3 of text .*, of 7 tokens, is in none of them; add .* rest"),
        ("name,1-", (7,), r"position 1 of text .* is in name and in 1-"),
        ("0,verb,rest", (7,), r"span 'verb': .* has no part of that name; expected ranges, rest, name"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said) as caught:
            score_edges(edge_graph(model, spans=spans), texts(model, lengths), "eap")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"spans 0,1-: .* takes images; spans are of texts"):
        edge_graph(load_model("shapes"), spans="0,1-")
    with pytest.raises(
        ValueError, match=r"has 122 edges between .* more than 100; expected at most 1 spans"
    ):
        StreamGraph(model, Spans.parse("0,1-"), limit=100)
