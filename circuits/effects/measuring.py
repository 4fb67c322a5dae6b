"""Measuring what a recipe does, compared with random edits."""

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
"""So many random edits are tuned to curves as well: each takes as long as the edit itself."""


@dataclass(frozen=True)
class FirstChoice(UnitActivation):
    """Whether a target is the first choice of its site, where it is read."""

    unit: str = "share"

    def of(self, reading: Reading, intact: Reading) -> Float[Tensor, " example"]:
        aim = self.aim(intact)
        units = aim.site.activations(reading.tensors[self.target.site])
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
    """Measure what a recipe does, and what random edits do: the same edits of other units, or of equal norm.

    Args:
        model: the model; afterwards it is what it was.
        recipe: the edits.
        task: what is measured on. Examples stand for the task that they state by themselves.
        targets: what the edits are meant to change: `class:NAME`, `token:WORD`, `SITE:INDEX`, with `@POSITION`
            behind; the place where the intact model is most active if none is given.
        generalisation: other examples, on which the targets are measured too.
        labels: as `ablate` takes them.
        tuning: units of one site whose tuning to curves is measured.
        n_random: how many random edits.
        batch: examples together.
        seed: of the random edits and intervals.
        progress: called with what is done and all there is, in examples times variants.

    Raises:
        KeyError: if a site, layer or target is unknown.
        ValueError: if an edit does not fit, the recipe is for other weights, there is no example, or labels do
            not fit.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.of(model, recipe)
    if model.edited:
        raise ValueError(f"model {model.name} is edited: measure outside the edit")
    recipe.check(model)
    edits = checked(model, recipe.edits)
    if not edits:
        raise ValueError("recipe has no edit to measure")
    asked = as_task(model, task, labels)
    aims = _aims(model, targets)
    own = Variant(EDITED, edits)
    null = null_of(model, own, asked.examples, n_random, seed)
    one = asked.examples.batch(range(1))
    model_hash, first = model.hash, model.logits(one.inputs)
    watch = _Others(model, [edits, *(v.edits or edits for v in null.variants)])
    outcomes = run(
        model, [own, *null.variants], asked, measures=[*measures_of(asked), *aims], watch=watch.names,
        look=watch.look, batch=batch, seed=seed, progress=progress,
    )  # fmt: skip
    whole = watch.added(outcomes)
    found = effects_of(whole, EDITED, null)
    ready, random = prepared(model, own), [prepared(model, v) for v in null.variants]
    named = {m.name for m in aims}
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
    """Each target's number, and of an output whether it is the first choice."""
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


# --- what the edits are not about ----------------------------------------------------------------

OTHERS = "others "


class _Others:
    """How much the units of edited sites change that edits are not about, in each variant."""

    def __init__(self, model: HookedModel, each: Sequence[Sequence[Edit]]) -> None:
        self.own = [edited_units(model, edits) for edits in each]
        self.sites = [
            s
            for s in map(model.site, self.own[0])
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
    """The sites that edits change first, each with the units that they change there."""
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
    """How large a variant's changes are: of parameters, and of what sites hold on some examples."""
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
    """Tuning of units in the intact model, the edited one (the first plan) and random ones."""
    if not units:
        return ()

    def tuned() -> list[RadialTuning]:
        return radial_tuning(model, units, radii=radii, step=5.0, seed=seed)

    radii: list[float] | None = None
    intact = tuned()
    # the same drawings for all: the radius that most units like
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
