"""`discover`: from a task to a circuit, with the evidence for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from circuits.discovery.agreement import Checked, check_scores
from circuits.discovery.alternatives import Alternatives, find_alternatives
from circuits.discovery.building import edge_graph
from circuits.discovery.evaluating import Evaluation, Mask, evaluate
from circuits.discovery.graphs import Edge, EdgeGraph
from circuits.discovery.pairs import EdgePairs, pair_edges, strongest
from circuits.discovery.pruning import PART, prune
from circuits.discovery.results import SIZES, EdgeScores, Ranking, importance
from circuits.discovery.runs import Ablation, Runs
from circuits.discovery.scoring import STEPS, Method, Rule, score_edges
from circuits.discovery.searching import (
    SEARCHES,
    Search,
    acdc,
    check_size,
    greedy,
    refine,
    top,
)
from circuits.discovery.stability import Choose, SearchStability, stability
from circuits.examples import BATCH
from circuits.experiments import N_RANDOM
from circuits.experiments.patched_runs import Direction
from circuits.experiments.running import MEMORY
from circuits.files import Keep, make_now
from circuits.graph.circuit import ORDER, CircuitGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.tables import Table
from circuits.tasks.task import Task

SIZE = 50
"""The number of edges that a search keeps unless it is told otherwise; small graphs keep a quarter of theirs."""

BY_WEIGHT = "by weight magnitude"
SWAPPED = "found with answers swapped at random"

CheckOn = Literal["find", "test"]
"""On which half of the examples approximate scores are checked: that which was scored, or the other."""

Stage = Callable[[str], Progress | None]
"""Gives the progress of a stage of the work, by its name."""


@dataclass(frozen=True, eq=False)
class Discovery:
    """A circuit that was found, and how good it is.

    Attributes:
        circuit: the circuit.
        scores: the scores of all edges.
        checked: how far they agree with exact patching; None if they are exact, or baselines.
        stability: how far the same circuit is found on other draws of the examples; None of searches that try edges.
        evaluation: how good the circuit is on the `test` half.
        alternatives: further circuits that are as good; None if none were asked for, or faithfulness is undefined.
        pairs: what the strongest edges do two at a time; None if it was not asked for.
        notes: comparisons that could not be made, and why.
    """

    circuit: CircuitGraph
    scores: EdgeScores
    checked: Checked | None
    stability: SearchStability | None
    evaluation: Evaluation
    alternatives: Alternatives | None = None
    pairs: EdgePairs | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "circuit": dict(self.circuit.graph["made"]), "scores": self.scores.to_dict(),
            "agreement": None if self.checked is None else self.checked.to_dict(),
            "stability": None if self.stability is None else self.stability.to_dict(),
            "evaluation": self.evaluation.to_dict(),
            "alternatives": None if self.alternatives is None else self.alternatives.to_dict(),
            "pairs": None if self.pairs is None else self.pairs.to_dict(), "notes": list(self.notes),
        }  # fmt: skip

    def tables(self, top: int) -> Iterator[Table | str]:
        """The strongest edges, how far scores can be trusted, and how good the circuit is."""
        yield from self.scores.tables(top)
        if self.checked is not None:
            yield from self.checked.lines()
        if self.stability is not None:
            yield from self.stability.lines()
        yield from self.evaluation.tables(top)
        if self.alternatives is not None:
            yield from self.alternatives.tables()
        if self.pairs is not None:
            yield from self.pairs.tables(top)
        yield from self.notes


def discover(
    graph: EdgeGraph,
    task: Task,
    method: Method = "eap-ig",
    *,
    search: Search = "greedy",
    size: int | None = None,
    threshold: float | None = None,
    ranking: Ranking = "absolute",
    direction: Direction = "noising",
    steps: int = STEPS,
    rule: Rule = "midpoint",
    ablation: Ablation = "counterpart",
    shift: int = 0,
    check: int | None = None,
    check_on: CheckOn = "find",
    n_random: int = N_RANDOM,
    n_curves: int = 10,
    pairs: int = 0,
    alternatives: int = 0,
    other: Mapping[str, Mask] | None = None,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    stage: Stage = lambda name: None,
    keep: Keep = make_now,
) -> Discovery:
    """Find the circuit of a task: score edges and search on its `find` half, evaluate on its `test` half.

    Args:
        graph: the model's edges.
        task: the whole task.
        method: how edges are scored, see `score_edges`.
        search: `top`: the most important edges; `greedy`: grown backwards from the output; `refine`: from three times
            as many, dropping those with the smallest exact effect; `acdc`: from all, dropping what is not needed;
            `pruning`: a mask over all edges that is learned.
        size: how many edges to keep; 50, or a quarter of a graph of fewer than 200, if None.
        threshold: of `acdc`: how much worse the metric may get by an edge that is dropped.
        ranking: by the size of scores, or by sign.
        direction: of `exact`.
        steps: of integrated gradients.
        rule: of integrated gradients.
        ablation: what edges outside the circuit carry. With `optimal` edges are scored by means, the search
            `pruning` learns what they carry together with the mask, and the evaluation learns it for the circuit.
        shift: see `score_edges`.
        check: how many edges are patched exactly to check approximate scores; 60 if None, none if 0.
        check_on: the half of the examples on which they are patched.
        n_random: how many random circuits the circuit is compared with.
        n_curves: how many random rankings its curve is compared with.
        pairs: how many of the strongest edges are patched two at a time (`pair_edges`); 0 for none, at least 2.
        alternatives: how many further circuits are looked for that are as good and share little with it.
        other: further circuits to compare with, such as another task's, by what they are.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: of everything random.
        stage: gives the progress of each stage.
        keep: keeps the numbers of each batch of the scores.

    Raises:
        ValueError: if a setting is out of range, the task has too few examples for two halves, or does not fit.
    """
    _check_choices(graph, method, search, size, threshold, ranking)
    if ablation == "optimal":
        _check_optimal(search, alternatives)
    n = size or usual_size(graph)
    if check_on not in get_args(CheckOn):
        raise ValueError(f"check_on {check_on!r}: expected find or test")
    find, test = task.find, task.test
    settings: dict[str, Any] = {
        "ablation": "mean" if ablation == "optimal" else ablation,
        "shift": shift,
        "batch": batch,
        "memory": memory,
    }
    scoring: dict[str, Any] = {
        "direction": direction,
        "steps": steps,
        "rule": rule,
        "seed": seed,
        **settings,
    }
    scores = score_edges(graph, find, method, progress=stage("scores"), keep=keep, **scoring)
    runs = Runs(graph, find, seed=seed, **settings)
    checked = None
    if method not in ("exact", "random", *SIZES) and check != 0:
        more = {} if check is None else {"n": check}
        other_runs = runs if check_on == "find" else Runs(graph, test, seed=seed, **settings)
        checked = check_scores(other_runs, scores, seed=seed, progress=stage("agreement"), **more)
    # Searches that try edges are not repeated for comparisons: greedy stands in for them.
    pick = partial(top if search == "top" else greedy, graph, n=n)
    if search == "pruning":
        kept = _pruned(graph, find, n, ablation == "optimal", settings, seed, stage("search"), keep)
    else:
        kept = _searched(runs, scores, search, n, threshold, ranking, pick, stage)

    def choose(mean: Float[np.ndarray, " edge"]) -> Mask:
        return pick(importance(mean, scores.better, ranking))

    again = stability(scores, kept, choose, seed=seed) if search in ("top", "greedy") else None
    others, notes = _nulls(graph, pick, other or {})
    if ablation == "optimal":
        notes = (
            "edges were scored by mean ablation: optimal constants belong to a circuit",
            *notes,
        )
    if method != "random" and find.compared:
        told = stage("scores with answers swapped")
        null = score_edges(graph, swapped(find, seed), method, progress=told, **scoring)
        others[SWAPPED] = choose(null.mean)
    evaluating: dict[str, Any] = settings | {"ablation": ablation}
    made = evaluate(
        graph, test, kept, scores=scores, ranking=ranking, find=find, others=others, n_random=n_random,
        n_curves=n_curves, seed=seed, progress=stage("evaluation"), **evaluating,
    )  # fmt: skip
    further = None
    if alternatives and made.defined:
        further = find_alternatives(
            runs, Runs(graph, test, seed=seed, **settings), kept, scores.worth(ranking), pick, alternatives, seed,
            stage("alternatives"),
        )  # fmt: skip
    paired = None
    if pairs:
        edges = strongest(scores, pairs, ranking)
        paired = pair_edges(graph, find, edges, seed=seed, progress=stage("pairs"), **settings)
    how = {"search": search, "ranking": ranking, "size": n} | (
        {} if threshold is None else {"threshold": threshold}
    )
    circuit = circuit_graph(graph, kept, scores, task, how, again)
    return Discovery(circuit, scores, checked, again, made, further, paired, notes)


def usual_size(graph: EdgeGraph) -> int:
    """How many edges a circuit has unless it is told otherwise: 50, or a quarter of a small graph's."""
    return min(SIZE, max(1, len(graph) // 4))


def _nulls(
    graph: EdgeGraph, pick: Choose, other: Mapping[str, Mask]
) -> tuple[dict[str, Mask], tuple[str, ...]]:
    """Circuits to compare with that need no run of the model, and why one could not be had."""
    found = dict(other)
    try:
        return found | {BY_WEIGHT: pick(graph.weight_norms())}, ()
    except ValueError as error:
        return found, (f"not compared with a circuit {BY_WEIGHT}: {error}",)


def _check_choices(
    graph: EdgeGraph,
    method: Method,
    search: Search,
    size: int | None,
    threshold: float | None,
    ranking: Ranking,
) -> None:
    """Raise ValueError unless the choices of a search go together."""
    if search not in SEARCHES:
        raise ValueError(f"search {search!r}: expected one of {', '.join(SEARCHES)}")
    if (search == "acdc") != (threshold is not None):
        raise ValueError("a threshold belongs to the search acdc, which needs one, and to no other")
    if ranking == "signed" and method in SIZES:
        raise ValueError(f"ranking signed: scores by {method} have no sign; expected absolute")
    if size is not None:
        check_size(graph, size)


def _pruned(
    graph: EdgeGraph, find: Task, n: int, optimal: bool, settings: dict[str, Any], seed: int, progress: Progress | None,
    keep: Keep,
) -> Mask:  # fmt: skip
    """The circuit of the search `pruning`, whose steps take fewer examples than other passes."""
    smaller = settings | {"batch": min(settings["batch"], PART)}
    runs = Runs(graph, find, seed=seed, **smaller)
    return prune(runs, n, optimal=optimal, seed=seed, progress=progress, keep=keep)


def _check_optimal(search: Search, alternatives: int) -> None:
    """Raise ValueError if a search tries circuits one by one, for each of which constants would have to be learned."""
    if search in ("refine", "acdc"):
        raise ValueError(
            f"ablation optimal: constants are learned for a circuit, and the search {search} tries many; expected the "
            "search top, greedy or pruning"
        )
    if alternatives:
        raise ValueError(
            f"alternatives {alternatives}: other circuits have other constants; expected 0 with the ablation optimal"
        )


def _searched(
    runs: Runs, scores: EdgeScores, search: Search, n: int, threshold: float | None, ranking: Ranking,
    pick: Choose, stage: Stage,
) -> Mask:  # fmt: skip
    """The edges that a search keeps.

    Raises:
        ValueError: if none of them lies on a path from the model's input to its output.
    """
    worth = scores.worth(ranking)
    if search == "acdc":
        assert threshold is not None, "checked before"
        kept = acdc(runs, threshold, stage("search"))
    elif search == "refine":
        kept = refine(runs, worth, n, ranking, stage("search"))
    else:
        kept = pick(worth)
    if not kept.any():
        raise ValueError(
            f"search {search}: no path from the model's input to its output is left; expected a larger size or a "
            "smaller threshold"
        )
    return kept


def swapped(task: Task, seed: int) -> Task:
    """The task with right and wrong answers exchanged in half of its examples, drawn at random."""
    rng = np.random.default_rng(seed)
    which = set(rng.permutation(len(task))[: len(task) // 2].tolist())
    asked = tuple(
        replace(q, answers=q.against, against=q.answers) if i in which else q
        for i, q in enumerate(task.questions)
    )
    return replace(task, questions=asked)


def circuit_graph(
    graph: EdgeGraph, kept: Mask, scores: EdgeScores, task: Task, how: dict[str, Any],
    again: SearchStability | None = None,
) -> CircuitGraph:  # fmt: skip
    """Some edges as a circuit that can be saved, drawn and exported; an edge's sum is what it adds to the metric.

    Args:
        graph: the model's edges.
        kept: which of them.
        scores: of all edges.
        task: the task.
        how: how they were chosen.
        again: in which share of bootstraps each edge was found.
    """
    made = CircuitGraph()
    model = graph.model
    kind = "effect" if scores.method == "exact" else "attribution"
    edges = np.flatnonzero(kept).tolist()
    used = {*graph.ends[edges, 0].tolist()}
    for edge in edges:
        source, target = graph.ends[edge].tolist()
        more = {} if again is None else {"share": again.shares[graph.edges[edge]]}
        for node in graph.nodes_of(target, used):
            made.connect(
                graph.node(graph.sources[source]), node, kind, sum=-float(scores.mean[edge]),
                layer=graph.way(target), edge=" -> ".join(graph.edges[edge]), **more,
            )  # fmt: skip
    made.graph |= {
        "model": model.name, "model_hash": model.hash, ORDER: [site.name for site in model.sites],
        "made": {
            "by": "discover", "grain": graph.grain, "graph": dict(graph.choices), "task": task.name,
            "task_hash": task.hash, "metric": scores.metric, "method": scores.method,
            "settings": dict(scores.settings), **how, "seed": scores.record.seed,
            "edges": [list(graph.edges[e]) for e in edges],
            "scores": [float(scores.mean[e]) for e in edges],
        },
    }  # fmt: skip
    return made


def graph_of(circuit: CircuitGraph, model: HookedModel) -> EdgeGraph:
    """The graph in which a circuit was found.

    Args:
        circuit: the circuit.
        model: its model, with the same autoencoders.

    Raises:
        ValueError, KeyError: if the circuit was made in another way, or the model lacks what it was found between.
    """
    edges_of(circuit)
    graph = edge_graph(model, **circuit.graph["made"].get("graph", {}))
    graph.mask(edges_of(circuit))
    return graph


def parts_in(choices: Mapping[str, Any]) -> dict[str, Any]:
    """What says between which parts the edges of a graph lead, whichever of them it has."""
    return {name: value for name, value in choices.items() if name not in ("limit", "latents")}


def parts_of(circuit: CircuitGraph) -> dict[str, Any]:
    """`parts_in` of the graph in which a circuit was found."""
    return parts_in(circuit.graph["made"].get("graph", {}))


def edges_of(circuit: CircuitGraph) -> tuple[Edge, ...]:
    """The edges of a circuit that was found.

    Raises:
        ValueError: if it was made in another way.
    """
    made = circuit.graph.get("made", {})
    edges = made.get("edges") if isinstance(made, dict) else None
    if not isinstance(edges, list) or not all(
        isinstance(e, list) and len(e) == 2 and all(isinstance(x, str) for x in e) for e in edges
    ):
        raise ValueError(
            "the circuit does not say its edges: expected one that `circuits discover` saved"
        )
    return tuple((a, b) for a, b in edges)


def strongest_circuit(graph: EdgeGraph, found: Discovery, task: Task, n: int) -> CircuitGraph:
    """The circuit of the n most important edges, without those on no path from the model's input to its output.

    Args:
        graph: the model's edges.
        found: what has scored them, with its ranking.
        task: the task that they were scored on.
        n: how many edges.

    Raises:
        ValueError: if there are not as many edges, or no path is left.
    """
    scores, ranking = found.scores, found.circuit.graph["made"]["ranking"]
    kept = top(graph, scores.worth(ranking), n)
    if not kept.any():
        raise ValueError(
            f"size {n}: the strongest edges make no path from the model's input to its output; expected a larger size"
        )
    how = {"search": "top", "ranking": ranking, "size": n}
    return circuit_graph(graph, kept, scores, task, how)
