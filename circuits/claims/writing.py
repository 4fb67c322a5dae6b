"""New claim files: what can be claimed of a circuit, with strict default thresholds."""

from __future__ import annotations

from circuits.claims.catalogue import TESTS
from circuits.claims.claim import CircuitSpec, Claim, ClaimFile, TaskSpec
from circuits.claims.parts import Ablation
from circuits.claims.subject import RESTORABLE
from circuits.graph.circuit import CircuitGraph
from circuits.models.adapter.hooked_model import HookedModel

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
) -> ClaimFile:
    """A claim file about a saved circuit, with its usual claims.

    Args:
        name: of the circuit in the workspace.
        circuit: the circuit.
        model: its model.
        spec: the model, as `load_model` takes it.
        task: the task.
        weights: the model's file of weights.
        ablation: what everything outside the circuit carries.
        about: the story, in a few sentences.
        seed: of everything random.
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
        name, spec, model.hash, tuple(claims), task, CircuitSpec(saved=name), ablation, about=about, weights=weights,
        seed=seed,
    )  # fmt: skip
