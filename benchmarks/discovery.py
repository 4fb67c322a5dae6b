"""What scores of all edges cost, compared with the passes that they are made of.

`stories260k`, pairs of the pronoun task, its 1,701 edges; or `--model smollm2 --task indirect-object --pairs 64`,
without exact noising of its 70,651. EAP-IG with five steps, everything included, over five bare forward and backward
passes of the same texts (target: at most 1.6; of smollm2 2). Exact noising of every edge over one bare forward pass
an edge (target: at most 1/8 with 8 pairs, 1/2 with 64). Ways take turns in one process, on one thread; times are of
the processor, ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from benchmarks.heads import interleaved
from circuits.discovery import Runs, edge_graph, score_edges
from circuits.discovery.scoring import exact
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task
from circuits.tasks.task import Task

STEPS = 5


def forward(model: HookedModel, task: Task) -> None:
    """A bare forward pass of a task's texts."""
    with torch.no_grad():
        for part in task.batches():
            model.module(part.inputs)


def backward(model: HookedModel, task: Task) -> None:
    """Five bare forward and backward passes: logits at the last position, gradients of all parameters held fixed."""
    embed: Any = model.module.embed
    kept: list[torch.Tensor] = []

    def begin(module: Any, given: Any, made: torch.Tensor) -> torch.Tensor:
        kept[:] = [made.detach().requires_grad_()]
        return kept[0] * 1

    handle = embed.register_forward_hook(begin)
    try:
        for _ in range(STEPS):
            for part in task.batches():
                logits = model.module(part.inputs)
                torch.autograd.grad(logits[:, -1].sum(), kept[0])
    finally:
        handle.remove()


def measured(spec: str, name: str, n_pairs: int, rounds: int) -> dict[str, Any]:
    """The two ratios with some pairs."""
    model = load_model(spec)
    graph, task = edge_graph(model), load_task(model, name, n=n_pairs)
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    runs = Runs(graph, task)

    def patched() -> None:
        for pair in runs.pairs():
            exact(runs, pair)

    ways = {
        "bare": lambda: backward(model, task),
        "eap-ig": lambda: score_edges(graph, task, "eap-ig", steps=STEPS, rule="left"),
        "forward": lambda: forward(model, task),
    }
    few = len(graph) < 10_000
    found = interleaved(ways | ({"exact": patched} if few else {}), rounds)
    scores = statistics.median(a / b for a, b in zip(found["eap-ig"], found["bare"], strict=True))
    shares = (
        a / (b * len(graph)) for a, b in zip(found.get("exact", []), found["forward"], strict=False)
    )
    return {
        "pairs": len(task), "edges": len(graph), "eap_ig_of_five_passes": round(scores, 3),
        "exact_of_a_pass_an_edge": round(statistics.median(shares), 3) if few else None,
        "ms": {name: round(1000 * statistics.median(times), 1) for name, times in found.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2, help="rounds")
    parser.add_argument("--model", default="stories260k")
    parser.add_argument("--task", default="pronouns")
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for n_pairs in args.pairs:
        made = measured(args.model, args.task, n_pairs, args.n)
        print(json.dumps({"name": "discovery", "model": args.model} | made))


if __name__ == "__main__":
    main()
