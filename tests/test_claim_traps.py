"""Published traps: circuits that look right by one number and are not, and what says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from circuits.claims import TESTS, TaskSpec
from circuits.claims.parts import Ablation, Mask, Parts
from circuits.claims.subject import Subject, load_claims_task
from circuits.claims.verdicts import Level
from circuits.experiments.patched_runs import Direction
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.progress import Progress
from circuits.tasks.task import Task

N = 6
CIRCUIT = np.array([True, True, True, False, False, False])


class Made(Parts):
    """Parts of which the metric of each circuit is made up: 0 for none, 4 for all, and what is wanted for `CIRCUIT`."""

    word = "parts"
    ablations: tuple[str, ...] = ("counterpart",)

    def __init__(self, model: HookedModel, off: dict[str, np.ndarray]) -> None:
        self.model, self.off = model, off

    names = tuple(f"part {i}" for i in range(N))
    classes = np.zeros(N, int)

    def mask(self, names: Sequence[str]) -> Mask:
        return np.isin(self.names, names)

    def values(
        self,
        circuits: Sequence[Mask],
        task: Task,
        ablation: Ablation,
        direction: Direction,
        progress: Progress | None = None,
    ) -> np.ndarray:
        scale = 4 + np.sin(
            np.arange(len(task))
        )  # the model's effect differs from example to example
        found = []
        for circuit in circuits:
            kept = circuit if direction == "noising" else ~circuit
            share = kept.mean() if not (kept == CIRCUIT).all() else 1 + self.off[task.half]
            found.append(scale * share)
        return np.stack(found)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_claims_task(load_model("induction-by-hand"), TaskSpec(examples=200))


def verdict(task: Task, off: dict[str, np.ndarray], test: str, **given: object) -> str:
    parts = Made(task.model, off)
    subject = Subject(task.model, task, parts, CIRCUIT)
    made = TESTS[test].run(subject, TESTS[test].settings(given, test), Level(0.05, 3))
    return made.verdict(0.05)[0]


def test_over_and_undershooting_is_not_equivalence(task: Task):
    """Half of the examples get .3 of the effect too much, the other half too little: on average it is all there."""
    signs = np.resize([0.3, -0.3], len(task.test))
    off = {"test": signs, "find": signs}
    assert verdict(task, off, "faithfulness") == "holds"
    assert verdict(task, off, "equivalence") == "refuted"
    near = {half: values / 10 for half, values in off.items()}
    assert verdict(task, near, "faithfulness") == "holds"


def test_as_often_above_as_below_is_not_enough(task: Task):
    """P(circuit > model) is one half, and the published test is content; the errors are as large as the effect."""
    signs = np.resize([1.0, -1.0], len(task.test))
    parts = Made(task.model, {"test": signs, "find": signs})
    subject = Subject(task.model, task, parts, CIRCUIT)
    made = TESTS["equivalence"].run(
        subject, TESTS["equivalence"].settings({"eps": 0.2}, ""), Level()
    )
    share, near = made.quantities
    assert share.p_holds < 0.05
    assert made.details["shi_p"] > 0.05
    assert near.p_refuted < 0.05
    assert made.verdict(0.05)[0] == "refuted"


def test_a_circuit_that_fits_its_find_half_alone_is_refused(task: Task):
    rng = np.random.default_rng(0)
    off = {
        "find": np.zeros(len(task.find)),
        "test": -0.3 + 0.05 * rng.standard_normal(len(task.test)),
    }
    assert verdict(task, off, "faithfulness") == "refuted"
    fits = {half: np.zeros(len(values)) for half, values in off.items()}
    assert verdict(task, fits, "faithfulness") == "holds"


def test_a_few_examples_decide_nothing(task: Task):
    noisy = 0.5 * np.random.default_rng(1).standard_normal(len(task.test))
    few = task.subset([i for i, half in enumerate(task._halves) if half == "test"][:6])
    parts = Made(task.model, {"test": noisy[:6], "find": noisy[:6], "all": noisy[:6]})
    subject = replace(Subject(task.model, task, parts, CIRCUIT), task=few)
    subject.__dict__["test"] = replace(few, half="test")
    made = TESTS["faithfulness"].run(subject, TESTS["faithfulness"].settings({}, ""), Level())
    assert made.verdict(0.05)[0] == "undecided"
