"""Experiments: variants of a model run over a task.

What is before the first change is not computed again: a pass begins at the first site that a variant changes, or at
the residual stream before it, where what is behind depends on that tensor alone. Variants that begin at one site
share a pass, as many as fit into memory. Behind the last attention only the positions that a task counts are run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from circuits.examples import BATCH
from circuits.experiments.narrowing import Cuts, Narrowing, few
from circuits.experiments.outcomes import Outcomes, Record
from circuits.experiments.variants import INTACT, Context, Prepared, Variant, prepared
from circuits.hooks import Change, placed
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import main_output
from circuits.models.paths.restarting import Restart, nearest_restart, restart_candidates
from circuits.progress import Progress
from circuits.tasks.metrics import (
    Custom,
    Metric,
    accuracy,
    cross_entropy,
    kl,
    logit_of_first,
    top1_changed,
    top5,
)
from circuits.tasks.reading import Places, Reading
from circuits.tasks.targets import output_site
from circuits.tasks.task import Task, TaskBatch, check_metric
from circuits.units import Site

Look = Callable[[int, TaskBatch, Reading, Reading], None]
"""Sees each variant's reading of each batch: the variant's place (0 is the intact model), the batch, the variant's and
the intact model's reading."""

MEMORY = 2**28
"""Bytes that the tensors of one pass may take, roughly; with larger ones a processor is slower."""

_ABOUT = 24
"""The peak memory of a pass, estimated as a multiple of the tensor that it begins with."""

_OUTPUT = 2
"""Copies of the output that a pass holds besides, where every position is computed."""

_ENOUGH = 8
"""With fewer variants than this in a pass it is not checked whether positions can be left out."""


def measures_of(task: Task) -> tuple[Metric, ...]:
    """What can be measured of a task: its own metric first, then all that its answers allow."""
    found = [task.metric]
    if task.answered:
        found += (
            [cross_entropy, accuracy] if task.feeding != "fed" or task.compared else [cross_entropy]
        )
        if task.feeding != "fed" and output_site(task.model).n_units > 10:
            found.append(top5)
    found += [kl, top1_changed, logit_of_first]
    return tuple(dict.fromkeys(found))


def run(
    model: HookedModel,
    variants: Iterable[Variant],
    task: Task,
    *,
    measures: Sequence[Metric] | None = None,
    watch: Sequence[str] = (),
    look: Look | None = None,
    corrupted: bool = False,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcomes:
    """Run a model and variants of it over a task.

    Args:
        model: the model; afterwards it is what it was.
        variants: models with something else in them; the intact model comes first by itself.
        task: what is measured on.
        measures: what is measured; all that the task allows if not given.
        watch: sites whose tensors `look` sees.
        look: sees each variant's readings, for what is no number an example.
        corrupted: run the counterparts instead of the clean examples (what variants take from "the counterpart" are
            the clean ones then).
        batch: examples together.
        memory: bytes that one pass may take, roughly.
        seed: for the record, and of intervals.
        progress: called with passes done and all there are, in examples times variants.

    Raises:
        KeyError: if a site, layer or unit is unknown.
        ValueError: if the model is edited, two variants have one name, an edit does not fit, a measure needs what the
            task does not have, the task is for another model's vocabulary, or the intact model puts out what is not
            finite.
    """
    if model.edited:
        raise ValueError(f"model {model.name} is edited: run experiments outside the edit")
    check_model(model, task)
    own = measures_of(task) if measures is None else tuple(measures)
    for metric in own:
        check_metric(task, metric)
    plans = [prepared(model, variant) for variant in variants]
    names = [INTACT, *(plan.variant.name for plan in plans)]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"variant {twice!r} is there twice: expected a name for each")
    if corrupted or any(plan.reads and plan.variant.live for plan in plans):
        _check_counterparts(task, corrupted)
    engine = _Engine(model, plans, own, tuple(model.site(w) for w in watch), memory)
    values: dict[str, list[np.ndarray]] = {m.name: [] for m in own}
    counts: list[np.ndarray] = []
    order: list[int] = []
    # a position of an edit, or of a person's own metric, is one of each text
    one_length = any(isinstance(metric, Custom) for metric in own) or any(
        placed(change) for plan in plans for change in plan.changes.values()
    )
    done, total = 0, len(task) * (1 + len(plans))
    for part in task.batches(batch, one_length):
        order += part.which
        found: list[dict[str, np.ndarray]] = [{} for _ in names]
        for k, reading, intact in engine.readings(_swapped(part) if corrupted else part):
            found[k] = {m.name: _numbers(m, reading, intact, k, part, task) for m in own}
            if look is not None:
                look(k, part, reading, intact)
            done += len(part)
            if progress is not None:
                progress(done, total)
            if k == 0:
                counts.append(_counts(reading))
        for metric in own:
            values[metric.name].append(np.stack([f[metric.name] for f in found]))
    back = np.argsort(order)
    joined = {name: np.concatenate(rows, 1)[:, back] for name, rows in values.items()}
    return Outcomes(
        own, tuple(names), joined, np.concatenate(counts)[back], task.clusters, task.examples.labels,
        Record.of(model, task, seed),
    )  # fmt: skip


def check_model(model: HookedModel, task: Task) -> None:
    """Raise ValueError if a task was made for a model that takes something else."""
    ours, theirs = model.input.describe(), task.model.input.describe()
    if ours != theirs:
        what = "tokenizer" if ours["kind"] == theirs["kind"] == "tokens" else "input"
        raise ValueError(
            f"task {task.name} was made for {task.model.name}: model {model.name} has another {what}"
        )


def _check_counterparts(task: Task, corrupted: bool) -> None:
    if corrupted and task.counterparts is None:
        raise ValueError(f"task {task.name} has no counterparts: there is no corrupted run")


def _swapped(part: TaskBatch) -> TaskBatch:
    """A batch with clean examples and counterparts exchanged."""
    assert part.counterparts is not None, "checked before"
    return replace(part, inputs=part.counterparts, counterparts=part.inputs)


def _numbers(
    metric: Metric, reading: Reading, intact: Reading, variant: int, part: TaskBatch, task: Task
) -> np.ndarray:
    made = metric.of(reading, intact)
    if variant == 0 and bool(torch.isnan(made).any()):
        at = part.which[int(torch.isnan(made).int().argmax())]
        raise ValueError(
            f"measure {metric.name} of the intact model is not a number on example {task.examples.names[at]!r}"
        )
    return made.detach().double().cpu().numpy()


def _counts(reading: Reading) -> np.ndarray:
    """How many positions count in each example; answers that are fed in are measured as a whole, and count once."""
    if reading.places.fed:
        return np.ones(reading.places.n_examples)
    where = reading.places.example
    return torch.bincount(where.cpu(), minlength=reading.places.n_examples).double().numpy()


@dataclass(frozen=True, eq=False)
class _Share:
    """Variants that begin at one site, or with their input (None), and run together.

    Behind `narrow` only the positions that count are run.
    """

    begin: Restart | None
    members: tuple[int, ...]
    narrow: Site | None = None


class _Engine:
    """Runs the intact model and all variants on one batch after another."""

    def __init__(
        self,
        model: HookedModel,
        plans: Sequence[Prepared],
        measures: Sequence[Metric],
        watch: Sequence[Site],
        memory: int,
    ) -> None:
        self.model, self.plans, self.memory = model, plans, memory
        self.end = output_site(model)
        wanted = [self.end, *(model.site(s) for m in measures for s in m.sites()), *watch]
        self.ends = list(dict.fromkeys(wanted))
        self.keep_output = any(isinstance(m, Custom) for m in measures)
        self.order = {s.name: i for i, s in enumerate(model.sites)}
        self.cuts = Cuts(model, self.end)
        self.whole = self.keep_output or self.end in wanted[1:]  # all of the output is asked for
        self.shares: list[_Share] | None = None
        self.places: tuple[TaskBatch, Places] | None = None  # of the batch that is run

    def readings(self, part: TaskBatch) -> Iterator[tuple[int, Reading, Reading]]:
        """The intact model's reading of a batch (place 0), then each variant's."""
        starts = self._starts()
        read = list(dict.fromkeys([*self.ends, *starts, *self._reads()]))
        cache = self.model.run(part.inputs, mask=part.mask, read=read)
        tensors = {s.name: cache[s] for s in read}
        self._check_finite(tensors[self.end.name], part)
        whole = main_output(cache.output) if self.keep_output else None
        intact = self._reading(part, tensors, whole)
        yield 0, intact, intact
        context = Context(part, tensors, self._counterpart(part))
        if self.shares is None:
            self.shares = self._planned(part, tensors)
        for share in self.shares:
            size = self._together(share, part, tensors)
            for start in range(0, len(share.members), size):
                some = share.members[start : start + size]
                for k, reading in self._run(share, some, part, context):
                    yield k + 1, reading, intact

    # --- what begins where -----------------------------------------------------------------------

    def _plain(self, plan: Prepared) -> bool:
        return plan.model is self.model and not plan.tensors and bool(plan.sites)

    def _starts(self) -> list[Site]:
        """Sites at which passes may begin."""
        if self.shares is not None:
            return [s.begin.site for s in self.shares if s.begin is not None]
        firsts = dict.fromkeys(p.sites[0] for p in self.plans if self._plain(p))
        found = [
            c for name in firsts for c in restart_candidates(self.model, self.model.site(name))
        ]
        return list(dict.fromkeys(found))

    def _reads(self) -> list[Site]:
        return [self.model.site(s) for s in dict.fromkeys(s for p in self.plans for s in p.reads)]

    def _planned(self, part: TaskBatch, tensors: Mapping[str, Tensor]) -> list[_Share]:
        """Where each variant's passes begin, decided on the first batch."""
        begin: dict[str, Restart | None] = {}
        groups: dict[str | int | None, list[int]] = {}
        where: dict[str | int | None, Restart | None] = {}
        for k, plan in enumerate(self.plans):
            if not self._plain(plan):
                groups[k], where[k] = [k], None
                continue
            first = self.model.site(plan.sites[0])
            if first.name not in begin:
                begin[first.name] = self._beginning(first, part, tensors)
            place = begin[first.name]
            key = None if place is None else place.site.name
            groups.setdefault(key, []).append(k)
            where[key] = place
        return [
            _Share(where[key], tuple(members), self._narrow(members, part, tensors))
            for key, members in groups.items()
        ]

    def _narrow(
        self, members: Sequence[int], part: TaskBatch, tensors: Mapping[str, Tensor]
    ) -> Site | None:
        """Where the positions that do not count may be left out of a pass of some variants."""
        length = tensors[self.end.name].shape[1]
        tokens = self.end.axes == ("batch", "position", "unit") and part.inputs.shape[1] == length
        if self.whole or not tokens or length < 2 or len(members) < _ENOUGH:
            return None
        if not few(part.places(length), len(part.inputs), length):
            return None
        changed = [self.order[site] for k in members for site in self.plans[k].sites[-1:]]
        read = [1 + self.order[e.name] for e in self.ends if e != self.end]
        whole = [i for i in range(len(part.inputs)) if part.mask is None or part.mask[i].all()][:2]
        output = tensors[self.end.name]
        return self.cuts.first(part.inputs[whole], output[whole], max([*changed, *read]))

    def _beginning(
        self, first: Site, part: TaskBatch, tensors: Mapping[str, Tensor]
    ) -> Restart | None:
        if part.mask is not None and self.model.padding != "right":
            return None
        ends = self._behind(first)
        # of padded texts the shortest too: what a model has to be told, it is not told where a pass begins
        rows = (0, 1) if part.mask is None else tuple(part.mask.sum(1).argsort()[:2].tolist())
        own = [p.sites for p in self.plans if self._plain(p) and p.sites[0] == first.name]
        changed = [
            self.model.site(name) for name in dict.fromkeys(n for names in own for n in names)
        ]
        return nearest_restart(self.model, first, ends, part.inputs, tensors, changed, rows)

    def _behind(self, site: Site) -> list[Site]:
        """What is read at a site or behind it; what is before is as in the intact model."""
        return [e for e in self.ends if self.order[e.name] >= self.order[site.name]]

    def _together(self, share: _Share, part: TaskBatch, tensors: Mapping[str, Tensor]) -> int:
        """How many variants fit into one pass."""
        if len(share.members) == 1:
            return 1
        like = tensors[self.end.name if share.begin is None else share.begin.site.name]
        output = tensors[self.end.name]
        each = like.nbytes * _ABOUT + (output.nbytes * _OUTPUT if share.narrow is None else 0)
        return max(1, self.memory // max(1, each))

    # --- passes ----------------------------------------------------------------------------------

    def _run(
        self, share: _Share, some: Sequence[int], part: TaskBatch, context: Context
    ) -> Iterator[tuple[int, Reading]]:
        begin, plans = share.begin, [self.plans[k] for k in some]
        if not self._plain(plans[0]):
            yield some[0], self._alone(plans[0], part, context)
            return
        each = [dict(plan.on(context)) for plan in plans]
        inputs, mask = part.inputs, part.mask
        if begin is None:
            ends = self.ends
            inputs = inputs.repeat(len(some), *(1,) * (inputs.ndim - 1))
            mask = None if mask is None else mask.repeat(len(some), 1)
            edits = self._shared(each, len(part.inputs))
        else:
            site = begin.site.name
            ends, inputs, mask = self._behind(begin.site), begin.inputs(inputs), None
            value = context.intact[site]
            own = [made.pop(site, None) for made in each]
            edits = self._shared(each, len(part.inputs))
            # put together when the pass gets there; a copy each, since what follows may work in place
            edits[site] = lambda _: torch.cat(
                [value if change is None else change(value) for change in own]
            )
        n, cut = len(part.inputs), None
        if share.narrow is not None:
            places = part.places(context.intact[self.end.name].shape[1])
            cut = Narrowing.at(share.narrow, places, n)
            edits = cut.added(edits)
        cache = self.model.run(inputs, mask=mask, read=ends, edits=edits)
        whole = main_output(cache.output) if self.keep_output else None
        for i, k in enumerate(some):
            rows = slice(i * n, (i + 1) * n)
            made = {e.name: cache[e][rows] for e in ends}
            output = None if whole is None else whole[rows]
            yield k, self._reading(part, dict(context.intact) | made, output, cut)

    def _alone(self, plan: Prepared, part: TaskBatch, context: Context) -> Reading:
        """A variant with other parameters, or another model."""
        with plan.model.rewriting(plan.tensors):
            cache = plan.model.run(
                part.inputs, mask=part.mask, read=self.ends, edits=dict(plan.on(context))
            )
        whole = main_output(cache.output) if self.keep_output else None
        return self._reading(part, {e.name: cache[e] for e in self.ends}, whole)

    @staticmethod
    def _shared(each: Sequence[Mapping[str, Change]], n: int) -> dict[str, Change]:
        """Changes of several variants, each at its own rows of a stacked batch."""
        if len(each) == 1:
            return dict(each[0])

        def at(name: str) -> Change:
            def change(value: Tensor) -> Tensor:
                parts = zip(each, value.split(n), strict=True)
                return torch.cat([own[name](rows) if name in own else rows for own, rows in parts])

            return change

        return {name: at(name) for name in dict.fromkeys(n for own in each for n in own)}

    def _counterpart(self, part: TaskBatch) -> Mapping[str, Tensor]:
        reads = self._reads()
        if part.counterparts is None or not reads:
            return {}
        cache = self.model.run(
            part.counterparts, mask=part.mask, read=reads, until=self.model.last(reads)
        )
        return {s.name: cache[s] for s in reads}

    # --- readings --------------------------------------------------------------------------------

    def _reading(
        self,
        part: TaskBatch,
        tensors: Mapping[str, Tensor],
        output: Tensor | None,
        cut: Narrowing | None = None,
    ) -> Reading:
        rows = self.end.rows(tensors[self.end.name])
        flat = rows[:, None] if rows.ndim == 2 else rows.flatten(1, -2)
        if self.places is None or self.places[0] is not part:
            self.places = part, part.places(flat.shape[1] if cut is None else part.inputs.shape[1])
        places = self.places[1]
        if cut is None:
            return Reading(
                places, flat[places.row, places.position].double(), tensors, part.mask, output
            )
        rest = {name: value for name, value in tensors.items() if name != self.end.name}
        return Reading(places, flat[places.row, cut.slots].double(), rest, part.mask, output)

    def _check_finite(self, logits: Tensor, part: TaskBatch) -> None:
        bad = ~torch.isfinite(logits).flatten(1).all(1)
        if part.mask is not None:
            return
        if bool(bad.any()):
            raise ValueError(
                f"model {self.model.name} puts out what is not finite on an example as it is"
            )
