"""A slow transformer in plain torch, written edge by edge: what exact path patching has to equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Edge = tuple[str, str]


@dataclass
class Plain:
    """Every target (a head's q, k or v, an MLP, the logits) reads the sum of all sources before it, each through a
    normalisation of its own; a source can be another run's for one target alone. In float64.

    Attributes:
        w: weights, as rows of inputs: `embed`, `pos`, and of layer N `N.ln1`, `N.q`, `N.q.bias`, …
    """

    w: Mapping[str, Tensor]
    n_layers: int
    n_heads: int
    n_groups: int
    norm: Literal["ln", "rms", ""] = "ln"
    rotary: Literal["", "adjacent", "half"] = ""
    rotary_dims: int = 0
    gated: bool = False
    parallel: bool = False
    act: Callable[[Tensor], Tensor] = F.gelu

    def targets(self) -> list[tuple[str, list[str]]]:
        """Each target with its sources."""
        sources = ["token", "position"] if "pos" in self.w else ["token"]
        found = []
        for layer in range(self.n_layers):
            heads = [f"{layer}.{h}" for h in range(self.n_heads)]
            found += [(f"{h}.q", list(sources)) for h in heads]
            found += [(f"{h}.{p}", list(sources)) for h in heads[: self.n_groups] for p in "kv"]
            mlp = f"mlp:{layer}"
            found.append((mlp, list(sources) if self.parallel else [*sources, *heads]))
            sources += [*heads, mlp]
        return [*found, ("logits", sources)]

    def edges(self) -> list[Edge]:
        return [(source, target) for target, sources in self.targets() for source in sources]

    def run(
        self,
        tokens: Tensor,
        edges: Collection[Edge] = (),
        other: Mapping[str, Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and what every source writes."""
        made = {"token": self.w["embed"][tokens]}
        if "pos" in self.w:
            at = torch.arange(tokens.shape[1]) if positions is None else positions
            made["position"] = self.w["pos"][at].expand_as(made["token"])

        def read(target: str, norm: str) -> Tensor:
            parts = [
                other[name] if other is not None and (name, target) in edges else value
                for name, value in made.items()
            ]
            return self.normed(torch.stack(parts).sum(0), norm)

        for layer in range(self.n_layers):
            heads = self.heads(layer, read)
            if not self.parallel:
                made |= heads
            mlp = self.mlp(layer, read(f"mlp:{layer}", f"{layer}.ln2"))
            made |= heads | {f"mlp:{layer}": mlp}
        return self.unembedded(read("logits", "ln_final")), made

    def through_mlps(self, tokens: Tensor, edge: Edge, other: Mapping[str, Tensor]) -> Tensor:
        """Logits where the MLPs between an edge's ends recompute while all heads stay as they are."""
        source, target = edge
        _, live = self.run(tokens)
        written = {"token": live["token"]} | (
            {"position": live["position"]} if "pos" in self.w else {}
        )
        if source in written:
            written[source] = other[source]
        reached = dict(self.targets())[target]
        for layer in range(self.n_layers):
            heads = {n: live[n] for n in live if n.startswith((f"{layer}.", f"bias:{layer}"))}
            heads |= {source: other[source]} if source in heads else {}
            mlp = f"mlp:{layer}"
            before = written if self.parallel else written | heads
            if mlp in reached:
                stream = torch.stack(list(before.values())).sum(0)
                again = self.mlp(layer, self.normed(stream, f"{layer}.ln2"))
                written[mlp] = other[mlp] if mlp == source else again
            written |= heads
        changed = {name for name in reached if not torch.equal(written[name], live[name])}
        return self.run(tokens, {(name, target) for name in changed}, written)[0]

    # --- parts -----------------------------------------------------------------------------------

    def normed(self, x: Tensor, name: str) -> Tensor:
        if not self.norm:
            return x
        if self.norm == "ln":
            return F.layer_norm(x, x.shape[-1:], self.w[name], self.w[f"{name}.bias"], 1e-5)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        made = x @ self.w[name].T
        return made + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else made

    def heads(self, layer: int, read: Callable[[str, str], Tensor]) -> dict[str, Tensor]:
        size = len(self.w[f"{layer}.q"]) // self.n_heads

        def part(head: int, letter: str) -> Tensor:
            rows = slice(head * size, (head + 1) * size)
            made = self.linear(
                read(f"{layer}.{head}.{letter}", f"{layer}.ln1"), f"{layer}.{letter}"
            )
            return made[..., rows] if letter == "v" else self.turned(made[..., rows])

        found = {}
        for h in range(self.n_heads):
            group = h * self.n_groups // self.n_heads
            scores = part(h, "q") @ part(group, "k").mT / math.sqrt(size)
            z = self.pattern(scores) @ part(group, "v")
            found[f"{layer}.{h}"] = z @ self.w[f"{layer}.o"][:, h * size : (h + 1) * size].T
        if f"{layer}.o.bias" in self.w:
            found[f"bias:{layer}"] = self.w[f"{layer}.o.bias"].expand_as(found[f"{layer}.0"])
        return found

    def pattern(self, scores: Tensor) -> Tensor:
        """How much each position attends to each one before it: batch x query x key."""
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -math.inf).softmax(-1)

    def turned(self, x: Tensor) -> Tensor:
        """Rotary embedding of queries or keys: batch x position x d_head."""
        if not self.rotary:
            return x
        n = self.rotary_dims
        speeds = 1 / 10000 ** (torch.arange(0, n, 2, dtype=torch.float64) / n)
        angle = torch.arange(x.shape[1])[:, None] * speeds
        if self.rotary == "adjacent":
            first, second = x[..., 0:n:2], x[..., 1:n:2]
        else:
            first, second = x[..., : n // 2], x[..., n // 2 : n]
        a = first * angle.cos() - second * angle.sin()
        b = second * angle.cos() + first * angle.sin()
        both = (
            torch.stack([a, b], -1).flatten(-2)
            if self.rotary == "adjacent"
            else torch.cat([a, b], -1)
        )
        return torch.cat([both, x[..., n:]], -1)

    def mlp(self, layer: int, read: Tensor) -> Tensor:
        inner = self.linear(read, f"{layer}.in")
        gate = self.linear(read, f"{layer}.gate") if self.gated else None
        return self.linear(self.hidden(inner, gate), f"{layer}.out")

    def hidden(self, inner: Tensor, gate: Tensor | None) -> Tensor:
        return self.act(inner) if gate is None else self.act(gate) * inner

    def unembedded(self, read: Tensor) -> Tensor:
        return self.linear(read, "unembed")


def of_native(bridge: Any, n_layers: int) -> dict[str, Tensor]:
    """The weights of a native bridge."""
    names = {"embed": "embed", "pos": "pos_embed", "ln_final": "ln_final", "unembed": "unembed"}
    for layer in range(n_layers):
        parts = (
            "ln1",
            "ln2",
            *(f"attn.{p}" for p in "qkvo"),
            *(f"mlp.{p}" for p in ("in", "gate", "out")),
        )
        names |= {f"{layer}.{p.rpartition('.')[2]}": f"blocks.{layer}.{p}" for p in parts}
    state = bridge.state_dict()
    found = {}
    for ours, theirs in names.items():
        for end, kind in (("", "weight"), (".bias", "bias")):
            if f"{theirs}.{kind}" in state:
                found[ours + end] = state[f"{theirs}.{kind}"].double()
    return found


def of_neox(model: Any, n_heads: int) -> dict[str, Tensor]:
    """The weights of a GPT-NeoX of transformers: queries, keys and values lie head by head."""
    inner = model.gpt_neox
    found = {
        "embed": inner.embed_in.weight,
        "ln_final": inner.final_layer_norm.weight,
        "ln_final.bias": inner.final_layer_norm.bias,
        "unembed": model.lm_head.weight,
    }
    for i, layer in enumerate(inner.layers):
        joint = layer.attention.query_key_value
        for end, tensor in (("", joint.weight), (".bias", joint.bias)):
            by_head = tensor.reshape(n_heads, 3, -1, *tensor.shape[1:])
            for j, letter in enumerate("qkv"):
                found[f"{i}.{letter}{end}"] = by_head[:, j].flatten(0, 1)
        parts = {
            "ln1": layer.input_layernorm,
            "ln2": layer.post_attention_layernorm,
            "o": layer.attention.dense,
            "in": layer.mlp.dense_h_to_4h,
            "out": layer.mlp.dense_4h_to_h,
        }
        for name, part in parts.items():
            found |= {f"{i}.{name}": part.weight, f"{i}.{name}.bias": part.bias}
    return {name: tensor.detach().double() for name, tensor in found.items()}
