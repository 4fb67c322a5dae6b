"""Measuring what a recipe does, beside its random twins (layer 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from circuits.attribution.counting import (
    Counted,
    checked_labels,
    class_changes,
    interval,
    labels_of,
    p_value,
)
from circuits.attribution.targets import Aim, Target, as_target, output_site
from circuits.edits.activations import ActivationEdit
from circuits.edits.connections import ConnectionEdit
from circuits.edits.layers import LayerEdit
from circuits.edits.recipes import Recipe, checked
from circuits.edits.records import Edit
from circuits.edits.weights import layer_named
from circuits.effects.reports import EditReport, Effect, TuningChange
from circuits.effects.variants import Variant, noise_of, twins_of, variant_of
from circuits.models.adapter import HookedModel
from circuits.models.normalisation import FastNormalisation
from circuits.models.sites import unit_activations
from circuits.tuning.radial import RadialTuning, radial_tuning
from circuits.units import Site, Unit

Progress = Callable[[int, int], object]


def measure(
    model: HookedModel,
    recipe: Recipe | Iterable[Edit],
    batches: Iterable[Tensor] | Tensor,
    *,
    targets: Sequence[str | Unit | Target] = (),
    generalisation: Iterable[Tensor] | Tensor = (),
    labels: Sequence[int] | None = None,
    tuning: Sequence[str | Unit] = (),
    n_random: int = 5,
    data: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> EditReport:
    """Measure what a recipe does, what random twins of it do, and what random changes of its size do.

    Args:
        model: the model; afterwards it is what it was.
        recipe: the edits.
        batches: examples, as the model takes them.
        targets: what the edits are meant to change: `class:NAME`, `token:WORD`, `SITE:INDEX`, with `@POSITION`
            behind; the place where the intact model is most active if none is given.
        generalisation: other examples, on which the targets are measured too.
        labels: the class of each example; for tokens the next token is the label.
        tuning: units of one site whose tuning to curves is measured.
        n_random: how many twins, and how many random changes of the same size.
        data: where the examples come from, for the record.
        seed: of twins, noise and bootstrap.
        progress: called with passes done and all there are.

    Raises:
        KeyError: if a site, layer or target is unknown.
        ValueError: if an edit does not fit, the recipe is for other weights, there is no example, or labels do
            not fit.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.of(model, recipe)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must be from 0 to 2^63 - 1")
    if n_random < 0:
        raise ValueError(f"n_random {n_random} must be 0 or more")
    if model.edited:
        raise ValueError(f"model {model.name} is edited: measure outside the edit")
    recipe.check(model)
    edits = checked(model, recipe.edits)
    if not edits:
        raise ValueError("recipe has no edit to measure")
    aims = [as_target(model, target) for target in targets]
    names = [str(target) for target in targets]
    parts, more = _parts(batches), _parts(generalisation)
    n = sum(map(len, parts))
    if not n:
        raise ValueError("batches hold no example")
    checked_labels(model, labels, n, output_site(model).n_units)
    generator = Generator().manual_seed(seed)
    twins = twins_of(model, edits, n_random, generator)
    edit = variant_of(model, edits)
    noise = [noise_of(model, edit, generator) for _ in range(n_random)]
    variants = [edit, *(variant_of(model, twin) for twin in twins), *noise]
    model_hash, first = model.hash, model.logits(parts[0][:1])
    total = (n + sum(map(len, more))) * (1 + len(variants))
    own = [edits, *twins, *[edits] * len(noise)]
    run = _Run(model, own, variants, aims, labels, _Progress(progress, total))
    for x in parts:
        run.add(x, whole=True)
    effects = _Effects(len(twins), seed)
    classes = class_changes(model, labels, run.right)
    on_target = effects.targets(run, names)
    measures = {k: effects.of(v) for k, v in run.numbers.items() if " " not in k}
    others = {
        k.partition(" ")[2]: effects.of(v)
        for k, v in run.numbers.items()
        if k.startswith("others ")
    }
    norms, noise_norms = edit.norms(model), noise[0].norms(model) if noise else ()
    run.numbers = {}
    for x in more:
        run.add(x, whole=False)
    general = effects.targets(run, names)
    curves = _tuning(model, variants, len(twins), tuning, seed)
    restored = model.hash == model_hash and torch.equal(model.logits(parts[0][:1]), first)
    return EditReport(
        recipe, on_target, general, measures, others, classes, curves, norms, noise_norms,
        tuple("; ".join(map(str, twin)) for twin in twins), model.name, model_hash, data, n, seed, restored,
    )  # fmt: skip


def _parts(batches: Iterable[Tensor] | Tensor) -> list[Tensor]:
    return list(batches.split(32) if isinstance(batches, Tensor) else batches)


class _Progress:
    """Counts examples times variants."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, n: int) -> None:
        self.done += n
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Run:
    """Everything that is counted on the way: by name, variant x example."""

    def __init__(
        self,
        model: HookedModel,
        edits: Sequence[Sequence[Edit]],
        variants: Sequence[Variant],
        aims: Sequence[Target],
        labels: Sequence[int] | None,
        progress: _Progress,
    ) -> None:
        self.model, self.variants, self.aims, self.progress = model, variants, aims, progress
        self.labels = None if labels is None else torch.tensor(labels)
        self.done = 0
        self.numbers: dict[str, list[np.ndarray]] = {}
        self.right: list[np.ndarray] = []
        self.own = [_edited_units(model, each) for each in edits]

    def add(self, x: Tensor, whole: bool) -> None:
        """Measure a batch in all variants; its targets only unless `whole`."""
        model, end = self.model, output_site(self.model)
        sites = [model.site(aim.site) for aim in self.aims]
        watched = [model.site(name) for name in self.own[0]] if whole else []
        names = list({s.name: s for s in (end, *sites, *watched)}.values())
        with FastNormalisation():
            intact = model.run(x, read=names)
            fixed = [Aim.at(model, a, intact[s]) for a, s in zip(self.aims, sites, strict=True)]
            rows = unit_activations(end, intact[end]).movedim(1, 2).double()
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(
                    f"model {model.name} puts out what is not finite on an example as it is"
                )
            labels = None
            if whole and self.labels is not None:
                labels = self.labels[self.done : self.done + len(x)].to(model.device)
            counted = Counted(rows, labels_of(model, x, labels)) if whole else None
            found = [self._numbers(intact, intact, fixed, counted, end, watched, self.own[0])]
            self.progress.add(len(x))
            for variant, own in zip(self.variants, self.own, strict=True):
                with variant.inside(model):
                    cache = model.run(x, read=names)
                found.append(self._numbers(cache, intact, fixed, counted, end, watched, own))
                self.progress.add(len(x))
        for name in found[0]:
            self.numbers.setdefault(name, []).append(np.stack([f[name] for f in found]))
        if labels is not None:
            self.right.append(np.stack([f["top1"] for f in found[:2]]))
        self.done += len(x)

    def _numbers(
        self,
        cache: Mapping[str, Tensor],
        intact: Mapping[str, Tensor],
        fixed: Sequence[Aim],
        counted: Counted | None,
        end: Site,
        watched: Sequence[Site],
        own: Mapping[str, set[int]],
    ) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        if counted is not None:
            found = counted.of(unit_activations(end, cache[end.name]).movedim(1, 2).double())
        for i, aim in enumerate(fixed):
            value = cache[aim.site.name]
            examples = torch.arange(len(value), device=value.device)
            found[f"target {i}"] = aim.value(value, examples).double().cpu().numpy()
            if aim.site == end and aim.target.against is None:
                found[f"first {i}"] = self._first(aim, value)
        for site in watched:
            rest = [i for i in range(site.n_units) if i not in own.get(site.name, set())]
            if rest:
                before, after = (
                    tensors[site.name].movedim(site.unit_axis, 1)[:, rest].double().flatten(1)
                    for tensors in (intact, cache)
                )
                share = (after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-30)
                found[f"others {site.name}"] = share.cpu().numpy()
        return found

    @staticmethod
    def _first(aim: Aim, value: Tensor) -> np.ndarray:
        """Whether the target is the first choice, an example."""
        units = unit_activations(aim.site, value)
        rows = torch.arange(len(units), device=units.device)
        choice = units[rows, :, aim.places].argmax(1)
        return (choice == aim.indices.to(choice)).double().cpu().numpy()


def _edited_units(model: HookedModel, edits: Sequence[Edit]) -> dict[str, set[int]]:
    """The sites that edits change first, each with the units that they change there."""
    found: dict[str, set[int]] = {}
    for edit in edits:
        if isinstance(edit, ActivationEdit):
            site, own = model.site(edit.where), {u.index for u in edit.own(model)}
        elif isinstance(edit, ConnectionEdit) and edit.into is not None:
            site = model.site(edit.into.site)
            own = set(edit.into.among(site))
        elif isinstance(edit, ConnectionEdit | LayerEdit):
            parts = (
                [part.matrix for part in edit.parts(model.matrices)]
                if isinstance(edit, ConnectionEdit)
                else [layer_named(model.matrices, edit.layer)]
            )
            written = [e.site for m in parts for e in m.writes[:1]]
            for name in written:
                found.setdefault(name, set())
            continue
        else:
            continue
        found.setdefault(site.name, set()).update(own)
    return found


class _Effects:
    """Means, bootstrap intervals and p-values."""

    def __init__(self, n_twins: int, seed: int) -> None:
        self.n_twins, self.generator = n_twins, np.random.default_rng(seed)

    def targets(self, run: _Run, names: Sequence[str]) -> dict[str, Effect]:
        """Each target's number, and of an output whether it is the first choice."""
        found = {}
        for i, name in enumerate(names):
            for key, label in ((f"target {i}", name), (f"first {i}", f"{name} is first choice")):
                if key in run.numbers:
                    found[label] = self.of(run.numbers[key])
        return found

    def of(self, parts: Sequence[np.ndarray]) -> Effect:
        """Of batches' numbers, each variant x example."""
        numbers = np.concatenate(parts, 1)
        numbers = numbers[:, ~np.isnan(numbers[0])]  # an example without a label has none
        change = numbers[1:] - numbers[:1]
        n = numbers.shape[1]
        if not n:
            nan = float("nan")
            return Effect(nan, nan, nan, nan, nan, (), (), nan)
        low, high = interval(change[0], self.generator)
        means = change.mean(1)
        random, noise = means[1 : 1 + self.n_twins], means[1 + self.n_twins :]
        return Effect(
            float(numbers[0].mean()), float(numbers[1].mean()), float(means[0]), low, high,
            tuple(random.tolist()), tuple(noise.tolist()),
            p_value(means[0], random if len(random) else noise),
        )  # fmt: skip


def _tuning(
    model: HookedModel,
    variants: Sequence[Variant],
    n_twins: int,
    units: Sequence[str | Unit],
    seed: int,
) -> tuple[TuningChange, ...]:
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
    for variant in variants:
        with variant.inside(model):
            changed.append(tuned())
    found = []
    for i, before in enumerate(intact):
        after = changed[0][i]
        echoes = [of[i].measures.echo.value - before.measures.echo.value for of in changed[1:]]
        found.append(
            TuningChange(
                before.unit, before.angles, before.mean, after.mean, before.measures, after.measures,
                tuple(echoes[:n_twins]), tuple(echoes[n_twins:]),
            )
        )  # fmt: skip
    return tuple(found)
