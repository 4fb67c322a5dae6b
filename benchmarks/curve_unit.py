"""What builds a curve unit: edges into GoogLeNet's `mixed3b:335`, compared with expanded weights and with ablation.

On the photographs that activate the unit most, with each one turned by 180 degrees as its counterpart, edges are scored
by integrated gradients on the unit's input, before its ReLU. For each unit of a lower layer the scores of all edges
that leave it are added up. They are compared with the unit's expanded weight into the curve unit times the change of
its activation, summed over the kernel at the curve unit's place, and with the effect of ablation, where the whole unit
carries what it carries on the counterpart. Both are rank correlations over the layer's units, with bootstrap intervals.
All of it is shown for shuffled weights, too.

    CIRCUITS_ASSETS=... python benchmarks/curve_unit.py --photographs 16 --among 96
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from circuits.discovery import Runs, edge_graph, score_edges
from circuits.discovery.graphs import EdgeGraph
from circuits.discovery.searching import values_of
from circuits.experiments.statistics import percentiles
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.randomizing import randomized
from circuits.models.zoo.loading import load_model
from circuits.tasks import Task
from circuits.tasks.builtin import load_task, with_counterparts
from circuits.tasks.contrasts import most_active
from circuits.units import Unit
from circuits.weights import expand_weights

TARGET = "mixed3b_5x5_pre_relu"
UNIT = 15
LAYERS = ("localresponsenorm1", "mixed3a", "mixed3b_5x5_bottleneck")
"""The first is what layers read of `conv2d2`."""


def photographs(model: HookedModel, folder: Path, n: int, among: int) -> Task:
    """The photographs that activate the unit most, turned counterparts included."""
    task = load_task(model, n=among, data=f"folder:{folder}", metric=f"{TARGET}:{UNIT}")
    return with_counterparts(most_active(task, n), "turned")


def left_by(graph: EdgeGraph, layer: str, n_units: int) -> list[np.ndarray]:
    """For each unit of a layer the numbers of the edges that leave it."""
    source = np.full(n_units, -1)
    for number, name in enumerate(graph.sources):
        unit = Unit.parse(name)
        if unit.site == layer:
            source[unit.index] = number
    return [np.flatnonzero(graph.ends[:, 0] == s) if s >= 0 else np.zeros(0, int) for s in source]


def expanded_effects(runs: Runs, layer: str) -> Tensor:
    """Expanded weight times the change of activation, summed over the kernel, for each example and unit of a layer."""
    model = runs.model
    found = expand_weights(model, layer, TARGET, units=[UNIT])
    kernel = found.weight[0]
    high, wide = kernel.shape[1:]
    stride = round(found.source_shape[0] / found.target_shape[0])
    rows = []
    for pair in runs.pairs():
        assert pair.part.counterparts is not None
        clean, other = (
            model.run(x, read=[layer], until=layer)[layer]
            for x in (pair.part.inputs, pair.part.counterparts)
        )
        change = F.pad(other - clean, (wide, wide, high, high))
        given = pair.clean[TARGET][:, UNIT]
        for example, at in enumerate(given.flatten(1).argmax(1).tolist()):
            y, x = divmod(at, given.shape[2])
            top = found.start[0] + stride * (y - found.at[0]) + high
            left = found.start[1] + stride * (x - found.at[1]) + wide
            window = change[example, :, top : top + high, left : left + wide]
            rows.append((window * kernel).sum((1, 2)))
    return torch.stack(rows).double()


def ablated(runs: Runs, leaving: list[np.ndarray]) -> np.ndarray:
    """The mean change of the metric by ablating each unit: all edges that leave it, at once."""
    every = np.ones(len(runs.graph), bool)
    kept = []
    for edges in leaving:
        some = every.copy()
        some[edges] = False
        kept.append(some)
    values = values_of(runs, [every, *kept])
    return (values[1:] - values[0]).mean(1)


def correlated(a: np.ndarray, b: np.ndarray) -> str:
    """The rank correlation with its interval over resampled units."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(a), len(a)) for _ in range(500)]
    low, high = percentiles(np.array([_spearman(a[i], b[i]) for i in drawn]))
    return f"{_spearman(a, b):5.2f} ({low:.2f} to {high:.2f})"


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def compare(model: HookedModel, folder: Path, n: int, among: int) -> dict[str, list[str]]:
    """For each layer the two correlations, printed as they are made."""
    task = photographs(model, folder, n, among)
    graph = edge_graph(model, ["conv2d2", "mixed3a", f"{TARGET}:{UNIT}"])
    began = time.perf_counter()
    scores = score_edges(graph, task, "eap-ig")
    runs = Runs(graph, task)
    print(
        f"{model.name}: {len(graph)} edges scored on {len(task)} photographs in {time.perf_counter() - began:.1f} s; "
        f"unit {scores.clean.mean():.1f}, turned {scores.corrupted.mean():.1f}, "
        f"completeness residual {scores.completeness:.2g}",
        flush=True,
    )
    found = {}
    for layer in LAYERS:
        leaving = left_by(graph, layer, graph.model.n_units(layer))
        summed = np.array([scores.mean[edges].sum() for edges in leaving])
        weights = expanded_effects(runs, layer).mean(0).numpy()
        found[layer] = [correlated(summed, weights), correlated(summed, ablated(runs, leaving))]
        print(
            f"  {layer:24} {len(summed):4} units: expanded weight x activation {found[layer][0]}, ablation "
            f"{found[layer][1]}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=16)
    parser.add_argument("--among", type=int, default=96)
    parser.add_argument("--null", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    folder = Path(os.environ["CIRCUITS_ASSETS"]) / "images" / "imagenet500"
    model = load_model("googlenet")
    made = {
        which.name: compare(which, folder, args.photographs, args.among)
        for which in [model, *([randomized(model, 0)] if args.null else [])]
    }
    print(json.dumps({"name": "curve unit: edges, expanded weights and ablation", **made}))


if __name__ == "__main__":
    main()
