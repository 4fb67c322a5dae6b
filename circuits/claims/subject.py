"""What claims are about, loaded: a model, its tasks, a circuit, and the metric of circuits, computed once each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.claims.claim import CircuitSpec, ClaimFile
from circuits.claims.evidence import Mean, Ratio, is_clear
from circuits.claims.parts import ABLATIONS, Ablation, EdgeParts, Mask, Parts, UnitParts
from circuits.claims.verdicts import Measured
from circuits.discovery import edge_graph, edges_of
from circuits.discovery.evaluating import check_apart
from circuits.discovery.formats import read_edges
from circuits.discovery.found import graph_of
from circuits.errors import line
from circuits.experiments.patched_runs import Direction
from circuits.experiments.statistics import LEVEL
from circuits.factories import from_file
from circuits.graph.circuit import CircuitGraph
from circuits.graph.saved import load_circuit
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.tables import between
from circuits.tasks.halves import LEAST
from circuits.tasks.metrics import Metric
from circuits.tasks.spec import TaskSpec
from circuits.tasks.task import Task
from circuits.workspace import Workspace

Values = Float[np.ndarray, " example"]

RESTORABLE: tuple[Ablation, ...] = ("counterpart", "resample")
"""Ablations that give parts what they carry in another run, so that the circuit can be restored in that run."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, a task and a circuit.

    Attributes:
        model: the model.
        task: the whole task.
        parts: what the circuit is chosen from; None if claims need no circuit.
        kept: the circuit; None if there is none.
        ablation: what everything outside carries.
        seed: of everything random.
        found: the saved circuit that it is, with the examples on which it was found; None of others.
        task_spec: how the task is made.
        place: the workspace in which circuits are saved.
        folder: where files that claims name are looked for.
        progress: called with the work done and the total of one measurement.
    """

    model: HookedModel
    task: Task
    parts: Parts | None = None
    kept: Mask | None = None
    ablation: Ablation = "counterpart"
    seed: int = 0
    found: CircuitGraph | None = None
    task_spec: TaskSpec = field(default_factory=TaskSpec)
    place: Workspace = field(default_factory=Workspace.default)
    folder: Path = Path()
    progress: Progress | None = None
    _known: dict[tuple[str, str, str, str, bytes], Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ablation not in ABLATIONS:
            raise ValueError(f"ablation {self.ablation!r}: expected one of {', '.join(ABLATIONS)}")

    @cached_property
    def test(self) -> Task:
        """The half of the task on which claims are judged, without examples that were seen when the circuit was found.

        Raises:
            ValueError: if hardly any are left.
        """
        half = self.task.test
        new = unseen(half, self.seen)
        if len(new) == len(half):
            return half
        if len(new) < LEAST:
            raise ValueError(
                f"{len(half) - len(new)} of the {len(half)} examples of the {half.half} half were seen when the "
                "circuit was found: expected another seed, more examples, or another task"
            )
        return half.subset(new)

    @cached_property
    def seen(self) -> frozenset[str]:
        """The identities of all examples on which the circuit was found or evaluated, as far as it says which.

        Raises:
            ValueError: if an earlier version saved it, and its task cannot be made again.
        """
        made = {} if self.found is None else self.found.graph.get("made", {})
        seen = {*made.get("found_on", ()), *made.get("evaluated_on", ())}
        if "evaluated_on" not in made and made.get("examples"):
            seen |= {*_drawn_then(self.model, made)}
        return frozenset(seen)

    @cached_property
    def find(self) -> Task:
        """The half on which thresholds, subsets and directions may be chosen."""
        half = self.task.find
        check_apart(half, self.test)
        return half

    @property
    def circuit(self) -> tuple[Parts, Mask]:
        """The parts and which of them are the circuit.

        Raises:
            ValueError: if the claims have no circuit.
        """
        if self.parts is None or self.kept is None:
            raise ValueError("the test needs a circuit: expected `circuit` in the claim file")
        return self.parts, self.kept

    def directions(self, circuit: Mask) -> tuple[Direction, ...]:
        """In which runs a circuit can be tested under the ablation."""
        parts, _ = self.circuit
        both = self.ablation in RESTORABLE and parts.restorable(circuit)
        return ("noising", "denoising") if both else ("noising",)

    # --- numbers ---------------------------------------------------------------------------------

    def values(
        self,
        circuits: Sequence[Mask],
        *,
        task: Task | None = None,
        metric: Metric | None = None,
        ablation: Ablation | None = None,
        direction: Direction = "noising",
    ) -> Float[np.ndarray, "circuit example"]:
        """The metric of circuits on each example; see `Parts.values`.

        Args:
            circuits: which parts each keeps.
            task: on which examples; the test half if None.
            metric: what is measured; the task's metric if None.
            ablation: what other parts carry; that of the claims if None.
            direction: in which run.
        """
        parts, _ = self.circuit
        task, ablation = task or self.test, ablation or self.ablation
        if metric is not None:
            task = task.with_metric(metric)
        keys = [
            (task.hash, task.half, ablation, direction, np.packbits(c).tobytes()) for c in circuits
        ]
        new = list(dict.fromkeys(k for k in keys if k not in self._known))
        if new:
            masks = [circuits[keys.index(k)] for k in new]
            made = parts.values(masks, task, ablation, direction, self.progress)
            self._known.update(zip(new, made, strict=True))
        return np.stack([self._known[k] for k in keys])

    def ends(
        self,
        task: Task | None = None,
        metric: Metric | None = None,
        ablation: Ablation | None = None,
    ) -> tuple[Values, Values]:
        """The metric without any part, m(0), and with all, m(N), on each example."""
        _, kept = self.circuit
        none, full = np.zeros_like(kept), np.ones_like(kept)
        empty, whole = self.values([none, full], task=task, metric=metric, ablation=ablation)
        return empty, whole

    def restored(self, circuit: Mask, *, task: Task | None = None) -> Values:
        """The metric in the corrupted run with a circuit restored."""
        return self.values([~circuit], task=task, direction="denoising")[0]

    def faithfulness(
        self, values: Values, task: Task | None = None, ablation: Ablation | None = None
    ) -> Ratio:
        """f = (m(C) - m(0)) / (m(N) - m(0)), a ratio of means over examples."""
        empty, whole = self.ends(task, ablation=ablation)
        return Ratio(values - empty, whole - empty, (task or self.test).clusters)

    def no_effect(
        self, task: Task | None = None, ablation: Ablation | None = None, level: float = LEVEL
    ) -> str:
        """Why nothing can be tested: the model's own effect cannot be told from 0; empty if it can."""
        task = task or self.test
        empty, whole = self.ends(task, ablation=ablation)
        effect = Mean(whole - empty, task.clusters)
        if is_clear(effect, level):
            return ""
        return (
            f"the model's own effect on {task.name}, {effect.value:.3g} {task.metric.unit or task.metric.name} "
            f"(interval {between(*effect.interval(level))}), cannot be told from 0 under {ablation or self.ablation} "
            "ablation"
        )

    def cannot(self, why: str) -> Measured:
        """What a test returns that cannot test anything."""
        return Measured((), "", self.seed, untestable=why)

    def said(self, task: Task | None = None) -> str:
        """On which examples something is measured, in words."""
        task = task or self.test
        less = (
            len(self.task.test) - len(task) if task is self.test and self.found is not None else 0
        )
        left = (
            f"; {less} more were seen when the circuit was found, and are left out" if less else ""
        )
        return f"{len(task)} examples of {task.name} ({task.half} half), {len(set(task.clusters))} independent{left}"


def _drawn_then(model: HookedModel, made: Mapping[str, Any]) -> list[str]:
    """The examples of a circuit of an earlier version, which says how many were drawn of a task, and its name."""
    try:
        spec = TaskSpec(str(made["task"]), int(made["examples"]), int(made.get("seed", 0)))
        return load_claims_task(model, spec).examples.identities
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            "the circuit does not say on which examples it was evaluated, and its task cannot be made again "
            f"({line(error)}): expected one that `circuits discover` saved since"
        ) from error


def unseen(task: Task, seen: Collection[str]) -> list[int]:
    """Which examples of a task are not among some, given by their identities (see `Examples.identity`)."""
    return [i for i, identity in enumerate(task.examples.identities) if identity not in seen]


# --- loading -----------------------------------------------------------------------------------------


def load_claims_task(model: HookedModel, spec: TaskSpec, folder: Path = Path()) -> Task:
    """The task that claims are about.

    Args:
        model: the model.
        spec: how the task is made.
        folder: where a file of labels is looked for.

    Raises:
        KeyError, FileNotFoundError, ValueError: as `TaskSpec.compile`, or if making it would run code that is not
            trusted.
    """
    for what, name in spec.names.items():
        without_code(name, what)
    return spec.compile(model, folder)


def without_code(name: str, what: str = "data") -> str:
    """What a claim file names, as it is.

    Args:
        name: the name.
        what: what it names, for messages.

    Raises:
        ValueError: if opening it would run code that is not trusted.
    """
    return from_file(what, name, "claim file", f"name {what} that is opened without code")


def subject_of(
    file: ClaimFile,
    model: HookedModel,
    place: Workspace,
    folder: Path,
    progress: Progress | None = None,
) -> Subject:
    """What the claims of a file are about.

    Args:
        file: the claims.
        model: their model.
        place: the workspace in which circuits are saved.
        folder: the file's folder, in which files that it names are looked for.
        progress: called with the work done and the total of one measurement.

    Raises:
        KeyError: if the circuit has parts that the model lacks.
        FileNotFoundError: if a file is missing.
        ValueError: if something does not fit.
    """
    subject = Subject(
        model, load_claims_task(model, file.task, folder), ablation=file.ablation, seed=file.seed, task_spec=file.task,
        place=place, folder=folder, progress=progress,
    )  # fmt: skip
    return with_circuit(subject, file.circuit, file.shift) if file.circuit.given else subject


def with_circuit(subject: Subject, circuit: CircuitSpec, shift: int = 0) -> Subject:
    """The same model and task with a circuit; of one chosen from the same parts, what is known stays known.

    Raises:
        KeyError, FileNotFoundError, ValueError: as `subject_of`.
    """
    parts, kept, found = circuit_of(
        circuit, subject.model, subject.place, subject.folder, shift, subject.seed
    )
    if not kept.any():
        raise ValueError("circuit: it has no parts; expected at least one")
    own = subject.parts
    if own is not None and (own.word, own.names) == (parts.word, parts.names):
        return replace(subject, kept=kept, found=found)
    return replace(subject, parts=parts, kept=kept, found=found, _known={})


def circuit_of(
    spec: CircuitSpec,
    model: HookedModel,
    place: Workspace,
    folder: Path,
    shift: int = 0,
    seed: int = 0,
) -> tuple[Parts, Mask, CircuitGraph | None]:
    """A circuit by its description.

    Args:
        spec: the description.
        model: the model.
        place: the workspace in which circuits are saved.
        folder: where a file of edges is looked for.
        shift: see `discovery.score_edges`.
        seed: of what ablations draw.

    Returns:
        What it is chosen from, which of these parts it has, and the saved circuit, if it is one.

    Raises:
        KeyError, FileNotFoundError, ValueError: as `subject_of`.
    """
    if spec.units:
        parts: Parts = UnitParts(model, spec.sites, seed=seed)
        return parts, parts.mask(spec.units), None
    if spec.saved:
        found = load_circuit(place.database, spec.saved, model.hash)
        graph = graph_of(found, model)
        return EdgeParts(graph, shift=shift, seed=seed), graph.mask(edges_of(found)), found
    graph = edge_graph(model, **_grain(spec.graph))
    kept = read_edges(str(folder / spec.file), graph).kept if spec.file else graph.mask(spec.edges)
    return EdgeParts(graph, shift=shift, seed=seed), kept, None


def _grain(graph: Mapping[str, Any]) -> dict[str, Any]:
    known = ("sites", "kv", "spans", "neurons", "latents", "limit")
    unknown = next((name for name in graph if name not in known), None)
    if unknown is not None:
        raise ValueError(f"circuit.graph: {unknown!r} is unknown; expected {', '.join(known)}")
    return dict(graph)
