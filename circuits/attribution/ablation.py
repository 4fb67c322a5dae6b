"""What units do: the model without them, beside random units of the same site (layer 4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.attribution.counting import (
    ClassChange,
    Counted,
    Difference,
    checked_labels,
    class_changes,
    difference,
    labels_of,
)
from circuits.attribution.passes import Passes, Progress, channels_last
from circuits.attribution.targets import output_site
from circuits.hooks import Change
from circuits.models.adapter import HookedModel
from circuits.models.normalisation import FastNormalisation
from circuits.models.sites import unit_activations
from circuits.units import Site, Unit

How = Literal["zero", "mean", "resample"]
"""What takes a unit's place: zero, its mean over the data, or what it does on another example."""


@dataclass(frozen=True)
class Downstream:
    """What becomes of a later unit.

    Attributes:
        unit: which.
        intact: its mean activation.
        change: of it, without the group.
        random: the root mean square of the change without random groups.
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
        measures: `top1`, `top5` (of labels), `loss` (cross-entropy of labels or next tokens, in nats), `kl`
            from the intact prediction, `top1_changed`, `logit` (of the intact first choice): by name, those
            that can be had.
        classes: classes whose accuracy changed, most first.
        downstream: units of a later site that changed most.
        random_groups: the units beside.
        pool: what they were drawn from.
        n_examples: on how many.
        model: its name.
        model_hash: of its weights.
        data: on what.
        seed: of everything random.
    """

    units: tuple[Unit, ...]
    how: How
    measures: Mapping[str, Difference]
    classes: tuple[ClassChange, ...]
    downstream: tuple[Downstream, ...]
    random_groups: tuple[tuple[Unit, ...], ...]
    pool: str
    n_examples: int
    model: str
    model_hash: str
    data: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {
            "units": [str(u) for u in self.units],
            "measures": {k: asdict(v) for k, v in self.measures.items()},
            "downstream": [asdict(d) | {"unit": str(d.unit)} for d in self.downstream],
            "random_groups": [[str(u) for u in group] for group in self.random_groups],
        }


def ablate(
    model: HookedModel,
    units: Sequence[str | Unit],
    batches: Iterable[Tensor] | Tensor,
    *,
    labels: Sequence[int] | None = None,
    how: How = "zero",
    n_random: int = 20,
    pool: Sequence[str | Unit] | None = None,
    later: str | Site | None = None,
    top: int = 10,
    data: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> AblationReport:
    """Take units away and measure what changes, and what changes without random units.

    Args:
        model: the model.
        units: the group; of one site or of several.
        batches: the examples, as the model takes them.
        labels: the class of each; for tokens the next token is the label.
        how: what takes the units' place; `resample` takes them from another example of the batch.
        n_random: different random groups, each with as many units of each site; all there are, if fewer.
        pool: units that they are drawn from; all of the same sites if not given. The group itself is left
            out where enough others are left.
        later: a site behind whose units are looked at too.
        top: how many of them to list.
        data: where the examples come from, for the record.
        seed: of random groups, resampling and bootstrap.
        progress: called with examples done and all there are, as far as known.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if there are no units, one does not exist or is listed twice, labels do not fit, the pool
            is too small, or an option is out of range.
    """
    group = _checked_group(model, units)
    if how not in get_args(How):
        raise ValueError(f"how {how!r} is not one of {', '.join(get_args(How))}")
    if n_random < 0 or top < 0:
        raise ValueError(f"n_random {n_random} and top {top} must be 0 or more")
    others, drawn_from = _random_groups(model, group, pool, n_random, seed)
    parts = _parts(batches, how)
    n = sum(map(len, parts))
    if not n:
        raise ValueError("batches hold no example")
    outputs = output_site(model).n_units
    checked_labels(model, labels, n, outputs)
    later_site = None if later is None else model.site(later)
    if later_site is not None and model.last([later_site, *(u.site for u in group)]) != later_site:
        raise ValueError(f"later {later_site.name!r} does not come behind the units' sites")
    if later_site is not None and later_site.name in {u.site for u in group}:
        raise ValueError(f"later {later_site.name!r} is the units' own site")
    run = _Run(model, [group, *others], how, later_site, seed)
    if how == "mean":
        run.learn_means(parts)
    done = 0
    for x in map(channels_last, parts):
        own = (
            None
            if labels is None
            else torch.tensor(labels[done : done + len(x)], device=model.device)
        )
        with FastNormalisation():
            run.add(x, own)
        done += len(x)
        if progress is not None:
            progress(done, n)
    generator = np.random.default_rng(seed)
    numbers = {k: np.concatenate(v, 1) for k, v in run.numbers.items()}
    # an example without a label has no number in any variant
    known = {k: v[:, ~np.isnan(v[0])] for k, v in numbers.items()}
    measures = {k: difference(v, generator) for k, v in known.items() if v.shape[1]}
    return AblationReport(
        group, how, measures, class_changes(model, labels, run.right), _downstream(later_site, run, top), tuple(others),
        drawn_from, n, model.name,
        model.hash, data, seed,
    )  # fmt: skip


def _parts(batches: Iterable[Tensor] | Tensor, how: How) -> list[Tensor]:
    """Batches; a last one of a single example goes with the one before, if it is to be resampled."""
    parts = list(batches.split(32) if isinstance(batches, Tensor) else batches)
    alone = how == "resample" and len(parts) > 1 and len(parts[-1]) == 1
    if alone and parts[-1].shape[1:] == parts[-2].shape[1:]:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _checked_group(model: HookedModel, units: Sequence[str | Unit]) -> tuple[Unit, ...]:
    group = tuple(model.unit(unit) for unit in units)
    if not group:
        raise ValueError("units: expected at least one to ablate")
    twice = [u for u in set(group) if group.count(u) > 1]
    if twice:
        raise ValueError(f"unit {twice[0]} is listed twice")
    return group


def _random_groups(
    model: HookedModel,
    group: Sequence[Unit],
    pool: Sequence[str | Unit] | None,
    n: int,
    seed: int,
) -> tuple[list[tuple[Unit, ...]], str]:
    """Different random groups, none the group itself, and what they were drawn from."""
    given = None if pool is None else [model.unit(unit) for unit in pool]
    source = "all others of the site" if given is None else f"{len(given)} units given"
    choices: list[tuple[int, list[Unit]]] = []
    for site in dict.fromkeys(unit.site for unit in group):
        wanted = sum(unit.site == site for unit in group)
        all_units = [model.site(site).unit(i) for i in range(model.site(site).n_units)]
        among = all_units if given is None else sorted({u for u in given if u.site == site})
        rest = [unit for unit in among if unit not in group]
        if len(rest) < wanted and n:
            if given is not None:
                raise ValueError(
                    f"pool has {len(rest)} other units of {site}: expected at least {wanted}"
                )
            rest, source = among, "all of the site, the group's own too: there are too few others"
        choices.append((wanted, rest))
    generator = np.random.default_rng(seed)
    ways = math.prod(math.comb(len(rest), wanted) for wanted, rest in choices)
    if ways <= n + 1:  # all there are
        each = [itertools.combinations(rest, wanted) for wanted, rest in choices]
        every = [tuple(itertools.chain(*parts)) for parts in itertools.product(*each)]
        return [g for g in every if set(g) != set(group)][:n], source
    found: dict[tuple[Unit, ...], None] = {}
    while len(found) < n:
        drawn = tuple(
            rest[i]
            for wanted, rest in choices
            for i in sorted(generator.choice(len(rest), wanted, replace=False).tolist())
        )
        if set(drawn) != set(group):
            found[drawn] = None
    return list(found), source


class _Run:
    """Everything that is counted on the way."""

    def __init__(
        self,
        model: HookedModel,
        groups: Sequence[tuple[Unit, ...]],
        how: How,
        later: Site | None,
        seed: int,
    ) -> None:
        self.model, self.how, self.later = model, how, later
        self.sites = [model.site(s) for s in dict.fromkeys(unit.site for unit in groups[0])]
        self.groups = [
            {s.name: [u.index for u in group if u.site == s.name] for s in self.sites}
            for group in groups
        ]
        self.means: dict[str, Tensor] = {}
        self.generator = Generator().manual_seed(seed)
        self.numbers: dict[str, list[np.ndarray]] = {}
        self.right: list[np.ndarray] = []  # of the intact model and of the group
        self.activity: Tensor | None = None  # sums over examples: variant x unit of the later site
        self.n = 0
        self._alone: bool | None = None

    def learn_means(self, parts: Sequence[Tensor]) -> None:
        """Each unit's mean over all examples and positions."""
        totals = {s.name: torch.zeros(0) for s in self.sites}
        counts = dict.fromkeys(totals, 0)
        for x in parts:
            cache = self.model.run(x, read=self.sites, until=self.model.last(self.sites))
            for site in self.sites:
                value = (
                    cache[site]
                    .double()
                    .movedim(site.unit_axis, -1 if "d_head" not in site.axes else -2)
                )
                inner = value.flatten(0, -2) if "d_head" not in site.axes else value.flatten(0, -3)
                total = inner.sum(0)
                totals[site.name] = total if not counts[site.name] else totals[site.name] + total
                counts[site.name] += len(inner)
        self.means = {name: total / counts[name] for name, total in totals.items()}

    def add(self, x: Tensor, labels: Tensor | None) -> None:
        """Measure a batch in all variants."""
        end = output_site(self.model)
        read = [*self.sites, end, *([self.later] if self.later is not None else [])]
        cache = self.model.run(x, read=read)
        other = self._others(len(x))
        rows = self._rows(cache[end])
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(
                f"model {self.model.name} puts out what is not finite on an example as it is"
            )
        counted = Counted(rows, labels_of(self.model, x, labels))
        numbers, activity = [counted.of(rows)], [self._activity(cache)]
        for group in self.groups:
            changed = self._without(x, cache, group, other, read[len(self.sites) :])
            numbers.append(counted.of(self._rows(changed[end.name])))
            activity.append(self._activity(changed))
        for name in numbers[0]:
            self.numbers.setdefault(name, []).append(np.stack([of[name] for of in numbers]))
        if "top1" in numbers[0]:
            self.right.append(np.stack([of["top1"] for of in numbers[:2]]))
        if self.later is not None:
            stacked = torch.stack([a for a in activity if a is not None])
            self.activity = stacked if self.activity is None else self.activity + stacked
        self.n += len(x)

    def _others(self, n: int) -> Tensor:
        """For each example another one: the next in a random order."""
        if n == 1 and self.how == "resample":
            raise ValueError(
                "how 'resample' needs two examples in every batch: one has a single example"
            )
        order = torch.randperm(n, generator=self.generator)
        other = torch.empty_like(order)
        other[order] = order.roll(-1)
        return other

    def _rows(self, value: Tensor) -> Float[Tensor, "example position output"]:
        return unit_activations(output_site(self.model), value).movedim(1, 2).double()

    def _activity(self, cache: Mapping[str, Tensor]) -> Tensor | None:
        if self.later is None:
            return None
        return unit_activations(self.later, cache[self.later.name]).mean(2).sum(0).double()

    def _without(
        self,
        x: Tensor,
        cache: Any,
        group: Mapping[str, list[int]],
        other: Tensor,
        read: Sequence[Site],
    ) -> Mapping[str, Tensor]:
        changes: dict[str, Change] = {
            s.name: self._replacing(s, group[s.name], cache[s], other) for s in self.sites
        }
        if len(self.sites) > 1 or not self._begins(x):
            return self.model.run(x, read=read, edits=changes)
        site = self.sites[0]
        made = changes[site.name](cache[site])
        return self.model.run(x[:1], read=read, edits={site.name: lambda value: made * 1})

    def _begins(self, x: Tensor) -> bool:
        """Whether a pass may begin at the only site (see `Passes.alone`)."""
        if self._alone is None:
            end = output_site(self.model)
            order = [s.name for s in self.model.sites]
            site = self.sites[0]
            between = self.later is None or order.index(self.later.name) > order.index(site.name)
            self._alone = (
                between and Passes(self.model, x[:1], f"{end.name}:0", site, size="keep").alone
            )
        return self._alone

    def _replacing(self, site: Site, units: list[int], intact: Tensor, other: Tensor) -> Change:
        def change(value: Tensor) -> Tensor:
            made = value.clone()
            place = (slice(None),) * site.unit_axis + (units,)
            if self.how == "zero":
                made[place] = 0
            elif self.how == "resample":
                made[place] = intact[other.to(intact.device)][place]
            else:
                mean = self.means[site.name][units].to(made)
                shape = [1] * made.ndim
                shape[site.unit_axis] = len(units)
                if "d_head" in site.axes:
                    shape[site.axes.index("d_head")] = mean.shape[-1]
                made[place] = mean.reshape(shape).expand_as(made[place])
            return made

        return change


def _downstream(later: Site | None, run: _Run, top: int) -> tuple[Downstream, ...]:
    if later is None or run.activity is None:
        return ()
    mean = (run.activity / run.n).cpu()
    change = mean[1:] - mean[:1]
    order = change[0].abs().argsort(descending=True, stable=True)[:top].tolist()
    beside = (
        change[1:].square().mean(0).sqrt()
        if len(change) > 1
        else torch.full((mean.shape[1],), float("nan"))
    )
    return tuple(
        Downstream(later.unit(i), mean[0, i].item(), change[0, i].item(), beside[i].item())
        for i in order
    )
