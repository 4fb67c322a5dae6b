"""Pairs of edges: what two edges do together beyond what each does alone, and what that makes them to each other.

With a, b and ab the changes of the metric by patching one edge, the other, and both, the interaction is ab - a - b. In
noising edges of the intact run carry what they carry in the corrupted one; in denoising the runs are exchanged. A
direction is synergistic if neither edge alone, nor the two alone added up, make more than half of ab.

- *redundant*: noising is synergistic and denoising is not. Either is enough (OR).
- *conjunctive*: denoising is synergistic and noising is not. Both are needed (AND).
- *additive*: no interaction in either direction.
- *backup*: a source steps in once an edge is removed. OR and a backup have the same rows; what tells them apart is a
  third pass: the direct effect of a source on the output grows, in the direction of ab. In a redundant pair this is a
  source that the other edge leads to. Two edges into the output are always additive, up to a normalisation: there it is
  the source of the other edge, which may have done nothing before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from circuits.discovery.graphs import Edge, EdgeGraph, Mask, mask_of
from circuits.discovery.results import EdgeScores, Ranking
from circuits.discovery.runs import Ablation, Runs
from circuits.discovery.searching import values_of
from circuits.examples import BATCH
from circuits.experiments.outcomes import Record
from circuits.experiments.patched_runs import Direction
from circuits.experiments.running import MEMORY
from circuits.experiments.statistics import Interval, mean_intervals
from circuits.files import Keep, finite, make_now
from circuits.progress import Progress
from circuits.tables import Table, between
from circuits.tasks.task import Task

Relation = Literal["redundant", "conjunctive", "additive", "backup"]

LARGEST = 32
"""At most this many edges are paired."""

_HALF = 0.5
"""The share of the joint effect that single edges make at most where a direction is synergistic."""

_SMALL = 0.1
"""An interaction below this share of the weaker edge's effect counts as none, and a growth below this share of the
largest effect."""

_NOISE = 1e-5
"""Effects below this share of the metric's values are rounding."""

_MIRRORED = 1e-3
"""Effects that differ by less than this share of the largest are the same in both directions."""


@dataclass(frozen=True, eq=False)
class Effects:
    """What two edges do to the metric in one direction, on each example.

    Attributes:
        first: the change by patching the first edge alone.
        second: that by the second alone.
        both: that by both together.
        interval: of the mean interaction (bootstrap over clusters of examples).
    """

    first: Float[np.ndarray, " example"]
    second: Float[np.ndarray, " example"]
    both: Float[np.ndarray, " example"]
    interval: Interval

    @property
    def means(self) -> tuple[float, float, float]:
        """The mean of each."""
        return float(self.first.mean()), float(self.second.mean()), float(self.both.mean())

    @property
    def over(self) -> Float[np.ndarray, " example"]:
        """The interaction."""
        return self.both - self.first - self.second

    @property
    def synergistic(self) -> bool:
        """Whether most of the joint effect happens only with both, and chance does not explain the interaction."""
        first, second, both = self.means
        sure = np.isnan(self.interval.low) or self.interval.clear
        most = max(abs(first), abs(second), abs(first + second))
        return bool(sure and both and most <= _HALF * abs(both))

    def to_dict(self) -> dict[str, Any]:
        """The means, as JSON has them."""
        first, second, both = self.means
        made = {"first": first, "second": second, "both": both}
        return made | {"interaction": asdict(self.interval)}


@dataclass(frozen=True)
class Growth:
    """How the direct effect of a source changes once an edge is removed.

    Attributes:
        removed: the edge. With it goes all that its source puts out, unless that is the model's input.
        source: of those that the other edge leads to, the source whose direct effect grows most.
        before: the mean change of the metric by patching its edges into the output, in the intact run.
        after: the same once the edge is removed.
    """

    removed: Edge
    source: str
    before: float
    after: float

    @property
    def amount(self) -> float:
        """By how much the direct effect's size grows."""
        return abs(self.after) - abs(self.before)


@dataclass(frozen=True, eq=False)
class EdgePair:
    """Two edges.

    Attributes:
        first: one.
        second: the other.
        noising: what they do alone and together, in the intact run.
        denoising: the same in the corrupted run.
        growth: what removing one does to the sources behind the other; none where these have no edge into the output.
        relation: what they are to each other; None if none of the four, if chance may explain it, or if one does
            nothing.
    """

    first: Edge
    second: Edge
    noising: Effects
    denoising: Effects
    growth: tuple[Growth, ...]
    relation: Relation | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "first": list(self.first), "second": list(self.second), "noising": self.noising.to_dict(),
            "denoising": self.denoising.to_dict(), "growth": [asdict(g) for g in self.growth],
            "relation": self.relation,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class EdgePairs:
    """Second-order effects of edges.

    Attributes:
        pairs: every pair of the chosen edges.
        settings: how they were measured.
        clean: the metric on each example, with no edge patched.
        corrupted: the metric with every edge patched.
        metric: the metric's name.
        unit: its unit.
        record: model, task, seed and versions.
        notes: what is said of the pairs as a whole.
    """

    pairs: tuple[EdgePair, ...]
    settings: Mapping[str, Any]
    clean: Float[np.ndarray, " example"]
    corrupted: Float[np.ndarray, " example"]
    metric: str
    unit: str
    record: Record
    notes: tuple[str, ...] = ()

    def of(self, first: Edge, second: Edge) -> EdgePair:
        """The pair of two edges, in either order.

        Raises:
            KeyError: if they were not paired.
        """
        for pair in self.pairs:
            if {pair.first, pair.second} == {first, second}:
                return pair
        raise KeyError(f"no pair of {' -> '.join(first)} and {' -> '.join(second)}")

    def order(self) -> list[EdgePair]:
        """The pairs, those with the largest interaction first."""
        sizes = [max(abs(e.interval.value) for e in (p.noising, p.denoising)) for p in self.pairs]
        return [self.pairs[i] for i in np.argsort(-np.array(sizes), kind="stable")]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, the largest interactions first; None for what is not finite."""
        return finite({
            "settings": dict(self.settings), "metric": self.metric, "unit": self.unit,
            "clean": float(self.clean.mean()), "corrupted": float(self.corrupted.mean()),
            "pairs": [pair.to_dict() for pair in self.order()],
            "notes": list(self.notes), "record": asdict(self.record),
        })  # fmt: skip

    def tables(self, top: int) -> Iterator[Table | str]:
        """The pairs with the largest interactions in both directions, and who backs up whom."""
        shown = self.order()[:top]
        for way in ("noising", "denoising"):
            rows = []
            for pair in shown:
                found: Effects = getattr(pair, way)
                i = found.interval
                rows.append((
                    " -> ".join(pair.first), " -> ".join(pair.second), *found.means, i.value,
                    between(i.low, i.high), pair.relation or "none of these",
                ))  # fmt: skip
            heads = ("first", "second", "first alone", "second alone", "both", "interaction")
            title = (
                f"{way}: change of {self.metric} ({self.unit or 'its own unit'}); {len(rows)} of {len(self.pairs)} "
                f"pairs, {self.record.measured_on}, seed {self.record.seed}"
            )
            yield Table((*heads, "95 % interval", "relation"), rows, title)
        for pair in shown:
            best = stepping_in(pair.noising, pair.growth)
            if pair.relation == "backup" and best is not None:
                yield (
                    f"backup: without {' -> '.join(best.removed)} the direct effect of {best.source} goes from "
                    f"{best.before:.4g} to {best.after:.4g}"
                )
        yield from self.notes


def strongest(scores: EdgeScores, n: int, ranking: Ranking = "absolute") -> tuple[Edge, ...]:
    """The n edges with the largest scores.

    Raises:
        ValueError: if there are not as many, or the ranking is unknown.
    """
    if not 1 <= n <= len(scores.edges):
        raise ValueError(f"n {n}: expected 1 to {len(scores.edges)}, the number of edges")
    return tuple(scores.edges[e] for e in scores.order(ranking)[:n].tolist())


def pair_edges(
    graph: EdgeGraph,
    task: Task,
    edges: Sequence[Edge | str],
    *,
    ablation: Ablation = "counterpart",
    shift: int = 0,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
    keep: Keep = make_now,
) -> EdgePairs:
    """The second-order effects of every pair of some edges, exactly, by patching.

    Args:
        graph: the model's edges.
        task: the behaviour; its examples need counterparts, since relations show in both directions.
        edges: the edges, by their names or written `source -> target`; see `strongest`.
        ablation: `counterpart`; the others are refused.
        shift: see `score_edges`.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: of intervals.
        progress: called with the work done and the total, in sets of edges times examples.
        keep: keeps the numbers of each batch, so that a run which is stopped goes on.

    Raises:
        KeyError: if there is no such edge.
        ValueError: if there are fewer than two edges, too many, or one twice; or the task has no counterparts.
    """
    chosen = _checked(graph, edges)
    if ablation != "counterpart":
        raise ValueError(
            f"ablation {ablation}: pairs need denoising, from a run on counterparts; expected counterpart"
        )
    runs = Runs(graph, task, ablation=ablation, shift=shift, batch=batch, memory=memory)
    sets = _Sets(graph, chosen)
    values = _values(runs, sets, progress, keep)
    clean, corrupted = values["noising"][0], values["denoising"][0]
    measured = _Measured(graph, sets, values, task.clusters, seed)
    pairs = tuple(measured.pair(a, b) for a, b in combinations(chosen, 2))
    settings = {"grain": graph.grain, "ablation": ablation} | ({"shift": shift} if shift else {})
    return EdgePairs(
        pairs, settings, clean, corrupted, task.metric.name, task.metric.unit,
        Record.of(graph.model, task, seed), tuple(_notes(pairs)),
    )  # fmt: skip


def _notes(pairs: Sequence[EdgePair]) -> Iterator[str]:
    """What is to be said where the two directions are one: a task whose texts are each other's counterparts."""
    ways = np.array([[p.noising.means, p.denoising.means] for p in pairs])
    over = np.array([p.noising.over for p in pairs])
    # Without interactions the directions always are one, on each example.
    slack = _MIRRORED * np.abs(ways).max()
    if np.abs(ways.sum(1)).max() <= slack < np.abs(over).max():
        yield (
            "noising and denoising have the same effects, with opposite signs, as where texts are each other's "
            "counterparts: redundant and conjunctive cannot be told apart"
        )


def _checked(graph: EdgeGraph, edges: Sequence[Edge | str]) -> list[int]:
    """The numbers of 2 to `LARGEST` edges."""
    chosen = [graph.index(edge) for edge in edges]
    if not 2 <= len(chosen) <= LARGEST:
        raise ValueError(f"{len(chosen)} edges: expected 2 to {LARGEST}, all of which are paired")
    for i, edge in enumerate(chosen):
        if edge in chosen[:i]:
            raise ValueError(f"edge {' -> '.join(graph.edges[edge])} is given twice")
    return chosen


# --- which edges are patched -------------------------------------------------------------------------


class _Sets:
    """The sets of edges that are patched, each once; the first is the empty one."""

    def __init__(self, graph: EdgeGraph, chosen: Sequence[int]) -> None:
        self.graph = graph
        self.noising: list[Mask] = []
        self._places: dict[bytes, int] = {}
        self.place(mask_of(len(graph), []))
        for edge in chosen:
            self.place(mask_of(len(graph), [edge]))
        for pair in combinations(chosen, 2):
            self.place(mask_of(len(graph), pair))
        self.denoising = list(self.noising)
        for a in chosen:
            for source in {u for b in chosen if b != a for u in behind(graph, b)}:
                direct = _direct(graph, source)
                gone = removed(graph, a)
                for off in (direct, gone, gone | direct):
                    self.place(off)

    def place(self, off: Mask) -> int:
        """The number of a set; it is added if it is new."""
        key = off.tobytes()
        if key not in self._places:
            self._places[key] = len(self.noising)
            self.noising.append(off)
        return self._places[key]


def removed(graph: EdgeGraph, edge: int) -> Mask:
    """The edges that are patched to remove an edge's source: all that leave it, of the model's input the edge alone."""
    source = int(graph.ends[edge, 0])
    if source in graph.inputs:
        return mask_of(len(graph), [edge])
    return graph.ends[:, 0] == source


def _direct(graph: EdgeGraph, source: int) -> Mask:
    """A source's edges into the model's output."""
    outputs = [t for t, fed in enumerate(graph.feeds) if not fed]
    return (graph.ends[:, 0] == source) & np.isin(graph.ends[:, 1], outputs)


def behind(graph: EdgeGraph, edge: int) -> tuple[int, ...]:
    """The sources with an edge into the output that an edge leads to; of an edge into the output, its own source."""
    source, target = graph.ends[edge].tolist()
    if not graph.feeds[target]:
        return (source,)
    live = np.zeros(len(graph.sources), bool)
    live[list(graph.feeds[target])] = True
    for later, into in enumerate(graph.edges_into):  # in order of execution
        if live[graph.ends[into, 0]].any():
            live[list(graph.feeds[later])] = True
    return tuple(u for u in np.flatnonzero(live).tolist() if _direct(graph, u).any())


def _values(
    runs: Runs, sets: _Sets, progress: Progress | None, keep: Keep
) -> dict[str, Float[np.ndarray, "set example"]]:
    """The metric of every set of edges by direction."""
    ways: dict[Direction, list[Mask]] = {"noising": sets.noising, "denoising": sets.denoising}
    total = sum(map(len, ways.values())) * len(runs.task)
    found, done = {}, 0
    for way, masks in ways.items():

        def told(n: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + n, total)

        def kept(name: str, make: Callable[[], Any], way: str = way) -> Any:
            return keep(f"{way} {name}", make)

        found[way] = values_of(runs, [~mask for mask in masks], told, kept, way)
        done += len(masks) * len(runs.task)
    return found


# --- relations --------------------------------------------------------------------------------


class _Measured:
    """The metric of every set of edges, and what pairs make of it."""

    def __init__(
        self,
        graph: EdgeGraph,
        sets: _Sets,
        values: Mapping[str, Float[np.ndarray, "set example"]],
        clusters: tuple[int, ...],
        seed: int,
    ) -> None:
        self.graph, self.sets, self.values = graph, sets, values
        self.clusters, self.seed = clusters, seed
        ends = np.stack([values["noising"][0], values["denoising"][0]])
        self.noise = _NOISE * float(np.abs(ends).max())

    def pair(self, a: int, b: int) -> EdgePair:
        """What two edges do, and what they are to each other."""
        noising, denoising = (self._effects(way, a, b) for way in ("noising", "denoising"))
        growth = tuple(g for x, y in ((a, b), (b, a)) if (g := self._growth(x, y)) is not None)
        outputs = [not self.graph.feeds[int(self.graph.ends[e, 1])] for e in (a, b)]
        relation = relation_of(noising, denoising, growth, all(outputs), self.noise)
        edges = self.graph.edges
        return EdgePair(edges[a], edges[b], noising, denoising, growth, relation)

    def _value(self, way: str, off: Mask) -> Float[np.ndarray, " example"]:
        return self.values[way][self.sets.place(off)]

    def _effects(self, way: str, a: int, b: int) -> Effects:
        base = self.values[way][0]
        first, second, both = (
            self._value(way, mask_of(len(self.graph), edges)) - base for edges in ([a], [b], [a, b])
        )
        over = (both - first - second)[None]
        return Effects(first, second, both, *mean_intervals(over, self.clusters, self.seed))

    def _growth(self, a: int, b: int) -> Growth | None:
        """What removing the source of a does to the direct effects of what b leads to: the one that grows most."""
        gone, found = removed(self.graph, a), []
        whole, without = self.values["noising"][0], self._value("noising", gone)
        for source in behind(self.graph, b):
            direct = _direct(self.graph, source)
            before = float((self._value("noising", direct) - whole).mean())
            after = float((self._value("noising", gone | direct) - without).mean())
            found.append(Growth(self.graph.edges[a], self.graph.sources[source], before, after))
        return max(found, key=lambda g: g.amount, default=None)


def relation_of(
    noising: Effects,
    denoising: Effects,
    growth: Sequence[Growth],
    into_output: bool,
    noise: float = 0.0,
) -> Relation | None:
    """What two edges are to each other, see the module.

    Args:
        noising: what they do in the intact run.
        denoising: what they do in the corrupted run.
        growth: how direct effects grow once one of them is removed.
        into_output: whether both lead into the model's output.
        noise: effects below this are rounding.
    """
    ways = (noising, denoising)
    alone = [max(abs(e.means[i]) for e in ways) for i in (0, 1)]
    over = max(abs(e.interval.value) for e in ways)
    largest = max(*alone, *(abs(e.means[2]) for e in ways))
    best = stepping_in(noising, growth)
    slack = max(noise, _SMALL * largest)
    steps_in = best is not None and best.amount > slack
    if (
        into_output and steps_in and max(alone) > noise
        and all(_within(e.interval, slack) for e in ways)
    ):  # fmt: skip
        return "backup"  # without a normalisation or a metric that bends there is no interaction at all here
    if min(alone) <= noise and over <= noise:
        return None
    if all(_within(e.interval, max(noise, _SMALL * min(alone))) for e in ways):
        return "additive"
    if over <= noise or noising.synergistic == denoising.synergistic:
        return None
    if denoising.synergistic:
        return "conjunctive"
    # Between edges into the output growth is the interaction itself, by the bend of the metric.
    return "backup" if steps_in and not into_output else "redundant"


def stepping_in(noising: Effects, growth: Sequence[Growth]) -> Growth | None:
    """The strongest growth in the direction of the joint effect."""
    along = [g for g in growth if g.after * noising.means[2] > 0]
    return max(along, key=lambda g: g.amount, default=None)


def _within(found: Interval, slack: float) -> bool:
    """Whether an interaction is none, with its interval where that is known."""
    ends = [x for x in (found.value, found.low, found.high) if not np.isnan(x)]
    return all(abs(x) <= slack for x in ends)
