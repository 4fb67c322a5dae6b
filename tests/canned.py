"""A circuit that was found and a report of claims, with numbers made up: for what shows them, where making them would
take long."""

from __future__ import annotations

import numpy as np

from circuits.claims import ClaimFile, Judged, Measured, Quantity, Region, Report
from circuits.claims.registration import Earlier, Registration
from circuits.discovery import Checked, Discovery, EdgeGraph, EdgeScores, Evaluation
from circuits.discovery.agreement import Agreement
from circuits.discovery.evaluating import Curve, ladder
from circuits.discovery.found import circuit_graph
from circuits.discovery.searching import greedy
from circuits.discovery.stability import SearchStability
from circuits.experiments.outcomes import Record
from circuits.experiments.statistics import Interval
from circuits.tasks import Task

EMPTY, FULL = 8.0, 1.0
"""The metric without edges and with all of them, in the mean over examples."""


def scores(graph: EdgeGraph, task: Task) -> EdgeScores:
    """Scores that fall from edge to edge in a random order."""
    rng, n = np.random.default_rng(0), len(task)
    mean = rng.permutation(np.geomspace(0.001, 1.0, len(graph))) * rng.choice([-1, 1], len(graph))
    values = mean * (1 + 0.1 * rng.standard_normal((n, len(graph))))
    return EdgeScores(
        "eap", {"ablation": "counterpart"}, graph.edges, values, np.full(n, FULL), np.full(n, EMPTY), (0,),
        "cross_entropy", "nats", -1, tuple(range(n)), Record.of(graph.model, task, 0),
    )  # fmt: skip


def evaluation(
    graph: EdgeGraph, task: Task, kept: np.ndarray, effect: float = EMPTY - FULL, curves: int = 3
) -> Evaluation:
    """Faithfulness 0.8, of random circuits 0.1 to 0.3; by size the share of its logarithm, at random powers of that."""
    rng, sizes = np.random.default_rng(1), ladder(len(graph))
    order = scores(graph, task).order()
    masks = (np.isin(np.arange(len(graph)), order[:size]) for size in sizes)
    connected = tuple(int(graph.connected(mask).sum()) for mask in masks)
    noise = 0.05 * rng.standard_normal(len(task))
    noise -= noise.mean()
    share = np.log(sizes) / np.log(len(graph))

    def metric(f: np.ndarray) -> np.ndarray:
        return FULL + effect * (1 - np.asarray(f)[..., None]) + noise

    def curve(power: float) -> Curve:
        return Curve(sizes, connected, metric(share**power))

    return Evaluation(
        tuple(graph.edges[i] for i in np.flatnonzero(kept)), len(graph), "cross_entropy", "nats", -1,
        metric(np.array(0.0)) + noise, metric(np.array(1.0)), metric(np.array(0.8)), metric(np.array(0.1)),
        metric(np.array([0.1, 0.2, 0.3])), (0, 0.2, 1.0), {}, {}, curve(1.0) if curves else None,
        tuple(curve(k + 2.0) for k in range(curves)), 0.85, None, "counterpart", tuple(range(len(task))),
        Record.of(graph.model, task, 0),
    )  # fmt: skip


def discovery(graph: EdgeGraph, task: Task, size: int = 10) -> Discovery:
    """A circuit of some edges."""
    found = scores(graph, task.find)
    kept = greedy(graph, np.abs(found.mean), size)
    how = {"search": "greedy", "ranking": "absolute", "size": size}
    noising = Agreement(
        "noising", 12, 1.0, 12.0, Interval(0.95, 0.9, 1.0), Interval(1.0, 1.0, 1.0), 0.9, 10, 0.0
    )
    return Discovery(
        circuit_graph(graph, kept, found, task, how), found,
        Checked(tuple(range(20)), noising, None, 0.95, 0.01, ()),
        SearchStability({graph.edges[i]: 0.9 for i in np.flatnonzero(kept)}, 0.75, 0.6, 0.05, 100, len(task.find)),
        evaluation(graph, task.test, kept),
    )  # fmt: skip


def claims_report(file: ClaimFile, words: str = "a number") -> Report:
    """A report in which the first claim holds, the second is refuted, and the others could not be tested.

    Args:
        file: the claims.
        words: stand wherever a report has words.
    """
    inside = Quantity(words, 0.95, 0.92, 0.98, Region(0.9, 1.1), 1e-6, 1.0, n=20, clusters=20)
    outside = Quantity(
        words, 0.3, 0.2, 0.4, Region(low=0.9), 1.0, 2e-9, "nats", 20, 20, (0.1, float("nan"), 0.4), words
    )  # fmt: skip
    unknown = Quantity(
        words, 0.5, float("nan"), float("nan"), Region(high=0.1), float("nan"), float("nan")
    )
    found = (
        Measured((inside,), words, 3, (words,), {"x": 1}),
        Measured((inside, outside), words, 3),
        *(Measured((unknown,), words, 3) for _ in file.claims[2:]),
    )
    judged = []
    for i, (claim, measured) in enumerate(zip(file.claims, found, strict=True)):
        before = (
            (Earlier("2026-11-01", {"least": 0.1}, "holds", {"least": (0.1, 0.9)}),)
            if i == 1
            else ()
        )
        made = Registration(claim, "1" * 64, f"{i}" * 64, "2026-11-30", before)
        judged.append(Judged(claim, *measured.verdict(file.alpha), measured, made))
    return Report(file, file.model_hash, tuple(judged), "3 of 9 edges")
