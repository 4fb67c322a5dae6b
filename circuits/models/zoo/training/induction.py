"""Train the built-in `induction` model: `python -m circuits.models.zoo.training.induction --out DIR`.

Writes `induction.safetensors` and `induction.log.jsonl`. About ten minutes on two cores; the seed fixes
data and initial weights.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from circuits.models.zoo.loading import INDUCTION
from circuits.models.zoo.transformers import native_bridge
from circuits.stimuli.repeats import draw_repeats
from circuits.tensors import write_tensors

log = logging.getLogger(__name__)

BATCH = 64


@torch.no_grad()
def evaluate(bridge: Any, n: int = 500, seed: int = 10_000) -> tuple[float, float]:
    """Accuracy and loss (nats) on the tokens that copying predicts, on `n` held-out sequences."""
    tokens, repeated = draw_repeats(n, torch.Generator().manual_seed(seed))
    logits, wanted, counted = bridge(tokens)[:, :-1], tokens[:, 1:], repeated[:, 1:]
    loss = F.cross_entropy(logits[counted], wanted[counted])
    return (logits.argmax(-1) == wanted)[counted].float().mean().item(), loss.item()


@torch.no_grad()
def head_scores(bridge: Any, n: int = 200, seed: int = 10_001) -> dict[str, list[list[float]]]:
    """What each head looks at, layer -> head, each between 0 and 1.

    `previous_token`: mean attention to the token before. `prefix_matching`: mean attention, from
    repeated tokens, to the tokens that followed earlier copies of the present one, which is what an
    induction head does (Olsson et al. 2022); even attention gives about 0.05.
    """
    tokens, repeated = draw_repeats(n, torch.Generator().manual_seed(seed))
    _, cache = bridge.run_with_cache(tokens)
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    after_same = torch.roll(same, 1, dims=2).tril()  # key j follows a copy of query i
    after_same[:, :, 0] = False
    scores: dict[str, list[list[float]]] = {"previous_token": [], "prefix_matching": []}
    for layer in range(INDUCTION["n_layers"]):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        previous = pattern.diagonal(offset=-1, dim1=2, dim2=3).mean(dim=(0, 2))
        matching = (pattern * after_same[:, None]).sum(-1)
        scores["previous_token"].append([round(x, 3) for x in previous.tolist()])
        scores["prefix_matching"].append(
            [round(m[repeated].mean().item(), 3) for m in matching.unbind(1)]
        )
    return scores


def train(steps: int, seed: int, out: Path, lr: float = 3e-3) -> Any:
    """Train for `steps` batches with AdamW; log and save into `out`."""
    bridge = native_bridge(**INDUCTION, seed=seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    with (out / "induction.log.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            tokens, repeated = draw_repeats(BATCH, generator)
            logits, counted = bridge(tokens)[:, :-1], repeated[:, 1:]
            loss = F.cross_entropy(logits[counted], tokens[:, 1:][counted])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bridge.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 250 == 0 or step == steps:
                accuracy, held_out = evaluate(bridge)
                row = {
                    "step": step,
                    "held_out_loss": round(held_out, 4),
                    "held_out_accuracy": round(accuracy, 4),
                    **head_scores(bridge),
                }
                file.write(json.dumps(row) + "\n")
                file.flush()
                log.info("%s", row)
    write_tensors(
        out / "induction.safetensors",
        bridge.state_dict(),
        {"seed": str(seed), "steps": str(steps), "batch": str(BATCH)},
    )
    return bridge


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.steps, options.seed, options.out)


if __name__ == "__main__":
    main()
