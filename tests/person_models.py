"""Small transformers as people write them, each with a different form of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N_VOCAB, WIDTH, HEADS, LAYERS, CONTEXT = 20, 16, 4, 2, 12

# --- nanoGPT -------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """Attention with queries, keys and values in one projection, fused or with the softmax written out."""

    def __init__(self, width: int, heads: int, context: int, slow: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.n_head, self.n_embd, self.slow = heads, width, slow
        below = torch.tril(torch.ones(context, context)).view(1, 1, context, context)
        self.register_buffer("bias", below, persistent=False)
        self.bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.slow:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            y = att @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = (
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, context: int, slow: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = CausalSelfAttention(width, heads, context, slow), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """A decoder in the style of nanoGPT, its embedding tied to the unembedding.

    Args:
        slow: write the softmax out in place of the fused call.
    """

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(N_VOCAB, WIDTH),
            "wpe": nn.Embedding(CONTEXT, WIDTH),
            "drop": nn.Dropout(0.1),
            "h": nn.ModuleList([NanoBlock(WIDTH, HEADS, CONTEXT, slow) for _ in range(LAYERS)]),
            "ln_f": nn.LayerNorm(WIDTH),
        })  # fmt: skip
        self.lm_head = nn.Linear(WIDTH, N_VOCAB, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](pos))
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


# --- the attention of torch ----------------------------------------------------------------------


class TorchEncoder(nn.Module):
    """Token and position embeddings around `nn.TransformerEncoder`.

    Args:
        batch_first: the order of the encoder's axes; this module takes the batch first in both.
        norm_first: norms before attention and MLP, or after them.
        causal: mask later positions.
    """

    def __init__(self, batch_first: bool, norm_first: bool, causal: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(N_VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 24, activation="gelu", batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(
            layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, N_VOCAB)
        self.batch_first, self.causal = batch_first, causal

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:length]
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(
                length, device=x.device, dtype=x.dtype
            )
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask=mask, is_causal=self.causal)
        return self.head(x if self.batch_first else x.transpose(0, 1))


class MultiheadBlock(nn.Module):
    """A hand-written block around `nn.MultiheadAttention`."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.norm, self.mix = (
            nn.LayerNorm(WIDTH),
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        )
        self.after, self.mlp = nn.LayerNorm(WIDTH), MLP(WIDTH)
        self.weights = weights

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        read = self.norm(x)
        x = x + self.mix(read, read, read, attn_mask=mask, need_weights=self.weights)[0]
        return x + self.mlp(self.after(x))


class Multihead(nn.Module):
    """A causal decoder of blocks with `nn.MultiheadAttention`.

    Args:
        weights: ask the attention for its weights, which keeps it from the fused call.
    """

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(N_VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList([MultiheadBlock(weights) for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, N_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for layer in self.layers:
            x = layer(x, later)
        return self.head(self.norm(x))


# --- einsum only ---------------------------------------------------------------------------------

Kind = Literal["plain", "grouped", "talking"]


def person_shapes(kind: Kind) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the parameters of a person's decoder."""
    d, kv = WIDTH // HEADS, 2 if kind == "grouped" else HEADS
    found: dict[str, tuple[int, ...]] = {"embed": (N_VOCAB, WIDTH), "place": (CONTEXT, WIDTH)}
    for n in range(LAYERS):
        found |= {
            f"gain{n}": (WIDTH,), f"query{n}": (HEADS, WIDTH, d), f"key{n}": (kv, WIDTH, d),
            f"value{n}": (kv, WIDTH, d), f"out{n}": (HEADS, d, WIDTH), f"shift_query{n}": (HEADS, d),
            f"shift_key{n}": (kv, d), f"shift_value{n}": (kv, d), f"wide{n}": (WIDTH, 24), f"narrow{n}": (24, WIDTH),
        }  # fmt: skip
        if kind == "talking":
            found |= {f"before{n}": (HEADS, HEADS), f"after{n}": (HEADS, HEADS)}
    return found | {"gain": (WIDTH,), "unembed": (WIDTH, N_VOCAB)}


class Person(nn.Module):
    """A decoder in einsum only, with a hand-written softmax, learned positions and no `nn.Linear`."""

    kind: Kind = "plain"

    def __init__(self) -> None:
        super().__init__()
        for name, shape in person_shapes(self.kind).items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.embed[tokens]

    def normed(self, x: Tensor, gain: Tensor) -> Tensor:
        return x / (torch.einsum("bpm,bpm->bp", x, x) / WIDTH + 1e-5).sqrt()[..., None] * gain

    def softmax(self, scores: Tensor) -> Tensor:
        later = torch.arange(scores.shape[-1]) > torch.arange(scores.shape[-2])[:, None]
        exp = torch.exp(scores - scores.amax(-1, keepdim=True)) * (~later).to(scores.dtype)
        return exp / exp.sum(-1, keepdim=True)

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        """What each head reads, of queries, keys and values: batch x head x position x d_head."""
        pattern = self.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5)
        return torch.einsum("bhqk,bhkd->bqhd", pattern, v)

    def attention(self, x: Tensor, n: int) -> Tensor:
        def projected(name: str) -> Tensor:
            weight, shift = getattr(self, f"{name}{n}"), getattr(self, f"shift_{name}{n}")
            return torch.einsum("bpm,hmd->bhpd", x, weight) + shift[:, None]

        z = self.weighed(projected("query"), projected("key"), projected("value"), n)
        return torch.einsum("bqhd,hdm->bqm", z, getattr(self, f"out{n}"))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(tokens) + self.place[: tokens.shape[1]]
        for n in range(LAYERS):
            x = x + self.attention(self.normed(x, getattr(self, f"gain{n}")), n)
            hidden = torch.einsum("bpm,mw->bpw", x, getattr(self, f"wide{n}"))
            hidden = hidden * (hidden > 0)
            x = x + torch.einsum("bpw,wm->bpm", hidden, getattr(self, f"narrow{n}"))
        return torch.einsum("bpm,mv->bpv", self.normed(x, self.gain), self.unembed)


class OneHot(Person):
    """Tokens' rows of the embedding, picked by a product with one-hot vectors."""

    def embedded(self, tokens: Tensor) -> Tensor:
        picked = (tokens[..., None] == torch.arange(N_VOCAB)).to(self.embed.dtype)
        return torch.einsum("bpv,vm->bpm", picked, self.embed)


class Grouped(Person):
    """Heads in groups that share keys and values, by einsum over five axes."""

    kind = "grouped"

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        q = q.unflatten(1, (k.shape[1], -1))
        pattern = self.softmax(torch.einsum("bgrqd,bgkd->bgrqk", q, k) / q.shape[-1] ** 0.5)
        return torch.einsum("bgrqk,bgkd->bqgrd", pattern, v).flatten(2, 3)


class TalkingHeads(Person):
    """Heads mixed before and after the softmax (Shazeer et al. 2020)."""

    kind = "talking"

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        scores = torch.einsum("bhqk,hi->biqk", scores, getattr(self, f"before{n}"))
        pattern = torch.einsum("bhqk,hi->biqk", self.softmax(scores), getattr(self, f"after{n}"))
        return torch.einsum("bhqk,bhkd->bqhd", pattern, v)


class LinearAttention(Person):
    """Sums of keys' features times values, with no product of queries and keys (Katharopoulos et al. 2020)."""

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhkd,bhke->bhkde", k, v).cumsum(2)
        total = torch.einsum("bhqd,bhqd->bhq", q, k.cumsum(2))
        return torch.einsum("bhqd,bhqde->bqhe", q, state) / total.transpose(1, 2)[..., None]


class SigmoidAttention(Person):
    """Each key weighed by a sigmoid of its score alone."""

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = torch.sigmoid(scores - math.log(scores.shape[-1])).tril()
        return torch.einsum("bhqk,bhkd->bqhd", weights, v)


class Retention(Person):
    """Scores that decay with distance, without any softmax (Sun et al. 2023)."""

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        at = torch.arange(q.shape[2])
        rates = 1 - 2.0 ** -(1 + torch.arange(HEADS))
        decay = (rates[:, None, None] ** (at[:, None] - at).clamp(min=0)).tril()
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bhkd->bqhd", scores * decay, v)


class OverHeads(Person):
    """A softmax over heads, which share out each pair of positions."""

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(1).tril(), v)


# --- functions only ------------------------------------------------------------------------------


def rms(x: Tensor, gain: Tensor) -> Tensor:
    """A norm by the root mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain


def attend(w: dict[str, Tensor], x: Tensor, n: int) -> Tensor:
    """Causal attention of layer n."""
    q, k, v = (
        x[:, None] @ w[f"{name}{n}"] + w[f"shift_{name}{n}"][:, None]
        for name in ("query", "key", "value")
    )
    scores = q @ k.mT * q.shape[-1] ** -0.5
    above = torch.full(scores.shape[-2:], -1e9).triu(1)
    pattern = torch.softmax(scores + above, dim=-1)
    return (pattern @ v @ w[f"out{n}"]).sum(1)


def decode(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of a decoder of plain functions."""
    x = w["embed"][tokens] + w["place"][: tokens.shape[1]]
    for n in range(LAYERS):
        x = x + attend(w, rms(x, w[f"gain{n}"]), n)
        x = x + torch.clamp(x @ w[f"wide{n}"], min=0) @ w[f"narrow{n}"]
    return rms(x, w["gain"]) @ w["unembed"]


class OfFunctions(nn.Module):
    """Plain functions and a dictionary of parameters in one module without submodules."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in person_shapes("plain").items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, tokens: Tensor) -> Tensor:
        return decode(dict(self.named_parameters()), tokens)


# --- the built-in models as plain modules --------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a built-in model is made of.

    Attributes:
        n_mlp: neurons of the MLP; 0 without one.
        gated: the MLP's neurons are gated, with a SiLU.
        rotary: positions by rotation of adjacent pairs, and norms by the root mean square; without it, learned
            positions and no norms.
    """

    n_vocab: int
    n_ctx: int
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_mlp: int = 0
    gated: bool = False
    rotary: bool = False


class ReloadedBlock(nn.Module):
    """Attention and MLP of a built-in model, queries, keys and values in one projection."""

    def __init__(self, shape: Shape, slow: bool) -> None:
        super().__init__()
        self.shape, self.slow, self.size = shape, slow, shape.width // shape.n_heads
        self.ln_1, self.ln_2 = (
            nn.RMSNorm(shape.width, 1e-5) if shape.rotary else nn.Identity() for _ in range(2)
        )
        rows = (shape.n_heads + 2 * shape.n_kv_heads) * self.size
        self.c_attn, self.c_proj = nn.Linear(shape.width, rows), nn.Linear(shape.width, shape.width)
        if shape.n_mlp:
            self.c_fc = nn.Linear(shape.width, shape.n_mlp, bias=not shape.gated)
            self.c_out = nn.Linear(shape.n_mlp, shape.width, bias=not shape.gated)
        if shape.gated:
            self.c_gate = nn.Linear(shape.width, shape.n_mlp, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        """Rotate adjacent pairs of queries or keys by their position: batch x head x position x d_head."""
        speeds = 10000 ** (-torch.arange(0, self.size, 2) / self.size)
        angles = torch.arange(x.shape[2])[:, None] * speeds
        first, second = x[..., ::2], x[..., 1::2]
        sin, cos = angles.sin(), angles.cos()
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)

    def attention(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        kv = self.shape.n_kv_heads * self.size
        q, k, v = self.c_attn(x).split([C, kv, kv], dim=2)
        q, k, v = (part.view(B, T, -1, self.size).transpose(1, 2) for part in (q, k, v))
        if self.shape.rotary:
            q, k = self.turned(q), self.turned(k)
        if self.slow:
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.size)
            later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            y = F.softmax(scores.masked_fill(later, float("-inf")), dim=-1) @ v
        else:
            grouped = k.shape[1] < q.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        if not self.shape.n_mlp:
            return x
        read = self.ln_2(x)
        hidden = self.c_fc(read)
        hidden = F.silu(self.c_gate(read)) * hidden if self.shape.gated else F.relu(hidden)
        return x + self.c_out(hidden)


class Reloaded(nn.Module):
    """A decoder of the same function as a built-in model."""

    def __init__(self, shape: Shape, slow: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.n_vocab, shape.width)
        self.wpe = None if shape.rotary else nn.Embedding(shape.n_ctx, shape.width)
        self.h = nn.ModuleList([ReloadedBlock(shape, slow) for _ in range(shape.n_layers)])
        self.ln_f = nn.RMSNorm(shape.width, 1e-5) if shape.rotary else nn.Identity()
        self.lm_head = nn.Linear(shape.width, shape.n_vocab)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a native bridge of TransformerLens."""
        names = {"embed": "wte", "pos_embed": "wpe", "ln_final": "ln_f", "unembed": "lm_head"}
        parts = {
            "ln1": "ln_1", "ln2": "ln_2", "attn.o": "c_proj", "mlp.in": "c_fc", "mlp.gate": "c_gate",
            "mlp.out": "c_out",
        }  # fmt: skip
        for n in range(len(self.h)):
            names |= {f"blocks.{n}.{old}": f"h.{n}.{new}" for old, new in parts.items()}
        found = {}
        for key, value in state.items():
            module, _, end = key.rpartition(".")
            if module in names:
                found[f"{names[module]}.{end}"] = value
        for n in range(len(self.h)):
            for end in ("weight", "bias"):
                fused = [state[f"blocks.{n}.attn.{letter}.{end}"] for letter in "qkv"]
                found[f"h.{n}.c_attn.{end}"] = torch.cat(fused)
        self.load_state_dict(found)
