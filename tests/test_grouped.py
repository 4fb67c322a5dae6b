"""Keys and values by query head: against a transformer whose keys are ungrouped, and against the group's own scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from circuits.discovery import EdgeScores, Runs, edge_graph, score_edges
from circuits.discovery.grouped import SharedHeads
from circuits.discovery.streams import BY_HEAD, StreamGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks import Task
from tests.edge_checks import check_circuits, check_ends
from tests.edge_oracle import Frozen, Oracle, TransformerEdges, last_logits
from tests.plain_transformer import Plain
from tests.test_discovery import LAST, weighed
from tests.test_paths import drawn, gpt2_like, llama_like, pairs


def ungrouped(plain: Plain) -> Plain:
    """The same function with one copy of its group's keys and values for each head."""
    times, w = plain.n_heads // plain.n_groups, dict(plain.w)
    for name in [n for n in w if n.split(".")[1:2] in (["k"], ["v"])]:
        by_group = w[name].unflatten(0, (plain.n_groups, -1))
        w[name] = by_group.repeat_interleave(times, 0).flatten(0, 1)
    return replace(plain, w=w, n_groups=plain.n_heads)


@pytest.fixture(scope="module")
def case() -> tuple[StreamGraph, Task, Plain]:
    model, plain = llama_like()
    clean, corrupted = drawn()
    return StreamGraph(model, "head"), pairs(model, clean, corrupted, weighed), ungrouped(plain)


@pytest.fixture(scope="module")
def oracle(case: tuple[StreamGraph, Task, Plain]) -> Oracle:
    graph, _, plain = case
    return Oracle(TransformerEdges(plain, graph.edges), last_logits(LAST), *drawn())


def close(scores: EdgeScores, wanted: Tensor) -> None:
    found = torch.from_numpy(scores.values)
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_each_head_has_keys_and_values_of_its_own(case: tuple[StreamGraph, Task, Plain]) -> None:
    graph, _, plain = case
    assert sorted(graph.edges) == sorted(plain.edges())
    assert len(graph) > len(edge_graph(graph.model))
    assert graph.grain == BY_HEAD
    for target, name in enumerate(graph.targets):
        if name.endswith((".q", ".k", ".v")):
            assert [graph.sources[s] for s in graph.feeds[target]] == [name[:-2]]


@pytest.mark.parametrize(
    ("method", "given", "name", "args"),
    [
        ("exact", {}, "noising", ()),
        ("exact", {"direction": "denoising"}, "denoising", ()),
        ("eap", {}, "eap", ()),
        ("eap-ig", {"steps": 3, "rule": "left"}, "ig_inputs", (3, "left")),
        ("eap-ig-activations", {"steps": 2}, "ig_activations", (2, "midpoint")),
    ],
)
def test_every_method_equals_its_definition_with_ungrouped_keys(
    case: tuple[StreamGraph, Task, Plain],
    oracle: Oracle,
    method: Any,
    given: Any,
    name: str,
    args: Any,
) -> None:
    graph, task, _ = case
    close(score_edges(graph, task, method, **given), getattr(oracle, name)(*args))


def test_relevance_equals_its_definition_with_ungrouped_keys(
    case: tuple[StreamGraph, Task, Plain],
) -> None:
    graph, task, plain = case
    rules = TransformerEdges(Frozen.of(plain), graph.edges)
    close(score_edges(graph, task, "relp"), Oracle(rules, last_logits(LAST), *drawn()).eap())


def test_circuits_of_head_keys_are_those_of_the_ungrouped_model(
    case: tuple[StreamGraph, Task, Plain], oracle: Oracle
) -> None:
    graph, task, _ = case
    some = np.random.default_rng(0).random((7, len(graph))) < 0.5
    check_circuits(Runs(graph, task), oracle, some)
    half = torch.full((2, len(graph)), 0.3)
    (pair,) = (runs := Runs(graph, task)).pairs()
    made = runs.patched(pair, half)
    between = oracle.value(torch.full((len(graph),), 0.3, dtype=torch.float64))
    torch.testing.assert_close(made[1], between, rtol=1e-4, atol=1e-5)


def test_no_edges_are_the_corrupted_run_and_all_edges_the_clean_one_to_the_bit(
    case: tuple[StreamGraph, Task, Plain],
) -> None:
    graph, task, _ = case
    assert graph.rows(graph.slopes) == 2
    check_ends(graph, task, weighed)


def test_to_first_order_the_edge_of_a_group_is_the_sum_of_its_heads() -> None:
    for kind, given in (
        ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("Gemma2Config", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    ):
        shape = {
            "vocab_size": 20,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
        }
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**shape, max_position_embeddings=16, **given)
        module = transformers.AutoModelForCausalLM.from_config(config).eval()
        model = HookedModel(module, TokenInput(20, 16), kind)
        task = pairs(model, *drawn(), weighed)
        by_group, by_head = (StreamGraph(model, kv) for kv in ("group", "head"))
        for method in ("eap", "eap-ig"):
            one, other = (score_edges(g, task, method, steps=2) for g in (by_group, by_head))
            times = given["num_attention_heads"] // given["num_key_value_heads"]
            for i, (source, target) in enumerate(by_group.edges):
                layer, _, rest = target.partition(".")
                head, _, letter = rest.partition(".")
                heads = (
                    range(int(head) * times, (int(head) + 1) * times)
                    if letter in ("k", "v")
                    else ()
                )
                same = [f"{layer}.{h}.{letter}" for h in heads] or [target]
                parts = other.values[:, [by_head.index((source, name)) for name in same]]
                wanted = one.values[:, i]
                np.testing.assert_allclose(
                    parts.sum(1), wanted, atol=1e-6 * np.abs(one.values).max()
                )
        # Patched exactly, all heads of a group together are the group.
        exact = score_edges(by_head, task, "exact").values
        names = [(s, t) for s, t in by_group.edges if t == "1.0.k"]
        runs = {g: Runs(g, task) for g in (by_group, by_head)}
        off = {g: torch.zeros(len(names) + 1, len(g)) for g in runs}
        for row, (source, _) in enumerate(names):
            off[by_group][row, by_group.index((source, "1.0.k"))] = 1
            for h in range(times):
                off[by_head][row, by_head.index((source, f"1.{h}.k"))] = 1
        values = [r.patched(next(iter(r.pairs())), off[g]) for g, r in runs.items()]
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-7)
        assert (np.abs(exact[:, [by_head.index((s, "1.0.k")) for s, _ in names]]) > 0).any()


def test_without_groups_both_are_the_same_graph() -> None:
    model, _ = gpt2_like()
    one, other = (edge_graph(model, kv=kv) for kv in ("group", "head"))
    assert (one.edges, one.grain, one.feeds) == (other.edges, other.grain, other.feeds)
    assert other.rows(other.slopes) == 1


def test_heads_that_share_other_keys_than_values_have_rows_of_their_own() -> None:
    assert SharedHeads((0, 0, 1, 1), (0, 1, 0, 1)).row == (0, 1, 2, 3)
    assert SharedHeads((0, 1, 2, 3), (0, 1, 0, 1)).row == (0, 0, 1, 1)
    assert SharedHeads((0, 0, 0, 0), (0, 0, 0, 0)).row == (0, 1, 2, 3)
