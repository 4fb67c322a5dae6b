"""A circuit in a graph of ten million edges; run by itself, so that its memory can be measured."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch

from circuits.discovery import discover, edge_graph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.transformers import native_bridge
from circuits.progress import Progress
from tests.test_paths import pairs


def main(n_neurons: int, folder: Path) -> None:
    """Find a circuit between all neurons of a random GPT-2 of four layers; print what it took as JSON."""
    torch.manual_seed(0)
    bridge = native_bridge(
        n_layers=4, d_model=64, d_vocab=50, n_ctx=12, d_head=16, n_heads=4, d_mlp=n_neurons, act_fn="gelu",
        normalization_type="LN",
    )  # fmt: skip
    model = HookedModel(bridge, TokenInput(50, 12), "large")
    clean, corrupted = torch.randint(1, 50, (2, 16, 8))
    clean[:, -1], corrupted[:, -1] = 7, 9  # so that the effect of all edges can be told from 0
    weights = torch.randn(50)
    task = pairs(model, clean, corrupted, lambda logits: logits[:, -1] @ weights.to(logits))
    begin, stages = time.monotonic(), dict[str, tuple[float, float]]()  # seconds, bytes

    def stage(name: str) -> Progress | None:
        stages[name] = time.monotonic() - begin, peak()
        return None

    graph = edge_graph(model, neurons="all", neuron_targets="all", limit=10**8)
    found = discover(
        graph, task, "eap-ig", search="top", size=1000, n_random=2, n_curves=0, check=20, stage=stage, folder=folder
    )  # fmt: skip
    lines = [str(line) for line in found.tables(5)]
    stages["end"] = time.monotonic() - begin, peak()
    said = json.dumps({
        "edges": len(graph), "kept": len(found.evaluation.edges), "defined": found.evaluation.defined,
        "completeness": found.scores.completeness, "peak": peak(), "stages": stages, "lines": lines,
    })  # fmt: skip
    sys.stdout.write(said + "\n")


def peak() -> float:
    """The most memory that this process has had, in bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
