"""Tiny transformers of many kinds, each with what its attention computes, found without any tracing.

What a library's module says of itself (the weights that its attention returns, inputs and outputs of its projections
by hooks of torch), or a computation by hand, is what tests of heads compare with. Each `Case` names its attentions as
the models' sites are named: `blocks.0.attn`, and `encoder_blocks.0.attn`, `decoder_blocks.0.self_attn`,
`decoder_blocks.0.cross_attn` where there are an encoder and a decoder.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from circuits.models.adapter.inputs import ImageInput, TokenInput
from tests import transformer_families, vision_families
from tests.person_models import (
    CONTEXT,
    HEADS,
    LAYERS,
    N_VOCAB,
    WIDTH,
    Grouped,
    LinearAttention,
    Multihead,
    NanoGPT,
    OfFunctions,
    OneHot,
    OverHeads,
    Person,
    Reloaded,
    Retention,
    Shape,
    SigmoidAttention,
    TalkingHeads,
    TorchEncoder,
)
from tests.vision_families import redraw

Implementation = Literal["eager", "sdpa"]
BOTH: tuple[Implementation, ...] = ("eager", "sdpa")
Sites = dict[str, Tensor]
Weigh = Callable[..., Sites]
TOKENS = TokenInput(N_VOCAB, CONTEXT)
IMAGES = ImageInput(3, vision_families.SIZE, vision_families.SIZE)


@dataclass(frozen=True)
class Weights:
    """The weights of one attention, as views of the module's parameters: writing to one changes the module.

    Attributes:
        q: d_model x head x d_head.
        k, v: d_model x head of keys and values x d_head.
        o: head x d_head x d_model.
        q_bias, k_bias, v_bias: head x d_head; None without biases.
        o_bias: d_model.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True)
class Attention:
    """One attention of a model.

    Attributes:
        name: of its sites.
        n_heads: heads of queries.
        n_kv_heads: heads of keys and values.
        module: the module that computes it; its output's last part is the pattern in libraries that give it.
        q, k, v, o: modules of its projections within `module`; the same one where they are fused.
        layout: how a fused projection's outputs lie: `blocks` of queries, keys and values, or `heads`, each with its
            queries, keys and values; `apart` if they are not fused.
    """

    name: str
    n_heads: int
    n_kv_heads: int
    module: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    layout: Literal["apart", "blocks", "heads"] = "apart"

    def part(self, made: Tensor, letter: str) -> Tensor:
        """The queries, keys or values of a projection's outputs, which are the last axis: … x head x d_head."""
        n, kv = self.n_heads, self.n_kv_heads
        if self.layout == "apart":
            return made.unflatten(-1, (n if letter == "q" else kv, -1))
        if self.layout == "heads":
            return made.unflatten(-1, (n, 3, -1))[..., "qkv".index(letter), :]
        heads = made.unflatten(-1, (n + 2 * kv, -1))
        start = {"q": 0, "k": n, "v": n + kv}[letter]
        return heads[..., start : start + (n if letter == "q" else kv), :]

    def projection(self, module: nn.Module, letter: str) -> nn.Module:
        """The module of a projection: `q`, `k`, `v` or `o`."""
        return module.get_submodule(f"{self.module}.{getattr(self, letter)}")

    def weights(self, module: nn.Module) -> Weights:
        """Its weights, from the modules of its projections."""
        found: dict[str, Tensor] = {}
        for letter in "qkv":
            linear = self.projection(module, letter)
            found[letter] = self.part(rows_in(linear), letter)
            if linear.bias is not None:
                found[f"{letter}_bias"] = self.part(linear.bias.detach(), letter)
        output = self.projection(module, "o")
        found["o"] = rows_in(output).unflatten(0, (self.n_heads, -1))
        if output.bias is not None:
            found["o_bias"] = output.bias.detach()
        return Weights(**found)


def rows_in(linear: Any) -> Tensor:
    """A view of the weights of a linear module, a row an input."""
    weight = linear.weight.detach()
    return weight if type(linear).__name__ == "Conv1D" else weight.T


@dataclass(frozen=True)
class Case:
    """A model, and what its attention computes.

    Attributes:
        name: of the model.
        build: makes it, random and in evaluation mode; the same weights for every implementation.
        input: what it takes.
        attentions: in order of execution.
        compute: from a module that `build` made and its inputs, the sites of every attention (`oracle`).
        weights: from the module, the weights of an attention.
        implementations: of its attention: `eager` writes the softmax out, `sdpa` calls the fused function.
        rotary: queries and keys are rotated by position after their projections.
        qk_norm: queries and keys are normed after their projections.
        mixed: heads are mixed after the softmax: what weighs the values is `hook_mixed_pattern`.
        refused: nothing in it is an attention pattern, a softmax over keys. `hook_pattern` is then what weighs the
            values, and `hook_implied_pattern` what would, if the module computed it.
        assets: its weights are in the assets folder.
    """

    name: str
    build: Callable[[Implementation], nn.Module]
    input: TokenInput | ImageInput
    attentions: tuple[Attention, ...]
    compute: Callable[[nn.Module, Tensor], Sites]
    weights: Callable[[nn.Module, Attention], Weights]
    implementations: tuple[Implementation, ...] = BOTH
    rotary: bool = False
    qk_norm: bool = False
    mixed: bool = False
    refused: bool = False
    assets: bool = False

    @property
    def heads(self) -> list[tuple[str, int, int]]:
        """Each attention's name, number of heads, and number of heads of keys and values."""
        return [(a.name, a.n_heads, a.n_kv_heads) for a in self.attentions]

    def make(self, implementation: Implementation | None = None) -> nn.Module:
        """The model, in evaluation mode; the first of its implementations if none is named."""
        return self.build(implementation or self.implementations[0])

    def oracle(self, module: nn.Module, inputs: Tensor) -> Sites:
        """What every attention computes, by the names of its sites.

        `NAME.hook_pattern` (batch, head, query, key), `NAME.hook_z` (batch, position, head, d_head) and
        `NAME.hook_q`, `hook_k` and `hook_v` (batch, position, head, d_head): outputs of the projections with biases,
        before rotation and norms. Windows of Swin are an axis after batch.
        """
        with torch.no_grad():
            return self.compute(module, inputs)

    def attention(self, name: str) -> Attention:
        """The attention of a name."""
        return next(a for a in self.attentions if a.name == name)

    def output_weights(self, module: nn.Module, name: str, head: int) -> nn.Module:
        """A copy of the module in which the output weights of one head are zero."""
        changed = copy.deepcopy(module)
        with torch.no_grad():
            self.weights(changed, self.attention(name)).o[head] = 0
        return changed

    def qk(self, module: nn.Module, name: str, head: int) -> Tensor:
        """W_Q W_K^T of a head: d_model x d_model, a row an entry of what queries read; without norms and rotation."""
        found = self.weights(module, self.attention(name))
        return found.q[:, head] @ found.k[:, head * found.k.shape[1] // found.q.shape[1]].T

    def ov(self, module: nn.Module, name: str, head: int) -> Tensor:
        """W_V W_O of a head: d_model x d_model, a row an entry of what values read; without norms."""
        found = self.weights(module, self.attention(name))
        return found.v[:, head * found.v.shape[1] // len(found.o)] @ found.o[head]


# --- by hooks ------------------------------------------------------------------------------------


def watched(module: nn.Module, inputs: Tensor, names: set[str]) -> dict[str, tuple[Any, Any, Any]]:
    """Run a module and note what submodules of the given names were given (by position, by name) and returned."""
    seen: dict[str, tuple[Any, Any, Any]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            seen[name] = (args, kwargs, output)

        return hook

    found = [(name, module.get_submodule(name)) for name in names]
    handles = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in found]
    try:
        module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def projected(attention: Attention, seen: dict[str, tuple[Any, Any, Any]]) -> Sites:
    """Queries, keys, values and z of an attention whose projections are modules."""
    name, found = attention.name, {}
    for letter in "qkv":
        output = seen[f"{attention.module}.{getattr(attention, letter)}"][2]
        found[f"{name}.hook_{letter}"] = attention.part(output, letter)
    read = seen[f"{attention.module}.{attention.o}"][0][0]
    found[f"{name}.hook_z"] = read.unflatten(-1, (attention.n_heads, -1))
    return found


def projections(attentions: tuple[Attention, ...]) -> set[str]:
    """The names of the modules of all projections."""
    return {f"{a.module}.{getattr(a, letter)}" for a in attentions for letter in "qkvo"}


def by_library(
    attentions: tuple[Attention, ...],
    build: Callable[[Implementation], nn.Module],
    module: nn.Module,
    inputs: Tensor,
) -> Sites:
    """The sites of a Hugging Face model, whose attention returns its pattern if it is not fused.

    Where attention is in windows, which the library puts into the batch, windows become an axis after the batch.
    """
    eager = build("eager").to(next(module.parameters()))
    eager.load_state_dict(module.state_dict())
    names = projections(attentions) | {a.module for a in attentions}
    seen, found = watched(eager, inputs, names), {}
    for attention in attentions:
        found |= projected(attention, seen)
        found[f"{attention.name}.hook_pattern"] = seen[attention.module][2][-1]
    if any("Swin" in type(part).__name__ for part in module.modules()):
        return {name: site.unflatten(0, (len(inputs), -1)) for name, site in found.items()}
    return found


def by_projections(
    attentions: tuple[Attention, ...],
    pattern: Callable[[Tensor, Tensor], Tensor],
    module: nn.Module,
    inputs: Tensor,
) -> Sites:
    """The sites of a model whose projections are modules, its patterns computed from queries and keys."""
    seen, found = watched(module, inputs, projections(attentions)), {}
    for attention in attentions:
        sites = projected(attention, seen)
        q, k = (sites[f"{attention.name}.hook_{letter}"] for letter in "qk")
        found |= {**sites, f"{attention.name}.hook_pattern": pattern(q, k)}
    return found


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """Products of queries and keys (batch x position x head x d_head) over the square root of d_head, by head."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])


def causal(q: Tensor, k: Tensor) -> Tensor:
    """The pattern of causal attention from queries and keys."""
    scores = scores_of(q, k)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1)


def rotated(x: Tensor) -> Tensor:
    """Adjacent pairs of queries or keys as complex numbers, turned by their position."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    speeds = 10000.0 ** -(torch.arange(pairs.shape[-1]) / pairs.shape[-1])
    angles = torch.arange(x.shape[1])[:, None, None] * speeds
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def causal_rotary(q: Tensor, k: Tensor) -> Tensor:
    """The pattern of causal attention with rotary positions."""
    return causal(rotated(q), rotated(k))


# --- the attention of torch ----------------------------------------------------------------------


def multihead_weights(module: nn.Module, attention: Attention) -> Weights:
    """The weights of an `nn.MultiheadAttention`."""
    inner: Any = module.get_submodule(attention.module)
    blocks = Attention("", attention.n_heads, attention.n_heads, layout="blocks")
    weight, bias = inner.in_proj_weight.detach().T, inner.in_proj_bias.detach()
    found = {letter: blocks.part(weight, letter) for letter in "qkv"}
    found |= {f"{letter}_bias": blocks.part(bias, letter) for letter in "qkv"}
    output = rows_in(inner.out_proj).unflatten(0, (attention.n_heads, -1))
    return Weights(**found, o=output, o_bias=inner.out_proj.bias.detach())


def by_multihead(attentions: tuple[Attention, ...], module: nn.Module, inputs: Tensor) -> Sites:
    """The sites of a model of `nn.MultiheadAttention`, computed by hand from what each one was given."""
    seen, found = watched(module, inputs, {a.module for a in attentions}), {}
    for attention in attentions:
        args, kwargs, output = seen[attention.module]
        inner: Any = module.get_submodule(attention.module)
        first = inner.batch_first
        read, returned = (x if first else x.transpose(0, 1) for x in (args[0], output[0]))
        w = multihead_weights(module, attention)
        q, k, v = (
            torch.einsum("bpm,mhd->bphd", read, getattr(w, letter)) + getattr(w, f"{letter}_bias")
            for letter in "qkv"
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        mask = kwargs.get("attn_mask")
        if mask is not None:
            blocked = mask if mask.dtype == torch.bool else mask < 0
            scores = scores.masked_fill(blocked, -math.inf)
        pattern = scores.softmax(-1)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        written = torch.einsum("bphd,hdm->bpm", z, w.o) + w.o_bias
        torch.testing.assert_close(written, returned, rtol=1e-5, atol=1e-5)
        sites = {"pattern": pattern, "z": z, "q": q, "k": k, "v": v}
        found |= {f"{attention.name}.hook_{site}": value for site, value in sites.items()}
    return found


# --- by hand -------------------------------------------------------------------------------------


def person_weights(module: nn.Module, attention: Attention) -> Weights:
    """The weights of a person's decoder, whose parameters have heads first."""
    state, n = module.state_dict(), attention.name.split(".")[1]
    parts = {
        letter: next(state[key] for key in state if key.rpartition(".")[2] == f"{word}{n}")
        for letter, word in (
            ("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"),
            ("q_bias", "shift_query"), ("k_bias", "shift_key"), ("v_bias", "shift_value"),
        )
    }  # fmt: skip
    return Weights(**{k: x.transpose(0, 1) if k in "qkv" else x for k, x in parts.items()})


def by_hand(
    attentions: tuple[Attention, ...], weigh: Weigh, module: nn.Module, inputs: Tensor
) -> Sites:
    """The sites of a person's decoder, recomputed head by head; checks that the logits are the module's."""
    w = {key.rpartition(".")[2]: value for key, value in module.state_dict().items()}

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    found: Sites = {}
    x = w["embed"][inputs] + w["place"][: inputs.shape[1]]
    for n, attention in enumerate(attentions):
        more = [w[f"{name}{n}"] for name in ("before", "after") if f"{name}{n}" in w]
        read = normed(x, w[f"gain{n}"])
        sites = attended(person_weights(module, attention), read, functools.partial(weigh, *more))
        found |= {f"{attention.name}.hook_{site}": value for site, value in sites.items()}
        for h in range(attention.n_heads):
            x = x + sites["z"][:, :, h] @ w[f"out{n}"][h]
        x = x + (x @ w[f"wide{n}"]).relu() @ w[f"narrow{n}"]
    logits = normed(x, w["gain"]) @ w["unembed"]
    torch.testing.assert_close(logits, module(inputs), rtol=1e-5, atol=1e-5)
    return found


def attended(w: Weights, read: Tensor, weigh: Callable[[Tensor, Tensor], Sites]) -> Sites:
    """Queries, keys, values, what `weigh` makes of queries and keys, and z, weighed by the last of it."""
    q, k, v = (
        torch.einsum("bpm,mhd->bphd", read, getattr(w, letter)) + getattr(w, f"{letter}_bias")
        for letter in "qkv"
    )
    weights = weigh(q, k)
    last, group = list(weights.values())[-1], q.shape[2] // v.shape[2]
    z = torch.stack([last[:, h] @ v[:, :, h // group] for h in range(q.shape[2])], 2)
    return {"q": q, "k": k, "v": v, **weights, "z": z}


def by_softmax(q: Tensor, k: Tensor) -> Sites:
    return {"pattern": causal(q, k)}


def by_talking_heads(before: Tensor, after: Tensor, q: Tensor, k: Tensor) -> Sites:
    """Each head's pattern, from all heads' scores; and what weighs its values, of all heads' patterns."""
    scores, heads = scores_of(q, k), range(q.shape[2])
    mixed = [sum(before[h, i] * scores[:, h] for h in heads) for i in heads]
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    pattern = torch.stack(mixed, 1).masked_fill(later, -math.inf).softmax(-1)
    weights = [sum(after[h, i] * pattern[:, h] for h in heads) for i in heads]
    return {"pattern": pattern, "mixed_pattern": torch.stack(weights, 1)}


def by_features(q: Tensor, k: Tensor) -> Sites:
    """What weighs the values of linear attention, though it is never computed there."""
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).tril()
    return {"implied_pattern": weights / weights.sum(-1, keepdim=True)}


def by_sigmoids(q: Tensor, k: Tensor) -> Sites:
    return {
        "pattern": 1
        / (1 + q.shape[1] * (-scores_of(q, k)).exp())
        * torch.ones(q.shape[1], q.shape[1]).tril()
    }


def by_decay(q: Tensor, k: Tensor) -> Sites:
    """Scores that decay at a rate of 1 - 2 ** -(1 + head)."""
    weights = torch.zeros_like(scores_of(q, k))
    for h in range(q.shape[2]):
        for at in range(q.shape[1]):
            for back in range(at + 1):
                score = (q[:, at, h] * k[:, at - back, h]).sum(-1) / math.sqrt(q.shape[-1])
                weights[:, h, at, at - back] = score * (1 - 2.0 ** -(1 + h)) ** back
    return {"pattern": weights}


def by_heads(q: Tensor, k: Tensor) -> Sites:
    exp = scores_of(q, k).exp()
    return {"pattern": (exp / exp.sum(1, keepdim=True)).tril()}


# --- models --------------------------------------------------------------------------------------


class Returning(nn.Module):
    """A Hugging Face model that takes and returns one tensor.

    Args:
        inner: the model.
        field: the field of its output that is returned.
        takes: `twice` gives the same tokens to encoder and decoder; `sound` takes spectra as images of one channel.
    """

    def __init__(
        self,
        inner: nn.Module,
        field: str = "logits",
        takes: Literal["once", "twice", "sound"] = "once",
    ) -> None:
        super().__init__()
        self.inner, self.field, self.takes = inner, field, takes

    def forward(self, x: Tensor) -> Tensor:
        if self.takes == "twice":
            return getattr(self.inner(input_ids=x, decoder_input_ids=x), self.field)
        return getattr(self.inner(x.squeeze(1) if self.takes == "sound" else x), self.field)


def drawn(module: nn.Module, name: str) -> nn.Module:
    """The module in evaluation mode, its weights drawn at random by its name."""
    redraw(module, sum(map(ord, name)))
    return module.eval()


def layers(
    path: str, n_heads: int, n_kv: int, names: str, layout: Any = "apart"
) -> tuple[Attention, ...]:
    """The attention of each layer of a model with one kind of it.

    Args:
        path: of the attention's module, with `{}` in the place of the layer.
        names: of its projections for queries, keys, values and the output, or of the fused one and the output.
    """
    parts = names.split()
    q, k, v, o = parts if len(parts) == 4 else (parts[0],) * 3 + (parts[1],)
    return tuple(
        Attention(f"blocks.{n}.attn", n_heads, n_kv, path.format(n), q, k, v, o, layout)
        for n in range(LAYERS)
    )


def from_projections(module: nn.Module, attention: Attention) -> Weights:
    """The weights of an attention whose projections are modules."""
    return attention.weights(module)


def library_case(
    name: str,
    build: Callable[[Implementation], nn.Module],
    attentions: tuple[Attention, ...],
    given: TokenInput | ImageInput = TOKENS,
    **more: Any,
) -> Case:
    """A case of a Hugging Face model."""
    compute = functools.partial(by_library, attentions, build)
    return Case(name, build, given, attentions, compute, from_projections, **more)


def huggingface(
    name: str, config_class: str, model_class: str, config: dict[str, Any], *returning: Any
) -> Callable[[Implementation], nn.Module]:
    """What makes a Hugging Face model of a configuration, by the names of both classes.

    Args:
        returning: more arguments of `Returning`.
    """

    def build(implementation: Implementation) -> nn.Module:
        import transformers
        from transformers.models.whisper import modeling_whisper

        found = getattr(transformers, model_class, None) or getattr(modeling_whisper, model_class)
        with warnings.catch_warnings(action="ignore"):
            made = getattr(transformers, config_class)(**config, attn_implementation=implementation)
            inner = found(made)
        return drawn(Returning(inner, *returning), name)

    return build


def decoder(
    family: str,
    path: str,
    names: str,
    n_kv: int = HEADS,
    layout: str = "apart",
    config: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    """A case of a decoder of `tests.transformer_families`, its configuration changed where `config` says so."""
    known = transformer_families.FAMILIES[family]
    head = "LMHeadModel" if known.kind == "GPT2" else "ForCausalLM"
    text = "Text" if known.kind == "Gemma3" else ""
    build = huggingface(
        family, f"{known.kind}{text}Config", f"{known.kind}{head}", known.config | (config or {})
    )
    return library_case(family, build, layers(path, HEADS, n_kv, names, layout), **more)


def vision(family: str, attentions: tuple[Attention, ...]) -> Case:
    """A case of an image classifier of `tests.vision_families`."""
    kind, config, _ = vision_families.FAMILIES[family]
    build = huggingface(family, f"{kind}Config", f"{kind}ForImageClassification", config)
    return library_case(family, build, attentions, IMAGES)


def both_halves(encoder: str, decoder: str, crossing: str, names: str) -> tuple[Attention, ...]:
    """The attentions of an encoder and a decoder, from the paths of their modules."""
    parts = names.split()
    first = [
        Attention(f"encoder_blocks.{n}.attn", HEADS, HEADS, encoder.format(n), *parts)
        for n in range(LAYERS)
    ]
    second = [
        Attention(f"decoder_blocks.{n}.{kind}", HEADS, HEADS, path.format(n), *parts)
        for n in range(LAYERS)
        for kind, path in (("self_attn", decoder), ("cross_attn", crossing))
    ]
    return (*first, *second)


_BERT = {
    "vocab_size": N_VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    "intermediate_size": 24, "max_position_embeddings": CONTEXT, "pad_token_id": None,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": N_VOCAB, "dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "hidden_dim": 24,
    "max_position_embeddings": CONTEXT, "pad_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": N_VOCAB, "d_model": WIDTH, "d_kv": 4, "num_heads": HEADS, "num_layers": LAYERS, "d_ff": 24,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": N_VOCAB, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "max_position_embeddings": CONTEXT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_WHISPER = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 24,
    "num_mel_bins": 8, "max_source_positions": CONTEXT,
}  # fmt: skip
_CLIP = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 24,
    "projection_dim": 8,
}  # fmt: skip
_CLIP_VISION = {**_CLIP, "image_size": vision_families.SIZE, "patch_size": 8}
_CLIP_TEXT = {
    **_CLIP, "vocab_size": N_VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
_REGISTERS = {**vision_families.FAMILIES["dinov2"][1], "num_register_tokens": 3}


def torch_case(name: str, make: Callable[..., nn.Module], path: str, **more: Any) -> Case:
    """A case of `nn.MultiheadAttention`."""
    attentions = layers(path, HEADS, HEADS, "- - - -")
    compute = functools.partial(by_multihead, attentions)
    return Case(
        name,
        lambda how: drawn(make(how), name),
        TOKENS,
        attentions,
        compute,
        multihead_weights,
        **more,
    )


def encoder_case(batch_first: bool, norm_first: bool, causal: bool = False) -> Case:
    """A case of `nn.TransformerEncoder`, which always calls the fused function."""
    order = "batch" if batch_first else "sequence"
    name = f"torch-encoder-{order}-first-{'pre' if norm_first else 'post'}-norm{'-causal' * causal}"
    make = functools.partial(TorchEncoder, batch_first, norm_first, causal)
    return torch_case(
        name, lambda _: make(), "encoder.layers.{}.self_attn", implementations=("sdpa",)
    )


def person_case(
    name: str,
    make: Callable[[], nn.Module],
    weigh: Weigh = by_softmax,
    n_kv: int = HEADS,
    **more: Any,
) -> Case:
    """A case of a person's decoder in einsum."""
    attentions = tuple(Attention(f"blocks.{n}.attn", HEADS, n_kv) for n in range(LAYERS))
    compute = functools.partial(by_hand, attentions, weigh)

    def build(_: Implementation) -> nn.Module:
        module = drawn(make(), name)
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if (
                    parameter.ndim == 3
                ):  # `redraw` takes the number of inputs for d_head times as large
                    parameter *= 2
                elif key.startswith("gain"):  # and these for biases, by their names
                    parameter += 1
        return module

    return Case(
        name, build, TOKENS, attentions, compute, person_weights, implementations=("eager",), **more
    )


def reloaded_case(name: str, shape: Shape) -> Case:
    """A case of a built-in model, with its weights."""
    attentions = tuple(
        Attention(
            f"blocks.{n}.attn", shape.n_heads, shape.n_kv_heads, f"h.{n}", *("c_attn",) * 3, "c_proj", "blocks"
        )
        for n in range(shape.n_layers)
    )  # fmt: skip

    def build(implementation: Implementation) -> nn.Module:
        from circuits.models.zoo.loading import load_model

        module = Reloaded(shape, implementation == "eager")
        module.load(load_model(name).module.state_dict())
        return module.eval()

    pattern = causal_rotary if shape.rotary else causal
    compute = functools.partial(by_projections, attentions, pattern)
    given = TokenInput(shape.n_vocab, shape.n_ctx)
    more = {"rotary": shape.rotary, "assets": name != "induction"}
    return Case(name, build, given, attentions, compute, from_projections, **more)


def nano_case() -> Case:
    """The case of nanoGPT."""
    attentions = layers("transformer.h.{}.attn", HEADS, HEADS, "c_attn c_proj", "blocks")
    compute = functools.partial(by_projections, attentions, causal)
    return Case(
        "nanogpt", lambda how: drawn(NanoGPT(how == "eager"), "nanogpt"), TOKENS, attentions, compute,
        from_projections,
    )  # fmt: skip


_APART = "q_proj k_proj v_proj o_proj"
_OUT = "q_proj k_proj v_proj out_proj"
_SELF = "inner.model.layers.{}.self_attn"
_SWIN = tuple(
    Attention(
        f"blocks.{n}.attn", 2, 2, f"inner.swin.encoder.layers.{stage}.blocks.{block}.attention", *_APART.split()
    )
    for n, (stage, block) in enumerate(((0, 0), (0, 1), (1, 0)))
)  # fmt: skip

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        nano_case(),
        *(encoder_case(batch, norm) for batch in (True, False) for norm in (True, False)),
        encoder_case(True, True, causal=True),
        torch_case("multihead", lambda how: Multihead(how == "eager"), "layers.{}.mix"),
        person_case("person", Person),
        person_case("one-hot", OneHot),
        person_case("functions", OfFunctions),
        person_case("grouped", Grouped, n_kv=2),
        person_case("talking-heads", TalkingHeads, by_talking_heads, mixed=True),
        person_case("linear", LinearAttention, by_features, refused=True),
        person_case("sigmoid", SigmoidAttention, by_sigmoids, refused=True),
        person_case("retention", Retention, by_decay, refused=True),
        person_case("over-heads", OverHeads, by_heads, refused=True),
        decoder("gpt2", "inner.transformer.h.{}.attn", "c_attn c_proj", layout="blocks"),
        decoder(
            "gpt-neox", "inner.gpt_neox.layers.{}.attention", "query_key_value dense", layout="heads", rotary=True
        ),
        decoder("gpt-j", "inner.transformer.h.{}.attn", _OUT, rotary=True),
        decoder("llama", _SELF, _APART, 2, rotary=True),
        decoder("mistral", _SELF, _APART, 2, rotary=True),
        # The library has no fused function with capped scores.
        decoder("gemma2", _SELF, _APART, 2, rotary=True, implementations=("eager",)),
        decoder(
            "gemma3", _SELF, _APART, 2, config={"layer_types": ["sliding_attention", "full_attention"]},
            rotary=True, qk_norm=True,
        ),
        decoder("qwen2", _SELF, _APART, 2, rotary=True),
        decoder("qwen3", _SELF, _APART, 2, rotary=True, qk_norm=True),
        decoder(
            "falcon", "inner.transformer.h.{}.self_attention", "query_key_value dense", 1, "blocks", rotary=True
        ),
        decoder(
            "bloom", "inner.transformer.h.{}.self_attention", "query_key_value dense", layout="heads",
            implementations=("eager",),  # the library has no fused one
        ),
        decoder("opt", "inner.model.decoder.layers.{}.self_attn", _OUT),
        decoder("phi3", _SELF, "qkv_proj o_proj", 2, "blocks", rotary=True),
        library_case(
            "bert", huggingface("bert", "BertConfig", "BertForMaskedLM", _BERT),
            layers(
                "inner.bert.encoder.layer.{}.attention", HEADS, HEADS,
                "self.query self.key self.value output.dense",
            ),
        ),
        library_case(
            "distilbert", huggingface("distilbert", "DistilBertConfig", "DistilBertForMaskedLM", _DISTILBERT),
            layers("inner.distilbert.transformer.layer.{}.attention", HEADS, HEADS, "q_lin k_lin v_lin out_lin"),
        ),
        library_case(
            "t5", huggingface("t5", "T5Config", "T5ForConditionalGeneration", _T5, "logits", "twice"),
            both_halves(
                "inner.encoder.block.{}.layer.0.SelfAttention", "inner.decoder.block.{}.layer.0.SelfAttention",
                "inner.decoder.block.{}.layer.1.EncDecAttention", "q k v o",
            ),
        ),
        library_case(
            "bart", huggingface("bart", "BartConfig", "BartForConditionalGeneration", _BART, "logits", "twice"),
            both_halves(
                "inner.model.encoder.layers.{}.self_attn", "inner.model.decoder.layers.{}.self_attn",
                "inner.model.decoder.layers.{}.encoder_attn", _OUT,
            ),
        ),
        library_case(
            "whisper-encoder",
            huggingface("whisper", "WhisperConfig", "WhisperEncoder", _WHISPER, "last_hidden_state", "sound"),
            layers("inner.layers.{}.self_attn", HEADS, HEADS, _OUT),
            ImageInput(1, 8, 2 * CONTEXT),
        ),
        vision("vit", layers("inner.vit.layers.{}.attention", 2, 2, _APART)),
        vision("deit", layers("inner.deit.layers.{}.attention", 2, 2, _APART)),
        vision("swin", _SWIN),
        library_case(
            "dinov2-registers",
            huggingface(
                "dinov2", "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", _REGISTERS
            ),
            layers("inner.dinov2_with_registers.encoder.layer.{}.attention", 2, 2, _APART), IMAGES,
        ),
        library_case(
            "clip-vision",
            huggingface("clip", "CLIPVisionConfig", "CLIPVisionModelWithProjection", _CLIP_VISION, "image_embeds"),
            layers("inner.vision_model.encoder.layers.{}.self_attn", HEADS, HEADS, _OUT), IMAGES,
        ),
        library_case(
            "clip-text",
            huggingface("clip", "CLIPTextConfig", "CLIPTextModel", _CLIP_TEXT, "last_hidden_state"),
            layers("inner.encoder.layers.{}.self_attn", HEADS, HEADS, _OUT),
        ),
    )
}  # fmt: skip
"""Every case with random weights by its name."""

KNOWN: dict[str, Case] = {
    case.name: case
    for case in (
        reloaded_case("induction", Shape(64, 64, 64, 2, 4, 4)),
        reloaded_case("modular-addition", Shape(114, 3, 128, 1, 4, 4, 512)),
        reloaded_case("stories260k", Shape(512, 512, 64, 5, 8, 4, 172, gated=True, rotary=True)),
    )
}
"""Built-in models as plain modules, by the names of `load_model`; all but `induction` need the assets folder."""
