"""Runs the intact model and variants of it over a task.

Nothing before a variant's first change is computed again: its pass starts at the first site that it changes, or at the
residual stream before that, if everything downstream depends on that tensor alone. Variants that start at one site
share a pass, as many as fit into memory. After the last attention layer only the counted positions are run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.checks import clipped
from circuits.examples import BATCH
from circuits.experiments.narrowing import Narrowing, PositionwiseStreams, worth_narrowing
from circuits.experiments.outcomes import Outcomes, Record
from circuits.experiments.variants import INTACT, Context, Prepared, Variant, prepared
from circuits.files import Keep, make_now
from circuits.hooks import Change, placed
from circuits.models.adapter.finiteness import first_nonfinite, where_nonfinite
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import main_output
from circuits.models.paths.restarting import Restart, nearest_restart, restart_candidates
from circuits.progress import Progress
from circuits.tasks.metrics import (
    Custom,
    Metric,
    UnitActivation,
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
"""Called with each reading of each batch: the variant's index (0 is the intact model), the batch, the variant's reading
and the intact model's."""

MEMORY = 2**28
"""A rough limit for the tensors of one pass, in bytes; larger passes are slower on a CPU."""

PEAK_MEMORY = 24
"""The peak memory of a pass, estimated as a multiple of the tensor that it begins with."""

_OUTPUT_COPIES = 2
"""How many copies of the output a pass holds in addition, if every position is computed."""

_FEWEST_TO_NARROW = 8
"""With fewer variants in a pass than this it is not tested whether positions can be left out."""


def measures_of(task: Task) -> tuple[Metric, ...]:
    """The measures that a task allows: its own metric first, then every measure that fits its answers."""
    found = [task.metric]
    if task.answered:
        # Of an answer that is fed in token by token there is a loss; accuracy needs something to compare it with.
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
    keep: Keep = make_now,
) -> Outcomes:
    """Run a model and variants of it over a task.

    Args:
        model: the model; it is unchanged afterwards.
        variants: changed versions of the model; the intact model is added in front.
        task: what is measured on.
        measures: what is measured; everything that the task allows if not given.
        watch: sites whose tensors `look` needs.
        look: called with every reading, for results that are not one number for each example.
        corrupted: run the counterparts instead of the clean examples; what variants take from "the counterpart" is
            then the clean example's.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: the seed for the record, and of intervals.
        progress: called with the work done and the total, in examples times variants.
        keep: keeps the numbers of each batch, so that a run which is killed goes on; not together with `look`.

    Raises:
        KeyError: if a site, layer or unit is unknown.
        ValueError: if the model is edited, two variants have the same name, an edit does not fit, a measure needs what
            the task does not have, the task was made for another vocabulary, or the intact model's output is not
            finite.
    """
    if model.edited:
        raise ValueError(f"model {model.name} is edited: run experiments outside the edit")
    check_model(model, task)
    own = measures_of(task) if measures is None else tuple(measures)
    for metric in own:
        check_metric(task, metric)
    # Before anything runs: a bad edit in the last of a hundred variants is found now and not after an hour.
    plans = [prepared(model, variant) for variant in variants]
    names = _variant_names(plans)
    if corrupted and task.counterparts is None:
        raise ValueError(f"task {task.name} has no counterparts: there is no corrupted run")
    runner = _Runner(model, plans, own, tuple(model.site(w) for w in watch), memory)
    values: dict[str, list[np.ndarray]] = {m.name: [] for m in own}
    counts: list[np.ndarray] = []
    order: list[int] = []
    total = len(task) * len(names)
    for number, part in enumerate(task.batches(batch, _needs_one_length(own, plans))):
        before = len(order) * len(names)
        told = None if progress is None else partial(_tell, progress, before, total)
        shown = _swapped(part) if corrupted else part
        make = partial(_numbers, runner, task, own, part, shown, look, told)
        made = keep(f"batch {number}", make)
        order += part.which
        counts.append(np.array(made["positions"], float))
        for metric in own:
            values[metric.name].append(np.array(made["values"][metric.name], float))
    # Batches put texts of similar length together; results are returned in the task's own order.
    back = np.argsort(order)
    joined = {name: np.concatenate(rows, 1)[:, back] for name, rows in values.items()}
    return Outcomes(
        own, names, joined, np.concatenate(counts)[back], task.clusters, task.examples.labels,
        Record.of(model, task, seed),
    )  # fmt: skip


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _numbers(
    runner: _Runner,
    task: Task,
    measures: Sequence[Metric],
    part: TaskBatch,
    shown: TaskBatch,
    look: Look | None,
    told: Callable[[int], object] | None,
) -> dict[str, Any]:
    """The numbers of a batch, as JSON has them: each measure, variant by example, and the counted positions."""
    values: dict[str, list[list[float]]] = {m.name: [[]] * runner.n_variants for m in measures}
    positions: list[float] = []
    for done, (k, reading, intact) in enumerate(runner.readings(shown), 1):
        for m in measures:
            values[m.name][k] = _measure(m, reading, intact, k, part, task).tolist()
        if look is not None:
            look(k, part, reading, intact)
        if told is not None:
            told(done * len(part))
        if k == 0:
            positions = _counted_positions(reading).tolist()
    return {"values": values, "positions": positions}


def _variant_names(plans: Sequence[Prepared]) -> tuple[str, ...]:
    """The variants' names, the intact model's first; raises ValueError if two are the same."""
    names = (INTACT, *(plan.variant.name for plan in plans))
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"variant {twice!r} occurs twice: expected a different name for each")
    return names


def _needs_one_length(measures: Sequence[Metric], plans: Sequence[Prepared]) -> bool:
    """Whether batches may only hold texts of one length."""
    # An edit at a position, and a user's own metric that indexes the output, mean that position of every text. In a
    # padded batch one index would be different positions of different texts.
    return any(isinstance(metric, Custom) for metric in measures) or any(
        placed(change) for plan in plans for change in plan.changes.values()
    )


def check_model(model: HookedModel, task: Task) -> None:
    """Raise ValueError if a task was made for a model with another tokenizer or input."""
    ours, theirs = model.input.describe(), task.model.input.describe()
    if ours != theirs:
        what = "tokenizer" if ours["kind"] == theirs["kind"] == "tokens" else "input"
        raise ValueError(
            f"task {task.name} was made for {task.model.name}: model {model.name} has another {what}"
        )


def _swapped(part: TaskBatch) -> TaskBatch:
    """A batch with clean examples and counterparts exchanged."""
    assert part.counterparts is not None, "checked before"
    return replace(part, inputs=part.counterparts, counterparts=part.inputs)


def _measure(
    metric: Metric, reading: Reading, intact: Reading, variant: int, part: TaskBatch, task: Task
) -> np.ndarray:
    made = metric.of(reading, intact)
    bad = ~torch.isfinite(made) if variant else torch.isnan(made)
    if bool(bad.any()):
        at = part.which[int(bad.int().argmax())]
        whose = f"variant {variant}" if variant else "the intact model"
        raise ValueError(
            f"measure {metric.name} of {whose} is {float(made[bad][0])} on example {task.examples.names[at]!r}: "
            "expected a number"
        )
    return made.detach().double().cpu().numpy()


def _counted_positions(reading: Reading) -> np.ndarray:
    """The number of counted positions of each example; an answer that is fed in is measured whole and counts once."""
    if reading.places.fed:
        return np.ones(reading.places.n_examples)
    where = reading.places.example
    return torch.bincount(where.cpu(), minlength=reading.places.n_examples).double().numpy()


@dataclass(frozen=True, eq=False)
class _SharedPass:
    """Variants that run together, since their passes start at the same site (None: at the input).

    After `narrow` only the counted positions are run.
    """

    begin: Restart | None
    members: tuple[int, ...]
    narrow: Site | None = None


class _Runner:
    """Runs the intact model and all variants, one batch after another."""

    def __init__(
        self,
        model: HookedModel,
        plans: Sequence[Prepared],
        measures: Sequence[Metric],
        watch: Sequence[Site],
        memory: int,
    ) -> None:
        self.model, self.plans, self.memory = model, plans, memory
        # What is measured of units alone needs no logits, which detection models do not have.
        units = model.listed and all(isinstance(m, UnitActivation) for m in measures)
        self.end = model.sites[-1] if units else output_site(model)
        wanted = [self.end, *(model.site(s) for m in measures for s in m.sites()), *watch]
        self.ends = list(dict.fromkeys(wanted))
        self.keep_output = any(isinstance(m, Custom) for m in measures)
        self.order = {s.name: i for i, s in enumerate(model.sites)}
        self.streams = PositionwiseStreams(model, self.end)
        self.whole = (
            self.keep_output or self.end in wanted[1:]
        )  # whether every position of the output is needed
        self.passes: list[_SharedPass] | None = None
        self.places: tuple[TaskBatch, Places] | None = None  # those of the current batch
        self.n_variants = 1 + len(plans)

    def readings(self, part: TaskBatch) -> Iterator[tuple[int, Reading, Reading]]:
        """The intact model's reading of a batch (index 0), then each variant's."""
        # Everything that variants start from, read or are compared with is taken from one intact run.
        starts = self._starts()
        read = list(dict.fromkeys([*self.ends, *starts, *self._reads()]))
        cache = self.model.run(part.inputs, mask=part.mask, read=read)
        tensors = {s.name: cache[s] for s in read}
        self._check_finite(tensors[self.end.name], part)
        whole = main_output(cache.output) if self.keep_output else None
        intact = self._reading(part, tensors, whole)
        yield 0, intact, intact
        context = Context(part, tensors, self._counterpart(part))
        if self.passes is None:
            self.passes = self._plan_passes(part, tensors)
        for shared_pass in self.passes:
            size = self._variants_per_pass(shared_pass, part, tensors)
            for start in range(0, len(shared_pass.members), size):
                some = shared_pass.members[start : start + size]
                for k, reading in self._run(shared_pass, some, part, context):
                    if not bool(torch.isfinite(reading.logits).all()):
                        raise self._overflow(self.plans[k], part, context)
                    yield k + 1, reading, intact

    def _overflow(self, plan: Prepared, part: TaskBatch, context: Context) -> ValueError:
        """The error for a variant that puts out NaN or infinity, with the first site that holds them."""
        with plan.model.rewriting(plan.tensors), plan.model.intervening(dict(plan.on(context))):
            first = first_nonfinite(plan.model, part.inputs, part.mask)
        edits = clipped("; ".join(map(str, plan.variant.edits)), 120)
        return ValueError(
            f"variant {clipped(plan.variant.name)!r}{f' ({edits})' if edits else ''} of {self.model.name} gives NaN or "
            f"infinity, first at {first or 'its output'}: expected edits by smaller numbers"
        )

    # --- what begins where -----------------------------------------------------------------------

    def _edits_activations_only(self, plan: Prepared) -> bool:
        return plan.model is self.model and not plan.tensors and bool(plan.sites)

    def _starts(self) -> list[Site]:
        """The sites at which passes may start; they have to be recorded in the intact run."""
        # Before the first batch it is not yet known which candidates work, so all of them are recorded.
        if self.passes is not None:
            return [s.begin.site for s in self.passes if s.begin is not None]
        firsts = dict.fromkeys(p.sites[0] for p in self.plans if self._edits_activations_only(p))
        found = [
            c for name in firsts for c in restart_candidates(self.model, self.model.site(name))
        ]
        return list(dict.fromkeys(found))

    def _reads(self) -> list[Site]:
        return [self.model.site(s) for s in dict.fromkeys(s for p in self.plans for s in p.reads)]

    def _plan_passes(self, part: TaskBatch, tensors: Mapping[str, Tensor]) -> list[_SharedPass]:
        """Group the variants by where their passes start; decided once, on the first batch."""
        begin: dict[str, Restart | None] = {}
        groups: dict[str | int | None, list[int]] = {}
        where: dict[str | int | None, Restart | None] = {}
        for k, plan in enumerate(self.plans):
            if not self._edits_activations_only(
                plan
            ):  # other weights or another model: a pass of its own
                groups[k], where[k] = [k], None
                continue
            first = self.model.site(plan.sites[0])
            # Tested once a site and not once a variant, as each test costs passes through the model.
            if first.name not in begin:
                begin[first.name] = self._start_at(first, part, tensors)
            place = begin[first.name]
            key = None if place is None else place.site.name
            groups.setdefault(key, []).append(k)
            where[key] = place
        return [
            _SharedPass(where[key], tuple(members), self._narrow(members, part, tensors))
            for key, members in groups.items()
        ]

    def _narrow(
        self, members: Sequence[int], part: TaskBatch, tensors: Mapping[str, Tensor]
    ) -> Site | None:
        """The site after which some variants' pass may leave out positions that do not count; None if there is none."""
        length = tensors[self.end.name].shape[1]
        tokens = self.end.axes == ("batch", "position", "unit") and part.inputs.shape[1] == length
        if self.whole or not tokens or length < 2 or len(members) < _FEWEST_TO_NARROW:
            return None
        if not worth_narrowing(part.places(length), len(part.inputs), length):
            return None
        # Every site that is changed needs all positions, and what is read must still have them; `1 +` because a site
        # that is read has to lie before the narrowing, not at it.
        # The last site that a variant changes; all others lie before it.
        changed = [self.order[site] for k in members for site in self.plans[k].sites[-1:]]
        read = [1 + self.order[e.name] for e in self.ends if e != self.end]
        # Two rows without padding, for a test on real positions only.
        whole = [i for i in range(len(part.inputs)) if part.mask is None or part.mask[i].all()][:2]
        output = tensors[self.end.name]
        return self.streams.first(part.inputs[whole], output[whole], max([*changed, *read]))

    def _start_at(
        self, first: Site, part: TaskBatch, tensors: Mapping[str, Tensor]
    ) -> Restart | None:
        # A pass that starts inside the model is not told the mask, so it fits padded texts only if the model needs
        # none: if it is causal and padding is on the right.
        if part.mask is not None and self.model.padding != "right":
            return None
        ends = self._sites_from(first)
        # Whether a pass may start there is tested on two rows; of padded texts on the two shortest, which have the most
        # padding and would show it if the model needed the mask.
        rows = (0, 1) if part.mask is None else tuple(part.mask.sum(1).argsort()[:2].tolist())
        own = [
            p.sites
            for p in self.plans
            if self._edits_activations_only(p) and p.sites[0] == first.name
        ]
        changed = [
            self.model.site(name) for name in dict.fromkeys(n for names in own for n in names)
        ]
        return nearest_restart(self.model, first, ends, part.inputs, tensors, changed, rows)

    def _sites_from(self, site: Site) -> list[Site]:
        """The sites to read at a site or after it; what is before it is the same as in the intact model."""
        return [e for e in self.ends if self.order[e.name] >= self.order[site.name]]

    def _variants_per_pass(
        self, shared_pass: _SharedPass, part: TaskBatch, tensors: Mapping[str, Tensor]
    ) -> int:
        """How many variants fit into one pass."""
        if len(shared_pass.members) == 1:
            return 1
        # A pass that begins inside the network never holds what lies before; its memory goes with the tensor it begins
        # with.
        like = tensors[self.end.name if shared_pass.begin is None else shared_pass.begin.site.name]
        output = tensors[self.end.name]
        each = like.nbytes * PEAK_MEMORY + (
            output.nbytes * _OUTPUT_COPIES if shared_pass.narrow is None else 0
        )
        return max(1, self.memory // max(1, each))

    # --- passes ----------------------------------------------------------------------------------

    def _run(
        self, shared_pass: _SharedPass, some: Sequence[int], part: TaskBatch, context: Context
    ) -> Iterator[tuple[int, Reading]]:
        begin, plans = shared_pass.begin, [self.plans[k] for k in some]
        if not self._edits_activations_only(plans[0]):
            yield some[0], self._run_alone(plans[0], part, context)
            return
        each = [dict(plan.on(context)) for plan in plans]
        inputs, mask = part.inputs, part.mask
        if begin is None:
            ends = self.ends
            inputs = inputs.repeat(len(some), *(1,) * (inputs.ndim - 1))
            mask = None if mask is None else mask.repeat(len(some), 1)
            edits = self._stacked(each, len(part.inputs))
        else:
            site = begin.site.name
            ends, inputs, mask = self._sites_from(begin.site), begin.inputs(inputs), None
            value = context.intact[site]
            # Changes at the site itself are made on the tensor that is put in, all others on the way.
            own = [made.pop(site, None) for made in each]
            edits = self._stacked(each, len(part.inputs))
            # Concatenated only when the pass gets there, to hold less memory; `cat` copies, so that in-place operations
            # after the site cannot damage the intact model's tensor.
            edits[site] = lambda _: torch.cat(
                [value if change is None else change(value) for change in own]
            )
        n, cut = len(part.inputs), None
        if shared_pass.narrow is not None:
            places = part.places(context.intact[self.end.name].shape[1])
            cut = Narrowing.at(shared_pass.narrow, places, n)
            edits = cut.added(edits)
        cache = self.model.run(inputs, mask=mask, read=ends, edits=edits)
        whole = main_output(cache.output) if self.keep_output else None
        for i, k in enumerate(some):
            rows = slice(i * n, (i + 1) * n)
            made = {e.name: cache[e][rows] for e in ends}
            output = None if whole is None else whole[rows]
            # What lies before the start is the intact model's, which the variant shares.
            yield k, self._reading(part, dict(context.intact) | made, output, cut)

    def _run_alone(self, plan: Prepared, part: TaskBatch, context: Context) -> Reading:
        """The reading of a variant with other parameters or another model, in a pass of its own."""
        with plan.model.rewriting(plan.tensors):
            cache = plan.model.run(
                part.inputs, mask=part.mask, read=self.ends, edits=dict(plan.on(context))
            )
        whole = main_output(cache.output) if self.keep_output else None
        return self._reading(part, {e.name: cache[e] for e in self.ends}, whole)

    @staticmethod
    def _stacked(each: Sequence[Mapping[str, Change]], n: int) -> dict[str, Change]:
        """The changes of several variants as one, each acting on its own rows of a stacked batch."""
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
        # Stopped at the last site that is read: nobody looks at what comes behind it.
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
        finite = torch.isfinite(logits)
        if part.mask is not None and self.end.axes[:2] == ("batch", "position"):
            # Nothing reads what a model puts out at padding, so it may be anything.
            finite = finite.flatten(2).all(2) | ~part.mask
        if not bool(finite.all()):
            names = [part.which[row] for row in part.rows.tolist()]
            where = where_nonfinite(self.model, part.inputs, part.mask, names)
            raise ValueError(
                f"model {self.model.name} puts out NaN or infinity on an example of the task, without any edit: {where}"
            )
