"""Addition mod p written by hand, with five frequencies: known truth for circuit discovery.

The algorithm that Nanda et al. 2023 ("Progress measures for grokking via mechanistic interpretability") found in a
trained network, in the form that needs one head. Sequences are `a b =`; the answer is read at `=`. A token t is
written as cos(w_k t) and sin(w_k t) for each frequency k, w_k = 2 pi k / p. The first head averages over the three
positions (`=` is written as nothing), which gives

    cos(w a) + cos(w b) = 2 cos(w (a - b) / 2) cos(w (a + b) / 2), and the same with sines.

A neuron of phase f takes max(0, cos(f) * first + sin(f) * second) = max(0, 2 c cos(w (a + b) / 2 - f)), c the first
cosine. Summed over phases with weights cos(2 f) and sin(2 f), what is left is the second harmonic, |c| cos(w (a + b))
and |c| sin(w (a + b)): an odd number of phases cancels all others but those from 2 N - 2 on. The logit of n adds
|c_k| cos(w_k (a + b - n)) over frequencies, which is largest at n = a + b mod p. The other head and positions are
written where nobody reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

N_HEADS = 2
FREQUENCIES = (3, 14, 25, 37, 52)
"""Of one turn of p: any five different ones from 1 to p / 2 that have no common factor with p will do."""

N_PHASES = 9
_LOGIT = 30.0

TRUE_EDGES: tuple[tuple[str, str], ...] = (
    ("token", "0.0.v"),
    ("0.0", "mlp:0"),
    ("mlp:0", "logits"),
)
"""Source and target of each edge that does something; heads are written layer.head, MLPs mlp:layer."""


def config(p: int) -> dict[str, object]:
    """The shape of the network, as TransformerLens configures it.

    Raises:
        ValueError: if a frequency is not below half of p.
    """
    if p <= 2 * max(FREQUENCIES):
        raise ValueError(
            f"p {p} must be more than {2 * max(FREQUENCIES)}, twice the highest frequency"
        )
    n = 2 * len(FREQUENCIES)
    return {
        "d_model": 4 * n + 3, "d_head": n, "n_heads": N_HEADS, "n_layers": 1, "n_ctx": 3, "d_vocab": p + 1,
        "d_mlp": N_PHASES * len(FREQUENCIES), "normalization_type": None, "act_fn": "relu",
    }  # fmt: skip


def weights(p: int) -> dict[str, Tensor]:
    """All weights, named as in a native bridge; token p is `=`.

    The stream is five spaces: the token's waves, their sum over positions, the answer's waves, what the other head
    writes, and positions.
    """
    n = 2 * len(FREQUENCIES)
    d_model, d_mlp = 4 * n + 3, N_PHASES * len(FREQUENCIES)
    token, total, answer, unread = (slice(i * n, i * n + n) for i in range(4))
    number = torch.arange(p, dtype=torch.float64)[:, None]
    turns = torch.tensor(FREQUENCIES, dtype=torch.float64) * (2 * math.pi / p)
    waves = torch.stack([(turns * number).cos(), (turns * number).sin()], 2).flatten(1)
    phases = torch.arange(N_PHASES, dtype=torch.float64) * (2 * math.pi / N_PHASES)
    embed, unembed = torch.zeros(2, p + 1, d_model, dtype=torch.float64)
    embed[:p, token] = waves
    unembed[:p, answer] = waves
    positions = torch.zeros(3, d_model, dtype=torch.float64)
    positions[:, 4 * n :] = torch.eye(3)
    v = torch.zeros(N_HEADS * n, d_model, dtype=torch.float64)
    o = torch.zeros(d_model, N_HEADS * n, dtype=torch.float64)
    # The second head reads the same as the first and writes where nobody reads: an edge that is there and does nothing.
    v[:n, token] = v[n:, token] = torch.eye(n, dtype=torch.float64)
    o[total, :n] = 3 * torch.eye(n, dtype=torch.float64)  # the mean of three positions, as a sum
    o[unread, n:] = torch.eye(n, dtype=torch.float64)
    into = torch.zeros(d_mlp, d_model, dtype=torch.float64)
    out = torch.zeros(d_model, d_mlp, dtype=torch.float64)
    for k in range(len(FREQUENCIES)):
        neurons = slice(k * N_PHASES, (k + 1) * N_PHASES)
        first, second = total.start + 2 * k, answer.start + 2 * k
        into[neurons, first], into[neurons, first + 1] = phases.cos(), phases.sin()
        # max(0, cos x) = 1/pi + cos(x) / 2 + 2/(3 pi) cos(2 x) - …: summed over N equally spaced phases f with weights
        # cos(2 f) and sin(2 f), of every harmonic m only those with m = 2 modulo N remain (or m = -2), the smallest
        # being 2 and N - 2. With N = 9 these are 2, 7, 11 and 16; as odd harmonics beyond the first are zero, the next
        # one is 16 = 2 N - 2.
        out[second, neurons], out[second + 1, neurons] = (2 * phases).cos(), (2 * phases).sin()
    # Queries and keys of zero: all scores are 0, and attention is uniform.
    nothing = torch.zeros(N_HEADS * n, d_model, dtype=torch.float64)
    made = {
        "embed.weight": embed, "pos_embed.weight": positions, "unembed.weight": _LOGIT / N_PHASES * unembed,
        "unembed.bias": torch.zeros(p + 1), "blocks.0.attn.q.weight": nothing, "blocks.0.attn.k.weight": nothing,
        "blocks.0.attn.v.weight": v, "blocks.0.attn.o.weight": o, "blocks.0.mlp.in.weight": into,
        "blocks.0.mlp.out.weight": out, "blocks.0.mlp.in.bias": torch.zeros(d_mlp),
        "blocks.0.mlp.out.bias": torch.zeros(d_model), "blocks.0.attn.o.bias": torch.zeros(d_model),
        **{f"blocks.0.attn.{name}.bias": torch.zeros(N_HEADS * n) for name in "qkv"},
    }  # fmt: skip
    return {name: tensor.float().contiguous() for name, tensor in made.items()}
