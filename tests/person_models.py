"""Small transformers as people write them, each with attention in a form of its own."""

from __future__ import annotations

import math
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
    """A block of a person's own around `nn.MultiheadAttention`."""

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

Kind = Literal["plain", "grouped", "talking", "linear", "sigmoid", "retention", "over-heads"]


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
    """A decoder in einsum only, with a softmax and positions of its own and no `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in person_shapes("plain").items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def normed(self, x: Tensor, gain: Tensor) -> Tensor:
        return x / (torch.einsum("bpm,bpm->bp", x, x) / WIDTH + 1e-5).sqrt()[..., None] * gain

    def softmax(self, scores: Tensor) -> Tensor:
        later = torch.arange(scores.shape[-1]) > torch.arange(scores.shape[-2])[:, None]
        exp = torch.exp(scores - scores.amax(-1, keepdim=True)) * (~later).to(scores.dtype)
        return exp / exp.sum(-1, keepdim=True)

    def attention(self, x: Tensor, n: int) -> Tensor:
        def projected(name: str) -> Tensor:
            weight, shift = getattr(self, f"{name}{n}"), getattr(self, f"shift_{name}{n}")
            return torch.einsum("bpm,hmd->bhpd", x, weight) + shift[:, None]

        q, k, v = projected("query"), projected("key"), projected("value")
        pattern = self.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5)
        z = torch.einsum("bhqk,bhkd->bqhd", pattern, v)
        return torch.einsum("bqhd,hdm->bqm", z, getattr(self, f"out{n}"))

    def forward(self, tokens: Tensor) -> Tensor:
        # The tokens' rows of the embedding, picked by a product with one-hot vectors.
        picked = (tokens[..., None] == torch.arange(N_VOCAB)).to(self.embed.dtype)
        x = torch.einsum("bpv,vm->bpm", picked, self.embed) + self.place[: tokens.shape[1]]
        for n in range(LAYERS):
            x = x + self.attention(self.normed(x, getattr(self, f"gain{n}")), n)
            hidden = torch.einsum("bpm,mw->bpw", x, getattr(self, f"wide{n}"))
            hidden = hidden * (hidden > 0)
            x = x + torch.einsum("bpw,wm->bpm", hidden, getattr(self, f"narrow{n}"))
        return torch.einsum("bpm,mv->bpv", self.normed(x, self.gain), self.unembed)
