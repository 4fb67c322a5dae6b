"""Edges of families whose MLP reads what others read, too, has experts, or is scaled: against torch's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import circuits
from circuits.autoencoders import Autoencoder
from circuits.discovery import EdgeGraph, Runs, edge_graph, score_edges
from circuits.discovery.streams import StreamGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks import Task
from tests.edge_checks import check_ends
from tests.plain_transformer import Edge
from tests.test_discovery import weighed
from tests.test_grains import coded
from tests.test_paths import drawn, pairs
from tests.transformer_families import (
    CONTEXT,
    FAMILIES,
    HEADS,
    MORE,
    N_VOCAB,
    WIDTH,
    bridged,
    huggingface_model,
)  # fmt: skip

PARALLEL, BEHIND = ("cohere", "stablelm-parallel"), ("olmo2",)
"""Families in which attention and MLP read the same, and those that normalise nothing before the two."""


class ByHand:
    """What one edge does in a Hugging Face model of Llama's layout, by torch's hooks on its modules."""

    def __init__(self, family: str, inner: Any, clean: Tensor, other: Tensor) -> None:
        self.family, self.inner, self.clean = family, inner, clean
        self.added = (FAMILIES | MORE)[family].added
        self.layers = list(inner.model.layers)
        self.seen, self.other = self._watched(clean), self._watched(other)

    def _watched(self, tokens: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for name, module in self.inner.named_modules():

                def note(_m: Any, args: Any, kwargs: Any, made: Any, name: str = name) -> None:
                    given = next(
                        (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None
                    )
                    seen[f"{name}<"] = given  # type: ignore[assignment]
                    seen[name] = made[0] if isinstance(made, tuple) else made

                handle = module.register_forward_hook(note, with_kwargs=True)
                stack.callback(handle.remove)
            self.inner(tokens)
        return seen

    def norm(self, layer: int, what: str) -> Callable[[Tensor], Tensor]:
        at = self.layers[layer]
        if self.family in BEHIND:
            return lambda x: x
        return (
            at.post_attention_layernorm
            if what == "mlp" and self.family not in PARALLEL
            else at.input_layernorm
        )

    def written(self, sender: str) -> Tensor:
        """What a sender adds to the stream in the other run less what it adds in the clean one."""
        if sender == "token":
            return self.other["model.layers.0<"] - self.seen["model.layers.0<"]
        if sender.startswith("mlp:"):
            end = "post_feedforward_layernorm" if self.family in BEHIND else "mlp"
            name = f"model.layers.{sender[4:]}.{end}"
            return (self.other[name] - self.seen[name]) * self.added
        layer, head = map(int, sender.split("."))
        name, own = f"model.layers.{layer}.self_attn.o_proj", slice(head * 4, head * 4 + 4)
        assert WIDTH // HEADS == 4
        live = self.seen[f"{name}<"].clone()
        live[..., own] = self.other[f"{name}<"][..., own]
        out = self.layers[layer].self_attn.o_proj
        after = (
            self.layers[layer].post_attention_layernorm if self.family in BEHIND else nn.Identity()
        )
        return (after(out(live)) - after(self.seen[name])) * self.added

    def before(self, layer: int, what: str) -> Tensor:
        """The stream that attention or the MLP of a layer reads."""
        stream = self.seen[f"model.layers.{layer}<"]
        if what != "mlp" or self.family in PARALLEL:
            return stream
        end = "post_attention_layernorm" if self.family in BEHIND else "self_attn"
        return stream + self.seen[f"model.layers.{layer}.{end}"] * self.added

    def logits(self, sender: str, receiver: str) -> Tensor:
        """The logits where what a receiver reads has a sender's other contribution in it."""
        moved = self.written(sender)
        if receiver == "logits":
            module: Any = self.inner.model.norm
            hook: Any = module.register_forward_pre_hook(lambda _, args: (args[0] + moved,))
        elif receiver.startswith("mlp:"):
            layer = int(receiver[4:])
            made = self.norm(layer, "mlp")(self.before(layer, "mlp") + moved)
            hook = self.layers[layer].mlp.register_forward_pre_hook(lambda *_: (made,))
        else:
            number, head, letter = receiver.split(".")
            layer, own = int(number), slice(int(head) * 4, int(head) * 4 + 4)
            module = getattr(self.layers[layer].self_attn, f"{letter}_proj")
            norm, stream = self.norm(layer, "q"), self.before(layer, "q")
            made = module(norm(stream + moved))

            def changed(_m: Any, _x: Any, out: Tensor) -> Tensor:
                return torch.cat([out[..., : own.start], made[..., own], out[..., own.stop :]], -1)

            hook = module.register_forward_hook(changed)
        with torch.no_grad():
            logits = self.inner(self.clean).logits
        hook.remove()
        return logits


def effects_by_hand(
    model: HookedModel, by_hand: Callable[[str, str], Tensor], some: Sequence[Edge]
) -> Tensor:
    """Checks that no edges and all edges are the runs themselves, and some edges what they are by hand.

    Args:
        model: the model of texts.
        by_hand: the logits with an edge patched.
        some: edges.

    Returns:
        By how much each edge moves the metric, on the example where it moves it most.
    """
    graph, (clean, corrupted) = edge_graph(model), drawn()
    task = pairs(model, clean, corrupted, weighed)
    check_ends(graph, task, weighed)
    (pair,) = (runs := Runs(graph, task)).pairs()
    found = runs.patched(pair, torch.eye(len(graph))[[graph.index(edge) for edge in some]])
    with torch.no_grad():
        made = torch.stack([weighed(by_hand(*edge)) for edge in some]).double()
        intact = weighed(model.logits(clean)).double()
    torch.testing.assert_close(found, made, rtol=1e-3, atol=1e-4)
    return (made - intact).abs().amax(1)


def check(family: str, model: HookedModel, inner: Any) -> None:
    graph = edge_graph(model)
    assert isinstance(graph, StreamGraph)
    assert {"token", "0.3", "mlp:0"} <= set(graph.sources)
    clean, corrupted = drawn()
    with torch.no_grad():
        hand = ByHand(family, inner, clean, corrupted)
    assert float(effects_by_hand(model, hand.logits, graph.edges).amax()) > 1e-2


@pytest.mark.parametrize(
    "family", ["cohere", "stablelm-parallel", "olmo2", "mixtral", "gpt-oss", "granite"]
)
def test_edges_of_a_module_are_those_that_are_patched_by_hand(family: str) -> None:
    inner = huggingface_model(family)
    check(family, HookedModel(inner, TokenInput(N_VOCAB, CONTEXT), family), inner)


def test_edges_of_a_bridge_whose_outputs_are_scaled(tmp_path: Path) -> None:
    check("granite", *bridged("granite", tmp_path))


# --- gradients and rows of passes, in every family -----------------------------------------------

WITH_EDGES = [f for f in (*FAMILIES, *MORE) if f not in ("mamba", "openai-gpt", "deepseek-v2")]
"""All families but one without attention, one whose stream is normalised itself, and one with latent attention."""


def check_slopes(graph: EdgeGraph, task: Task) -> None:
    """Scores by gradients are the slopes of the metric along each edge that is patched, taken through the pass itself.

    With all edges intact, that of each set and edge is `eap`.
    """
    (pair,) = (runs := Runs(graph, task)).pairs()
    off = torch.zeros(1, len(graph), requires_grad=True)
    with torch.enable_grad():
        values = runs.patched(pair, off)[0]
        slopes = [torch.autograd.grad(v, off, retain_graph=True)[0][0] for v in values]
    found = torch.from_numpy(score_edges(graph, task, "eap").values)
    largest = float(found.abs().amax())
    assert largest > 1e-2
    torch.testing.assert_close(torch.stack(slopes).double(), found, rtol=1e-3, atol=1e-5 * largest)


def check_rows(graph: EdgeGraph, task: Task) -> None:
    """What a set of edges is worth does not depend on the sets that are patched in the same pass."""
    (pair,) = (runs := Runs(graph, task)).pairs()
    late = torch.tensor([target == "logits" for _, target in graph.edges]).float()
    drawn = torch.rand(2, len(graph), generator=torch.Generator().manual_seed(0)) < 0.1
    sets = torch.stack([late * 0, late, *drawn.float()])
    together = runs.patched(pair, sets)
    alone = torch.cat([runs.patched(pair, one[None]) for one in sets])
    assert float((alone - alone[0]).abs().amax()) > 1e-2
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", WITH_EDGES)
def test_scores_are_slopes_and_rows_are_independent_in_every_family(family: str) -> None:
    model = HookedModel(huggingface_model(family), TokenInput(N_VOCAB, CONTEXT), family)
    graph, task = edge_graph(model), pairs(model, *drawn(), weighed)
    check_slopes(graph, task)
    check_rows(graph, task)


@pytest.mark.parametrize("family", ["falcon", "cohere"])
def test_scores_are_slopes_and_rows_are_independent_in_bridges(family: str, tmp_path: Path) -> None:
    model, _ = bridged(family, tmp_path)
    graph, task = edge_graph(model), pairs(model, *drawn(), weighed)
    check_slopes(graph, task)
    check_rows(graph, task)


# --- rows of all examples, readouts of several layers ---------------------------------------------


def check_some(
    model: HookedModel, by_hand: Callable[[str, str], Tensor], some: Sequence[Edge]
) -> None:
    """No edges and all edges are the runs themselves, and some edges what they are by hand."""
    assert bool((effects_by_hand(model, by_hand, some) > 1e-3).all())


def note(seen: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, args: Any, made: Any) -> None:
        seen[name] = made[0] if isinstance(made, tuple) else made

    return hook


def opt_by_hand(inner: Any) -> Callable[[str, str], Tensor]:
    """Edges into MLPs and the logits of OPT, whose MLPs take the positions of all examples as rows."""
    layers, (clean, corrupted) = inner.model.decoder.layers, drawn()
    runs: list[dict[str, Tensor]] = []
    for tokens in (clean, corrupted):
        seen: dict[str, Tensor] = {}
        hooks = [inner.model.decoder.embed_tokens.register_forward_hook(note(seen, "token"))]
        for i, layer in enumerate(layers):
            hooks += [
                layer.self_attn.register_forward_hook(note(seen, f"attention:{i}")),
                layer.fc2.register_forward_hook(note(seen, f"mlp:{i}")),
                layer.register_forward_hook(note(seen, f"after:{i}")),
            ]
        inner(tokens)
        for hook in hooks:
            hook.remove()
        runs.append({k: v.reshape(*tokens.shape, -1) for k, v in seen.items()})
    live, other = runs

    def logits(sender: str, receiver: str) -> Tensor:
        moved = other[sender] - live[sender]
        if receiver == "logits":
            norm: Any = inner.model.decoder.final_layer_norm
            hook = norm.register_forward_pre_hook(lambda _, args: (args[0] + moved,))
        else:
            layer = layers[int(receiver[4:])]
            read = live["after:0"] + live["attention:1"] + moved
            made = layer.final_layer_norm(read).flatten(0, 1)
            hook = layer.fc1.register_forward_pre_hook(lambda *_: (made,))
        found = inner(clean).logits
        hook.remove()
        return found

    return logits


SOME = [("token", "mlp:1"), ("mlp:0", "mlp:1"), ("mlp:1", "logits"), ("token", "logits")]


def test_edges_of_mlps_that_take_the_positions_of_all_examples_as_rows(tmp_path: Path) -> None:
    bridge, inner = bridged("opt", tmp_path)
    with torch.no_grad():
        by_hand = opt_by_hand(inner)
    check_some(bridge, by_hand, SOME)
    traced = HookedModel(inner, TokenInput(N_VOCAB, CONTEXT), "opt")
    check_some(traced, by_hand, SOME)
    # A site of such rows has them by example, whatever the batch.
    clean, corrupted = drawn()
    for tokens in (clean, corrupted[:1]):
        found = traced.run(tokens, read=["blocks.1.mlp.hook_post"])["blocks.1.mlp.hook_post"]
        assert found.shape == (*tokens.shape, 24)
    one = traced.run(clean, read=["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"]
    alone = traced.run(clean[1:2], read=["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"]
    torch.testing.assert_close(one[1:2], alone)


def encoder(kind: str, **more: Any) -> Any:
    """A tiny random masked language model."""
    config = {
        "vocab_size": N_VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2,
        "intermediate_size": 24, "max_position_embeddings": CONTEXT, "attn_implementation": "eager", "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**config | more)
    inner: Any = transformers.AutoModelForMaskedLM.from_config(made).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in inner.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return inner


def test_the_logits_of_a_head_of_several_layers_are_a_target() -> None:
    inner = encoder("ModernBert", global_attn_every_n_layers=1)
    model = HookedModel(inner, TokenInput(N_VOCAB, CONTEXT), "modernbert")
    clean, corrupted = drawn()
    runs: list[dict[str, Tensor]] = []
    for tokens in (clean, corrupted):
        seen: dict[str, Tensor] = {}
        hooks = [
            m.register_forward_hook(note(seen, f"mlp:{i}"))
            for i, m in enumerate(m.mlp for m in inner.model.layers)
        ]
        hooks.append(inner.model.embeddings.register_forward_hook(note(seen, "token")))
        with torch.no_grad():
            inner(tokens)
        for hook in hooks:
            hook.remove()
        runs.append(seen)

    def by_hand(sender: str, _: str) -> Tensor:
        moved = runs[1][sender] - runs[0][sender]
        norm: Any = inner.model.final_norm
        hook = norm.register_forward_pre_hook(lambda _, args: (args[0] + moved,))
        found = inner(clean).logits
        hook.remove()
        return found

    check_some(model, by_hand, [("token", "logits"), ("mlp:0", "logits"), ("mlp:1", "logits")])


@pytest.mark.parametrize("kind", ["Bert", "Albert", "Electra"])
def test_a_stream_that_is_normalised_itself_has_no_edges(kind: str) -> None:
    more = {"embedding_size": 8} if kind == "Albert" else {}
    model = HookedModel(encoder(kind, **more), TokenInput(N_VOCAB, CONTEXT), kind)
    with pytest.raises(ValueError, match=f"model {kind} normalises its residual stream itself"):
        edge_graph(model)


def test_latent_attention_has_no_edges_of_heads() -> None:
    inner = huggingface_model("deepseek-v2")
    model = HookedModel(inner, TokenInput(N_VOCAB, CONTEXT), "deepseek-v2")
    with pytest.raises(ValueError, match="has no matrix W_K: between its heads and the stream"):
        edge_graph(model)


# --- the site of what only the MLP reads ----------------------------------------------------------


@pytest.mark.parametrize("family", ["cohere", "olmo2", "gpt-oss"])
def test_what_the_mlp_alone_reads_is_changed_and_attributed_there(family: str) -> None:
    """The same tensor goes to attention or the skip connection, which a change of the site does not reach."""
    inner, site = huggingface_model(family), "blocks.0.mlp.hook_in"
    model = HookedModel(inner, TokenInput(N_VOCAB, CONTEXT), family)
    tokens, _ = drawn()
    read = model.run(tokens, read=[site])[site]

    def by_hand(value: Tensor) -> Tensor:
        hook = inner.model.layers[0].mlp.register_forward_pre_hook(lambda *_: (value,))
        with torch.no_grad():
            made = inner(tokens).logits
        hook.remove()
        return made

    cut = read.clone()
    cut[..., 1] = 0
    with circuits.edited(model, [circuits.edits.zero(f"{site}:1")]):
        torch.testing.assert_close(model.logits(tokens), by_hand(cut), rtol=1e-4, atol=1e-5)
    found = circuits.attribute(model, tokens, "token:3", site, check=0).values
    step = torch.zeros_like(read)
    for place in ((0, 2, 3), (1, 6, 7), (2, 5, 1)):
        step.zero_()[place] = 3e-3
        up, down = (by_hand(read + sign * step)[place[0], -1, 3] for sign in (1, -1))
        wanted = (up - down) / 6e-3 * read[place]
        torch.testing.assert_close(found[place], wanted, rtol=2e-2, atol=1e-3)
    with_code = coded(model, site)
    assert torch.equal(with_code.logits(tokens), model.logits(tokens))
    code = with_code.module.get_submodule("sae/code.code")
    assert isinstance(code, Autoencoder)
    with torch.no_grad():
        latents = code.encode(read)
        moved = read - latents[..., 4:5] * code.W_dec[4]
    with circuits.edited(with_code, [circuits.edits.zero("sae/code:4")]):
        found = with_code.logits(tokens)
    assert bool((latents[..., 4] > 0).any())
    torch.testing.assert_close(found, by_hand(moved), rtol=1e-4, atol=1e-5)
