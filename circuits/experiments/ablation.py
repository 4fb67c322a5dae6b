"""What units do: the model without them, compared with the model without other units that are as active."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.edits.activations import Set, zero
from circuits.examples import BATCH, Examples, as_examples
from circuits.experiments.outcomes import Effect, Outcomes, Record, effects_table
from circuits.experiments.running import run
from circuits.experiments.twins import N_RANDOM, Null, null_of
from circuits.experiments.variants import Context, Variant
from circuits.files import finite
from circuits.hooks import Change
from circuits.means import Activity, activities, warn_of_sinks
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.progress import Progress
from circuits.tables import Table
from circuits.tasks.reading import Reading
from circuits.tasks.task import Task, TaskBatch, labelled_tokens, of_examples
from circuits.units import Site, Unit, Units

Replacement = Literal["zero", "mean", "resample", "counterpart"]
"""What takes a unit's place: zero; its mean over the task's examples; what it is on another example; what it is on the
example's counterpart."""

Labels = Sequence[int] | Sequence[Sequence[int]] | Tensor
"""A class for each image, or a token for each text and position."""

ABLATED = "ablated"


@dataclass(frozen=True)
class ClassChange:
    """A class's accuracy before and after a change.

    Attributes:
        index: of the class.
        name: of it.
        n: examples of it.
        intact: share of them that were right.
        changed: share after.
    """

    index: int
    name: str
    n: int
    intact: float
    changed: float


@dataclass(frozen=True)
class Downstream:
    """What becomes of a later unit.

    Attributes:
        unit: which.
        intact: its mean activation.
        change: of it, without the group.
        random: the root mean square of the change in the random variants.
    """

    unit: Unit
    intact: float
    change: float
    random: float


@dataclass(frozen=True)
class AblationReport:
    """What a model does without some units.

    Attributes:
        units: the group.
        how: what took their place.
        effects: by measure: the task's own first.
        classes: classes whose accuracy changed, most first.
        downstream: units of a later site that changed most.
        null_units: the units of each random variant, where these are other units.
        null_is: what the random variants are.
        record: model, task, examples and seed.
    """

    units: tuple[Unit, ...]
    how: Replacement
    effects: Mapping[str, Effect]
    classes: tuple[ClassChange, ...]
    downstream: tuple[Downstream, ...]
    null_units: tuple[tuple[Unit, ...], ...]
    null_is: str
    record: Record

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite(asdict(self) | {
            "units": [str(u) for u in self.units],
            "downstream": [asdict(d) | {"unit": str(d.unit)} for d in self.downstream],
            "null_units": [[str(u) for u in group] for group in self.null_units],
        })  # fmt: skip

    def tables(self) -> Iterator[Table]:
        """Effects, then classes and later units that changed most, where there are any."""
        title = f"{self.record.model} without {len(self.units)} units ({self.how}), {self.record.measured_on}"
        yield effects_table({"": self.effects}, f"{title}; seed {self.record.seed}")
        yield from classes_table(self.classes)
        if self.downstream:
            rows = [(d.unit, d.intact, d.change, d.random) for d in self.downstream]
            columns = ("unit", "mean activation", "change", "random groups (rms)")
            yield Table(columns, rows, f"units of {self.downstream[0].unit.site}")


def classes_table(classes: Sequence[ClassChange]) -> Iterator[Table]:
    """The ten classes whose accuracy changed most, in a table; nothing where none changed."""
    if classes:
        rows = [(c.name, c.n, c.intact, c.changed) for c in classes[:10]]
        yield Table(
            ("class", "examples", "right", "right when changed"), rows, "classes that changed most"
        )


def ablate(
    model: HookedModel,
    units: Sequence[str | Unit],
    task: Task | Examples | Tensor | Iterable[Tensor] | str,
    *,
    labels: Labels | None = None,
    how: Replacement = "zero",
    n_random: int = N_RANDOM,
    pool: Sequence[str | Unit] | None = None,
    later: str | Site | None = None,
    top: int = 10,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> AblationReport:
    """Take units away and measure what changes, compared with what changes without other units.

    Args:
        model: the model.
        units: the group; of one site or of several.
        task: what is measured on. Examples stand for the task that they state by themselves: the class, if there are
            labels; the next token at every position; or nothing but the intact model's own answers.
        labels: the class of each example, where these are images; of texts the token that is right at each position,
            -1 where none counts.
        how: what takes the units' place.
        n_random: how many random variants: other groups of live units of the same sites, matched in activity; random
            changes of equal norm where there are too few.
        pool: units that the random groups are drawn from.
        later: a site behind whose units are looked at too.
        top: how many of them to list.
        batch: examples together.
        seed: of random groups, resampling and intervals.
        progress: called with what is done and all there is, in examples times variants.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if there are no units, one does not exist or is listed twice, labels do not fit, the task has no
            counterparts where they are asked for, the pool is too small, or an option is out of range.
    """
    group = checked_units(model, units)
    if how not in get_args(Replacement):
        raise ValueError(f"how {how!r} is not one of {', '.join(get_args(Replacement))}")
    if top < 0:
        raise ValueError(f"top {top} must be 0 or more")
    asked = as_task(model, task, labels)
    watched = _later(model, later, group)
    given = None if pool is None else [model.unit(unit) for unit in pool]
    seen: Mapping[str, Activity] = {}
    if how == "mean":
        seen = activities(model, [u.site for u in group], asked.examples)
        warn_of_sinks(model, seen, asked.examples)

    def made(swap: Mapping[Unit, Unit]) -> Variant:
        return replaced(model, [swap.get(u, u) for u in group], how, seen, ABLATED, seed)

    own = made({})
    null = null_of(model, own, asked.examples, n_random, seed, units=group, pool=given, remake=made)
    watching = _Watch(watched, 2 + len(null.variants))  # and the intact model, the group
    outcomes = run(
        model, [own, *null.variants], asked, watch=[] if watched is None else [watched.name],
        look=None if watched is None else watching.look, batch=batch, seed=seed, progress=progress,
    )  # fmt: skip
    return AblationReport(
        group, how, effects_of(outcomes, ABLATED, null), class_changes(model, outcomes, ABLATED),
        watching.changes(top), null.units, null.is_, outcomes.record,
    )  # fmt: skip


def as_task(
    model: HookedModel,
    task: Task | Examples | Tensor | Iterable[Tensor] | str,
    labels: Labels | None = None,
) -> Task:
    """A task, or the one that examples state by themselves (see `of_examples`).

    Args:
        model: the model.
        task: it, or examples.
        labels: the class of each image; of texts the token that is right at each position (see `labelled_tokens`).

    Raises:
        ValueError: if labels come with a task, or do not fit.
    """
    if isinstance(task, Task):
        if labels is not None:
            raise ValueError(f"labels do not go with task {task.name}, which has its own answers")
        return task
    if labels is not None and isinstance(model.input, TokenInput):
        return labelled_tokens(as_examples(model, task), labels)  # type: ignore[arg-type]
    return of_examples(as_examples(model, task, labels))  # type: ignore[arg-type]


def checked_units(model: HookedModel, units: Sequence[str | Unit]) -> tuple[Unit, ...]:
    """Units under their sites' own names.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if there is none, one does not exist, or one is listed twice.
    """
    group = tuple(model.unit(unit) for unit in units)
    if not group:
        raise ValueError("units: expected at least one")
    twice = next((u for u in group if group.count(u) > 1), None)
    if twice is not None:
        raise ValueError(f"unit {twice} is listed twice")
    return group


def effects_of(outcomes: Outcomes, variant: str, null: Null) -> dict[str, Effect]:
    """The effect of a variant on every measure that some example has."""
    found = {
        m.name: outcomes.effect(m.name, variant, null.names, null.is_) for m in outcomes.measures
    }
    return {name: effect for name, effect in found.items() if effect.n}


def class_changes(model: HookedModel, outcomes: Outcomes, variant: str) -> tuple[ClassChange, ...]:
    """Classes whose accuracy a variant changes, most first; none without labels."""
    if outcomes.labels is None or "accuracy" not in outcomes.values:
        return ()
    before, after = outcomes.of("accuracy"), outcomes.of("accuracy", variant)
    return by_class(outcomes.labels, before, after, model.classes)


def by_class(
    labels: Sequence[int],
    before: Float[np.ndarray, " example"],
    after: Float[np.ndarray, " example"],
    names: tuple[str, ...] = (),
) -> tuple[ClassChange, ...]:
    """Classes whose accuracy changes, most first, from what each example has before and after."""
    each = np.array(labels)
    found = [
        ClassChange(
            index, names[index] if names else str(index), int(own.sum()),
            float(before[own].mean()), float(after[own].mean()),
        )
        for index in np.unique(each).tolist()
        for own in [each == index]
    ]  # fmt: skip
    moved = [c for c in found if c.intact != c.changed]
    return tuple(sorted(moved, key=lambda c: -abs(c.intact - c.changed)))


# --- what takes units' places --------------------------------------------------------------------


def replaced(
    model: HookedModel,
    units: Sequence[Unit],
    how: Replacement,
    seen: Mapping[str, Activity],
    name: str,
    seed: int = 0,
) -> Variant:
    """The model with something else in the places of units.

    Args:
        model: the model.
        units: which.
        how: what takes their place.
        seen: their activity, for their means.
        name: of the variant.
        seed: of which example each takes, where they are resampled.
    """
    by_site = {
        site: Units(site, tuple(u.index for u in units if u.site == site))
        for site in dict.fromkeys(u.site for u in units)
    }
    if how == "zero":
        return Variant(name, tuple(zero(own) for own in by_site.values()))
    if how == "mean":
        return Variant(
            name,
            tuple(
                Set(own, values=seen[site].mean[list(own.among(model.site(site)))], origin="mean")
                for site, own in by_site.items()
            ),
        )

    def live(context: Context) -> Mapping[str, Change]:
        batch = context.batch
        if batch is None or (how == "counterpart" and batch.counterparts is None):
            raise ValueError(f"how {how!r} needs a task with counterparts: there are none")
        donors = context.intact if how == "resample" else context.counterpart
        order = _another(batch, seed) if how == "resample" else None
        return {
            site: _taken(model.site(site), own, donors[site], order, batch.mask)
            for site, own in by_site.items()
        }

    return Variant(name, live=live, sites=tuple(by_site), reads=tuple(by_site))


def _another(batch: TaskBatch, seed: int) -> Tensor:
    """For each row one of another example of the batch, the next in a random order.

    Of several rows of an example, one an answer, it is the one in its place, or the last one if there are fewer.
    """
    n = len(batch)
    if n < 2:
        raise ValueError(
            "how 'resample' takes what units are on another example: expected at least two examples a batch"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + batch.which[0]))
    other = torch.empty_like(order)
    other[order] = order.roll(-1)
    rows = batch.rows.tolist()
    own: dict[int, list[int]] = {}
    for row, example in enumerate(rows):
        own.setdefault(example, []).append(row)
    found = []
    for row, example in enumerate(rows):
        theirs = own[int(other[example])]
        found.append(theirs[min(own[example].index(row), len(theirs) - 1)])
    return torch.tensor(found)


def _taken(
    site: Site, units: Units, donors: Tensor, order: Tensor | None, mask: Tensor | None
) -> Change:
    """Units take what they are in other runs; where a shorter text has no token they stay what they are."""
    from_ = donors if order is None else donors[order.to(donors.device)]
    there = None if order is None or mask is None else mask[order]

    def change(value: Tensor) -> Tensor:
        made = value.clone()
        view, other = site.by_unit(made), site.by_unit(from_)
        which = list(units.among(site))
        taken = other[:, which]
        if there is not None and site.position_axes == ("position",):
            keep = there[:, None, :].to(value.device)
            keep = keep[..., None] if site.inner_axis is not None else keep
            taken = torch.where(keep, taken, view[:, which])
        view[:, which] = taken
        return made

    return change


# --- what becomes of later units -----------------------------------------------------------------


def _later(model: HookedModel, later: str | Site | None, group: Sequence[Unit]) -> Site | None:
    if later is None:
        return None
    site = model.site(later)
    if site.name in {u.site for u in group}:
        raise ValueError(f"later {site.name!r} is the units' own site")
    if model.last([site, *(u.site for u in group)]) != site:
        raise ValueError(f"later {site.name!r} does not come behind the units' sites")
    return site


class _Watch:
    """Sums the activity of a later site's units in each variant."""

    def __init__(self, site: Site | None, n: int) -> None:
        self.site, self.n = site, 0.0
        self.sums: list[Tensor] = [torch.zeros(())] * n

    def look(self, variant: int, batch: TaskBatch, reading: Reading, intact: Reading) -> None:
        assert self.site is not None, "called for a site"
        value = self.site.activations(reading.tensors[self.site.name]).double()
        if batch.mask is not None and self.site.position_axes == ("position",):
            keep = batch.mask[:, None].to(value)
            own = (value * keep).sum(2) / keep.sum(2)
        else:
            own = value.mean(2)
        self.sums[variant] = self.sums[variant] + own.sum(0).cpu()
        if variant == 0:
            self.n += len(value)

    def changes(self, top: int) -> tuple[Downstream, ...]:
        if self.site is None:
            return ()
        mean = torch.stack(self.sums) / self.n
        change = mean[1:] - mean[:1]
        order = change[0].abs().argsort(descending=True, stable=True)[:top].tolist()
        nan = torch.full((mean.shape[1],), float("nan"))
        beside = change[1:].square().mean(0).sqrt() if len(change) > 1 else nan
        return tuple(
            Downstream(self.site.unit(i), mean[0, i].item(), change[0, i].item(), beside[i].item())
            for i in order
        )
