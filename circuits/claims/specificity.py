"""The test of specificity: a circuit that is ablated harms its own task, and other tasks less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from circuits.claims.claim import CircuitSpec
from circuits.claims.evidence import Mean, Ratio, Region, is_clear
from circuits.claims.parts import EdgeParts, Mask
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject, circuit_of
from circuits.claims.sufficiency import check_tasks, other_task
from circuits.claims.verdicts import Level, Measured, quantity
from circuits.discovery.graphs import EdgeGraph
from circuits.discovery.runs import Runs
from circuits.discovery.searching import values_of
from circuits.tasks.metrics import accuracy
from circuits.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Damage:
    """What ablating a circuit does to a task.

    Attributes:
        lost: what each example loses of the metric.
        effect: what each example loses with every part ablated.
        right: accuracy with the circuit ablated, and without; NaN where nothing is right or wrong.
        clusters: of the examples.
    """

    lost: Float[np.ndarray, " example"]
    effect: Float[np.ndarray, " example"]
    right: tuple[float, float]
    clusters: Sequence[int]

    @property
    def share(self) -> Ratio:
        """The damage as a share of the task's own effect."""
        return Ratio(self.lost, self.effect, self.clusters)


def common_means(graph: EdgeGraph, tasks: Sequence[Task]) -> Mapping[str, Tensor]:
    """The mean of each site over several tasks' examples: one ablation for all of them.

    Means over a task's own examples would keep what its examples have in common, and so spare that task.
    """
    total: dict[str, Tensor] = {}
    for task in tasks:
        for name, value in Runs(graph, task, ablation="mean").constants.items():
            total[name] = total[name] + value.double() if name in total else value.double()
    return {name: value / len(tasks) for name, value in total.items()}


def damage(
    graph: EdgeGraph, circuits: Sequence[Mask], task: Task, constants: Mapping[str, Tensor]
) -> list[Damage]:
    """What ablating each of some circuits to given constants does to a task."""
    n = len(graph)
    masks = [np.ones(n, bool), np.zeros(n, bool), *(~c for c in circuits)]

    def measured(task: Task) -> Float[np.ndarray, "circuit example"]:
        return values_of(Runs(graph, task, ablation="optimal", constants=constants), masks)

    whole, nothing, *without = measured(task)
    right = [float("nan")] * len(masks)
    if task.answered:
        right = measured(task.with_metric(accuracy)).mean(1).tolist()
    return [
        Damage(whole - row, whole - nothing, (right[i + 2], right[0]), task.clusters)
        for i, row in enumerate(without)
    ]


def specificity(subject: Subject, settings: Settings, level: Level) -> Measured:
    """The damage to the circuit's own task, and to others, each as a share of that task's own effect."""
    parts, kept = subject.circuit
    if not isinstance(parts, EdgeParts):
        why = "specificity is measured of circuits of edges"
        return subject.cannot(why)
    others = {spec: other_task(subject, spec) for spec in settings["tasks"]}
    tasks = {subject.task.name: subject.test, **others}
    circuits = {"the circuit": kept, **_further(subject, settings["circuits"])}
    constants = common_means(parts.graph, [*tasks.values()])
    made = {
        name: damage(parts.graph, [*circuits.values()], task, constants)
        for name, task in tasks.items()
    }
    for name, rows in made.items():
        if not is_clear(Mean(rows[0].effect, rows[0].clusters), level.each):
            why = f"the model's own effect on {name} cannot be told from 0 under mean ablation"
            return subject.cannot(why)
    own = subject.task.name
    found = [
        quantity(
            f"damage to {name}", rows[0].share,
            Region(low=settings["own"]) if name == own else Region(high=settings["others"]), level, parts=len(made),
        )
        for name, rows in made.items()
    ]  # fmt: skip
    matrix = {
        circuit: {
            name: {
                "damage": rows[i].share.value,
                "accuracy": rows[i].right[0],
                "accuracy_intact": rows[i].right[1],
            }
            for name, rows in made.items()
        }
        for i, circuit in enumerate(circuits)
    }
    lines = [
        f"{circuit} ablated: "
        + ", ".join(
            f"{name} {cell['damage']:.3g} of its effect (accuracy {cell['accuracy']:.1%} of "
            f"{cell['accuracy_intact']:.1%})"
            for name, cell in row.items()
        )
        for circuit, row in matrix.items()
    ]
    note = "ablation by the mean over the examples of all these tasks, the same for all"
    said = "; ".join(subject.said(task) for task in tasks.values())
    return Measured(tuple(found), said, subject.seed, (note, *lines), {"matrix": matrix})


def _further(subject: Subject, names: Sequence[str]) -> dict[str, Mask]:
    """Other saved circuits of the model between the same parts."""
    parts, _ = subject.circuit
    found = {}
    for name in names:
        other, mask, _ = circuit_of(
            CircuitSpec(saved=name), subject.model, subject.place, subject.folder
        )
        if other.names != parts.names:
            raise ValueError(
                f"circuit {name!r} is between other parts than the circuit of the claims"
            )
        found[name] = mask
    return found


TESTS = (
    ClaimTest(
        "specificity", ("specific",),
        "The damage that ablating the circuit does to its own task and to others, each as a share of that task's own "
        "effect, under one mean ablation for all.",
        (
            Parameter("tasks", "the other tasks, as `--task` takes them", form="texts"),
            Parameter("own", "the least damage to its own task", 0.5, -10, 10),
            Parameter("others", "the largest damage to another task", 0.25, -10, 10),
            Parameter("circuits", "further saved circuits to show in the matrix", (), form="texts"),
        ), specificity, check=check_tasks,
    ),
)  # fmt: skip
