"""Circuits that were found, with the evidence for them, and as circuits that can be saved, drawn and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.discovery.agreement import Checked
from circuits.discovery.alternatives import Alternatives
from circuits.discovery.building import edge_graph
from circuits.discovery.evaluating import Evaluation
from circuits.discovery.graphs import Edge, EdgeGraph, Mask
from circuits.discovery.pairs import EdgePairs
from circuits.discovery.results import EdgeScores
from circuits.discovery.searching import top
from circuits.discovery.stability import SearchStability
from circuits.discovery.truth import Recovered
from circuits.graph.circuit import ORDER, CircuitGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table
from circuits.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Discovery:
    """A circuit that was found, and how good it is.

    Attributes:
        circuit: the circuit.
        scores: the scores of all edges.
        checked: how far they agree with exact patching; None if they are exact, or baselines.
        stability: how far the same circuit is found on other draws of the examples; None of searches that try edges and
            of scores by weights, which no example changes.
        evaluation: how good the circuit is on the `test` half.
        alternatives: further circuits that are as good; None if none were asked for, or faithfulness is undefined.
        pairs: what the strongest edges do two at a time; None if it was not asked for.
        recovered: how well the scores find edges that are known to be true; None if none are known.
        notes: comparisons that could not be made, and why.
    """

    circuit: CircuitGraph
    scores: EdgeScores
    checked: Checked | None
    stability: SearchStability | None
    evaluation: Evaluation
    alternatives: Alternatives | None = None
    pairs: EdgePairs | None = None
    recovered: Recovered | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "circuit": dict(self.circuit.graph["made"]), "scores": self.scores.to_dict(),
            "recovered": None if self.recovered is None else self.recovered.to_dict(),
            "agreement": None if self.checked is None else self.checked.to_dict(),
            "stability": None if self.stability is None else self.stability.to_dict(),
            "evaluation": self.evaluation.to_dict(),
            "alternatives": None if self.alternatives is None else self.alternatives.to_dict(),
            "pairs": None if self.pairs is None else self.pairs.to_dict(), "notes": list(self.notes),
        }  # fmt: skip

    def tables(self, top: int) -> Iterator[Table | str]:
        """The strongest edges, how far scores can be trusted, and how good the circuit is."""
        yield from self.scores.tables(top)
        if self.recovered is not None:
            yield from self.recovered.lines()
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
    made, find, test = CircuitGraph(), task.find, task.test
    model = graph.model
    edges = np.flatnonzero(kept).tolist()
    used, mean = {*graph.ends[edges, 0].tolist()}, scores.mean
    for edge in edges:
        source, target = graph.ends[edge].tolist()
        more = {} if again is None else {"share": again.shares[graph.edges[edge]]}
        for node in graph.nodes_of(target, used):
            made.connect(
                graph.node(graph.sources[source]), node, "effect", sum=-scores.sign * float(mean[edge]),
                layer=graph.way(target), edge=" -> ".join(graph.edges[edge]), **more,
            )  # fmt: skip
    made.graph |= {
        "model": model.name, "model_hash": model.hash, ORDER: [site.name for site in model.sites],
        "made": {
            "by": "discover", "grain": graph.grain, "graph": dict(graph.choices), "task": task.name,
            "task_hash": task.hash, "task_spec": dict(task.spec),
            "found_on": find.examples.identities, "evaluated_on": test.examples.identities,
            "metric": scores.metric, "method": scores.method,
            "settings": dict(scores.settings), **how, "seed": scores.record.seed,
            "edges": [list(graph.edges[e]) for e in edges],
            "scores": [float(mean[e]) for e in edges],
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


def check_not_found_on(circuit: CircuitGraph, task: Task) -> None:
    """Raise ValueError if a task has an example on which a circuit was found."""
    seen = set(circuit.graph["made"].get("found_on", ()))
    names = task.examples.names
    both = [names[i] for i in range(len(task)) if task.examples.identity(i) in seen]
    if both:
        raise ValueError(
            f"example {both[0]!r} (one of {len(both)}) of the {task.half} half is one on which the circuit was found: "
            f"expected seed {circuit.graph['made'].get('seed')} and as many examples as then, or other examples"
        )


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
