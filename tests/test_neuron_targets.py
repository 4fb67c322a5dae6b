"""Neurons of MLPs as targets of edges, against definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from circuits.discovery import Runs, edge_graph, score_edges
from circuits.discovery.streams import StreamGraph
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.tasks import Task
from tests.edge_checks import check_ends
from tests.edge_oracle import Oracle, See, TransformerEdges, Values, as_it_is, last_logits
from tests.test_discovery import LAST, METHODS, OWN, weighed
from tests.test_grains import close
from tests.test_paths import drawn, gpt2_like, llama_like, pairs


@dataclass
class NeuronEdges(TransformerEdges):
    """A transformer in which the neurons of the second MLP are targets, and those of the first senders."""

    @property
    def sites(self) -> list[list[str]]:
        neurons = [f"mlp:0:{i}" for i in range(12)]
        return [neurons if site == ["mlp:0"] else site for site in super().sites]

    def run(
        self, start: Values, see: See = as_it_is, replaced: Values | None = None
    ) -> tuple[Tensor, Values]:
        # What each neuron sees is laid along a first axis, read from there by its own column of the matrices.
        def seen(target: str, values: Values) -> Values:
            if target != "mlp:1":
                return see(target, values)
            own = [see(f"{target}:{i}", values) for i in range(12)]
            return {name: torch.stack([o[name] for o in own]) for name in values}

        return super().run(start, seen, replaced)

    def mlp(self, layer: int, read: Tensor) -> dict[str, Tensor]:
        plain, shape = self.plain, "epm,nm->epn" if layer == 0 else "nepm,nm->epn"

        def into(name: str) -> Tensor:
            made = torch.einsum(shape, read, plain.w[name])
            bias = plain.w.get(f"{name}.bias")
            return made if bias is None else made + bias

        gate = into(f"{layer}.gate") if plain.gated else None
        hidden, rows = plain.hidden(into(f"{layer}.in"), gate), plain.w[f"{layer}.out"].T
        made = {f"mlp:{layer}:{i}": hidden[..., i : i + 1] * row for i, row in enumerate(rows)}
        bias = plain.w.get(f"{layer}.out.bias")
        if layer == 1:
            whole = torch.stack(list(made.values())).sum(0)
            return {"mlp:1": whole if bias is None else whole + bias}
        return made if bias is None else made | {"bias:mlp": bias.expand_as(made["mlp:0:0"])}


@pytest.fixture(scope="module", params=[gpt2_like, llama_like])
def case(request: pytest.FixtureRequest) -> tuple[StreamGraph, Task, Any]:
    model, plain = request.param()
    graph = edge_graph(model, neurons="0", neuron_targets="1")
    assert isinstance(graph, StreamGraph)
    return graph, pairs(model, *drawn(), weighed), plain


@pytest.fixture(scope="module")
def oracle(case: tuple[StreamGraph, Task, Any]) -> Oracle:
    graph, _, plain = case
    return Oracle(NeuronEdges(plain, graph.edges), last_logits(LAST), *drawn())


@pytest.mark.parametrize(
    ("method", "given", "name", "args"),
    [
        case for case in METHODS if case[0] != "exact"
    ],  # a hook of torch's own is compared with exact patching below
)
def test_edges_into_neurons_score_what_their_definition_says(
    case: tuple[StreamGraph, Task, Any],
    oracle: Oracle,
    method: Any,
    given: Any,
    name: str,
    args: Any,
) -> None:
    graph, task, _ = case
    close(score_edges(graph, task, method, **given), getattr(oracle, name)(*args))


def test_circuits_of_neurons_carry_what_their_definition_says(
    case: tuple[StreamGraph, Task, Any], oracle: Oracle
) -> None:
    graph, task, _ = case
    check_ends(graph, task, weighed)
    (pair,) = (runs := Runs(graph, task)).pairs()
    off = (torch.rand(4, len(graph), generator=torch.Generator().manual_seed(2)) < 0.5).float()
    off[2] = 0.3
    off[3, [t.startswith("mlp:1:") and not t.endswith("7") for _, t in graph.edges]] = 1
    wanted = torch.stack([oracle.value(row.double()) for row in off])
    torch.testing.assert_close(runs.patched(pair, off), wanted, rtol=1e-4, atol=1e-5)


def hooked(model: HookedModel, inputs: Tensor, change: Change) -> Tensor:
    """The logits of a run in which torch's own hook changes what the second MLP's neurons are given."""
    point: Any = model.module.hook_dict["blocks.1.mlp.hook_pre"]  # type: ignore[index]
    handle = point.register_forward_hook(lambda _, __, made: change(made))
    try:
        return model.logits(inputs)
    finally:
        handle.remove()


def test_a_patched_edge_is_what_a_hook_of_torch_makes_by_hand() -> None:
    model, _ = gpt2_like()
    model.module.double()
    clean, corrupted = drawn()
    task = pairs(model, clean, corrupted, weighed)
    graph = edge_graph(model, neurons="0", neuron_targets="1")
    (pair,) = (runs := Runs(graph, task)).pairs()
    post, resid, pre = "blocks.0.mlp.hook_post", "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_pre"
    live, other = (model.run(x, read=[post, resid, pre]) for x in (clean, corrupted))
    block = model.module.get_submodule("blocks.1")
    w_out: Any = model.module.get_submodule("blocks.0.mlp").W_out
    w_in: Any = block.get_submodule("mlp").W_in
    norm = block.get_submodule("ln2")
    for source, target in ((3, 5), (11, 0), (0, 11)):
        moved = (other[post] - live[post])[..., source, None] * w_out[source]
        with torch.no_grad():
            given = (norm(live[resid] + moved) - norm(live[resid])) @ w_in[:, target]

        def change(made: Tensor, given: Tensor = given, target: int = target) -> Tensor:
            made = made.clone()
            made[..., target] += given
            return made

        wanted = weighed(hooked(model, clean, change)).double()
        off = torch.zeros(1, len(graph))
        off[0, graph.index(f"mlp:0:{source} -> mlp:1:{target}")] = 1
        assert (wanted - weighed(model.logits(clean))).abs().max() > 1e-5
        torch.testing.assert_close(runs.patched(pair, off)[0], wanted, rtol=0, atol=1e-12)
    # All edges into one neuron: it is given, to the bit, what it was given in the other run.
    whole = torch.tensor([[float(t == "mlp:1:5") for _, t in graph.edges]])

    def put(made: Tensor) -> Tensor:
        made = made.clone()
        made[..., 5] = other[pre][..., 5]
        return made

    assert torch.equal(runs.patched(pair, whole)[0], weighed(hooked(model, clean, put)).double())


@pytest.mark.parametrize("name", ["norms after attention", "parallel layers"])
def test_neurons_of_a_traced_model_as_targets(name: str) -> None:
    kind, given = OWN[name]
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 6}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**shape, max_position_embeddings=16, **given)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = HookedModel(module, TokenInput(20, 16), "traced")
    graph = edge_graph(model, neurons="0", neuron_targets="all")
    assert isinstance(graph, StreamGraph)
    task = pairs(model, *drawn(), weighed)
    check_ends(graph, task, weighed)
    # All neurons of an MLP given another run's part are the MLP given it.
    (one,) = (runs := Runs(graph, task)).pairs()
    (other,) = (whole_runs := Runs(whole := edge_graph(model), task)).pairs()
    finer = torch.tensor([[s == "token" and t.startswith("mlp:1:") for s, t in graph.edges]])
    coarser = torch.tensor([[edge == ("token", "mlp:1") for edge in whole.edges]])
    torch.testing.assert_close(
        runs.patched(one, finer.float()), whole_runs.patched(other, coarser.float()), rtol=1e-5, atol=1e-6
    )  # fmt: skip
    eap, step = score_edges(graph, task, "eap").values, 3e-3
    some = list(range(0, len(graph), 7))
    off = torch.zeros(len(some) + 1, len(graph))
    off[torch.arange(len(some)), some] = step
    values = runs.patched(one, off)
    slopes = ((values[:-1] - values[-1:]) / step).T.numpy()
    assert np.abs(slopes - eap[:, some]).max() <= 0.01 * np.abs(eap).max()


def test_neurons_as_targets_at_spans_and_their_names() -> None:
    model, _ = gpt2_like()
    task = pairs(model, *drawn(), weighed)
    graph = edge_graph(model, neurons="1", neuron_targets="0-1", spans="0,1-3,4-")
    assert isinstance(graph, StreamGraph)
    check_ends(graph, task, weighed)
    coarse = edge_graph(model, neurons="1", neuron_targets="all")
    total = dict.fromkeys(coarse.edges, 0.0)
    for (source, target), score in zip(
        graph.edges, score_edges(graph, task, "eap").mean, strict=True
    ):
        total[source, target.partition("@")[0]] += score
    np.testing.assert_allclose(
        list(total.values()), score_edges(coarse, task, "eap").mean, rtol=1e-4, atol=1e-6
    )
    # A neuron feeds itself where neurons are sources, and the MLP where it is one.
    for target, fed in (("mlp:1:7", ["mlp:1:7"]), ("mlp:0:7", ["mlp:0"])):
        assert [coarse.sources[s] for s in coarse.feeds[coarse.targets.index(target)]] == fed
    assert coarse.kind("mlp:0:7") == "neuron of layer 0"
    assert graph.kind("mlp:0:7@1-3") == "neuron@1-3 of layer 0"
    assert coarse.grain.endswith("neurons of layers 0, 1 as targets")
    assert edge_graph(model, **coarse.choices).edges == coarse.edges
    with pytest.raises(KeyError, match=r"mlp:0:12"):
        coarse.index("token -> mlp:0:12")


def test_sizes_and_weights_of_edges_into_neurons(case: tuple[StreamGraph, Task, Any]) -> None:
    graph, task, _ = case
    whole = edge_graph(graph.model, neurons="0")
    for method in ("weights", "activations"):
        fine, coarse = (
            torch.from_numpy(score_edges(g, task, method).values) for g in (graph, whole)
        )
        for source, target in (("token", "mlp:1"), ("mlp:0:3", "mlp:1"), ("0.1", "mlp:1")):
            own = [graph.index(f"{source} -> {target}:{i}") for i in range(12)]
            squares = fine[:, own].square().sum(1).sqrt()
            if method == "weights":  # the matrix of an MLP is its neurons' side by side
                torch.testing.assert_close(squares, coarse[:, whole.index((source, target))])
            else:
                assert (squares > 0).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"neuron_targets": "2"}, "neuron_targets '2': gpt2-like has the layers 0 to 1"),
        ({"neuron_targets": "1-0"}, "neuron_targets '1-0': 1-0 runs backwards; expected 0-1"),
        (
            {"neuron_targets": "x"},
            "neuron_targets 'x': expected numbers of layers such as 3,5-7, or all",
        ),
    ],
)
def test_layers_without_neurons_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        edge_graph(gpt2_like()[0], **given)
    with pytest.raises(ValueError, match=r"neuron_targets 0: the edges of .* are between channels"):
        edge_graph(load_model("shapes"), neuron_targets="0")
