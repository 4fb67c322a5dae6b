"""Ablation: the model without some units, compared with the model without other units that are equally active."""

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
"""What an ablated unit is replaced by: zero; its mean over the task's examples; its activation on another example; its
activation on the example's counterpart."""

Labels = Sequence[int] | Sequence[Sequence[int]] | Tensor
"""A class for each image, or a token for each text and position."""

ABLATED = "ablated"


@dataclass(frozen=True)
class ClassChange:
    """A class's accuracy before and after a change.

    Attributes:
        index: the class's index.
        name: the class's name.
        n: the number of its examples.
        intact: the share of them that the intact model gets right.
        changed: the share that the changed model gets right.
    """

    index: int
    name: str
    n: int
    intact: float
    changed: float


@dataclass(frozen=True)
class Downstream:
    """How an ablation changes a downstream unit.

    Attributes:
        unit: the downstream unit.
        intact: its mean activation in the intact model.
        change: the change of this mean when the group is ablated.
        random: the root mean square of the change over the random variants.
    """

    unit: Unit
    intact: float
    change: float
    random: float


@dataclass(frozen=True)
class AblationReport:
    """What ablating some units does to a model.

    Attributes:
        units: the ablated group.
        how: what the units were replaced by.
        effects: the effect on each measure, the task's own metric first.
        classes: classes whose accuracy changed, the largest change first.
        downstream: the units of a downstream site that changed most.
        null_units: the units of each random variant, if these ablate other units.
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
    """Ablate units and measure what changes, compared with ablating other units.

    Args:
        model: the model.
        units: the group, of one site or of several.
        task: what is measured on. Examples stand for the task that follows from them (see `of_examples`).
        labels: the class of each image; for texts the right token at each position, -1 where none counts.
        how: what the units are replaced by.
        n_random: number of random variants: other groups of live units of the same sites, matched in activity, or
            random changes of equal norm if there are too few of these.
        pool: units that the random groups are drawn from.
        later: a downstream site whose units are compared too.
        top: how many of them to list.
        batch: examples per batch.
        seed: seed of random groups, resampling and intervals.
        progress: called with the work done and the total, in examples times variants.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if no unit is given, a unit does not exist or is given twice, labels do not fit, the task lacks
            counterparts that `how` needs, the pool is too small, or an option is out of range.
    """
    group = checked_units(model, units)
    if how not in get_args(Replacement):
        raise ValueError(f"how {how!r} is not one of {', '.join(get_args(Replacement))}")
    if top < 0:
        raise ValueError(f"top {top} must be 0 or more")
    asked = as_task(model, task, labels)
    watched = _downstream_site(model, later, group)
    given = None if pool is None else [model.unit(unit) for unit in pool]
    seen: Mapping[str, Activity] = {}
    # Only a mean needs a pass over the examples before; zero and resampling read nothing in advance.
    if how == "mean":
        seen = activities(model, [u.site for u in group], asked.examples)
        warn_of_sinks(model, seen, asked.examples)

    def made(swap: Mapping[Unit, Unit]) -> Variant:
        # The same replacement with other units: a random group is ablated in the way that the group itself is.
        return replaced(model, [swap.get(u, u) for u in group], how, seen, ABLATED, seed)

    own = made({})
    null = null_of(model, own, asked.examples, n_random, seed, units=group, pool=given, remake=made)
    watching = _DownstreamSums(
        watched, 2 + len(null.variants)
    )  # 2: the intact model and the ablated group
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
    """The task itself, or the task that follows from examples alone (see `of_examples`).

    Args:
        model: the model.
        task: a task or examples.
        labels: the class of each image; for texts the right token at each position (see `labelled_tokens`).

    Raises:
        ValueError: if labels are given with a task, or do not fit the examples.
    """
    if isinstance(task, Task):
        if labels is not None:
            raise ValueError(f"labels: task {task.name} has its own answers, so leave labels out")
        return task
    if labels is not None and isinstance(model.input, TokenInput):
        return labelled_tokens(as_examples(model, task), labels)  # type: ignore[arg-type]
    return of_examples(as_examples(model, task, labels))  # type: ignore[arg-type]


def checked_units(model: HookedModel, units: Sequence[str | Unit]) -> tuple[Unit, ...]:
    """Parsed units, with each site under its main name.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if there are no units, a unit does not exist, or one is listed twice.
    """
    group = tuple(model.unit(unit) for unit in units)
    if not group:
        raise ValueError("units: expected at least one")
    twice = next((u for u in group if group.count(u) > 1), None)
    # A unit named twice would be one in the edit and two in the random groups, which would then be larger.
    if twice is not None:
        raise ValueError(f"unit {twice} is listed twice")
    return group


def effects_of(outcomes: Outcomes, variant: str, null: Null) -> dict[str, Effect]:
    """The effect of a variant on every measure that at least one example has a value of."""
    found = {
        m.name: outcomes.effect(m.name, variant, null.names, null.is_) for m in outcomes.measures
    }
    return {name: effect for name, effect in found.items() if effect.n}


def class_changes(model: HookedModel, outcomes: Outcomes, variant: str) -> tuple[ClassChange, ...]:
    """The classes whose accuracy a variant changes, the largest change first; empty without labels."""
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
    """The classes whose accuracy changes, the largest change first, given each example's accuracy before and after."""
    each = np.array(labels)
    found = [
        ClassChange(
            index, names[index] if names else str(index), int(own.sum()),
            float(before[own].mean()), float(after[own].mean()),
        )
        for index in np.unique(each).tolist()
        for own in [each == index]
    ]  # fmt: skip
    # With a thousand classes and few examples most do not change at all.
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
    """The model with some units replaced.

    Args:
        model: the model.
        units: the units.
        how: what they are replaced by.
        seen: the activity of their sites, which has their means.
        name: the variant's name.
        seed: seed of the choice of other examples, for `resample`.
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
            raise ValueError(f"how {how!r} needs a task with counterparts: this one has none")
        # `resample` takes from the intact run of the same batch, so that donors cost no pass of their own.
        donors = context.intact if how == "resample" else context.counterpart
        order = _other_example(batch, seed) if how == "resample" else None
        return {
            site: _copied(model.site(site), own, donors[site], order, batch.mask)
            for site, own in by_site.items()
        }

    return Variant(name, live=live, sites=tuple(by_site), reads=tuple(by_site))


def _other_example(batch: TaskBatch, seed: int) -> Tensor:
    """For each row of a batch a row of another example.

    If examples have several rows, one for each answer, the row with the same index is taken, or the last one.
    """
    n = len(batch)
    if n < 2:
        raise ValueError(
            "how 'resample' takes activations from another example: expected at least two examples in a batch"
        )
    # Each example takes from the next one in a random circle, so that none takes from itself. Seeded by the batch's
    # first example: every variant of an experiment takes from the same examples.
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
        # An answer of several tokens has a row of its own: the k-th row takes from the other example's k-th, or from
        # its last if it has fewer.
        found.append(theirs[min(own[example].index(row), len(theirs) - 1)])
    return torch.tensor(found)


def _copied(
    site: Site, units: Units, donors: Tensor, order: Tensor | None, mask: Tensor | None
) -> Change:
    """Units take their activations from other rows or runs; where a shorter text has ended they keep their own."""
    from_ = donors if order is None else donors[order.to(donors.device)]
    # Where the donor's text has ended, its activation is that of padding.
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


def _downstream_site(
    model: HookedModel, later: str | Site | None, group: Sequence[Unit]
) -> Site | None:
    if later is None:
        return None
    site = model.site(later)
    if site.name in {u.site for u in group}:
        raise ValueError(f"later {site.name!r} is the units' own site: expected a site after it")
    # `last` is the one that is computed last of all: if that is a unit's own site, `later` lies before it.
    if model.last([site, *(u.site for u in group)]) != site:
        raise ValueError(
            f"later {site.name!r} comes before the units' sites: expected a site after them"
        )
    return site


class _DownstreamSums:
    """Sums up the mean activations of a downstream site's units in each variant."""

    def __init__(self, site: Site | None, n: int) -> None:
        self.site, self.n = site, 0.0
        self.sums: list[Tensor] = [torch.zeros(())] * n

    def look(self, variant: int, batch: TaskBatch, reading: Reading, intact: Reading) -> None:
        assert self.site is not None, "called for a site"
        value = self.site.activations(reading.tensors[self.site.name]).double()
        if batch.mask is not None and self.site.position_axes == ("position",):
            keep = batch.mask[:, None].to(value)
            # A mean over each text's own length, so that a padded batch gives what single texts give.
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
        # Root mean square: random groups move a unit up or down, and their mean would cancel.
        beside = change[1:].square().mean(0).sqrt() if len(change) > 1 else nan
        return tuple(
            Downstream(self.site.unit(i), mean[0, i].item(), change[0, i].item(), beside[i].item())
            for i in order
        )
