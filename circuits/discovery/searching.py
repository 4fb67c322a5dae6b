"""Searches for circuits: which edges to keep, from scores or by trying.

A search sees the `find` half of a task. Its result is a set of edges; the others carry what they carry in the other
run.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from circuits.discovery.graphs import LIMIT, EdgeGraph, Mask, as_off, mask_of
from circuits.discovery.results import Ranking, importance, ranked
from circuits.discovery.runs import Pair, Runs
from circuits.experiments.patched_runs import Direction
from circuits.files import Keep, make_now
from circuits.progress import Progress

Search = Literal["top", "greedy", "refine", "acdc", "pruning"]

SEARCHES: tuple[str, ...] = get_args(Search)

_DROPPED = 0.2
"""The share of a circuit's edges that `refine` drops in a round."""

_START = 3
"""How many times as many edges as it is to end with `refine` starts from."""


class Masks(Sequence[Mask]):
    """Circuits of one graph. Of a large graph they are kept as bits, and unpacked one at a time.

    Args:
        n_edges: the number of the graph's edges.
        masks: circuits to begin with.
    """

    def __init__(self, n_edges: int, masks: Iterable[Mask] = ()) -> None:
        self._n, self._packed = n_edges, n_edges > LIMIT
        self._kept: list[np.ndarray] = []
        for mask in masks:
            self.append(mask)

    def append(self, mask: Mask) -> None:
        """Add a circuit."""
        self._kept.append(np.packbits(mask) if self._packed else mask)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.some(range(*place.indices(len(self))))
        found = self._kept[place]
        return np.unpackbits(found, count=self._n).view(bool) if self._packed else found

    def some(self, places: Iterable[int]) -> Masks:
        """Some of the circuits."""
        made = Masks(self._n)
        made._kept = [self._kept[place] for place in places]
        return made

    def __add__(self, other: Masks) -> Masks:
        made = Masks(self._n)
        made._kept = [*self._kept, *other._kept]
        return made

    def key(self, place: int) -> bytes:
        """What tells a circuit from those that are not the same."""
        if self._packed:
            return hashlib.sha256(self._kept[place].tobytes()).digest()
        return np.packbits(self._kept[place]).tobytes()


def top(graph: EdgeGraph, worth: Float[np.ndarray, " edge"], n: int) -> Mask:
    """The n most important edges, without those that lie on no path from the model's input to its output."""
    check_size(graph, n)
    return first_connected(graph, ranked(worth, n), n)


def first_connected(graph: EdgeGraph, order: Int[np.ndarray, " ranked"], n: int) -> Mask:
    """The first n edges of an order of edges' numbers, without those that lie on no path from input to output."""
    return graph.connected(mask_of(len(graph), order[:n]))


def greedy(graph: EdgeGraph, worth: Float[np.ndarray, " edge"], n: int) -> Mask:
    """Grow a circuit backwards from the output, by the most important edge into what is in it (Hanna et al. 2024)."""
    check_size(graph, n)
    kept = np.zeros(len(graph), bool)
    queue: list[tuple[float, int]] = []
    targets_of: dict[int, list[int]] = {}
    for target, sources in enumerate(graph.feeds):
        for source in sources:
            targets_of.setdefault(source, []).append(target)
    seen: set[int] = set()

    def enter(target: int) -> None:
        if target not in seen:
            seen.add(target)
            for edge in graph.edges_into[target].tolist():
                heapq.heappush(queue, (-float(worth[edge]), edge))

    for target, sources in enumerate(graph.feeds):
        if not sources:
            enter(target)
    while queue and kept.sum() < n:
        _, edge = heapq.heappop(queue)
        kept[edge] = True
        for target in targets_of.get(int(graph.ends[edge, 0]), ()):
            enter(target)
    return graph.connected(kept)


def least_size(graph: EdgeGraph, pick: Callable[[int], Mask], n: int) -> int:
    """The smallest size, above one that keeps no edge, of which a search keeps some.

    Args:
        graph: the edges, all of which lie on a path.
        pick: the edges that a search keeps by size; a larger size keeps all that a smaller one does.
        n: a size of which it keeps none.
    """
    low, high = n, min(2 * n, len(graph))
    while not pick(high).any() and high < len(graph):
        low, high = high, min(2 * high, len(graph))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pick(middle).any() else (middle, high)
    return high


def check_size(graph: EdgeGraph, n: int) -> None:
    """Raise ValueError unless a circuit may have n edges."""
    if not isinstance(n, int) or not 1 <= n <= len(graph):
        raise ValueError(
            f"size {n}: {graph.model.name} has {len(graph)} edges at this grain; expected 1 to {len(graph)}"
        )


# --- by trying ---------------------------------------------------------------------------------------


def extremes(n_edges: int) -> tuple[Mask, Mask]:
    """The circuits of no edges and of all."""
    return np.zeros(n_edges, bool), np.ones(n_edges, bool)


def values_of(
    runs: Runs,
    circuits: Sequence[Mask],
    progress: Progress | None = None,
    keep: Keep = make_now,
    direction: Direction = "noising",
) -> Float[np.ndarray, "circuit example"]:
    """The metric of each circuit on each example, in the task's order: edges outside a circuit are patched.

    Args:
        runs: the task's runs.
        circuits: which edges each keeps.
        progress: called with the work done and the total, in examples times different circuits.
        keep: keeps the numbers of each batch.
        direction: with `denoising` the two runs are exchanged.
    """
    # Many circuits may be the same one: without connected edges all are empty.
    numbers: dict[bytes, int] = {}
    held = circuits if isinstance(circuits, Masks) else Masks(len(runs.graph), circuits)
    which = [numbers.setdefault(held.key(i), len(numbers)) for i in range(len(held))]
    different = held.some(which.index(i) for i in range(len(numbers)))
    found = np.zeros((len(different), len(runs.task)))
    done, total = 0, len(different) * len(runs.task)
    for number, pair in enumerate(runs.pairs()):
        told = None if progress is None else partial(_tell, progress, done, total)
        run = pair if direction == "noising" else pair.exchanged()
        made = keep(f"batch {number}", partial(_metrics, runs, run, different, told))
        found[:, list(pair.part.which)] = made
        done += len(different) * len(pair.part)
    return found[which]


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _metrics(
    runs: Runs, pair: Pair, circuits: Sequence[Mask], told: Callable[[int], None] | None
) -> list[list[float]]:
    """The metric of each circuit on each example of a batch, as JSON has it."""
    size, rows = min(len(circuits), runs.sets_per_pass(pair)), list[list[float]]()
    for start in range(0, len(circuits), size):
        some = [*circuits[start : start + size]]
        # The last pass is filled up: passes of another size would round differently.
        off = as_off(runs.graph, [*some, *[circuits[0]] * (size - len(some))])
        rows += runs.patched(pair, off)[: len(some)].tolist()
        if told is not None:
            told(len(rows) * len(pair.part))
    return rows


def removal_effects(
    runs: Runs, circuit: Mask, progress: Progress | None = None
) -> Float[np.ndarray, "removed example"]:
    """The change of the metric when each edge of a circuit is taken out of it, in the order of the edges."""
    without = []
    for edge in np.flatnonzero(circuit).tolist():
        fewer = circuit.copy()
        fewer[edge] = False
        without.append(fewer)
    values = values_of(runs, [circuit, *without], progress)
    return values[1:] - values[0]


def refine(
    runs: Runs,
    worth: Float[np.ndarray, " edge"],
    n: int,
    ranking: Ranking = "absolute",
    progress: Progress | None = None,
    keep: Keep = make_now,
) -> Mask:
    """Start from the most important edges by approximate scores, and take out those whose exact effect is smallest.

    In each round every edge of the circuit is taken out of it by itself; a fifth of them, those with the least effect,
    are dropped, until n are left.

    Args:
        runs: the runs of the task's `find` half.
        worth: how important each edge is, by approximate scores.
        n: the number of edges to end with.
        ranking: by the size of the effect, or by how much worse the metric gets.
        progress: called with the number of edges dropped so far and the number to drop.
        keep: keeps the effects of each round, so that a search which is stopped goes on.
    """
    graph = runs.graph
    circuit = greedy(graph, worth, min(len(graph), _START * n))
    whole, rounds = int(circuit.sum()) - n, 0
    while (size := int(circuit.sum())) > n:
        tried = partial(removal_effects, runs, circuit)
        made = keep(f"round {rounds}", lambda tried=tried: tried().mean(1).tolist())
        effects, rounds = np.array(made), rounds + 1
        own = np.flatnonzero(circuit)
        order = np.argsort(importance(effects, runs.metric.better, ranking), kind="stable")
        circuit[own[order[: max(1, min(size - n, int(_DROPPED * size)))]]] = False
        circuit = graph.connected(circuit)
        if progress is not None:
            progress(whole - max(0, int(circuit.sum()) - n), whole)
    return circuit


def acdc(
    runs: Runs, threshold: float, progress: Progress | None = None, keep: Keep = make_now
) -> Mask:
    """Automatic circuit discovery (Conmy et al. 2023): go from the output to the input and drop what is not needed.

    Each edge is taken out of what is left; it stays out if that makes the mean metric worse by less than the threshold
    (moves it by less, for metrics of which neither more nor less is better).

    Args:
        runs: the runs of the task's `find` half.
        threshold: in units of the metric.
        progress: called with the number of edges tried and the total.
        keep: keeps what was decided for each target, so that a search which is stopped goes on.

    Raises:
        ValueError: if the threshold is not above 0.
    """
    if not threshold > 0:
        raise ValueError(
            f"threshold {threshold} must be above 0, in {runs.metric.unit or 'the metric'}"
        )
    graph, kept, tried = runs.graph, np.ones(len(runs.graph), bool), 0
    now = float(values_of(runs, [kept]).mean())
    for target in reversed(range(len(graph.targets))):
        made = keep(f"target {target}", partial(_decided, runs, kept, target, now, threshold))
        kept = mask_of(len(graph), made["kept"])
        now = made["value"]
        tried += len(graph.edges_into[target])
        if progress is not None:
            progress(tried, len(graph))
    return graph.connected(kept)


def _decided(runs: Runs, kept: Mask, target: int, now: float, threshold: float) -> dict[str, Any]:
    """Which edges are left after those into a target were tried, and the metric then."""
    circuit, better = kept.copy(), runs.metric.better
    for edge in reversed(runs.graph.edges_into[target].tolist()):
        circuit[edge] = False
        value = float(values_of(runs, [circuit]).mean())
        worse = -better * (value - now) if better else abs(value - now)
        if worse < threshold:
            now = value
        else:
            circuit[edge] = True
    return {"kept": np.flatnonzero(circuit).tolist(), "value": now}
