"""The main number of each verdict a second time, by plain hooks and the definition; heads, edits, units."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.claims import TESTS, TaskSpec
from circuits.claims.parts import EdgeParts, UnitParts
from circuits.claims.specificity import common_means, damage
from circuits.claims.subject import Subject, load_claims_task
from circuits.claims.verdicts import Level, Measured
from circuits.discovery import edge_graph
from circuits.graph.circuit import CircuitGraph
from circuits.models.zoo.loading import load_model
from circuits.tasks.task import Task

LEVEL = Level()
KEPT = ("blocks.0.attn.hook_z:3", "blocks.1.attn.hook_z:0,1", "embed.hook_out")


@pytest.fixture(scope="module")
def subject() -> Subject:
    """Three heads of the trained induction model."""
    model = load_model("induction")
    spec = TaskSpec(examples=24)
    task = load_claims_task(model, spec)
    parts = UnitParts(model, ["embed.hook_out", "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"])
    return Subject(model, task, parts, parts.mask(KEPT), task_spec=spec)


@pytest.fixture(scope="module")
def edges() -> Subject:
    """A circuit of edges of the same model: all but every fifth."""
    model = load_model("induction")
    task = load_claims_task(model, TaskSpec(examples=24))
    graph = edge_graph(model)
    return Subject(model, task, EdgeParts(graph), np.arange(len(graph)) % 5 > 0)


def run_test(subject: Subject, name: str, **given: object) -> Measured:
    return TESTS[name].run(subject, TESTS[name].settings(given, name), LEVEL)


class Plain:
    """The model's own forward pass with hooks of torch alone."""

    def __init__(self, subject: Subject, task: Task) -> None:
        self.bridge: Any = subject.model.module
        self.task = task
        self.rows = []
        for part in task.batches(1):
            assert part.counterparts is not None, "the task has counterparts"
            self.rows.append((part.which[0], part.inputs, part.counterparts))

    def losses(self, keep: dict[str, list[int]] | None, denoise: bool = False) -> np.ndarray:
        """The mean loss at the counted positions of each example.

        Args:
            keep: for each hook the heads (or, for the embedding, anything) that keep what they have in the run; all
                others get what they have in the other run. None changes nothing.
            denoise: whether the run is the corrupted one, and the other the clean one.
        """
        found = np.zeros(len(self.task))
        for which, clean, other in self.rows:
            base, source = (other, clean) if denoise else (clean, other)
            logits = self._run(base, source, keep)
            question = self.task.questions[which]
            assert question.positions is not None, "token tasks say them"
            assert question.labels is not None, "the task has labels"
            logp = logits[0].double().log_softmax(-1)
            places = zip(question.positions, question.labels, strict=True)
            found[which] = -np.mean([logp[p, t].item() for p, t in places])
        return found

    def _run(self, base: Tensor, source: Tensor, keep: dict[str, list[int]] | None) -> Tensor:
        if keep is None:
            with torch.no_grad():
                return self.bridge(base)
        with torch.no_grad():
            _, cache = self.bridge.run_with_cache(source)

        def change(value: Tensor, hook: object, name: str) -> Tensor:
            theirs, own = cache[name], keep[name]
            if value.ndim == 3:
                return value if own else theirs
            made = theirs.clone()
            made[:, :, own] = value[:, :, own]
            return made

        with torch.no_grad():
            return self.bridge.run_with_hooks(
                base, fwd_hooks=[(name, partial(change, name=name)) for name in keep]
            )


ALL = {
    "embed.hook_out": [0],
    "blocks.0.attn.hook_z": [0, 1, 2, 3],
    "blocks.1.attn.hook_z": [0, 1, 2, 3],
}
NONE: dict[str, list[int]] = {name: [] for name in ALL}
OWN = {"embed.hook_out": [0], "blocks.0.attn.hook_z": [3], "blocks.1.attn.hook_z": [0, 1]}
REST = {name: [i for i in ALL[name] if i not in OWN[name]] for name in ALL}


def test_faithfulness_both_ways(subject: Subject):
    plain = Plain(subject, subject.test)
    empty, whole = plain.losses(NONE).mean(), plain.losses(None).mean()
    noised = (plain.losses(OWN).mean() - empty) / (whole - empty)
    [found] = run_test(
        subject, "faithfulness"
    ).quantities  # restoring the embedding would restore everything
    assert found.value == pytest.approx(noised, abs=1e-5)
    assert found.value < 0.99, "else nothing would be compared"
    heads = OWN | {"embed.hook_out": []}
    outside = {name: [i for i in ALL[name] if i not in heads[name]] for name in ALL}
    losses = plain.losses(heads).mean(), plain.losses(outside, denoise=True).mean()
    wanted = [(m - empty) / (whole - empty) for m in losses]
    own = replace(subject, kept=subject.circuit[0].mask(KEPT[:2]))
    assert [q.value for q in run_test(own, "faithfulness").quantities] == pytest.approx(
        wanted, abs=1e-5
    )


def test_knockout(subject: Subject):
    plain = Plain(subject, subject.test)
    empty, whole = plain.losses(NONE).mean(), plain.losses(None).mean()
    losses = plain.losses(REST).mean(), plain.losses(OWN, denoise=True).mean()
    wanted = [(m - empty) / (whole - empty) for m in losses]
    assert [q.value for q in run_test(subject, "knockout").quantities] == pytest.approx(
        wanted, abs=1e-5
    )


def test_equivalence(subject: Subject):
    plain, find = Plain(subject, subject.test), Plain(subject, subject.find)
    own, whole = plain.losses(OWN), plain.losses(None)
    effect = abs((find.losses(None) - find.losses(NONE)).mean())
    found = run_test(subject, "equivalence", delta=0.1).quantities
    assert found[0].value == pytest.approx((own > whole).mean(), abs=1e-5)
    assert found[1].value == pytest.approx((np.abs(own - whole) <= 0.1 * effect).mean(), abs=1e-5)


def test_completeness_and_minimality(subject: Subject):
    plain = Plain(subject, subject.test)
    empty, whole = plain.losses(NONE).mean(), plain.losses(None).mean()
    found = run_test(subject, "completeness", random=0, greedy=0).quantities
    head = {"embed.hook_out": [0], "blocks.0.attn.hook_z": [], "blocks.1.attn.hook_z": [0, 1]}
    model = {
        name: [i for i in ALL[name] if (name, i) != ("blocks.0.attn.hook_z", 3)] for name in ALL
    }
    wanted = (plain.losses(head).mean() - plain.losses(model).mean()) / (whole - empty)
    assert [q.value for q in found if "0.attn" in q.name] == [pytest.approx(wanted, abs=1e-5)]
    dropped = (plain.losses(OWN).mean() - plain.losses(head).mean()) / (whole - empty)
    needed = run_test(subject, "minimality", inflated=0).quantities
    assert [q.value for q in needed if "0.attn" in q.name] == [pytest.approx(dropped, abs=1e-5)]


def test_damage_is_that_of_one_mean_for_all_tasks(edges: Subject):
    parts, kept = edges.circuit
    assert isinstance(parts, EdgeParts)
    other = load_claims_task(edges.model, TaskSpec(examples=24, seed=5)).test
    constants = common_means(parts.graph, [edges.test, other])
    own = common_means(parts.graph, [edges.test])
    name = next(iter(constants))
    assert not torch.equal(constants[name], own[name])
    [found] = damage(parts.graph, [kept], edges.test, own)
    values = edges.values([~kept, np.ones_like(kept), np.zeros_like(kept)], ablation="mean")
    assert found.lost.mean() == pytest.approx((values[1] - values[0]).mean(), abs=1e-5)
    assert found.effect.mean() == pytest.approx((values[1] - values[2]).mean(), abs=1e-5)


def test_random_circuits_are_like_the_circuit(edges: Subject):
    parts, kept = edges.circuit
    one = parts.like(kept, np.random.default_rng(0))
    assert not (one == kept).all()
    assert np.bincount(parts.classes[one]).tolist() == np.bincount(parts.classes[kept]).tolist()


# --- heads, edits ------------------------------------------------------------------------------------


def test_roles_of_heads(subject: Subject):
    found = run_test(subject, "head-role", heads=["0.3"], role="previous_token", texts=16)
    assert found.verdict(0.05)[0] == "holds"
    assert (
        run_test(subject, "head-role", heads=["0.3"], role="induction", texts=16).verdict(0.05)[0]
        == "refuted"
    )


def test_attention_from_place_to_place(subject: Subject):
    [own, above] = run_test(subject, "attends", head="0.3", query="5", key="4").quantities
    plain, found = Plain(subject, subject.test), []
    for _, clean, _ in plain.rows:
        with torch.no_grad():
            _, cache = plain.bridge.run_with_cache(clean)
        found.append(cache["blocks.0.attn.hook_pattern"][0, 3, 5, 4].item())
    assert own.value == pytest.approx(np.mean(found), abs=1e-5)
    assert above.value == pytest.approx(np.mean(found) - 1 / 6, abs=1e-5)
    with pytest.raises(
        ValueError,
        match=r"place 'name': example .* has no such place; expected last, a position from",
    ):
        run_test(subject, "attends", head="0.3", query="name", key="4")


def test_the_effect_of_an_edit(subject: Subject):
    edit = {"edits": ["zero blocks.0.attn.hook_z:3"], "random": 19}
    found = run_test(subject, "edit-effect", least=-10, most=-1, **edit)
    plain = Plain(subject, subject.test)

    def zeroed(value: Tensor, hook: object) -> Tensor:
        made = value.clone()
        made[:, :, 3] = 0
        return made

    before = plain.losses(None)
    plain._run = lambda base, source, keep: plain.bridge.run_with_hooks(  # type: ignore[method-assign]
        base, fwd_hooks=[("blocks.0.attn.hook_z", zeroed)]
    )
    change = plain.losses(None).mean() - before.mean()
    metric = subject.test.metric
    assert abs(found.quantities[0].value) == pytest.approx(abs(change), abs=1e-5), metric.name


# --- what cannot be tested ---------------------------------------------------------------------------


def test_inputs_on_which_the_circuit_was_found_do_not_try_to_break_it(subject: Subject):
    drawn = load_claims_task(subject.model, TaskSpec(examples=10, seed=1)).examples.identities
    found = CircuitGraph()
    found.graph["made"] = {"found_on": drawn[:3]}
    tried = run_test(replace(subject, found=found), "breaking-inputs", inputs=10)
    assert tried.examples.startswith("7 examples")
    found.graph["made"] = {"found_on": drawn[:3], "evaluated_on": drawn[3:]}
    none = run_test(replace(subject, found=found), "breaking-inputs", inputs=10)
    assert none.untestable.endswith("other inputs than 34 known ones: nothing was searched")


def test_without_an_effect_nothing_is_tested(subject: Subject):
    none = subject.task
    assert none.counterparts is not None
    same = replace(none, counterparts=none.examples)
    without = replace(subject, task=same, _known={})
    for name in (
        "faithfulness",
        "knockout",
        "equivalence",
        "random-circuits",
        "completeness",
        "minimality",
    ):
        verdict, why = run_test(without, name).verdict(0.05)
        assert verdict == "could not be tested"
        assert "cannot be told from 0" in why


def test_units_and_places_that_do_not_fit(subject: Subject):
    assert run_test(subject, "stability").untestable.startswith(
        "a circuit of units is not searched for"
    )
    assert run_test(
        subject, "tuning", unit="blocks.0.attn.hook_z:0", angle=0
    ).untestable.startswith("model induction")
    assert run_test(subject, "ablations", ablations=["resample"]).untestable.startswith(
        "ablation resample: units take counterpart, mean"
    )
