"""RelP and the baselines by weights and activations: equal to definitions written out, and what they leave out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuits.attribution.propagation import Propagation
from circuits.discovery import Runs, discover, edge_graph, score_edges
from circuits.discovery.streams import StreamGraph
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks import Question, Task
from circuits.tasks.metrics import kl, logit_difference
from tests.edge_oracle import Frozen, Oracle, TransformerEdges, last_logits
from tests.gates import GATES, as_transformer
from tests.plain_transformer import Plain
from tests.test_gates import frozen_network_of, last_difference
from tests.test_paths import drawn, gpt2_like, llama_like, saved

LENGTH, RIGHT, WRONG = 5, 3, 7


def task_of(model: HookedModel, clean: Tensor, corrupted: Tensor | None = None) -> Task:
    """Texts with the difference of two logits at the last position, and counterparts if there are any."""
    asked = (Question((LENGTH - 1,), answers=((RIGHT,),), against=((WRONG,),)),) * len(clean)
    other = None if corrupted is None else Examples.given(model, corrupted)
    return Task("texts", Examples.given(model, clean), asked, logit_difference, counterparts=other)


def double(model: HookedModel) -> HookedModel:
    return HookedModel(nn.Module.double(model.module), model.input, model.name)


Case = tuple[HookedModel, Plain, Task, Oracle]


@pytest.fixture(scope="module", params=[gpt2_like, llama_like])
def case(request: pytest.FixtureRequest) -> Case:
    model, plain = request.param()
    model = double(model)
    weights = torch.zeros(20, dtype=torch.float64)
    weights[RIGHT], weights[WRONG] = 1, -1
    clean, corrupted = drawn(2, LENGTH)
    network = TransformerEdges(Frozen.of(plain), edge_graph(model).edges)
    oracle = Oracle(network, last_logits(weights), clean, corrupted)
    return model, plain, task_of(model, clean, corrupted), oracle


# --- RelP ----------------------------------------------------------------------------------------


def test_relp_is_eap_of_the_frozen_network(case: Case) -> None:
    model, _, task, oracle = case
    found = score_edges(edge_graph(model), task, "relp")
    wanted = oracle.eap()
    torch.testing.assert_close(
        torch.from_numpy(found.values), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max())
    )
    plain = score_edges(edge_graph(model), task, "eap").values
    assert np.abs(found.values - plain).max() > 0.1 * np.abs(plain).max()


def test_edges_into_queries_and_keys_are_said_to_score_nothing(case: Case) -> None:
    model, _, task, _ = case
    found = score_edges(edge_graph(model), task, "relp")
    held = [i for i, (_, target) in enumerate(found.edges) if target.endswith((".q", ".k"))]
    assert not found.values[:, held].any()
    (note,) = found.notes
    assert note.startswith("relp holds attention patterns constant")
    assert f"all {len(held)} edges into queries and keys score exactly 0" in note
    assert not score_edges(edge_graph(model), task, "eap").notes


@pytest.mark.parametrize("name", GATES)
def test_relp_of_gates(name: str) -> None:
    planted = as_transformer(GATES[name])
    found = score_edges(edge_graph(planted.model), planted.task, "relp")
    oracle = Oracle(
        frozen_network_of(planted), last_difference, planted.clean, planted.corrupted
    ).eap()
    wanted = planted.column("eap", found.edges).clone()
    if name == "sigmoid":  # which is attention: held constant
        wanted[:, found.edges.index(planted.wires["a"])] = 0
    torch.testing.assert_close(torch.from_numpy(found.values), wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.from_numpy(found.values), oracle, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # other packages' own
def test_a_norm_after_attention_is_held(tmp_path: Path) -> None:
    """In Gemma 2 all heads of a layer are normalised together: their shares add up to that of the layer."""
    model, inner = saved(tmp_path, "Gemma2")
    graph, (clean, corrupted) = StreamGraph(model), drawn(2, LENGTH)
    found = score_edges(graph, task_of(model, clean, corrupted), "relp").values
    (pair,) = Runs(graph, task_of(model, clean, corrupted)).pairs()
    norm = inner.model.layers[0].post_attention_layernorm
    site = "blocks.0.attn.hook_out"
    before = pair.clean[model.site(site).name]
    scale = (before.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    moved = (pair.other[model.site(site).name] - before) * scale * (1 + norm.weight.detach())
    # Of the logits: what they make of all that the layer adds.
    wanted = logits_part(inner, pair.clean[graph.stream.last], moved)
    own = [graph.index((f"0.{h}", "logits")) for h in range(4)]
    np.testing.assert_allclose(found[:, own].sum(1), wanted, rtol=1e-4, atol=1e-5)


def logits_part(inner: Any, stream: Tensor, moved: Tensor) -> np.ndarray:
    """What a change of Gemma's last stream does to the difference of two logits, by the rules of RelP."""
    final = inner.model.norm
    scale = (stream.square().mean(-1, keepdim=True) + final.eps).rsqrt()
    unembed = inner.lm_head.weight.detach()
    gain = 1 + final.weight.detach()
    logits, change = ((x * scale * gain)[:, -1] @ unembed.T for x in (stream, moved))
    cap = inner.config.final_logit_softcapping
    capped = change * (cap * torch.tanh(logits / cap) / logits)
    return (capped[:, RIGHT] - capped[:, WRONG]).numpy()


# --- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [F.gelu, F.silu, torch.tanh, F.softsign])
def test_an_activation_at_zero_has_its_slope(act: Callable[[Tensor], Tensor]) -> None:
    """act(x)/x has the limit act'(0) at zero, on both sides of which it lies."""
    x = torch.tensor([[0.0, 1e-3, -1e-3, 2.0]], dtype=torch.float64, requires_grad=True)
    with Propagation("epsilon", 1, x):
        made = act(x)
    (found,) = torch.autograd.grad(made.sum(), x)
    torch.testing.assert_close(made, act(x.detach()), rtol=1e-12, atol=1e-12)
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(act(zero), zero)
    torch.testing.assert_close(found[0, 0], slope)
    torch.testing.assert_close(found[0, 1:], (act(x.detach()) / x.detach())[0, 1:])
    torch.testing.assert_close(found[0, 0], found[0, 1:3].mean(), rtol=1e-3, atol=1e-3)


def test_a_sigmoid_at_zero_is_a_bias() -> None:
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    with Propagation("epsilon", 1, x) as rules:
        made = torch.sigmoid(x)
    found, biases = torch.autograd.grad(made.sum(), [x, rules.biases])
    assert not found.any()
    assert biases.tolist() == [1.5]


def test_entries_that_are_zero_are_normalised_by_the_same_factor() -> None:
    x = torch.tensor([[3.0, 0.0, -4.0, 0.0]], dtype=torch.float64)
    gain = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    factor = 1 / math.sqrt(25 / 4 + 1e-5)
    leaf = x.clone().requires_grad_()
    with Propagation("epsilon", 1, x):
        made = F.rms_norm(leaf, (4,), gain, 1e-5)
    torch.testing.assert_close(made, F.rms_norm(x, (4,), gain, 1e-5))
    (found,) = torch.autograd.grad(made.sum(), leaf)
    torch.testing.assert_close(found, factor * gain[None])

    maps = x.reshape(1, 4, 1, 1).clone().requires_grad_()
    with Propagation("epsilon", 1, x):
        made = F.local_response_norm(maps, 3, 0.5, 0.75, 2.0)
    torch.testing.assert_close(made, F.local_response_norm(maps.detach(), 3, 0.5, 0.75, 2.0))
    (found,) = torch.autograd.grad(made.sum(), maps)
    # The squares of each channel and its neighbours: 9, 25, 16, 16.
    windows = torch.tensor([9.0, 25, 16, 16], dtype=torch.float64)
    torch.testing.assert_close(found.flatten(), (2 + 0.5 / 3 * windows) ** -0.75)


# --- baselines -----------------------------------------------------------------------------------


def written_by_hand(plain: Plain, name: str) -> Tensor:
    """The matrix that makes what a source writes: inner x d_model."""
    if name in ("token", "position"):
        return plain.w[{"token": "embed", "position": "pos"}[name]]
    if name.startswith("mlp"):
        return plain.w[f"{name[4:]}.out"].T
    layer, head = map(int, name.split("."))
    size = plain.w[f"{layer}.o"].shape[1] // plain.n_heads
    return plain.w[f"{layer}.o"][:, head * size : (head + 1) * size].T


def read_by_hand(plain: Plain, name: str) -> tuple[str, Tensor | None]:
    """The norm before a target, and the matrix of queries, keys or values: d_model x d_head."""
    if name == "logits":
        return "ln_final", None
    if name.startswith("mlp"):
        return f"{name[4:]}.ln2", None
    layer, head, letter = name.split(".")
    size = len(plain.w[f"{layer}.q"]) // plain.n_heads
    rows = slice(int(head) * size, (int(head) + 1) * size)
    return f"{layer}.ln1", plain.w[f"{layer}.{letter}"][rows].T


def folded(plain: Plain, x: Tensor, norm: str) -> Tensor:
    """Rows after a norm's centre and gain."""
    return (x - x.mean(-1, keepdim=True) if plain.norm == "ln" else x) * plain.w[norm]


def test_weights_are_norms_of_products(case: Case) -> None:
    model, plain, task, _ = case
    found = score_edges(edge_graph(model), task, "weights")
    assert (found.values == found.values[0]).all()
    for (source, target), value in zip(found.edges, found.mean, strict=True):
        norm, read = read_by_hand(plain, target)
        if target == "logits":
            read = plain.w["unembed"].T
        elif target.startswith("mlp"):
            read = plain.w[f"{target[4:]}.in"].T
        assert read is not None
        wanted = (folded(plain, written_by_hand(plain, source), norm) @ read).norm()
        assert value == pytest.approx(float(wanted), rel=1e-6)


def test_activations_are_what_targets_are_given(case: Case) -> None:
    model, plain, task, oracle = case
    found = score_edges(edge_graph(model), task, "activations")
    streams: dict[str, Tensor] = {}

    def see(target: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        streams.setdefault(target, torch.stack(list(values.values())).sum(0))
        return values

    oracle.network.run(oracle.starts["clean"], see)  # type: ignore[arg-type]
    biases = attention_biases(plain)
    for i, (source, target) in enumerate(found.edges):
        norm, read = read_by_hand(plain, target)
        stream = streams[target] + biases[target_layer(plain, target)]
        stream = stream - stream.mean(-1, keepdim=True) if plain.norm == "ln" else stream
        scale = (stream.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        given = folded(plain, oracle.live[source], norm) * scale
        given = given if read is None else given @ read
        wanted = given.square().sum(-1).mean(1).sqrt()
        torch.testing.assert_close(
            torch.from_numpy(found.values[:, i]), wanted, rtol=1e-6, atol=1e-9
        )


def attention_biases(plain: Plain) -> list[Tensor]:
    """The sum of attention's output biases before each half layer."""
    total, found = torch.zeros(8, dtype=torch.float64), []
    for layer in range(plain.n_layers):
        found.append(total)
        total = total + plain.w.get(f"{layer}.o.bias", torch.zeros_like(total))
        found.append(total)
    return [*found, total]


def target_layer(plain: Plain, target: str) -> int:
    if target == "logits":
        return 2 * plain.n_layers
    return 2 * int(target[4:]) + 1 if target.startswith("mlp") else 2 * int(target.split(".")[0])


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_baselines_need_no_counterparts(method: str, case: Case) -> None:
    model, _, task, oracle = case
    found = score_edges(edge_graph(model), task_of(model, oracle.clean), method)  # type: ignore[arg-type]
    same = score_edges(edge_graph(model), task, method)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.values, same.values)
    assert found.notes == ("the task has no counterparts: edges that are removed carry nothing",)
    assert not same.notes
    table, line = same.tables(3)
    assert not isinstance(table, str)
    assert "removing" not in table.title
    assert isinstance(line, str)
    assert "completeness" not in line
    assert same.to_dict()["completeness_residual"] is None


def test_padding_does_not_count() -> None:
    """The size of what a source adds is that of the text alone, however much padding follows."""
    model = double(gpt2_like()[0])
    graph, tokens = StreamGraph(model), drawn(1, LENGTH)[0]
    longer = torch.cat([tokens, torch.ones(1, 2, dtype=tokens.dtype)], 1)
    sizes = []
    for given, n in ((tokens, None), (longer, LENGTH)):
        cache = model.run(given, read=graph.reads)
        counted = None if n is None else torch.arange(given.shape[1])[None] < n
        sizes.append(graph.sizes({s: cache[s] for s in graph.reads}, counted))
    torch.testing.assert_close(*sizes)


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_dead_edges_weigh_nothing(method: str) -> None:
    planted = as_transformer(GATES["backup"])
    found = score_edges(edge_graph(planted.model), planted.task, method)  # type: ignore[arg-type]
    at = found.edges.index
    assert found.mean[[at(planted.wires[w]) for w in ("a", "a>m", "b", "b>m", "a>out")]].all()
    assert not found.mean[[at(("position", "0.0.v")), at(("position", "0.3.v"))]].any()


# --- refusals ------------------------------------------------------------------------------------


def test_refusals_are_one_clear_line(case: Case) -> None:
    model, _, task, oracle = case
    graph = edge_graph(model)
    with pytest.raises(ValueError, match=r"metric kl .*gradient is zero: expected the method"):
        score_edges(graph, task.with_metric(kl), "relp")
    with pytest.raises(
        ValueError, match="direction denoising belongs to the method exact, not to relp"
    ):
        score_edges(graph, task, "relp", direction="denoising")
    with pytest.raises(ValueError, match="task texts has no counterparts: choose the ablation"):
        score_edges(graph, task_of(model, oracle.clean), "relp")
    with pytest.raises(
        ValueError, match="ranking signed: scores by weights have no sign; expected absolute"
    ):
        score_edges(graph, task, "weights").order("signed")
    with pytest.raises(ValueError, match="ranking signed: scores by activations have no sign"):
        discover(graph, task, "activations", ranking="signed")
