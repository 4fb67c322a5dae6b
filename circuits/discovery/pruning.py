"""Edge pruning: a circuit by learning a mask over all edges at once (Bhaskar et al. 2024).

Every edge has a gate z from 0 (it carries what it carries in the other run) to 1 (what it carries in the clean one),
drawn again in every step from the hard-concrete distribution (Louizos et al. 2018): with u uniform from 0 to 1,

    z = clamp(1.2 sigmoid((log u - log(1 - u) + a) / (2/3)) - 0.1, 0, 1),

which is exactly 0 or 1 with probabilities that depend on `a`, and differentiable between. `a` is learned so that
circuits are close to the model (`losses`), while two Lagrange multipliers hold the expected number of open gates at a
target, which shrinks from all edges to the size that is asked for. At the end edges are ranked by `a`, and as many are
kept as make the wanted number of edges on paths from input to output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.discovery.graphs import EdgeGraph, Mask
from circuits.discovery.losses import Distance
from circuits.discovery.optimal import Constants
from circuits.discovery.results import ranked
from circuits.discovery.runs import Pair, Runs
from circuits.discovery.searching import check_size, first_connected
from circuits.files import Keep, make_now
from circuits.progress import Progress

STEPS = 300
"""The number of steps in which a mask is learned."""

PART = 16
"""The most examples in a step."""

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3
"""Of the hard-concrete distribution: the interval that is cut off to 0 and 1, and the temperature."""

_SHRINKING = 0.7
"""The share of the steps in which the target shrinks; in the rest it is the size that is asked for."""

_OPEN = 3.0
"""What `a` begins with: gates are open with a probability of .99."""

_RATE, _FORCE, _MOVING = 0.1, 0.1, 0.02
"""The learning rates (Adam) of `a`, of the multipliers, and of constants that are learned together with them."""

_CHUNK = 25
"""After how many steps at least the state is kept."""


def gates(
    a: Float[Tensor, " edge"], noise: Float[Tensor, "*sets edge"]
) -> Float[Tensor, "*sets edge"]:
    """The gates that uniform noise from 0 to 1 draws.

    >>> gates(torch.tensor([-9.0, 0.0, 9.0]), torch.full((3,), 0.5)).tolist()
    [0.0, 0.5, 1.0]
    """
    noise = noise.clamp(1e-6, 1 - 1e-6)
    drawn = torch.sigmoid((noise.log() - (-noise).log1p() + a) / _TEMPERATURE)
    return (drawn * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def chances(a: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """The probability that each gate is not shut."""
    return torch.sigmoid(a - _TEMPERATURE * math.log(-_LOW / _HIGH))


def prune(
    runs: Runs,
    n: int,
    *,
    steps: int = STEPS,
    optimal: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    keep: Keep = make_now,
) -> Mask:
    """Learn which edges to keep.

    Args:
        runs: the runs of the task's `find` half.
        n: the number of edges to keep.
        steps: how often the mask is changed.
        optimal: learn what removed edges carry together with the mask, from the means that they carry in `runs`.
        seed: of the gates that are drawn.
        progress: called with the steps done and their number.
        keep: keeps the state every few steps, so that a search which is stopped goes on, with the same outcome.

    Returns:
        The edges that are kept: exactly n, unless no circuit of n edges on paths from input to output can be made from
        the order in which the mask puts them.

    Raises:
        ValueError: if the size is out of range, removing all edges changes nothing, or the metric has no gradient.
    """
    check_size(runs.graph, n)
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    state = _Pruning(runs, n, steps, optimal, seed)
    number = 0
    while state.done < steps:
        state.restore(keep(f"pruning {number}", partial(state.advanced, progress)))
        number += 1
        if progress is not None:  # what was kept is done at once
            progress(state.done, steps)
    return strongest_connected(runs.graph, state.a.detach().double().numpy(), n)


def strongest_connected(graph: EdgeGraph, worth: Float[np.ndarray, " edge"], n: int) -> Mask:
    """The most important edges, so many that n of them lie on a path from the model's input to its output.

    If one more edge would complete a path of several and so exceed n, the rest is filled with the most important edges
    that lie on a path at once.
    """
    order = ranked(worth)
    low, high = 0, len(graph) + 1  # the first `low` edges make at most n, the first `high` more
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if first_connected(graph, order, middle).sum() <= n else (low, middle)
        )
    kept = first_connected(graph, order, low)
    while kept.sum() < n and (more := np.flatnonzero(graph.attachable(kept))).size:
        kept[more[worth[more].argmax()]] = True
    return kept


class _Pruning:
    """A mask as it is being learned.

    Attributes:
        done: the steps done.
        a: the parameter of each edge's gate.
    """

    def __init__(self, runs: Runs, n: int, steps: int, optimal: bool, seed: int) -> None:
        self.runs, self.n, self.steps, self.seed, self.done = runs, n, steps, seed, 0
        self.distance = Distance.of(runs)
        self.a = torch.full((len(runs.graph),), _OPEN, requires_grad=True)
        self.multipliers = torch.zeros(2, requires_grad=True)
        self.constants = Constants.of(runs) if optimal else None
        moves = [] if self.constants is None else [*self.constants.moves.values()]
        groups = ((_RATE, [self.a]), (_FORCE, [self.multipliers]), (_MOVING, moves))
        self.parameters = [self.a, self.multipliers, *moves]
        self.optimizer = torch.optim.Adam(
            [{"params": own, "lr": rate} for rate, own in groups if own]
        )

    @recording_gradients()
    def advanced(self, progress: Progress | None = None) -> dict[str, Any]:
        """Go over the examples until enough steps are done, and return the state; progress is told of each step."""
        stop = min(self.steps, self.done + _CHUNK)
        while self.done < stop:
            for pair in self.runs.pairs():
                if self.done < self.steps:
                    self._step(pair)
                    if progress is not None:
                        progress(self.done, self.steps)
        return self.state()

    def _step(self, pair: Pair) -> None:
        shrunk = min(1.0, self.done / (_SHRINKING * self.steps))
        target = len(self.a) * (self.n / len(self.a)) ** shrunk
        # The noise of a step depends on nothing but its number, so that a run that goes on later draws the same.
        rng = np.random.default_rng((self.seed, self.done))
        z = gates(self.a, torch.from_numpy(rng.random(len(self.a), dtype=np.float32)))
        constants = None if self.constants is None else self.constants.now
        distance = self.distance.at(pair, 1 - z[None], constants)
        if not distance.requires_grad:
            raise ValueError(
                f"metric {self.runs.metric.name} has no gradient, which the search pruning needs; expected another "
                "metric or search"
            )
        over = (chances(self.a).sum() / target).log()
        held = self.multipliers[0] * over + self.multipliers[1] * over.square()
        self.optimizer.zero_grad()
        (distance + held).backward()
        assert self.multipliers.grad is not None, "the sum depends on them"
        self.multipliers.grad.neg_()  # they rise as long as too many gates are open
        self.optimizer.step()
        self.done += 1

    # --- kept ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as JSON has it."""

        def moments(name: str) -> list[Any]:
            # A constant that nothing reads never has a gradient, and no moments.
            return [
                self.optimizer.state[p].get(name, torch.zeros_like(p)).tolist()
                for p in self.parameters
            ]

        return {
            "done": self.done, "parameters": [p.tolist() for p in self.parameters],
            "first": moments("exp_avg"), "second": moments("exp_avg_sq"),
        }  # fmt: skip

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.done = state["done"]
        rows = zip(
            self.parameters, state["parameters"], state["first"], state["second"], strict=True
        )
        for own, value, first, second in rows:
            own.copy_(own.new_tensor(value))
            self.optimizer.state[own] = {
                "step": torch.tensor(float(self.done)), "exp_avg": own.new_tensor(first),
                "exp_avg_sq": own.new_tensor(second),
            }  # fmt: skip
