"""Train the built-in `shapes` network: `python -m circuits.models.zoo.training.shapes --out DIR`.

Writes `shapes.safetensors` and `shapes.log.jsonl` (one line every 250 steps). About half an hour on
two cores; the seed fixes the drawings and the initial weights.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from circuits.models.zoo.inception import InceptionNet, shapes
from circuits.stimuli.shapes import CLASSES, draw_shapes
from circuits.tensors import write_tensors

log = logging.getLogger(__name__)

MEAN, STD = 0.5, 0.25
BATCH = 64


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """He initialisation from `generator`; the classifier starts small, biases at zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            assert module.bias is not None, "every layer has a bias"
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(0.1)


@torch.no_grad()
def evaluate(model: InceptionNet, n: int = 4000, seed: int = 10_000) -> tuple[float, list[float]]:
    """Accuracy on `n` held-out drawings, overall and per class."""
    generator = torch.Generator().manual_seed(seed)
    hits, totals = torch.zeros(len(CLASSES)), torch.zeros(len(CLASSES))
    for start in range(0, n, 200):
        labels = torch.arange(start, min(start + 200, n)) % len(CLASSES)
        logits = model((draw_shapes(labels, generator) - MEAN) / STD)
        hits.index_add_(0, labels, (logits.argmax(-1) == labels).float())
        totals.index_add_(0, labels, torch.ones(len(labels)))
    return (hits.sum() / totals.sum()).item(), (hits / totals).tolist()


def train(steps: int, seed: int, out: Path, lr: float = 2e-3) -> InceptionNet:
    """Train for `steps` batches with AdamW, warm-up and cosine decay; log and save into `out`."""
    generator = torch.Generator().manual_seed(seed)
    model = shapes(len(CLASSES)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    initialize(model, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    losses: list[float] = []
    with (out / "shapes.log.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            labels = torch.randint(len(CLASSES), (BATCH,), generator=generator)
            images = (draw_shapes(labels, generator) - MEAN) / STD
            loss = F.cross_entropy(
                model(images.contiguous(memory_format=torch.channels_last)), labels
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if step % 250 == 0 or step == steps:
                accuracy, _ = evaluate(model, 4000 if step == steps else 800)
                mean = sum(losses) / len(losses)
                row = {
                    "step": step,
                    "loss": round(mean, 4),
                    "held_out_accuracy": round(accuracy, 4),
                }
                file.write(json.dumps(row) + "\n")
                file.flush()
                log.info("%s", row)
                losses.clear()
                write_tensors(
                    out / "shapes.safetensors",
                    model.state_dict(),
                    {"seed": str(seed), "steps": str(step), "batch": str(BATCH)},
                )
    return model


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.steps, options.seed, options.out)


if __name__ == "__main__":
    main()
