"""New claim files: what can be claimed of a circuit, with strict default thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from circuits.checks import clipped
from circuits.claims.catalogue import TESTS
from circuits.claims.claim import CircuitSpec, Claim, ClaimFile
from circuits.claims.files import task_from_yaml
from circuits.claims.parts import Ablation
from circuits.claims.subject import RESTORABLE, load_claims_task
from circuits.discovery.found import edges_of
from circuits.edits.recipes import Recipe
from circuits.edits.records import read_edit
from circuits.graph.circuit import CircuitGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks.spec import TaskSpec

USUAL = (
    ("faithfulness", "sufficient", "The circuit alone carries the behaviour."),
    ("accuracy", "sufficient", "The circuit alone is right as often as the model."),
    ("random-circuits", "sufficient", "Random circuits like it carry less."),
    ("knockout", "necessary", "Nothing else carries the behaviour."),
    (
        "partial-necessity",
        "necessary",
        "Ablating the circuit hurts more than ablating as much of anything else.",
    ),
    ("completeness", "complete", "The circuit has all parts that do its job."),
    ("minimality", "minimal", "Each part of the circuit is needed."),
    ("equivalence", "equivalent", "The circuit answers as the model does, example by example."),
    ("stability", "stable", "The search finds the circuit again on other examples."),
    ("breaking-inputs", "general", "Other inputs of the task's grammar do not break the circuit."),
)
"""The claims of a new file: test, kind, and statement. The others need to be told tasks or ablations."""


EXAMPLES = 500
"""How many examples a new file draws: half of them judge, which leaves all usual tests enough power to hold."""


def task_of_circuit(
    circuit: CircuitGraph,
    model: HookedModel,
    spec: str = "",
    examples: int | None = None,
    seed: int | None = None,
) -> TaskSpec:
    """The task that claims about a circuit are tested on: examples that were not drawn when it was found.

    Args:
        circuit: a circuit that was found.
        model: its model.
        spec: the task; the one on which it was found if empty.
        examples: how many are drawn for both halves; 500 if None.
        seed: of the examples and their halves; the next after the one with which the circuit was found if None.

    Raises:
        KeyError, FileNotFoundError, ValueError: if the circuit was not found, or the task cannot be made.
    """
    edges_of(circuit)
    found = _found_on(circuit.graph["made"])
    task = replace(
        TaskSpec(spec) if spec else found,
        examples=EXAMPLES if examples is None else examples,
        seed=found.seed + 1 if seed is None else seed,
    )
    if (
        task.data
    ):  # stretches of data end where they ended then: drawn from all of it, more examples are new
        task = replace(task, take="random")
    load_claims_task(model, task)
    return task


def _found_on(made: Mapping[str, Any]) -> TaskSpec:
    """The task on which a circuit was found; known by its name alone if nothing more was kept."""
    if kept := made.get("task_spec"):
        return task_from_yaml(kept, "task_spec of the circuit")
    return TaskSpec(str(made.get("task", "")), seed=int(made.get("seed", 0)))


def claims_of_circuit(
    name: str,
    circuit: CircuitGraph,
    model: HookedModel,
    spec: str,
    task: TaskSpec,
    *,
    weights: str = "",
    ablation: Ablation = "counterpart",
    about: str = "",
    seed: int = 0,
    saved: str = "",
) -> ClaimFile:
    """A claim file about a saved circuit, with its usual claims.

    Args:
        name: of the claims.
        circuit: the circuit.
        model: its model.
        spec: the model, as `load_model` takes it.
        task: the task.
        weights: the model's file of weights.
        ablation: what everything outside the circuit carries.
        about: the story, in a few sentences.
        seed: of everything random.
        saved: the circuit's name in the workspace, if it is not that of the claims.
    """
    made = circuit.graph.get("made", {})
    claims = []
    for test, kind, statement in USUAL:
        given = (
            {"directions": "noising"}
            if test == "faithfulness" and ablation not in RESTORABLE
            else {}
        )
        if test == "stability" and made.get("search") in ("top", "greedy"):
            given = {"search": made["search"], "method": made["method"]}
        settings = TESTS[test].settings(given, test)
        claims.append(Claim(f"{kind}: {test}", kind, test, settings, statement))
    return ClaimFile(
        name, spec, model.hash, tuple(claims), task, CircuitSpec(saved=saved or name), ablation, about=about,
        weights=weights, seed=seed,
    )  # fmt: skip


def claims_of_recipe(
    name: str,
    recipe: Recipe,
    model: HookedModel,
    spec: str,
    task: TaskSpec,
    least: float,
    most: float,
    *,
    weights: str = "",
    about: str = "",
    seed: int = 0,
) -> ClaimFile:
    """A claim file about what a recipe's edits do to a task's metric.

    Args:
        name: of the claims.
        recipe: the edits.
        model: the model that they are made in.
        spec: the model, as `load_model` takes it.
        task: the task.
        least: the least change of the metric that is predicted, in its unit.
        most: the largest.
        weights: the model's file of weights.
        about: the story, in a few sentences.
        seed: of everything random.

    Raises:
        ValueError: if the edits do not fit the model, or cannot be written in a claim file.
    """
    recipe.check(model)
    texts = [str(edit) for edit in recipe.edits]
    for text, edit in zip(texts, recipe.edits, strict=True):
        if read_edit(model, text, files=False) != edit:
            raise ValueError(
                f"edit {clipped(text)}: its numbers are too many to be written in a claim file"
            )
    settings = TESTS["edit-effect"].settings(
        {"edits": texts, "least": least, "most": most}, "edit-effect"
    )
    claim = Claim(
        "effect: edit-effect", "effect", "edit-effect", settings, "The edits do what is predicted."
    )
    return ClaimFile(
        name, spec, model.hash, (claim,), task, about=about, weights=weights, seed=seed
    )
