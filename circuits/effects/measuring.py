"""Measures the effects of a recipe, compared with random edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.edits.activations import ActivationEdit
from circuits.edits.connections import ConnectionEdit
from circuits.edits.layers import LayerEdit
from circuits.edits.recipes import Recipe, checked
from circuits.edits.records import Edit
from circuits.edits.weights import layer_named
from circuits.effects.reports import EditReport, Norm, TuningChange
from circuits.examples import BATCH, Examples, as_examples
from circuits.experiments.ablation import Labels, as_task, class_changes, effects_of
from circuits.experiments.outcomes import Effect, Outcomes
from circuits.experiments.running import measures_of, run
from circuits.experiments.twins import N_RANDOM, Null, null_of
from circuits.experiments.variants import Prepared, Variant, in_force, prepared
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.tasks.metrics import Metric, UnitActivation
from circuits.tasks.reading import Reading
from circuits.tasks.targets import Target, output_site
from circuits.tasks.task import Task, TaskBatch
from circuits.tuning.radial import RadialTuning, radial_tuning
from circuits.units import Site, Unit

EDITED = "edited"

TUNED = 5
"""For how many random edits tuning curves are measured too; each takes as long as for the edit itself."""


@dataclass(frozen=True)
class FirstChoice(UnitActivation):
    """Whether a target is the largest unit of its site, at the position where it is read."""

    unit: str = "share"

    def of(self, reading: Reading, intact: Reading) -> Float[Tensor, " example"]:
        aim = self.aim(intact)
        units = aim.site.activations(reading.tensors[self.target.site])
        # Position and unit were fixed on the intact model: an edit that moves the maximum must not move what is
        # measured.
        rows = torch.arange(len(units), device=units.device)
        choice = units[rows, :, aim.places].argmax(1)
        return (choice == aim.indices.to(choice)).double()


def measure(
    model: HookedModel,
    recipe: Recipe | Iterable[Edit],
    task: Task | Examples | Tensor | Iterable[Tensor] | str,
    *,
    targets: Sequence[str | Target] = (),
    generalisation: Examples | Tensor | Iterable[Tensor] | None = None,
    labels: Labels | None = None,
    tuning: Sequence[str | Unit] = (),
    n_random: int = N_RANDOM,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> EditReport:
    """Measure the effects of a recipe and of random edits: the same edits of other units, or changes of equal norm.

    Args:
        model: the model; it is unchanged afterwards.
        recipe: the edits.
        task: what is measured on. Examples stand for the task that follows from them.
        targets: what the edits are meant to change: `class:NAME`, `token:WORD` or `SITE:INDEX`, with `@POSITION` after
            it; without one, the most active position in the intact model.
        generalisation: other examples, on which the targets are measured too.
        labels: as in `ablate`.
        tuning: units of one site whose tuning to curves is measured.
        n_random: number of random edits.
        batch: examples per batch.
        seed: seed of the random edits and intervals.
        progress: called with the work done and the total, in examples times variants.

    Raises:
        KeyError: if a site, layer or target is unknown.
        ValueError: if an edit or labels do not fit, the recipe is for other weights, or there are no examples.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.of(model, recipe)
    if model.edited:
        raise ValueError(f"model {model.name} is edited: measure outside the edit")
    recipe.check(model)
    edits = checked(model, recipe.edits)
    if not edits:
        raise ValueError("recipe has no edits: expected at least one to measure")
    asked = as_task(model, task, labels)
    aims = _aims(model, targets)
    own = Variant(EDITED, edits)
    null = null_of(model, own, asked.examples, n_random, seed)
    one = asked.examples.batch(range(1))
    # The state before, to compare with afterwards to the bit.
    model_hash, first = model.hash, model.logits(one.inputs)
    # A variant without edits (a random change) has no units of its own: those of the recipe are left out instead.
    watch = _OffTargetUnits(model, [edits, *(v.edits or edits for v in null.variants)])
    outcomes = run(
        model, [own, *null.variants], asked, measures=[*measures_of(asked), *aims], watch=watch.names,
        look=watch.look, batch=batch, seed=seed, progress=progress,
    )  # fmt: skip
    whole = watch.added(outcomes)
    found = effects_of(whole, EDITED, null)
    ready, random = prepared(model, own), [prepared(model, v) for v in null.variants]
    named = {m.name for m in aims}
    # By weights and by an answer: hooks that stay behind would not show in the hash.
    restored = model.hash == model_hash and torch.equal(model.logits(one.inputs), first)
    return EditReport(
        recipe, {k: v for k, v in found.items() if k in named},
        _generalised(model, own, null, aims, generalisation, batch, seed),
        {k: v for k, v in found.items() if k not in named and not k.startswith(OTHERS)},
        {k.removeprefix(OTHERS): v for k, v in found.items() if k.startswith(OTHERS)},
        class_changes(model, outcomes, EDITED), _tuning(model, [ready, *random[:TUNED]], tuning, seed),
        norms(model, ready, asked.examples, batch), norms(model, random[0], asked.examples, batch) if random else (),
        null.is_, tuple("; ".join(map(str, v.edits)) for v in null.variants if v.edits), outcomes.record, restored,
    )  # fmt: skip


def _aims(model: HookedModel, targets: Sequence[str | Target]) -> list[Metric]:
    """A metric for each target's value, and for outputs also whether the target is the first choice."""
    found: list[Metric] = []
    for target in targets:
        aim = UnitActivation.named(model, target)
        found.append(aim)
        if aim.site == output_site(model) and aim.target.against is None:
            found.append(
                FirstChoice(
                    f"{aim.name} is first choice", "share", 1, target=aim.target, site=aim.site
                )
            )
    return found


def _generalised(
    model: HookedModel,
    own: Variant,
    null: Null,
    aims: Sequence[Metric],
    examples: Examples | Tensor | Iterable[Tensor] | None,
    batch: int,
    seed: int,
) -> dict[str, Effect]:
    if examples is None or not aims:
        return {}
    task = as_task(model, as_examples(model, examples))
    outcomes = run(model, [own, *null.variants], task, measures=aims, batch=batch, seed=seed)
    return effects_of(outcomes, EDITED, null)


# --- off target ----------------------------------------------------------------------------------

OTHERS = "others "


class _OffTargetUnits:
    """How much the units of edited sites that are not edited change, in each variant."""

    def __init__(self, model: HookedModel, each: Sequence[Sequence[Edit]]) -> None:
        self.own = [edited_units(model, edits) for edits in each]
        self.sites = [
            s
            for s in map(model.site, self.own[0])
            # A site all of whose units are edited has no others.
            if any(len(o.get(s.name, ())) < s.n_units for o in self.own)
        ]
        self.found: dict[str, list[list[np.ndarray]]] = {
            s.name: [[] for _ in range(1 + len(each))] for s in self.sites
        }
        self.order: list[int] = []

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.sites]

    def look(self, variant: int, batch: TaskBatch, reading: Reading, intact: Reading) -> None:
        if variant == 0:
            self.order += batch.which
        for site in self.sites:
            own = self.own[max(0, variant - 1)].get(site.name, set())
            rest = [i for i in range(site.n_units) if i not in own]
            before, after = (
                site.by_unit(tensors[site.name])[:, rest].double().flatten(1)
                for tensors in (intact.tensors, reading.tensors)
            )
            share = (after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-30)
            first = _first_rows(batch)
            self.found[site.name][variant].append(share[first].cpu().numpy())

    def added(self, outcomes: Outcomes) -> Outcomes:
        # Batches put texts of similar length together.
        back = np.argsort(self.order)
        for name, rows in self.found.items():
            values = np.stack([np.concatenate(row)[back] for row in rows])
            outcomes = outcomes.with_measure(Metric(OTHERS + name, "share", -1), values)
        return outcomes


def _first_rows(batch: TaskBatch) -> Tensor:
    """The first row of each example (answers of several tokens have a row each)."""
    rows = batch.rows.tolist()
    return torch.tensor([rows.index(i) for i in range(len(batch))])


def edited_units(model: HookedModel, edits: Sequence[Edit]) -> dict[str, set[int]]:
    """The sites that edits change first, each with the units that they edit there."""
    found: dict[str, set[int]] = {}
    for edit in edits:
        if isinstance(edit, ActivationEdit):
            site, own = model.site(edit.where), {u.index for u in edit.edited_units(model)}
        elif isinstance(edit, ConnectionEdit) and edit.into is not None:
            site = model.site(edit.into.site)
            own = set(edit.into.among(site))
        elif isinstance(edit, ConnectionEdit | LayerEdit):
            parts = (
                [part.matrix for part in edit.parts(model.matrices)]
                if isinstance(edit, ConnectionEdit)
                else [layer_named(model.matrices, edit.layer)]
            )
            # A whole layer is edited: of the sites that show its output, the first is the one behind it. No units are
            # excluded, as all may change.
            for name in [e.site for m in parts for e in m.writes[:1]]:
                found.setdefault(name, set())
            continue
        else:
            continue
        found.setdefault(site.name, set()).update(own)
    return found


# --- how large an edit is ------------------------------------------------------------------------


def norms(
    model: HookedModel, plan: Prepared, examples: Examples, batch: int = BATCH
) -> tuple[Norm, ...]:
    """The size of a variant's changes: of parameters, and of activations on some examples."""
    own = model.parameters
    found = []
    for name, tensor in plan.tensors.items():
        before = own[name].data.double()
        gone = (tensor.double() - before).norm().item()
        found.append(Norm(name, gone, gone / max(before.norm().item(), 1e-30)))
    if not plan.sites:
        return tuple(found)
    seen: dict[str, list[tuple[float, float, int]]] = {name: [] for name in plan.sites}

    def sized(site: Site, change: Change) -> Change:
        def changed(value: Tensor) -> Tensor:
            made = change(value)
            # In float64: a small change is a difference of large numbers.
            gone, whole = (
                (v.detach().double().flatten(1).norm(dim=1)) for v in (made - value, value)
            )
            seen[site.name].append(
                (float(gone.sum()), float((gone / whole.clamp_min(1e-30)).sum()), len(gone))
            )
            return made

        return changed

    changes = {name: sized(model.site(name), change) for name, change in plan.fixed().items()}
    for part in examples.batches(batch):
        with model.rewriting(plan.tensors):
            last = model.last(changes)
            model.run(part.inputs, mask=part.mask, edits=changes, read=[last], until=last)
    for name, rows in seen.items():
        n = sum(row[2] for row in rows)
        found.append(Norm(name, sum(r[0] for r in rows) / n, sum(r[1] for r in rows) / n))
    return tuple(found)


# --- tuning --------------------------------------------------------------------------------------


def _tuning(
    model: HookedModel, plans: Sequence[Prepared], units: Sequence[str | Unit], seed: int
) -> tuple[TuningChange, ...]:
    """The tuning of units in the intact model, in the edited one (the first plan) and in random ones."""
    if not units:
        return ()

    def tuned() -> list[RadialTuning]:
        return radial_tuning(model, units, radii=radii, step=5.0, seed=seed)

    radii: list[float] | None = None
    intact = tuned()
    # All models are shown the same drawings, of the radius that most units prefer in the intact model: otherwise an
    # edit that shifts a unit's preferred radius would be compared on other stimuli.
    radii = [max({t.radius for t in intact}, key=[t.radius for t in intact].count)]
    intact = tuned()
    changed = []
    for plan in plans:
        with in_force(plan):
            changed.append(tuned())
    return tuple(
        TuningChange(
            before.unit, before.angles, before.mean, changed[0][i].mean, before.measures, changed[0][i].measures,
            tuple(of[i].measures.echo.value - before.measures.echo.value for of in changed[1:]),
        )
        for i, before in enumerate(intact)
    )  # fmt: skip
