"""Induction heads written by hand: the known truth for circuit discovery.

The residual stream is five spaces side by side: the token here (one-hot), the position (one-hot), the token
before, the token that will come, and one that nothing reads. Layer 0's first head looks one position back and
copies that token into `before`. Layer 1's first head looks for positions whose `before` is the token here,
and copies the token that stands there into `next`; the logits read `next` alone. The other two heads of
each layer look somewhere and write where nobody reads.

With tokens and positions as separate sources the network has 71 edges (queries, keys and values of 3 heads
from 2 sources, the same of 3 heads from 2 sources and 3 heads, logits from 2 sources and 6 heads):
3 * 3 * 2 + 3 * 3 * 5 + 8 = 71. Seven of them do something: `TRUE_EDGES`.
"""

from __future__ import annotations

import torch
from torch import Tensor

N_HEADS = 3
_SHARPNESS = 16.0
"""What a match adds to an attention score: e^16 to one against each position that does not match."""

_LOGIT = 20.0
"""The logit of the token that is copied."""

TRUE_EDGES: tuple[tuple[str, str], ...] = (
    ("position", "0.0.q"),
    ("position", "0.0.k"),
    ("token", "0.0.v"),
    ("token", "1.0.q"),
    ("0.0", "1.0.k"),
    ("token", "1.0.v"),
    ("1.0", "logits"),
)
"""Source and target of each edge that does something; heads are written layer.head."""


def config(n_vocab: int, n_ctx: int) -> dict[str, object]:
    """The shape of the network, as TransformerLens configures it."""
    return {
        "d_model": 4 * n_vocab + n_ctx, "d_head": max(n_vocab, n_ctx), "n_heads": N_HEADS, "n_layers": 2,
        "n_ctx": n_ctx, "d_vocab": n_vocab, "attn_only": True, "normalization_type": None, "act_fn": "relu",
    }  # fmt: skip


def weights(n_vocab: int, n_ctx: int) -> dict[str, Tensor]:
    """All weights, named as in a native bridge."""
    d_head = max(n_vocab, n_ctx)
    sizes = {
        "token": n_vocab,
        "position": n_ctx,
        "before": n_vocab,
        "next": n_vocab,
        "unread": n_vocab,
    }
    starts, at = {}, 0
    for name, size in sizes.items():
        starts[name], at = at, at + size
    d_model = at

    def space(name: str, back: int = 0) -> Tensor:
        """d_head x d_model: reads number k of a space into number k + back of a head."""
        made, n = torch.zeros(d_head, d_model), sizes[name]
        k = torch.arange(n)[: n - back] if back else torch.arange(n)
        # Position j stands in the keys as j + 1, so that query i meets the key of j = i - 1.
        made[k + back, starts[name] + k] = 1
        return made

    # heads: what queries read, what keys read and how far they are moved up, where values go
    # A match adds sharp * sharp / sqrt(d_head) = _SHARPNESS to the score.
    sharp = (_SHARPNESS * d_head**0.5) ** 0.5  # scores are divided by sqrt(d_head)
    heads = (
        (
            ("position", "position", 1, "before"),  # position i looks at j where j + 1 = i
            ("token", "token", 0, "unread"),
            ("position", "position", 2, "unread"),
        ),
        (
            ("token", "before", 0, "next"),  # the token here was before the token there
            ("token", "token", 0, "unread"),
            ("position", "position", 0, "unread"),
        ),
    )
    out = {
        "embed.weight": space("token")[:n_vocab],
        "pos_embed.weight": space("position")[:n_ctx],
        "unembed.weight": _LOGIT * space("next")[:n_vocab],
        "unembed.bias": torch.zeros(n_vocab),
    }
    for layer, described in enumerate(heads):
        q = [sharp * space(query) for query, *_ in described]
        k = [sharp * space(key, back) for _, key, back, _ in described]
        v = [space("token") for _ in described]
        o = [space(target).T for *_, target in described]
        for name, parts, axis in (("q", q, 0), ("k", k, 0), ("v", v, 0), ("o", o, 1)):
            out[f"blocks.{layer}.attn.{name}.weight"] = torch.cat(parts, axis)
            n = d_model if name == "o" else N_HEADS * d_head
            out[f"blocks.{layer}.attn.{name}.bias"] = torch.zeros(n)
    return {name: tensor.contiguous() for name, tensor in out.items()}
