"""How good a circuit is: faithfulness by size, against random circuits, on examples that no search has seen.

With m(C) the mean metric when only a circuit's edges carry what they carry in the clean run and all others what they
carry in the other run, faithfulness is f(C) = (m(C) - m(0)) / (m(N) - m(0)): 0 for no edges, 1 for all (Marks et al.
2024; Hanna et al. 2024). It is a ratio of means over examples, not a mean of ratios. By size it is measured on a
logarithmic ladder, and CMD_log is the mean of |1 - f| over the logarithm of the size. MIB's CMD and CPR, which are
linear in the size, give half of their weight to circuits of more than half of all edges; they are printed for
comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from circuits.discovery.comparing import shared
from circuits.discovery.graphs import Edge, EdgeGraph, Mask
from circuits.discovery.nulls import random_circuit
from circuits.discovery.optimal import learn_constants
from circuits.discovery.results import EdgeScores, Ranking
from circuits.discovery.runs import Ablation, Runs
from circuits.discovery.searching import Masks, extremes, first_connected, values_of
from circuits.examples import BATCH
from circuits.experiments import N_RANDOM
from circuits.experiments.outcomes import Record
from circuits.experiments.running import MEMORY
from circuits.experiments.statistics import (
    UNKNOWN,
    Interval,
    least_p,
    mean_intervals,
    n_clusters,
    resampled,
)
from circuits.files import Keep, finite, make_now
from circuits.progress import Progress
from circuits.tables import Table, between, spread
from circuits.tasks.task import Task

Mean = TypeVar("Mean", float, np.ndarray)

FAITHFUL = 0.9
"""The faithfulness at which a circuit counts as enough."""

_EVERY = 100
"""Graphs of at most this many edges are evaluated at every size."""

MANY = 10_000
"""Of graphs with more edges than this fewer sizes and random rankings are evaluated: each takes a pass of the model."""


def _dense(n_edges: int) -> int:
    """Up to which size the smallest faithful circuit is found among all sizes."""
    return 1000 if n_edges <= MANY else 100


def usual_curves(n_edges: int) -> int:
    """How many random rankings a ranking of a graph's edges is compared with, unless it is said otherwise.

    >>> usual_curves(500), usual_curves(70_000)
    (10, 3)
    """
    return 10 if n_edges <= MANY else 3


_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def ladder(n_edges: int) -> tuple[int, ...]:
    """The sizes at which circuits are evaluated: all of a small graph, else ten in each factor of ten.

    Of more than 10,000 edges they are five in each factor of ten.

    >>> ladder(5), ladder(150)[-4:]
    ((1, 2, 3, 4, 5), (79, 100, 126, 150))
    """
    if n_edges <= _EVERY:
        return tuple(range(1, n_edges + 1))
    decade = 10 if n_edges <= MANY else 5
    steps = range(int(np.ceil(np.log10(n_edges) * decade)))
    return tuple(sorted({*(round(10 ** (k / decade)) for k in steps), n_edges}))


def log_mean(sizes: Sequence[int], values: Float[np.ndarray, " size"]) -> float:
    """The mean of a curve over the logarithm of the size, by the trapezoidal rule."""
    if len(sizes) < 2:
        return float(values[0])
    at = np.log(sizes)
    return float(np.trapezoid(values, at) / (at[-1] - at[0]))


def share_of_effect(value: Mean, empty: float | Mean, full: float | Mean) -> Mean:
    """(m(C) - m(0)) / (m(N) - m(0)): faithfulness, of mean metrics, or of several at once.

    Args:
        value: the mean metric of a circuit, or of each of some.
        empty: that of no edges.
        full: that of all edges, which must not be the same.
    """
    return (value - empty) / (full - empty)


def faithfulness_of(
    values: Float[np.ndarray, " example"],
    empty: Float[np.ndarray, " example"],
    full: Float[np.ndarray, " example"],
    clusters: Sequence[int],
    seed: int,
) -> Interval:
    """Faithfulness with its interval: a ratio of means, over the same resamples of clusters.

    Args:
        values: the metric of a circuit on each example.
        empty: that of no edges.
        full: that of all edges.
        clusters: a number for each example, shared by those that are not independent.
        seed: of the resamples.
    """
    rows = np.stack([values, empty, full])
    drawn = resampled(rows, clusters=clusters, seed=seed).T
    own = float(share_of_effect(*rows.mean(1)))
    return Interval.of(own, share_of_effect(*drawn), n_clusters(clusters))


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness by size, for one ranking of all edges.

    Attributes:
        sizes: the numbers of edges that were asked for, the largest being all edges.
        connected: of these, how many lie on a path from the model's input to its output and were kept.
        values: the metric, size x example.
    """

    sizes: tuple[int, ...]
    connected: tuple[int, ...]
    values: Float[np.ndarray, "size example"]

    def faithfulness(self, empty: float, full: float) -> Float[np.ndarray, " size"]:
        """f at each size."""
        return share_of_effect(self.values.mean(1), empty, full)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a circuit is, and the ranking that it comes from.

    Attributes:
        edges: the circuit's edges.
        n_edges: the number of edges of the whole graph.
        metric: what was measured.
        unit: its unit.
        better: 1 if more of it is better, -1 if less is.
        empty: the metric of the circuit of no edges, on each example.
        full: the metric of all edges: the model's own.
        own: the metric of the circuit.
        complement: the metric of all other edges.
        random: the metric of random circuits of the same size, layer profile and kinds.
        likeness: of these, how many are the circuit itself, their mean Jaccard index with it, and the mean share of
            their edges that lie on a path from the model's input to its output.
        others: the metric of further circuits to compare with, by what they are.
        other_sizes: their numbers of edges.
        curve: the ranking's faithfulness by size; None for a circuit without a ranking.
        random_curves: those of random rankings.
        on_find: the circuit's faithfulness on the `find` half, where it was found; NaN if it was not measured.
        smallest: the smallest size at which f is at least 0.9, among the sizes of the curve and, up to 1,000 (100 of
            more than 10,000 edges), all those between it and the one before; None if there is none.
        ablation: what edges outside the circuit carry.
        clusters: a number for each example, shared by those that are not independent.
        record: model, task, seed and versions.
    """

    edges: tuple[Edge, ...]
    n_edges: int
    metric: str
    unit: str
    better: int
    empty: Float[np.ndarray, " example"]
    full: Float[np.ndarray, " example"]
    own: Float[np.ndarray, " example"]
    complement: Float[np.ndarray, " example"]
    random: Float[np.ndarray, "circuit example"]
    likeness: tuple[int, float, float]
    others: Mapping[str, Float[np.ndarray, " example"]]
    other_sizes: Mapping[str, int]
    curve: Curve | None
    random_curves: tuple[Curve, ...]
    on_find: float
    smallest: int | None
    ablation: Ablation
    clusters: tuple[int, ...]
    record: Record

    # --- faithfulness ----------------------------------------------------------------------------

    @cached_property
    def effect(self) -> Interval:
        """The model's own effect, m(N) - m(0), with its interval."""
        return _effect(self.empty, self.full, self.clusters, self.record.seed)

    @property
    def defined(self) -> bool:
        """Whether faithfulness means something: the model's own effect can be told from 0."""
        return self.effect.clear

    @property
    def undefined(self) -> str:
        """Why faithfulness means nothing, in words; empty if it is defined."""
        if self.defined:
            return ""
        return (
            f"faithfulness is undefined: removing every edge moves {self.metric} by {0.0 - self.effect.value:.3g} (95 "
            f"% interval {between(-self.effect.high, -self.effect.low)}), which cannot be told from 0"
        )

    def ratio(self, values: Float[np.ndarray, " example"]) -> Interval:
        """A faithfulness with its interval."""
        if not self.defined:
            return UNKNOWN
        return faithfulness_of(values, self.empty, self.full, self.clusters, self.record.seed)

    @cached_property
    def faithfulness(self) -> Interval:
        """f of the circuit."""
        return self.ratio(self.own)

    @cached_property
    def complement_faithfulness(self) -> Interval:
        """f of all other edges: near 0 if the circuit is complete."""
        return self.ratio(self.complement)

    @cached_property
    def random_faithfulness(self) -> tuple[float, ...]:
        """f of each random circuit."""
        if not self.defined:
            return ()
        return tuple(share_of_effect(self.random.mean(1), *self._ends).tolist())

    @property
    def _ends(self) -> tuple[float, float]:
        """The mean metric of no edges and of all."""
        return float(self.empty.mean()), float(self.full.mean())

    @property
    def p_value(self) -> float:
        """(1 + k) / (1 + n) for k of n random circuits whose |1 - f| is at most the circuit's; NaN without any."""
        found = self.random_faithfulness
        off = abs(1 - self.faithfulness.value)
        if not found:
            return float("nan")
        return (1 + sum(abs(1 - f) <= off for f in found)) / (1 + len(found))

    @property
    def errors(self) -> dict[float, float]:
        """Quantiles over examples of m(C) - m(N), in the metric's unit."""
        off = self.own - self.full
        return {q: float(np.quantile(off, q)) for q in _QUANTILES}

    # --- by size ---------------------------------------------------------------------------------

    def _curve(self, curve: Curve) -> Float[np.ndarray, " size"]:
        return curve.faithfulness(*self._ends)

    def by_size(self) -> list[tuple[int, int, float, tuple[float, ...]]]:
        """For each size: the edges asked for, the connected ones, f, and f of the random rankings."""
        if self.curve is None or not self.defined:
            return []
        own = self._curve(self.curve)
        others = [self._curve(c) for c in self.random_curves]
        return [
            (size, self.curve.connected[i], float(own[i]), tuple(float(o[i]) for o in others))
            for i, size in enumerate(self.curve.sizes)
        ]

    @property
    def cmd_log(self) -> float:
        """The mean of |1 - f| over the logarithm of the size: 0 at best; NaN without a curve."""
        return self._cmd_log(self.curve)

    @property
    def random_cmd_log(self) -> tuple[float, ...]:
        """CMD_log of the random rankings."""
        return tuple(self._cmd_log(c) for c in self.random_curves)

    def _cmd_log(self, curve: Curve | None) -> float:
        if curve is None or not self.defined:
            return float("nan")
        return log_mean(curve.sizes, np.abs(1 - self._curve(curve)))

    @property
    def cmd(self) -> float:
        """MIB's CMD: the area of |1 - f| over the share of edges (Mueller et al. 2025), 0 at best."""
        return self._area(lambda f: np.abs(1 - f))

    @property
    def cpr(self) -> float:
        """MIB's CPR: the area of f over the share of edges, with f capped at 1 (MIB itself sets no cap)."""
        return self._area(lambda f: np.minimum(f, 1))

    def _area(self, height: Any) -> float:
        if self.curve is None or not self.defined:
            return float("nan")
        share = np.array([0, *self.curve.sizes]) / self.n_edges
        f = np.array([0.0, *self._curve(self.curve)])
        return float(np.trapezoid(height(f), share))

    # --- as a report -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite({
            "edges": [list(edge) for edge in self.edges], "n_edges": self.n_edges, "ablation": self.ablation,
            "metric": self.metric, "unit": self.unit, "intact": float(self.full.mean()),
            "all_edges_removed": float(self.empty.mean()), "circuit": float(self.own.mean()),
            "effect": asdict(self.effect), "faithfulness": asdict(self.faithfulness),
            "faithfulness_on_find": self.on_find if self.defined else None,
            "complement": asdict(self.complement_faithfulness),
            "random_circuits": list(self.random_faithfulness), "random_circuits_that_are_it": self.likeness[0],
            "random_circuits_jaccard": self.likeness[1], "random_circuits_on_a_path": self.likeness[2],
            "p_value": self.p_value,
            "least_p": least_p(len(self.random)) if len(self.random) else None,
            "others": {
                name: {"edges": self.other_sizes[name]} | asdict(self.ratio(values))
                for name, values in self.others.items()
            },
            "error_quantiles": {str(q): v for q, v in self.errors.items()},
            "cmd_log": self.cmd_log, "random_cmd_log": list(self.random_cmd_log), "cmd": self.cmd, "cpr": self.cpr,
            "smallest_faithful": self.smallest if self.defined else None,
            "by_size": [
                {"size": n, "connected": c, "faithfulness": f, "random": list(r)} for n, c, f, r in self.by_size()
            ],
            "record": asdict(self.record),
        })  # fmt: skip

    def tables(self, top: int = 20) -> Iterator[Table | str]:
        """Faithfulness of the circuit and by size, with what random circuits reach.

        Args:
            top: how many sizes are listed.
        """
        if not self.defined:
            yield self.undefined
            return
        yield self._compared()
        yield from self._remarks()
        if self.curve is not None:
            yield from self._listed_by_size(top)

    def _compared(self) -> Table:
        """The circuit's faithfulness next to that of what it is compared with."""

        def row(name: str, n: int, f: Interval, p: float | str = "") -> tuple[Any, ...]:
            return name, n, f.value, between(f.low, f.high), p

        n, random = len(self.edges), self.random_faithfulness
        rows = [row("circuit", n, self.faithfulness, self.p_value)]
        if not np.isnan(self.on_find):
            rows.append(("circuit, on the find half", n, self.on_find, "", ""))
        rows.append(row("all other edges", self.n_edges - n, self.complement_faithfulness))
        if random:
            name = f"random circuits ({len(random)})"
            rows.append((name, n, float(np.mean(random)), spread(random), ""))
        rows += [
            row(name, self.other_sizes[name], self.ratio(v)) for name, v in self.others.items()
        ]
        title = (
            f"faithfulness, {self.record.measured_on}, {self.ablation} ablation, {self.metric} "
            f"({self.empty.mean():.4g} without edges, {self.full.mean():.4g} intact), {len(set(self.clusters))} "
            f"independent examples, seed {self.record.seed}"
        )
        return Table(("of", "edges", "f", "95 % interval or range", "p"), rows, title)

    def _remarks(self) -> Iterator[str]:
        """What is to be said of random circuits, of single examples, and of learned constants."""
        if self.random_faithfulness:
            same, alike, on_path = self.likeness
            little = ": between its kinds of parts there are few other edges, so that p says little"
            yield (
                f"random circuits have a mean Jaccard index of {alike:.2f} with the circuit, and {on_path:.0%} of "
                f"their edges lie on a path; {same} of {len(self.random)} are the circuit itself"
                + (little if same else "")
            )
        quantiles = ", ".join(f"{q:.0%} {v:.3g}" for q, v in self.errors.items())
        yield f"circuit minus model, over examples ({self.unit or self.metric}): {quantiles}"
        if self.ablation == "optimal":
            yield (
                "removed edges carry constants that were learned for this circuit on the find half; they favour it "
                "over the circuits that it is compared with, which carry the same"
            )

    def _listed_by_size(self, top: int) -> Iterator[Table | str]:
        """The curve at some sizes, and what it comes to."""
        rows = [
            (n, k, own, spread(others)) for n, k, own, others in _spread_out(self.by_size(), top)
        ]
        columns = ("edges", "connected", "f", "f of random rankings")
        yield Table(columns, rows, "faithfulness by size")
        yield (
            f"CMD_log {self.cmd_log:.3g} (random rankings {spread(self.random_cmd_log)}; 0 is best); MIB's CMD "
            f"{self.cmd:.3g}, CPR {self.cpr:.3g} (capped at 1); smallest size with f >= {FAITHFUL}: "
            f"{self.smallest or 'none'}"
        )


def _spread_out(rows: list[Any], n: int) -> list[Any]:
    """At most n rows, the first and the last among them."""
    if len(rows) <= n:
        return rows
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, n).round().astype(int))]


def _effect(
    empty: Float[np.ndarray, " example"], full: Float[np.ndarray, " example"], clusters: Sequence[int], seed: int
) -> Interval:  # fmt: skip
    """m(N) - m(0), with its interval."""
    (found,) = mean_intervals((full - empty)[None], clusters, seed)
    return found


def _has_effect(runs: Runs, seed: int) -> bool:
    """Whether the model's own effect on a task can be told from 0."""
    empty, full = values_of(runs, extremes(len(runs.graph)))
    return _effect(empty, full, runs.task.clusters, seed).clear


def _likeness(graph: EdgeGraph, kept: Mask, randoms: Sequence[Mask]) -> tuple[int, float, float]:
    """How far random circuits are the found one, and connected; see `Evaluation.likeness`."""
    if not randoms:
        return 0, float("nan"), float("nan")
    paths = [graph.connected(one).sum() / max(1, one.sum()) for one in randoms]
    same = sum(bool((one == kept).all()) for one in randoms)
    return same, float(np.mean([shared(one, kept) for one in randoms])), float(np.mean(paths))


def _firsts(graph: EdgeGraph, order: np.ndarray, sizes: Sequence[int]) -> Masks:
    """The circuits of the first edges of a ranking, without those that lie on no path."""
    return Masks(len(graph), (first_connected(graph, order, size) for size in sizes))


def _rankings(
    graph: EdgeGraph,
    order: np.ndarray,
    sizes: Sequence[int],
    n_random: int,
    rng: np.random.Generator,
) -> Masks:
    """The circuits of every size of a ranking, then those of random rankings."""
    found = _firsts(graph, order, sizes)
    for _ in range(n_random):  # one at a time: of a large graph each order is large
        found += _firsts(graph, rng.permutation(len(graph)), sizes)
    return found


def _curves(
    sizes: Sequence[int], circuits: Sequence[Mask], values: Float[np.ndarray, "circuit example"]
) -> list[Curve]:
    """Curves of as many rankings as there are circuits for all sizes."""
    n = len(sizes)
    return [
        Curve(
            tuple(sizes),
            tuple(int(circuits[i].sum()) for i in range(at, at + n)),
            values[at : at + n],
        )
        for at in range(0, len(circuits) if n else 0, max(n, 1))
    ]


def _smallest(
    runs: Runs,
    order: np.ndarray,
    curve: Curve,
    empty: float,
    full: float,
) -> int | None:
    """The smallest size at which a ranking is faithful, by trying those that the curve leaves out before it.

    Args:
        runs: the runs on which the curve was measured.
        order: the edges' numbers, the most important first.
        curve: faithfulness by size.
        empty: the mean metric of no edges.
        full: that of all edges.
    """
    if full == empty:
        return None
    enough = curve.faithfulness(empty, full) >= FAITHFUL
    if not enough.any():
        return None
    first = int(enough.argmax())
    sizes = range(curve.sizes[first - 1] + 1 if first else 1, curve.sizes[first])
    if not sizes or curve.sizes[first] > _dense(len(order)):
        return curve.sizes[first]
    values = values_of(runs, _firsts(runs.graph, order, sizes))
    skipped = share_of_effect(values.mean(1), empty, full)
    return next(
        (n for n, f in zip(sizes, skipped, strict=True) if f >= FAITHFUL), curve.sizes[first]
    )


def _on_find(runs: Runs, kept: Mask) -> float:
    """Faithfulness on the half on which a circuit was found; NaN if nothing changes there."""
    empty, full, own = values_of(runs, [*extremes(len(kept)), kept]).mean(1).tolist()
    return share_of_effect(own, empty, full) if full != empty else float("nan")


def evaluate(
    graph: EdgeGraph,
    task: Task,
    circuit: Mask | Sequence[Edge | str],
    *,
    scores: EdgeScores | None = None,
    ranking: Ranking = "absolute",
    find: Task | None = None,
    others: Mapping[str, Mask] | None = None,
    ablation: Ablation = "counterpart",
    shift: int = 0,
    n_random: int = N_RANDOM,
    n_curves: int | None = None,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
    learning: Progress | None = None,
    keep: Keep = make_now,
) -> Evaluation:
    """Evaluate a circuit on a task.

    Args:
        graph: the model's edges.
        task: the task's `test` half, or another task.
        circuit: the edges that are kept.
        scores: the scores that it comes from, for faithfulness by size.
        ranking: how they rank edges.
        find: the half on which it was found, to show by how much it is better there.
        others: further circuits to compare with, by what they are.
        ablation: what the other edges carry; with `optimal` constants that are learned for the circuit on `find`.
        shift: as in `score_edges`.
        n_random: how many random circuits of the same size it is compared with.
        n_curves: how many random rankings the curve is compared with; 10 if None, or 3 of more than 10,000 edges.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: of random circuits and intervals.
        progress: called with the work done and the total.
        learning: called with the steps done and their number while constants are learned, before everything else.
        keep: keeps the numbers of each batch, so that work which is stopped goes on.

    Raises:
        KeyError: if the graph has no such edge.
        ValueError: if the task does not fit, or shares examples with `find`.
    """
    kept = circuit if isinstance(circuit, np.ndarray) else graph.mask(circuit)
    if find is not None:
        check_apart(find, task)
    settings: dict[str, Any] = {
        "ablation": ablation,
        "shift": shift,
        "batch": batch,
        "memory": memory,
        "seed": seed,
    }
    if ablation == "optimal":
        if find is None:
            raise ValueError(
                "ablation optimal: constants are learned on the find half and none was given; expected find=task.find"
            )
        learned = learn_constants(graph, find, kept, batch=batch, memory=memory, progress=learning)
        settings["constants"] = learned
    runs = Runs(graph, task, **settings)
    if not _has_effect(runs, seed):  # without an effect there is nothing to compare
        scores, n_random = None, 0
    rng, more, n = np.random.default_rng(seed), dict(others or {}), len(graph)
    randoms = Masks(n, (random_circuit(graph, kept, rng) for _ in range(n_random)))
    sizes, rankings = (), Masks(n)
    if scores is not None:
        sizes = ladder(n)
        n_curves = usual_curves(n) if n_curves is None else n_curves
        rankings = _rankings(graph, scores.order(ranking), sizes, n_curves, rng)
    groups = [Masks(n, [*extremes(n), kept, ~kept]), Masks(n, more.values()), randoms, rankings]
    values = values_of(runs, sum(groups, Masks(n)), progress, keep)
    fixed, several, drawn, by_rank = np.split(values, np.cumsum([len(g) for g in groups[:-1]]))
    empty, full, own, complement = fixed
    curves, smallest = _curves(sizes, rankings, by_rank), None
    if scores is not None:
        ends = float(empty.mean()), float(full.mean())
        smallest = _smallest(runs, scores.order(ranking), curves[0], *ends)
    return Evaluation(
        edges=tuple(graph.edges[i] for i in np.flatnonzero(kept).tolist()), n_edges=n, metric=runs.metric.name,
        unit=runs.metric.unit, better=runs.metric.better, empty=empty, full=full, own=own, complement=complement,
        random=drawn, likeness=_likeness(graph, kept, randoms), others=dict(zip(more, several, strict=True)),
        other_sizes={name: int(c.sum()) for name, c in more.items()}, curve=curves[0] if curves else None,
        random_curves=tuple(curves[1:]), smallest=smallest, ablation=ablation, clusters=task.clusters,
        on_find=float("nan") if find is None else _on_find(Runs(graph, find, **settings), kept),
        record=Record.of(graph.model, task, seed),
    )  # fmt: skip


def check_apart(find: Task, test: Task) -> None:
    """Raise ValueError if two tasks share an example."""
    seen = {*find.examples.identities}
    both = [i for i, identity in enumerate(test.examples.identities) if identity in seen]
    if both:
        raise ValueError(
            f"example {test.examples.names[both[0]]!r} of the {test.half} task is also in the {find.half} task: a "
            "circuit is not evaluated on what it was found on"
        )
