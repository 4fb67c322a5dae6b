"""Edge pruning: a circuit by learning a mask over all edges at once (Bhaskar et al. 2024).

Every edge has a gate z from 0 (it carries what it carries in the other run) to 1 (what it carries in the clean one), drawn
anew in every step from the hard-concrete distribution (Louizos et al. 2018): with u uniform,

    z = clamp(1.2 sigmoid((log u - log(1 - u) + a) / (2/3)) - 0.1, 0, 1),

which is 0 or 1 exactly with a probability that `a` decides, and differentiable between. `a` is learned to minimise the
distance between circuit and model (`losses`) and two Lagrange multipliers hold the expected number of open gates at a
target, which shrinks from all edges to the size that is asked for. At the end the edges are ranked by `a`, and the threshold
is the one at which as many edges as are asked for lie on a path from input to output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.discovery.graphs import EdgeGraph
from circuits.discovery.losses import Distance
from circuits.discovery.results import ranked
from circuits.discovery.runs import Runs
from circuits.discovery.searching import check_size
from circuits.files import Keep, make_now
from circuits.progress import Progress

STEPS = 300
"""The number of steps."""

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3
"""Of the hard-concrete distribution: the ends of the stretched interval and the temperature."""

_SHRINKING = 0.7
"""The share of the steps in which the target shrinks; in the rest it is the size that is asked for."""

_OPEN = 3.0
"""What `a` begins with: gates are open with a probability of .99."""

_RATE, _FORCE, _CONSTANT = 0.1, 0.1, 0.02
"""Learning rates (Adam) of `a`, of the Lagrange multipliers, and of constants, as shares of what they replace."""

_SETS = 1
"""How many masks are drawn in a step."""

_CHUNK = 25
"""After at least how many steps the state is kept."""


def prune(
    runs: Runs,
    n: int,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
    keep: Keep = make_now,
) -> Bool[np.ndarray, " edge"]:
    return strongest_connected(runs.graph, learn_mask(runs, n, steps=steps, seed=seed, progress=progress, keep=keep), n)


@recording_gradients()
def learn_mask(runs: Runs, n: int, steps: int = STEPS, seed: int = 0, progress=None, keep=make_now, rate=_RATE, force=_FORCE, sets=_SETS, start=None, shrink=_SHRINKING, log=None):
    distance = Distance.of(runs)
    N = len(runs.graph)
    a = torch.full((N,), _OPEN) if start is None else torch.from_numpy(start).float()
    a.requires_grad_(True)
    lam = torch.zeros(2, requires_grad=True)
    opt = torch.optim.Adam([{"params": [a], "lr": rate}, {"params": [lam], "lr": force}])
    done = 0
    while done < steps:
        for pair in runs.pairs():
            if done >= steps: break
            target = N * (n / N) ** min(1, done / (shrink * steps))
            noise = torch.rand(sets, N, generator=torch.Generator().manual_seed(seed * 1000003 + done))
            z = gates(a, noise)
            d = distance.at(pair, 1 - z)
            over = (opening(a).sum() / target).log()
            loss = d + lam[0] * over + lam[1] * over * over
            opt.zero_grad()
            loss.backward()
            lam.grad.neg_()
            opt.step()
            if log and done % log == 0:
                print(done, f"target {target:.1f} open {opening(a).sum():.1f} d {d:.4f} lam {lam.tolist()}", flush=True)
            done += 1
    return a.detach().numpy().astype(float)


def gates(a, noise):
    noise = noise.clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((noise.log() - (-noise).log1p() + a) / _TEMPERATURE)
    return (s * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def opening(a):
    return torch.sigmoid(a - _TEMPERATURE * math.log(-_LOW / _HIGH))


def strongest_connected(graph: EdgeGraph, worth, n: int):
    order = ranked(worth)
    low, high = 0, len(graph)
    def first(k):
        kept = np.zeros(len(graph), bool)
        kept[order[:k]] = True
        return graph.connected(kept)
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if first(mid).sum() <= n else (low, mid)
    kept = first(high) if first(high).sum() <= n else first(low)
    while kept.sum() < n:
        more = graph.attachable(kept)
        if not more.any(): break
        kept[np.flatnonzero(more)[worth[more].argmax()]] = True
    return kept
