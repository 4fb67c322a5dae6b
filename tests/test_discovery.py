"""Scores of edges, circuits and their faithfulness, against definitions and hand-made truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from circuits.cleanroom import addition, induction
from circuits.discovery import (
    EdgeScores,
    Recovered,
    Runs,
    acdc,
    discover,
    edge_graph,
    edges_of,
    evaluate,
    greedy,
    recovered,
    refine,
    score_edges,
    strongest_circuit,
    top,
)
from circuits.discovery.evaluating import ladder, log_mean
from circuits.discovery.finding import TRUE, swapped
from circuits.discovery.found import check_not_found_on, graph_of, parts_of
from circuits.discovery.nulls import random_circuit
from circuits.discovery.searching import removal_effects
from circuits.discovery.stability import stability
from circuits.experiments.patching import patch_paths
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.tables import Table
from circuits.tasks import Task
from circuits.tasks.builtin import load_task, named_metric
from circuits.tasks.metrics import kl
from tests.edge_checks import both_ends, check_circuits, check_ends
from tests.edge_oracle import Oracle, TransformerEdges, last_logits
from tests.gates import COLUMNS, GATES, Planted, as_transformer
from tests.plain_transformer import Plain
from tests.test_paths import drawn, gpt2_like, llama_like, pairs

Case = tuple[HookedModel, Plain]

LAST = torch.randn(20, generator=torch.Generator().manual_seed(4))
"""The weight of each logit in the metric."""


def weighed(logits: Tensor) -> Tensor:
    return logits[:, -1] @ LAST.to(logits)


@pytest.fixture(scope="module", params=[gpt2_like, llama_like])
def case(request: pytest.FixtureRequest) -> tuple[HookedModel, Task, Oracle]:
    model, plain = request.param()
    clean, corrupted = drawn()
    graph = edge_graph(model)
    oracle = Oracle(TransformerEdges(plain, graph.edges), last_logits(LAST), clean, corrupted)
    return model, pairs(model, clean, corrupted, weighed), oracle


def close(scores: EdgeScores, wanted: Tensor) -> None:
    found = torch.from_numpy(scores.values)
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


METHODS: list[tuple[str, dict[str, Any], str, tuple[Any, ...]]] = [
    ("exact", {}, "noising", ()),
    ("exact", {"direction": "denoising"}, "denoising", ()),
    ("eap", {}, "eap", ()),
    ("clean-corrupted", {}, "clean_corrupted", ()),
    ("eap-ig", {"steps": 3, "rule": "left"}, "ig_inputs", (3, "left")),
    ("eap-ig", {"steps": 3, "rule": "right"}, "ig_inputs", (3, "right")),
    ("eap-ig", {"steps": 4}, "ig_inputs", (4, "midpoint")),
    ("eap-ig-activations", {"steps": 3, "rule": "right"}, "ig_activations", (3, "right")),
    ("eap-ig-activations", {"steps": 2}, "ig_activations", (2, "midpoint")),
]  # fmt: skip


@pytest.mark.parametrize(("method", "given", "name", "args"), METHODS)
def test_every_method_equals_its_definition_on_every_edge_and_example(
    case: tuple[HookedModel, Task, Oracle], method: Any, given: Any, name: str, args: Any
) -> None:
    model, task, oracle = case
    close(score_edges(edge_graph(model), task, method, **given), getattr(oracle, name)(*args))


def test_a_circuit_of_no_edges_is_the_corrupted_run_and_of_all_edges_the_clean_run_to_the_bit(
    case: tuple[HookedModel, Task, Oracle],
) -> None:
    model, task, oracle = case
    graph = edge_graph(model)
    check_ends(graph, task, weighed)
    some = np.random.default_rng(0).random((5, len(graph))) < 0.5
    check_circuits(Runs(graph, task), oracle, some)


def test_masks_between_on_and_off_are_differentiable(
    case: tuple[HookedModel, Task, Oracle],
) -> None:
    model, task, oracle = case
    graph = edge_graph(model)
    half = torch.full((1, len(graph)), 0.3)
    (pair,) = (runs := Runs(graph, task)).pairs()
    wanted = oracle.value(torch.full((len(graph),), 0.3, dtype=torch.float64))
    torch.testing.assert_close(runs.patched(pair, half)[0], wanted, rtol=1e-4, atol=1e-5)


# --- gates -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(GATES))
def planted(request: pytest.FixtureRequest) -> Planted:
    return as_transformer(GATES[request.param])


@pytest.mark.parametrize(("column", "method", "given"), COLUMNS)
def test_gates_score_what_was_worked_out_by_hand_and_dead_edges_nothing(
    planted: Planted, column: str, method: Any, given: Any
) -> None:
    graph = edge_graph(planted.model)
    found = score_edges(graph, planted.task, method, **given)
    wanted = planted.column(column, graph.edges)
    torch.testing.assert_close(
        torch.from_numpy(found.values), wanted.expand(len(planted.task), -1), rtol=1e-4, atol=1e-5
    )
    dead = [i for i, edge in enumerate(graph.edges) if edge not in planted.expected]
    assert len(dead) >= 20
    assert (found.values[:, dead] == 0).all()


# --- hand-made circuits ------------------------------------------------------------------------------


ADDITION = {*addition.TRUE_EDGES}


def effective(scores: EdgeScores) -> set[tuple[str, str]]:
    return {scores.edges[i] for i in np.flatnonzero((scores.values != 0).any(0))}


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_exact_patching_finds_the_edges_that_were_made_and_no_other(direction: Any) -> None:
    model = load_model("induction-by-hand")
    graph, task = edge_graph(model), load_task(model, n=3, seed=5)
    assert len(graph) == 71
    rolled = score_edges(graph, task, "exact", direction=direction, shift=1)
    assert effective(rolled) == set(induction.TRUE_EDGES)
    # With the positions of both runs alike, what positions carry has no effect.
    plain = score_edges(graph, task, "exact", direction=direction)
    assert effective(plain) == {e for e in induction.TRUE_EDGES if e[0] != "position"}
    model = load_model("addition-by-hand")
    graph = edge_graph(model)
    assert len(graph) == 21
    found = score_edges(graph, load_task(model, n=3, seed=5), "exact", direction=direction)
    assert effective(found) == ADDITION


def test_redundant_heads_come_first_when_edges_are_restored() -> None:
    """Removing one of the four induction heads leaves the other three; restoring one restores most of the answer."""
    model = load_model("induction")
    graph, task = edge_graph(model), load_task(model, n=16)
    scores = score_edges(graph, task.find, "exact", direction="denoising")
    first = [graph.edges[i] for i in scores.order("absolute")]
    logits = [source for source, target in first if target == "logits"]
    assert set(logits[:4]) == {"1.0", "1.1", "1.2", "1.3"}
    keys = [source for source, target in first if target.endswith(".k") and target[0] == "1"]
    assert keys[:4] == ["0.3"] * 4  # the previous-token head
    assert "restoring an edge" in next(t.title for t in scores.tables(3) if isinstance(t, Table))


@pytest.mark.parametrize("search", ["top", "greedy", "refine", "acdc"])
def test_every_search_finds_the_addition_circuit(search: Any) -> None:
    model = load_model("addition-by-hand")
    graph = edge_graph(model)
    given: dict[str, Any] = {"threshold": 0.01} if search == "acdc" else {"size": 3}
    found = discover(
        graph, load_task(model, n=16, seed=1), "exact", search=search, n_random=9, **given
    )
    assert set(edges_of(found.circuit)) == ADDITION
    assert found.evaluation is not None
    assert found.evaluation.faithfulness.value == 1
    assert found.evaluation.complement_faithfulness.value == 0
    assert found.evaluation.smallest == 3
    assert found.checked is None
    assert found.recovered == Recovered(3, 21, 1.0, 1.0)
    assert found.evaluation.others[TRUE].tolist() == found.evaluation.full.tolist()


def test_edges_that_are_known_to_be_true_are_ranked_by_hand() -> None:
    made = recovered(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False]))
    # Of four pairs of a true and another edge: 3 > 2, 3 > 1, 1 < 2, and 1 = 1 counts half.
    assert (made.auroc, made.precision) == (2.5 / 4, 1 / 2)
    with pytest.raises(ValueError, match="truth: 0 of 2 edges are true; expected some and not all"):
        recovered(np.ones(2), np.zeros(2, bool))


def test_the_strongest_edges_of_a_ranking_are_a_circuit_where_they_make_a_path() -> None:
    model = load_model("addition-by-hand")
    graph, task = edge_graph(model), load_task(model, n=16, seed=1)
    found = discover(graph, task, "exact", size=3, n_random=0)
    made = strongest_circuit(graph, found, task, 3)
    assert set(edges_of(made)) == ADDITION
    assert made.graph["made"]["size"] == 3
    assert (made.graph["made"]["search"], made.graph["made"]["task_hash"]) == ("top", task.hash)
    assert len(edges_of(strongest_circuit(graph, found, task, 21))) == 21
    with pytest.raises(ValueError, match=r"^size 1: the strongest edges make no path"):
        strongest_circuit(graph, found, task, 1)
    with pytest.raises(ValueError, match=r"size 22: addition-by-hand has 21 edges"):
        strongest_circuit(graph, found, task, 22)


def test_evaluation_compares_with_random_circuits_and_shows_the_optimism() -> None:
    model = load_model("induction-by-hand")
    graph, task = edge_graph(model), load_task(model, n=16, seed=1)
    scores = score_edges(graph, task.find, "exact", shift=1)
    circuit = top(graph, scores.worth(), 7)
    made = evaluate(
        graph,
        task.test,
        circuit,
        scores=scores,
        find=task.find,
        shift=1,
        n_random=20,
        n_curves=3,
        seed=2,
    )
    assert set(made.edges) == set(induction.TRUE_EDGES)
    assert made.faithfulness.value == pytest.approx(1, abs=1e-4)
    assert made.on_find == pytest.approx(1, abs=1e-4)
    assert len(made.random_faithfulness) == 20
    # A random circuit with as many edges between any two kinds of parts may be the circuit itself.
    assert made.p_value <= 0.5
    assert made.smallest == 7
    assert made.cmd_log < min(made.random_cmd_log)
    said = made.to_dict()
    assert said["by_size"][-1]["faithfulness"] == pytest.approx(1)
    assert said["record"]["task"]["half"] == "test"


# --- structure ---------------------------------------------------------------------------------------


def test_only_edges_between_input_and_output_are_connected() -> None:
    graph = edge_graph(load_model("induction-by-hand"))
    kept = graph.mask(
        [
            ("token", "0.0.v"),
            ("0.0", "1.0.k"),
            ("1.0", "logits"),
            ("0.1", "1.1.q"),
            ("token", "1.2.v"),
        ]
    )
    found = {graph.edges[i] for i in np.flatnonzero(graph.connected(kept))}
    assert found == {("token", "0.0.v"), ("0.0", "1.0.k"), ("1.0", "logits")}
    with pytest.raises(KeyError, match=r"unknown edge of induction-by-hand '1.0 -> 0.0.q'"):
        graph.index("1.0 -> 0.0.q")


def test_random_circuits_have_as_many_edges_of_each_class() -> None:
    graph = edge_graph(load_model("induction-by-hand"))
    circuit = graph.mask(list(induction.TRUE_EDGES))
    for seed in range(5):
        drawn_ = random_circuit(graph, circuit, np.random.default_rng(seed))
        assert drawn_.sum() == circuit.sum()
        for c in np.unique(graph.classes):
            own = graph.classes == c
            assert drawn_[own].sum() == circuit[own].sum()


def test_random_circuits_of_many_channels_lie_mostly_on_paths() -> None:
    graph = edge_graph(load_model("shapes"), ["conv2d1", "mixed3a", "mixed3b:0"])
    worth = np.abs(np.random.default_rng(0).standard_normal(len(graph))) ** 4
    circuit, shares = greedy(graph, worth, 200), list[float]()
    for seed in range(5):
        made = random_circuit(graph, circuit, np.random.default_rng(seed))
        assert (np.bincount(graph.classes[made]) == np.bincount(graph.classes[circuit])).all()
        shares.append(graph.connected(made).sum() / made.sum())
    assert np.mean(shares) > 0.8, "of edges that are drawn again and again .68"


@pytest.mark.parametrize("search", ["top", "greedy"])
def test_a_size_that_leaves_no_path_is_refused_with_the_least_that_does(search: Any) -> None:
    model = load_model("induction-by-hand")
    graph, task = edge_graph(model), load_task(model, n=12, seed=1)
    given: dict[str, Any] = {"search": search, "check": 0, "n_random": 0, "n_curves": 0, "shift": 1}
    pick = {"top": top, "greedy": greedy}[search]
    # An edge straight to the output, which is worth nothing, is not among the first ones.
    worth = score_edges(graph, task.find, "exact", shift=1).worth()
    least = next(n for n in range(1, len(graph) + 1) if pick(graph, worth, n).any())
    assert least > 1
    for n in (1, least - 1):
        with pytest.raises(ValueError, match=f"no path .* expected a size of at least {least}$"):
            discover(graph, task, "exact", size=n, **given)
    assert len(edges_of(discover(graph, task, "exact", size=least, **given).circuit)) > 0


def test_greedy_grows_backwards_and_refine_ends_at_the_size_asked_for() -> None:
    model = load_model("induction-by-hand")
    graph, task = edge_graph(model), load_task(model, n=12, seed=1).find
    runs = Runs(graph, task, shift=1)
    worth = np.abs(score_edges(graph, task, "exact", shift=1).mean)
    for n in (3, 7, 12):
        kept = greedy(graph, worth, n)
        assert (graph.connected(kept) == kept).all()
        assert kept.sum() <= n
    assert refine(runs, worth, 7).sum() == 7
    circuit = graph.mask(list(induction.TRUE_EDGES))
    assert (np.abs(removal_effects(runs, circuit).mean(1)) > 0.01).all()


def test_sizes_are_on_a_logarithmic_ladder_and_so_is_the_mean() -> None:
    assert ladder(3) == (1, 2, 3)
    assert ladder(1701)[-1] == 1701
    assert len(ladder(100_000)) <= 52
    sizes = ladder(1000)
    assert log_mean(sizes, np.ones(len(sizes))) == pytest.approx(1)
    # Half of the decades at 1, half at 0: half of the mean, where a linear mean would have .97.
    curve = (np.array(sizes) > np.sqrt(1000)).astype(float)
    assert log_mean(sizes, curve) == pytest.approx(0.5, abs=0.02)


# --- saved, and refused ------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_line(case: tuple[HookedModel, Task, Oracle]) -> None:
    model, task, _ = case
    graph = edge_graph(model)
    alone = Task("alone", task.examples, task.questions, task.metric)
    for made, said in (
        (lambda: score_edges(graph, alone), "has no counterparts"),
        (lambda: score_edges(graph, task.with_metric(kl), "eap"), "its gradient is zero"),
        (lambda: score_edges(graph, task, "eap", direction="denoising"), "belongs to the method exact"),
        (lambda: score_edges(graph, task, steps=0), "steps 0 must be at least 1"),
        (lambda: discover(graph, task, search="acdc"), "a threshold belongs to the search acdc"),
        (lambda: discover(graph, task, size=10**6), "size 1000000"),
        (lambda: Runs(graph, task, ablation="zero", shift=2), "does not go with the ablation zero"),
        (lambda: acdc(Runs(graph, task), 0.0), "threshold 0.0 must be above 0"),
        (lambda: evaluate(graph, task, graph.mask([]), find=task), "not evaluated on what it was found on"),
        (lambda: Runs(graph, task.with_metric(named_metric(model, "hook_embed:3"))), "so that no edge changes it"),
        (lambda: edge_graph(model, ["hook_embed"]), "sites hook_embed: the edges of a transformer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said) as caught:
            made()
        assert "\n" not in str(caught.value)


# --- stability ---------------------------------------------------------------------------------------


def test_the_same_circuit_is_found_on_every_draw_of_a_hand_made_model_and_none_in_noise() -> None:
    model = load_model("addition-by-hand")
    graph = edge_graph(model)
    found = discover(graph, load_task(model, n=16, seed=1), "exact", size=3, n_random=2, n_curves=1)
    again = found.stability
    assert again is not None
    assert (again.jaccard, again.halves) == (1, 1)
    assert set(again.shares.values()) == {1}
    assert all(d["share"] == 1 for *_, d in found.circuit.edges(data=True))
    # Two random sets of 3 edges of 21: 9 / 21 are in both on average, of 6 - 9 / 21 in either.
    assert again.by_chance == pytest.approx(3 / 39)
    noise = score_edges(graph, load_task(model, n=16, seed=1).find, "random")

    def first(mean: np.ndarray) -> np.ndarray:
        kept = np.zeros(len(graph), bool)
        kept[np.argsort(-np.abs(mean))[:3]] = True
        return kept

    drawn_ = stability(noise, first(noise.mean), first, draws=200)
    assert drawn_.halves < 0.3
    assert drawn_.jaccard < 0.6


def test_a_circuit_found_with_answers_swapped_at_random_stands_next_to_the_found_one() -> None:
    planted = as_transformer(GATES["or"])
    answered = Task(
        "answered",
        planted.task.examples,
        planted.task.questions,
        planted.task.metric,
        planted.task.counterparts,
    )
    assert answered.compared
    turned = swapped(answered, 0)
    changed = [
        a.answers == b.against for a, b in zip(answered.questions, turned.questions, strict=True)
    ]
    assert sum(changed) == len(answered) // 2


# --- transformers that people bring ------------------------------------------------------------------

OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "parallel layers": ("GPTNeoXConfig", {"num_attention_heads": 2}),
    "grouped keys": ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "norms after attention": ("Gemma2Config", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OWN))
def test_edges_of_a_traced_model_are_patched_and_scored_as_by_definition(name: str) -> None:
    kind, given = OWN[name]
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**shape, max_position_embeddings=16, **given)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = HookedModel(module, TokenInput(20, 16), name)
    graph, (clean, corrupted) = edge_graph(model), drawn()
    task = pairs(model, clean, corrupted, weighed)
    exact = score_edges(graph, task, "exact")
    by_hand = patch_paths(model, clean, corrupted, metric=weighed).effects.T
    torch.testing.assert_close(
        torch.from_numpy(exact.values).float(), by_hand, rtol=1e-3, atol=1e-6
    )
    # EAP is the derivative by the share of an edge that is replaced.
    eap, step = score_edges(graph, task, "eap").values, 3e-3
    some = list(range(0, len(graph), 5))
    off = torch.zeros(len(some) + 1, len(graph))
    off[torch.arange(len(some)), some] = step
    (pair,) = (runs := Runs(graph, task)).pairs()
    values = runs.patched(pair, off)
    slopes = ((values[:-1] - values[-1:]) / step).T.numpy()
    assert np.abs(slopes - eap[:, some]).max() <= 0.01 * np.abs(eap).max()


class OneNorm(nn.Module):
    """A transformer with one normalisation for all places, so that patching a target calls it between its own calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed, self.norm = (
            nn.Embedding(20, 16),
            nn.Linear(16, 20),
            nn.LayerNorm(16),
        )
        self.heads = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x, n = self.embed(tokens), tokens.shape[1]
        mask = torch.ones(n, n).triu(1).bool()
        for heads, mlp in zip(self.heads, self.mlps, strict=True):
            y = self.norm(x)
            x = x + heads(y, y, y, attn_mask=mask, need_weights=False)[0]
            x = x + mlp(self.norm(x))
        return self.unembed(self.norm(x))


def test_a_module_that_is_used_in_several_places_is_patched_in_one() -> None:
    torch.manual_seed(0)
    model = HookedModel(OneNorm().eval(), TokenInput(20, 16), "one norm")
    graph, (clean, corrupted) = edge_graph(model), drawn()
    task = pairs(model, clean, corrupted, weighed)
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    none, full = both_ends(runs)
    for values, tokens in ((none, corrupted), (full, clean)):
        torch.testing.assert_close(
            values, weighed(model.logits(tokens)).double(), rtol=1e-4, atol=1e-5
        )
    # One edge at a time, in passes that start anywhere, as many at once as fit.
    exact = score_edges(graph, task, "exact").values
    together = runs.patched(pair, torch.eye(len(graph))) - full
    torch.testing.assert_close(together.T, torch.from_numpy(exact), rtol=1e-3, atol=1e-4)


def test_a_circuit_is_not_evaluated_on_what_it_was_found_on_and_knows_its_graph() -> None:
    model = load_model("induction")
    graph, task = edge_graph(model, spans="0-4,5-"), load_task(model, n=16)
    found = discover(graph, task, "eap", size=10, n_random=0, n_curves=0, check=0)
    again = graph_of(found.circuit, model)
    assert (again.edges, dict(again.choices)) == (graph.edges, {"spans": "0-4,5-"})
    assert parts_of(found.circuit) == {"spans": "0-4,5-"}
    check_not_found_on(found.circuit, task.test)
    with pytest.raises(
        ValueError, match=r"\(one of 8\) of the find half is one on which the circuit was found"
    ):
        check_not_found_on(found.circuit, task.find)


def test_signed_rankings_know_whether_edges_were_removed_or_restored() -> None:
    model = load_model("induction")
    graph, task = edge_graph(model), load_task(model, n=16)
    for direction in ("noising", "denoising"):
        found = discover(
            graph, task, "exact", direction=direction, ranking="signed", size=26, n_random=0, n_curves=0
        )  # fmt: skip
        assert found.evaluation.faithfulness.value > 0.8
        # Without a strong edge the loss is higher: what it adds to the loss is negative.
        sums = [data["sum"] for *_, data in found.circuit.edges(data=True)]
        assert min(sums) < -1 < max(map(abs, sums))
        assert max(sums) < 0.5
