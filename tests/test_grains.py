"""Finer grains of a transformer's graph, against definitions: spans of positions, neurons, latents."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from circuits.autoencoders import FILE, About, Autoencoder, save_autoencoder
from circuits.cli.main import run
from circuits.discovery import EdgeScores, Runs, discover, edge_graph, edges_of, score_edges
from circuits.discovery.spans import Spans
from circuits.discovery.splitting import active_latents
from circuits.discovery.streams import StreamGraph
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.tasks import Task
from circuits.tasks.builtin import load_task
from circuits.tasks.task import default_metric
from tests.commands import output
from tests.edge_checks import check_ends
from tests.edge_oracle import Network, Oracle, See, TransformerEdges, Values, as_it_is, last_logits
from tests.plain_transformer import Edge
from tests.test_discovery import LAST, METHODS, OWN, weighed
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
    check_ends(graph, task, weighed)
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
    whole, finer = edge_graph(model), edge_graph(model, spans="0,1-3,4-")
    named = [(s, t, span) for s, t in whole.edges for span in SPANS]
    places = np.array([finer.index((s, f"{t}@{span}")) for s, t, span in named]).reshape(-1, 3)
    norms = finer.weight_norms()[places]
    np.testing.assert_allclose(norms, np.repeat(whole.weight_norms()[:, None], 3, 1))
    sizes, squares = (
        torch.from_numpy(score_edges(g, task, "activations").values).square()
        for g in (whole, finer)
    )
    weights = torch.tensor([len(at) / 7 for at in SPANS.values()]).double()
    torch.testing.assert_close(squares[:, places] @ weights, sizes, rtol=1e-4, atol=1e-9)


def texts(model: HookedModel, lengths: Sequence[int]) -> Task:
    """Texts of different lengths and their counterparts; the part `name` are the second and third token."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(1, 20, (2, n), generator=generator).tolist() for n in lengths]
    task = pairs(model, *drawn(len(lengths)), weighed)
    asked = tuple(
        replace(q, positions=(n - 1,), spans={"name": (1, 3)})
        for q, n in zip(task.questions, lengths, strict=True)
    )
    return replace(
        task, examples=Examples.texts(model, [m[0] for m in made]), questions=asked,
        counterparts=Examples.texts(model, [m[1] for m in made]),
    )  # fmt: skip


def test_spans_of_texts_of_different_lengths() -> None:
    model = load_model("induction")
    lengths = (5, 7, 4)
    task = texts(model, lengths)
    asked = tuple(replace(q, answers=((3,),), against=((4,),)) for q in task.questions)
    task = replace(task, questions=asked, metric=default_metric(asked))
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
        StreamGraph(model, spans=Spans.parse("0,1-"), limit=100)


# --- neurons and latents -------------------------------------------------------------------------


@dataclass
class SplitEdges(TransformerEdges):
    """A transformer in which the neurons of the first layer's MLP are senders, and latents of the second's attention or
    MLP, with what is left as another.
    """

    encode: Any = None
    W_dec: Any = None
    at: str = "mlp"

    @property
    def sites(self) -> list[list[str]]:
        senders = list(dict.fromkeys(source for source, _ in self.edges))
        neurons = [s for s in senders if s.startswith("mlp:0")]
        latents = [s for s in senders if s.startswith("sae")]
        found = []
        for site in super().sites:
            split = site[0] == ("mlp:1" if self.at == "mlp" else "1.0")
            found.append(neurons if site == ["mlp:0"] else latents if split else site)
        return found

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        made = {
            f"sae/code:{i}": self.encode(x)[..., i : i + 1] * direction
            for i, direction in enumerate(self.W_dec)
        }
        return made | {"sae/code.error": x - torch.stack(list(made.values())).sum(0)}

    def heads(self, layer: int, read: Any) -> dict[str, Tensor]:
        made = super().heads(layer, read)
        if layer == 0 or self.at == "mlp":
            return made
        return self.parts(torch.stack(list(made.values())).sum(0))

    def mlp(self, layer: int, read: Tensor) -> dict[str, Tensor]:
        plain = self.plain
        if layer == 1:
            made = super().mlp(layer, read)
            return self.parts(made["mlp:1"]) if self.at == "mlp" else made
        gate = plain.linear(read, "0.gate") if plain.gated else None
        hidden = plain.hidden(plain.linear(read, "0.in"), gate)
        rows = plain.w["0.out"].T
        made = {f"mlp:0:{i}": hidden[..., i : i + 1] * row for i, row in enumerate(rows)}
        bias = plain.w.get("0.out.bias")
        return made if bias is None else made | {"bias:mlp": bias.expand_as(made["mlp:0:0"])}


def coded(model: HookedModel, site: str, n: int = 10, **more: Any) -> HookedModel:
    """The model with an autoencoder of random weights at a site."""
    generator = torch.Generator().manual_seed(3)
    width = model.site(site).width

    def random(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=generator)

    code = Autoencoder(random(n, width), random(n), random(n, width), random(width), **more)
    return model.attach(code, "code", site)


@pytest.fixture(scope="module", params=["mlp", "attention"])
def split(
    request: pytest.FixtureRequest, case: tuple[HookedModel, Task, Any]
) -> tuple[StreamGraph, Task, Oracle]:
    plain_model, task, plain = case
    part = "mlp" if request.param == "mlp" else "attn"
    model = coded(plain_model, f"blocks.1.hook_{part}_out")
    graph = edge_graph(model, neurons="0", latents=["sae/code"])
    assert isinstance(graph, StreamGraph)
    code = deepcopy(model.module.get_submodule("sae/code.code")).double()
    assert isinstance(code, Autoencoder)
    network = SplitEdges(plain, graph.edges, code.encode, code.W_dec, request.param)
    return graph, task, Oracle(network, last_logits(LAST), *drawn())


@pytest.mark.parametrize(("method", "given", "name", "args"), METHODS)
def test_edges_of_neurons_and_latents_score_what_their_definition_says(
    split: tuple[StreamGraph, Task, Oracle], method: Any, given: Any, name: str, args: Any
) -> None:
    graph, task, oracle = split
    close(score_edges(graph, task, method, **given), getattr(oracle, name)(*args))


def test_circuits_of_neurons_and_latents_carry_what_their_definition_says(
    split: tuple[StreamGraph, Task, Oracle],
) -> None:
    graph, task, oracle = split
    check_ends(graph, task, weighed)
    (pair,) = (runs := Runs(graph, task)).pairs()
    off = (torch.rand(3, len(graph), generator=torch.Generator().manual_seed(2)) < 0.5).float()
    off[2] = 0.3
    wanted = torch.stack([oracle.value(row.double()) for row in off])
    torch.testing.assert_close(runs.patched(pair, off), wanted, rtol=1e-4, atol=1e-5)


def test_all_parts_of_an_edge_are_the_edge(
    case: tuple[HookedModel, Task, Any], split: tuple[StreamGraph, Task, Oracle]
) -> None:
    _, task, _ = case
    graph, whole = split[0], edge_graph(case[0])
    (one,) = (runs := Runs(graph, task)).pairs()
    (other,) = (whole_runs := Runs(whole, task)).pairs()
    ways = [("mlp:0:", "mlp:0", 1.0), ("sae/", "1.", 1.0), ("mlp:0:", "mlp:0", 0.4)]
    for target in ("logits", "mlp:1", "1.1.k"):
        for part, sender, share in ways:
            finer = [s.startswith(part) and t == target for s, t in graph.edges]
            if not any(finer):
                continue
            at = "mlp:1" if "mlp:1" not in graph.sources and part == "sae/" else sender
            coarser = [s.startswith(at) and t == target for s, t in whole.edges]
            found = runs.patched(one, share * torch.tensor([finer]).float())
            wanted = whole_runs.patched(other, share * torch.tensor([coarser]).float())
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_parts_are_nodes_by_their_own_names_with_kinds_of_their_own(
    split: tuple[StreamGraph, Task, Oracle],
) -> None:
    graph = split[0]
    assert str(graph.node("mlp:0:3")) == "blocks.0.mlp.hook_post:3"
    assert str(graph.node("sae/code:7")) == "sae/code:7"
    assert str(graph.node("sae/code.error")) == "sae/code.error:*"
    kinds = {graph.kind(name) for name in graph.sources}
    assert {"part of mlp:0", "part of sae/code", "sae/code.error"} < kinds
    for node in (graph.node("mlp:0:3"), graph.node("sae/code:7")):
        graph.model.unit(str(node))
    fed = graph.feeds[graph.targets.index("mlp:0")]
    assert {graph.sources[s] for s in fed} == {f"mlp:0:{i}" for i in range(12)}
    assert graph.nodes_of(graph.targets.index("mlp:0"), {fed[2]}) == (graph.node("mlp:0:2"),)
    assert "neurons of layer 0" in graph.grain
    assert "10 of 10 latents of sae/code" in graph.grain


def test_baselines_of_parts(
    case: tuple[HookedModel, Task, Any], split: tuple[StreamGraph, Task, Oracle]
) -> None:
    model, task, _ = case
    graph, whole = edge_graph(model, neurons="all"), edge_graph(model)
    assert isinstance(graph, StreamGraph)
    squares = dict.fromkeys(whole.edges, 0.0)
    for (source, target), norm in zip(graph.edges, graph.weight_norms(), strict=True):
        squares[":".join(source.split(":")[:2]), target] += norm**2
    np.testing.assert_allclose(np.sqrt(list(squares.values())), whole.weight_norms(), rtol=1e-5)
    # Activations: a part's size is that of its direction times its activation, pushed through as a whole source is.
    (pair,) = Runs(graph, task).pairs()
    sizes, post = graph.sizes(pair.clean, None), pair.clean["blocks.0.mlp.hook_post"]
    rows = graph.stream.writers(0, "mlp").split
    assert rows is not None
    written = torch.einsum("epn,nm->enpm", post, rows.directions)
    for target in ("1.1.q", "mlp:1", "logits"):
        number = graph.targets.index(target)
        ((_, given),) = graph._given(pair.clean, written, [number])
        own = [graph.index((f"mlp:0:{i}", target)) for i in range(12)]
        torch.testing.assert_close(
            sizes[:, own], given.square().sum(-1).mean(-1).sqrt(), rtol=1e-4, atol=1e-6
        )
    split[0].sizes(next(Runs(split[0], task).pairs()).clean, None)
    with pytest.raises(
        ValueError, match=r"method weights: sae/code.error of .* not made with weights"
    ):
        split[0].weight_norms()


def test_spans_and_parts_together(case: tuple[HookedModel, Task, Any]) -> None:
    model, task, _ = case
    parts = edge_graph(model, neurons="1")
    graph = edge_graph(model, neurons="1", spans="0,1-3,4-")
    whole, finer = score_edges(parts, task, "eap"), score_edges(graph, task, "eap")
    total = dict.fromkeys(whole.edges, 0.0)
    for (source, target), score in zip(finer.edges, finer.mean, strict=True):
        total[source, target.partition("@")[0]] += score
    np.testing.assert_allclose(list(total.values()), whole.mean, rtol=1e-4, atol=1e-6)
    whole, finer = score_edges(parts, task, "exact"), score_edges(graph, task, "exact")
    # Behind the last attention layer only the last position counts: its span has the whole effect.
    for i, (source, target) in enumerate(finer.edges):
        if target.startswith("logits@"):
            wanted = whole.values[:, whole.edges.index((source, "logits"))]
            wanted = wanted if target.endswith("@4-") else 0 * wanted
            np.testing.assert_allclose(finer.values[:, i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "site"),
    [("norms after attention", "attn.hook_z"), ("parallel layers", "hook_mlp_out")],
)
def test_parts_of_a_traced_model(name: str, site: str) -> None:
    kind, given = OWN[name]
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**shape, max_position_embeddings=16, **given)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = coded(HookedModel(module, TokenInput(20, 16), "traced"), f"blocks.1.{site}")
    graph = edge_graph(model, neurons="0", latents=["code:1,3,4"])
    assert isinstance(graph, StreamGraph)
    task = pairs(model, *drawn(), weighed)
    check_ends(graph, task, weighed)
    whole = edge_graph(model)
    (one,) = (runs := Runs(graph, task)).pairs()
    (other,) = (whole_runs := Runs(whole, task)).pairs()
    coder = "1." if site == "attn.hook_z" else "mlp:1"
    for part, sender in (("mlp:0:", "mlp:0"), ("sae/code", coder)):
        finer = torch.tensor([[s.startswith(part) and t == "logits" for s, t in graph.edges]])
        coarser = torch.tensor([[s.startswith(sender) and t == "logits" for s, t in whole.edges]])
        torch.testing.assert_close(
            runs.patched(one, finer.float()), whole_runs.patched(other, coarser.float()), rtol=1e-5, atol=1e-6
        )  # fmt: skip
    # EAP is the derivative by the share of an edge that is replaced.
    eap, step = score_edges(graph, task, "eap").values, 3e-3
    some = list(range(0, len(graph), 29))
    off = torch.zeros(len(some) + 1, len(graph))
    off[torch.arange(len(some)), some] = step
    values = runs.patched(one, off)
    slopes = ((values[:-1] - values[-1:]) / step).T.numpy()
    assert np.abs(slopes - eap[:, some]).max() <= 0.01 * np.abs(eap).max()


def test_only_latents_that_are_active_need_to_be_in_the_graph() -> None:
    plain_model, _ = gpt2_like()
    model = coded(plain_model, "blocks.0.hook_mlp_out", n=40, activation="topk", k=2)
    task = pairs(model, *drawn(), weighed)
    (units,) = active_latents(model, task, ["sae/code"])
    assert units.indices is not None
    assert 2 <= len(units.indices) < 40
    graph, whole = edge_graph(model, latents=[units]), edge_graph(model, latents=["sae/code"])
    small, large = (score_edges(g, task, "eap") for g in (graph, whole))
    places = [whole.index(edge) for edge in graph.edges]
    np.testing.assert_allclose(small.values, large.values[:, places], rtol=1e-4, atol=1e-6)
    others = np.setdiff1d(np.arange(len(whole)), places)
    assert len(others)
    assert (large.values[:, others] == 0).all()
    (more,) = active_latents(model, task, ["sae/code"], {"sae/code": range(40)})
    assert more.indices == tuple(range(40))
    # Under another ablation the parts that are left out belong to the error: all edges off is all of it off.
    for ablation in ("mean", "zero"):
        runs, none = (
            Runs(graph, task, ablation=ablation),
            Runs(edge_graph(model), task, ablation=ablation),
        )
        (one,), (other,) = runs.pairs(), none.pairs()
        torch.testing.assert_close(runs.corrupted(one), none.corrupted(other), rtol=1e-4, atol=1e-5)


def test_parts_that_cannot_be_are_refused() -> None:
    plain_model, _ = gpt2_like()
    model = coded(plain_model, "blocks.0.hook_mlp_out")
    stream = coded(plain_model, "blocks.0.hook_resid_post")
    for made, said in (
        (lambda: edge_graph(model, neurons="0,x"), "neurons '0,x': expected numbers of layers such as 3,5-7, or all"),
        (lambda: edge_graph(model, neurons="1-2"), "neurons '1-2': gpt2-like.* has the layers 0 to 1"),
        (lambda: edge_graph(load_model("induction"), neurons="0"), "MLP of layer 0 of induction has no single layer"),
        (lambda: edge_graph(model, latents=["code:10"]), "latent 10 of sae/code: expected 0 to 9"),
        (lambda: edge_graph(model, neurons="0", latents=["code"]), "mlp:0 and sae/code both split the MLP of layer 0"),
        (lambda: edge_graph(stream, latents=["code"]), "blocks.0.hook_resid_post, which is not what attention"),
        (lambda: edge_graph(load_model("shapes"), neurons="0"), "neurons 0: the edges of shapes.* between channels"),
        (lambda: StreamGraph(model, neurons="all", limit=100), "more than 100; expected about 1[0-9] neurons"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said) as caught:
            made()
        assert "\n" not in str(caught.value)
    with pytest.raises(KeyError, match=r"unknown autoencoder of .* 'sae/cod'"):
        edge_graph(model, latents=["cod"])


def test_a_circuit_of_neurons_is_found() -> None:
    model = load_model("addition-by-hand")
    graph, task = edge_graph(model, neurons="all"), load_task(model, n=16, seed=1)
    found = discover(graph, task, "eap", size=40, check=0, n_random=3, n_curves=1)
    neurons = {n for n in found.circuit if str(n).startswith("blocks.0.mlp.hook_post:")}
    sources = {s for s, _ in edges_of(found.circuit) if s.startswith("mlp:0:")}
    assert {f"mlp:0:{str(n).rpartition(':')[2]}" for n in neurons} == sources
    assert len(sources) > 1


def test_grains_go_together_with_keys_and_values_by_query_head() -> None:
    model, _ = llama_like()
    task = pairs(model, *drawn(), weighed)
    whole = edge_graph(model, kv="head")
    graph = edge_graph(model, kv="head", neurons="0", spans="0,1-3,4-")
    for method in ("eap", "eap-ig"):
        coarse, fine = score_edges(whole, task, method), score_edges(graph, task, method)
        total = dict.fromkeys(whole.edges, 0.0)
        for (source, target), score in zip(fine.edges, fine.mean, strict=True):
            part = "mlp:0" if source.startswith("mlp:0:") else source
            total[part, target.partition("@")[0]] += score
        np.testing.assert_allclose(list(total.values()), coarse.mean, rtol=1e-4, atol=1e-6)
    # The same edges of all spans and all neurons, patched at once.
    chosen = {("mlp:0", "1.3.k"), ("0.1", "1.2.v"), ("token", "1.0.q")}
    mask = torch.tensor([[edge in chosen for edge in whole.edges]]).float()
    split = [
        ("mlp:0" if s.startswith("mlp:0:") else s, t.partition("@")[0]) for s, t in graph.edges
    ]
    finer = torch.tensor([[edge in chosen for edge in split]]).float()
    (one,), (other,) = (runs := Runs(whole, task)).pairs(), (fine_runs := Runs(graph, task)).pairs()
    torch.testing.assert_close(
        fine_runs.patched(other, finer), runs.patched(one, mask), rtol=1e-5, atol=1e-5
    )
    (pair,) = fine_runs.pairs()
    torch.testing.assert_close(
        fine_runs.patched(pair, torch.ones(1, len(graph)))[0],
        fine_runs.corrupted(pair),
        rtol=0,
        atol=0,
    )


# --- on the command line -------------------------------------------------------------------------


def test_finer_grains_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model("addition-by-hand")
    width = model.site("blocks.0.hook_mlp_out").width
    about = About("code", "blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out", model.name, model.hash)
    eye = torch.eye(width)
    folder = tmp_path / "saes" / "code"
    folder.mkdir(parents=True)
    zeros = torch.zeros(width)
    save_autoencoder(Autoencoder(eye, zeros, eye, zeros, about=about), folder / FILE)
    options = ["--workspace", str(tmp_path), "--random", "1"]
    search = ["--method", "eap", "--check", "0", "--size", "20"]
    for name, given, wanted in (
        ("addition-by-hand", ["--neurons", "all"], "mlp:0:"),
        ("addition-by-hand", ["--spans", "0,1-"], "@1-"),
        ("addition-by-hand+sae/code", ["--latents", "active"], "sae/code"),
    ):
        found = output(capsys, "discover", name, *given, *search, "--save", "found", *options)
        edges = [" -> ".join(edge) for edge in found["circuit"]["edges"]]
        assert any(wanted in edge for edge in edges)
        made = output(capsys, "evaluate", name, "found", *options)
        assert made["faithfulness"]["value"] == found["evaluation"]["faithfulness"]["value"]
    for given, said in (
        (["--latents", "active"], "latents active: addition-by-hand has no autoencoders"),
        (["--neurons", "2"], "neurons '2': addition-by-hand has the layers 0 to 0"),
        (["--spans", "0"], "nothing holds the positions behind '0'"),
        (["--neurons", "all", "--most-edges", "20"], "more than 20; expected about"),
    ):
        assert run(["discover", "addition-by-hand", *given, "--workspace", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert said in " ".join(error.split())
        assert "Traceback" not in error


@pytest.mark.parametrize(
    "grain", [{"neurons": "all", "neuron_targets": "0"}, {"neurons": "1", "spans": "0,1-"}]
)
def test_edges_of_parts_in_half_precision_are_those_in_float32(grain: Any) -> None:
    model, half = gpt2_like()[0], gpt2_like()[0]
    half = HookedModel(half.module.to(torch.bfloat16), half.input, "half")
    wanted, found = (
        [
            score_edges(edge_graph(m, **grain), pairs(m, *drawn(), weighed), method).mean
            for method in ("eap", "exact")
        ]
        for m in (model, half)
    )
    for one, other in zip(wanted, found, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.95  # of 8 bits
