"""Train the built-in `addition` model: `python -m circuits.models.zoo.training.addition --out DIR`.

Addition modulo 113 as in Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability": one
layer, four heads, no normalisation, 30 % of all sums, all of them in every step, AdamW with a weight decay of 1. Writes
`addition.safetensors`, `addition.log.jsonl` and, with `--checkpoints N`, the weights every N steps. About an hour on
one core; the seed fixes the split and the initial weights.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.models.zoo.loading import ADDITION
from circuits.models.zoo.transformers import native_bridge
from circuits.tensors import write_tensors

log = logging.getLogger(__name__)

MODULUS = 113
SHARE = 0.3
"""Which share of all sums is trained on."""

Weights = dict[str, Tensor]


def split(seed: int) -> tuple[Int[Tensor, "train two"], Int[Tensor, "rest two"]]:
    """The sums that are trained on, and all others, as pairs (a, b) in a random order."""
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    n = int(SHARE * len(pairs))
    return pairs[order[:n]], pairs[order[n:]]


def last_logits(w: Weights, pairs: Int[Tensor, "pair two"]) -> Float[Tensor, "pair token"]:
    """The logits after `a b =`, from the model's own tensors by name.

    The model's forward pass does each position of each pair. Only the last one counts, and what it attends to are 113
    tokens at two positions, of which keys and values are computed once: a tenth of the time.
    """
    embed, position = w["embed.weight"], w["pos_embed.weight"]
    x = torch.stack([embed[:MODULUS] + position[i] for i in (0, 1)])
    end = embed[MODULUS] + position[2]

    def read(name: str, value: Tensor) -> Tensor:
        made = F.linear(value, w[f"{_ATTENTION}.{name}.weight"], w[f"{_ATTENTION}.{name}.bias"])
        return rearrange(made, "... (head k) -> ... head k", head=ADDITION["n_heads"])

    def seen(name: str) -> Float[Tensor, "pair position head k"]:
        tokens, own = read(name, x), read(name, end)
        first, second = tokens[0, pairs[:, 0]], tokens[1, pairs[:, 1]]
        return torch.stack([first, second, own.expand_as(first)], 1)

    scores = einsum(read("q", end), seen("k"), "h k, b p h k -> b h p") / ADDITION["d_head"] ** 0.5
    z = einsum(scores.softmax(-1), seen("v"), "b h p, b p h k -> b h k")
    z = rearrange(z, "b h k -> b (h k)")
    mid = end + F.linear(z, w[f"{_ATTENTION}.o.weight"], w[f"{_ATTENTION}.o.bias"])
    hidden = torch.relu(F.linear(mid, w["blocks.0.mlp.in.weight"], w["blocks.0.mlp.in.bias"]))
    out = mid + F.linear(hidden, w["blocks.0.mlp.out.weight"], w["blocks.0.mlp.out.bias"])
    return F.linear(out, w["unembed.weight"])


_ATTENTION = "blocks.0.attn"


def parameters(bridge: Any) -> Weights:
    """The parameters of a native bridge, by their names in its state."""
    names = {tensor.data_ptr(): name for name, tensor in bridge.state_dict().items()}
    return {names[tensor.data_ptr()]: tensor for tensor in bridge.parameters()}


def loss_of(w: Weights, pairs: Int[Tensor, "pair two"]) -> tuple[Tensor, Tensor]:
    """The mean cross entropy in nats, in double precision, and the accuracy."""
    # In single precision the loss of a sum that is right by 1e-7 is rounded, and training jumps (Nanda et al.).
    logits, right = last_logits(w, pairs).double(), pairs.sum(1) % MODULUS
    return F.cross_entropy(logits, right), (logits[:, :MODULUS].argmax(-1) == right).float().mean()


def save(bridge: Any, path: Path, seed: int, steps: int) -> None:
    """Write the weights."""
    write_tensors(path, bridge.state_dict(), {"seed": str(seed), "steps": str(steps)})


def train(steps: int, seed: int, out: Path, checkpoints: int = 0) -> Any:
    """Train for `steps` steps on all training sums; log and save into `out`."""
    bridge = native_bridge(**ADDITION, seed=seed).train()
    w = parameters(bridge)
    ours, others = split(seed)
    optimizer = torch.optim.AdamW(w.values(), lr=1e-3, weight_decay=1.0, betas=(0.9, 0.98))
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    with (out / "addition.log.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss, right = loss_of(w, ours)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm.step()
            if checkpoints and step % checkpoints == 0:
                save(bridge, out / f"addition-{step}.safetensors", seed, step)
            if step % 250 == 0 or step == steps:
                with torch.no_grad():
                    rest, rest_right = loss_of(w, others)
                row = {
                    "step": step, "train_loss": float(f"{loss.item():.4g}"), "train_accuracy": round(right.item(), 4),
                    "test_loss": float(f"{rest.item():.4g}"), "test_accuracy": round(rest_right.item(), 4),
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
                file.flush()
                log.info("%s", row)
    save(bridge, out / "addition.safetensors", seed, steps)
    return bridge


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--steps", type=int, default=18_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=int, default=0, metavar="N")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.steps, options.seed, options.out, options.checkpoints)


if __name__ == "__main__":
    main()
