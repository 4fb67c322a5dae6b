"""Further circuits of the same task: as good as the first and as different from it as possible.

Circuits are not unique: two that explain a behaviour fully may share few of their edges. So a circuit stands next to
others that a search finds when the edges of earlier ones count less: what is in all of them (the core), what is in any
of them (the union), and whether a part of one can stand in for the same part of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.discovery.comparing import chance_jaccard, jaccard, shared
from circuits.discovery.evaluating import faithfulness_of, share_of_effect
from circuits.discovery.graphs import Edge, EdgeGraph, Mask
from circuits.discovery.nulls import random_circuit
from circuits.discovery.runs import Runs
from circuits.discovery.searching import extremes, values_of
from circuits.discovery.stability import Choose
from circuits.experiments.statistics import Interval
from circuits.files import finite
from circuits.progress import Progress
from circuits.tables import Table, between, spread

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
"""By what the importance of an edge that an earlier circuit has is multiplied, from the most different circuit on."""

TOLERANCE = 0.1
"""A circuit is as good as another if its faithfulness is at most this much further from 1."""

_CUTS = 8
"""At most this many places at which two circuits are joined."""


@dataclass(frozen=True)
class Exchange:
    """Circuits put together from two: of one, the edges into earlier targets, of the other, those into later ones.

    Attributes:
        first: the number of the circuit whose edges lead to earlier targets.
        second: the number of the other one.
        joined: the faithfulness of each, over the places at which they are joined.
        random: the same with a random circuit like the second in its place.
    """

    first: int
    second: int
    joined: tuple[float, ...]
    random: tuple[float, ...]

    def verdict(self, worst: float) -> str:
        """Whether one circuit's part can stand in for the other's, given |1 - f| of the worse of the two.

        It can if all of them are as good as that; but this says something only if random parts are not.
        """
        if not all(abs(1 - f) <= worst + TOLERANCE for f in self.joined):
            return "cannot all be interchanged"
        if all(abs(1 - f) <= worst + TOLERANCE for f in self.random):
            return "are not needed: random parts in their place do as well"
        return "can be interchanged"


@dataclass(frozen=True, eq=False)
class Alternatives:
    """Circuits for one task, and what they have in common.

    Attributes:
        circuits: the edges of each, the one that was found first among them.
        n_edges: the number of edges of the whole graph.
        wanted: how many further circuits were asked for.
        on_find: the faithfulness of each on the half on which they were found.
        faithfulness: that on the `test` half.
        core: the edges of all circuits.
        core_faithfulness: that of the core.
        union: the edges of any.
        union_faithfulness: that of the union.
        exchanges: what becomes of circuits that are put together from two.
        seed: of random circuits and intervals.
    """

    circuits: tuple[tuple[Edge, ...], ...]
    n_edges: int
    wanted: int
    on_find: tuple[float, ...]
    faithfulness: tuple[Interval, ...]
    core: tuple[Edge, ...]
    core_faithfulness: Interval
    union: tuple[Edge, ...]
    union_faithfulness: Interval
    exchanges: tuple[Exchange, ...]
    seed: int

    def _worst(self, one: Exchange) -> float:
        return max(abs(1 - self.faithfulness[i].value) for i in (one.first, one.second))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return finite({
            "wanted": self.wanted, "n_edges": self.n_edges, "seed": self.seed,
            "circuits": [
                {"edges": [list(e) for e in edges], "faithfulness": asdict(f), "faithfulness_on_find": found}
                for edges, f, found in zip(self.circuits, self.faithfulness, self.on_find, strict=True)
            ],
            "jaccard": [
                {"first": a, "second": b, "jaccard": jaccard(self.circuits[a], self.circuits[b])}
                for a, b in combinations(range(len(self.circuits)), 2)
            ],
            "core": {"edges": [list(e) for e in self.core], "faithfulness": asdict(self.core_faithfulness)},
            "union": {"edges": [list(e) for e in self.union], "faithfulness": asdict(self.union_faithfulness)},
            "exchanges": [
                asdict(x) | {"verdict": x.verdict(self._worst(x))} for x in self.exchanges
            ],
        })  # fmt: skip

    def tables(self) -> Iterator[Table | str]:
        """Each circuit, how much it shares with the first, and what becomes of parts that are exchanged."""
        if len(self.circuits) < 2:
            yield (
                f"alternatives: no other circuit of this size is as good (|1 - f| at most {TOLERANCE} larger on the "
                "find half)"
            )
            return
        first, rows = self.circuits[0], list[tuple[Any, ...]]()
        for i, (edges, f) in enumerate(zip(self.circuits, self.faithfulness, strict=True)):
            name = f"alternative {i}" if i else "the circuit"
            both = jaccard(first, edges) if i else ""
            chance = chance_jaccard(len(first), len(edges), self.n_edges) if i else ""
            rows.append((name, len(edges), f.value, between(f.low, f.high), both, chance))
        for name, edges, f in (
            ("core (in all)", self.core, self.core_faithfulness),
            ("union (in any)", self.union, self.union_faithfulness),
        ):
            rows.append((name, len(edges), f.value, between(f.low, f.high), "", ""))
        columns = ("circuit", "edges", "f", "95 % interval", "Jaccard with the first", "by chance")
        found = f"{len(self.circuits) - 1} of {self.wanted} that were asked for"
        yield Table(columns, rows, f"alternatives, {found}; test half, seed {self.seed}")
        for one in self.exchanges:
            yield (
                f"parts of {_named(one.first)} and {_named(one.second)} {one.verdict(self._worst(one))} (joined at "
                f"{len(one.joined)} places): f {spread(one.joined)} (with random later parts {spread(one.random)})"
            )


def _named(number: int) -> str:
    return f"alternative {number}" if number else "the circuit"


def find_alternatives(
    find: Runs,
    test: Runs,
    circuit: Mask,
    worth: Float[np.ndarray, " edge"],
    choose: Choose,
    k: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Alternatives:
    """Look for further circuits that are as good as one and share as little with it, and with each other, as possible.

    The search is repeated with the importance of edges that earlier circuits have multiplied by each of `WEIGHTS`. Of
    the circuits that are as good on the `find` half, the one that shares least with the earlier ones is taken. The
    search ends early if none is.

    Args:
        find: the runs of the task's `find` half.
        test: the runs of its `test` half.
        circuit: the first circuit.
        worth: how important each edge is.
        choose: the search: from importance to the edges that are kept.
        k: how many further circuits are wanted.
        seed: of random circuits and intervals.
        progress: called with the number of further circuits looked for and how many are wanted.

    Raises:
        ValueError: if k is below 1, or the model's own effect on the `find` half is zero.
    """
    if k < 1:
        raise ValueError(f"alternatives {k}: expected at least 1")
    empty, full, own = values_of(find, [*extremes(len(circuit)), circuit]).mean(1).tolist()
    if full == empty:
        raise ValueError(
            "alternatives: removing every edge changes nothing on the find half, so no circuit is better than another"
        )
    found, on_find = [circuit], [share_of_effect(own, empty, full)]
    for number in range(k):
        used = np.any(found, axis=0)
        tried = [choose(np.where(used, w * worth, worth)) for w in WEIGHTS]
        made = share_of_effect(values_of(find, tried).mean(1), empty, full).tolist()
        good = [
            (max(shared(mask, other) for other in found), i)
            for i, (mask, f) in enumerate(zip(tried, made, strict=True))
            if mask.any() and abs(1 - f) <= abs(1 - on_find[0]) + TOLERANCE
        ]
        if progress is not None:
            progress(number + 1, k)
        if not good or min(good)[0] == 1:
            break
        best = min(good)[1]
        found.append(tried[best])
        on_find.append(made[best])
    return _judged(test, found, on_find, k, seed)


def _judged(
    test: Runs, found: Sequence[Mask], on_find: Sequence[float], k: int, seed: int
) -> Alternatives:
    """Every circuit, what they share, and what is put together from them, on the `test` half."""
    graph, rng = test.graph, np.random.default_rng(seed)
    core, union = np.all(found, axis=0), np.any(found, axis=0)
    ways = [(a, b) for a in range(len(found)) for b in range(len(found)) if a != b]
    joined = [_joined(graph, found[a], found[b]) for a, b in ways]
    random = [_joined(graph, found[a], random_circuit(graph, found[b], rng)) for a, b in ways]
    circuits = [*extremes(len(core)), *found, core, union]
    extra = [mask for group in (*joined, *random) for mask in group]
    values = values_of(test, [*circuits, *extra])
    none, whole, *own = values[: len(circuits)]

    def f(value: Float[np.ndarray, " example"]) -> Interval:
        return faithfulness_of(value, none, whole, test.task.clusters, seed)

    rest = iter([f(value).value for value in values[len(circuits) :]])
    of = [tuple(next(rest) for _ in group) for group in (*joined, *random)]
    named = [
        tuple(graph.edges[e] for e in np.flatnonzero(m).tolist()) for m in (*found, core, union)
    ]
    return Alternatives(
        tuple(named[:-2]), len(graph), k, tuple(on_find), tuple(map(f, own[:-2])), named[-2], f(own[-2]), named[-1],
        f(own[-1]), tuple(Exchange(*way, a, b) for way, a, b in zip(ways, of, of[len(ways) :], strict=False)), seed,
    )  # fmt: skip


def _joined(graph: EdgeGraph, first: Mask, second: Mask) -> list[Mask]:
    """Of one circuit the edges into earlier targets, of the other those into later ones, for some places to join."""
    used = np.unique(graph.ends[first | second, 1])[1:]
    cuts = used[np.unique(np.linspace(0, len(used) - 1, min(_CUTS, len(used))).round().astype(int))]
    return [np.where(graph.ends[:, 1] < cut, first, second) for cut in cuts.tolist()]
