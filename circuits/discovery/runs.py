"""A task's batches with the two runs between which edges are patched, and passes with patched edges, many in one.

The sets of edges that one pass patches are stacked along the batch, each with all examples in order. Nothing before
the first patched target is computed again where the pass can start at the residual stream before it
(`models.paths.restarting`). Numbers that are compared come from the same rows of passes of the same size, so that an
edge without effect has the effect 0 to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.ablations import Ablation, AlignedMeans, resampled
from circuits.discovery.graphs import LIMIT, Cut, EdgeGraph
from circuits.examples import BATCH
from circuits.experiments.narrowing import Narrowing, PositionwiseStreams, worth_narrowing
from circuits.experiments.patched_runs import merged
from circuits.experiments.running import MEMORY, PEAK_MEMORY, check_model
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import ActivationCache
from circuits.models.adapter.inputs import ImageInput
from circuits.models.adapter.sites import main_output
from circuits.models.paths.restarting import Restart, restart_at
from circuits.tasks.metrics import Custom, UnitActivation
from circuits.tasks.reading import Places, Reading
from circuits.tasks.targets import output_site
from circuits.tasks.task import Task, TaskBatch
from circuits.units import Site

_RUNS = ("counterpart", "resample")
"""The ablations by which edges carry what they carry in another run."""

_VECTORS = 4096
"""How many vectors (examples times positions) a pass on a CPU has at most: more no longer fit into its caches."""

_TABLES = 16
"""How many bytes an edge of a large graph takes in a pass for each set of edges."""

_NUMBERS = 2**19
"""How many numbers the largest map of a pass on a CPU has at most, for the same reason."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A batch of a task with its two runs.

    Attributes:
        part: the batch.
        clean: the sites that the graph reads, on the clean examples.
        other: the same in the run that patched edges carry.
        intact: the output of the clean run.
        corrupted: the output of the other run; None if edges carry means or nothing, which no run does.
        edits: the changes of the clean run: none, unless the two runs were exchanged.
        other_edits: those of the other run.
    """

    part: TaskBatch
    clean: Mapping[str, Tensor]
    other: Mapping[str, Tensor]
    intact: Reading
    corrupted: Reading | None
    edits: Mapping[str, Change] = field(default_factory=dict)
    other_edits: Mapping[str, Change] = field(default_factory=dict)

    def exchanged(self) -> Pair:
        """The same pair with the two runs exchanged.

        Raises:
            ValueError: if there is no run on counterparts.
        """
        if self.corrupted is None or self.part.counterparts is None:
            raise ValueError("denoising needs a run on counterparts: means and zeros are no run")
        part = replace(self.part, inputs=self.part.counterparts, counterparts=self.part.inputs)
        return Pair(
            part, self.other, self.clean, self.intact, self.intact, self.other_edits, self.edits
        )


class Runs:
    """The runs of a task with patched edges.

    Args:
        graph: the edges.
        task: what is measured.
        ablation: what a patched edge carries.
        shift: by how many positions the counterpart's position embedding is rolled.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: of the other examples that are drawn by the ablation `resample`.
        constants: of the ablation `optimal`: what each site is given, as `discovery.optimal` learns it.

    Raises:
        ValueError: if the model is edited, the task was made for another vocabulary or has no counterparts where they
            are needed, or its texts do not fit the ablation.
    """

    def __init__(
        self,
        graph: EdgeGraph,
        task: Task,
        *,
        ablation: Ablation = "counterpart",
        shift: int = 0,
        batch: int = BATCH,
        memory: int = MEMORY,
        seed: int = 0,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        model = graph.model
        if model.edited:
            raise ValueError(f"model {model.name} is edited: look for circuits outside the edit")
        if ablation not in get_args(Ablation):
            raise ValueError(
                f"ablation {ablation!r}: expected one of {', '.join(get_args(Ablation))}"
            )
        if shift and ablation != "counterpart":
            raise ValueError(
                f"shift {shift} is of counterparts' positions: it does not go with the ablation {ablation}"
            )
        check_model(model, task)
        if ablation == "counterpart" and task.counterparts is None:
            raise ValueError(
                f"task {task.name} has no counterparts: choose the ablation resample, mean or zero, or a task with "
                "counterparts"
            )
        if (ablation == "optimal") != (constants is not None):
            raise ValueError(
                f"ablation {ablation}: constants belong to the ablation optimal, which needs those that were learned "
                "for a circuit, and to no other"
            )
        self.graph, self.task, self.model, self.metric = graph, task, model, task.metric
        self.ablation, self.batch, self.memory = ablation, batch, memory
        metric_sites = [model.site(s) for s in self.metric.sites()]
        # The activation of a unit of an image model needs nothing after it.
        self._of_units = isinstance(self.metric, UnitActivation) and isinstance(
            model.input, ImageInput
        )
        self.keep_output = isinstance(task.metric, Custom)
        self.end: Site = model.last(metric_sites) if self._of_units else output_site(model)
        self.ends = list(dict.fromkeys([self.end, *metric_sites]))
        self._order = {s.name: i for i, s in enumerate(model.sites)}
        self._check_reached(metric_sites)
        self._streams = PositionwiseStreams(model, self.end)
        self._pairs: list[Pair] | None = None
        self._starts: dict[str, Restart | None] = {}
        self._shift = shift
        self._source = resampled(task, seed) if ablation == "resample" else task
        self._constants = self._mean_run() if ablation == "mean" else constants
        self._aligned = self._aligned_means() if ablation.startswith("mean-by-") else None

    def _check_reached(self, metric_sites: Sequence[Site]) -> None:
        """Raise ValueError if all that the metric reads is computed before anything that edges lead to."""
        first = min(self.graph.slopes, key=self._order.__getitem__)
        if metric_sites and all(self._order[s.name] < self._order[first] for s in metric_sites):
            raise ValueError(
                f"metric {self.metric.name} is computed before {first}, the first site that edges lead to, so that no "
                "edge changes it; expected a metric of a later site"
            )

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """What each site is given, at all positions of all examples, by the ablations `mean` and `optimal`.

        Raises:
            ValueError: if the ablation is another.
        """
        if self._constants is None:
            raise ValueError(f"ablation {self.ablation} has no constants: expected mean or optimal")
        return self._constants

    # --- the two runs ----------------------------------------------------------------------------

    def pairs(self) -> Iterator[Pair]:
        """Every batch of the task with its two runs; they are kept where memory allows."""
        if self._pairs is not None:
            yield from self._pairs
            return
        kept, size = [], 0
        for pair in self._made_pairs():
            size += sum(v.nbytes for v in (*pair.clean.values(), *pair.other.values()))
            kept.append(pair)
            if size > self.memory:
                kept.clear()
            yield pair
        self._pairs = kept if size <= self.memory else None

    def _made_pairs(self) -> Iterator[Pair]:
        for part in self._source.batches(self.batch):
            placed = self.graph.placed(self._source, part)
            clean, intact = self.read(part, part.inputs)
            if self.ablation in _RUNS:
                assert part.counterparts is not None, "checked before"
                edits = self._rolled()
                other, corrupted = self.read(part, part.counterparts, edits)
                yield Pair(part, clean | placed, other | placed, intact, corrupted, {}, edits)
            else:
                yield Pair(part, clean | placed, self._filled(part, clean) | placed, intact, None)

    def read(
        self,
        part: TaskBatch,
        inputs: Tensor,
        edits: Mapping[str, Change] | None = None,
    ) -> tuple[dict[str, Tensor], Reading]:
        """The sites that the graph reads and the output, on some inputs."""
        read = list(dict.fromkeys([*map(self.model.site, self.graph.reads), *self.ends]))
        last = None if self.keep_output else self.model.last(read)
        cache = self.model.run(inputs, mask=part.mask, read=read, edits=edits, until=last)
        tensors = {s.name: cache[s] for s in read}
        return tensors, self.reading(part, tensors, output=output_of(cache))

    def _rolled(self) -> dict[str, Change]:
        """The change of the counterpart's run that gives its tokens other positions."""
        if not self._shift:
            return {}
        if "position" not in self.graph.sources:
            raise ValueError(
                f"shift {self._shift}: no position embedding is a source in {self.model.name} (one that does not "
                "depend on the tokens given counts as a constant); expected 0"
            )
        site = self.graph.input_sites[self.graph.sources.index("position")]
        return {site: lambda value: value.roll(self._shift, 1)}

    def _mean_run(self) -> dict[str, Tensor]:
        """The mean of each site over the task's examples and their positions."""
        totals: dict[str, Tensor] = {}
        count = 0.0
        images = isinstance(self.model.input, ImageInput)
        for part in self.task.batches(self.batch):
            clean, _ = self.read(part, part.inputs)
            mask = (
                torch.ones(clean[self.graph.reads[0]].shape[:2]) if part.mask is None else part.mask
            )
            for name in self.graph.reads:
                value = clean[name].double()
                if images:  # channels come before positions
                    rest = tuple(range(2, value.ndim))
                    added = value.mean(rest, keepdim=True).sum(0) if rest else value.sum(0)
                else:
                    real = mask.reshape(*mask.shape, *(1,) * (value.ndim - 2)).to(value)
                    added = (value * real).sum((0, 1))
                totals[name] = totals.get(name, 0) + added
            count += len(part) if images else float(mask.sum())
        return {name: total / count for name, total in totals.items()}

    def _aligned_means(self) -> AlignedMeans:
        """The mean of each site over the task's examples, at each position."""
        names = self._given
        runs = ((part, self.read(part, part.inputs)[0]) for part in self.task.batches(self.batch))
        read = ((part, {name: clean[name] for name in names}) for part, clean in runs)
        return AlignedMeans.of(self.task, read, self.ablation == "mean-by-template")

    @property
    def _given(self) -> list[str]:
        """The sites that are given something else where edges carry what they carry in no run."""
        # What targets read is left out: it would be given as it is where all edges of a target are off, and is no
        # sum of means.
        return [n for n in self.graph.reads if n not in self.graph.slopes]

    def _filled(self, part: TaskBatch, clean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What edges carry that are replaced by means, by constants or by nothing."""
        names = self._given
        if self._aligned is not None:
            return self._aligned.filled(self.task, part, clean, names)
        if self._constants is None:
            return {name: torch.zeros_like(clean[name]) for name in names}
        return spread_out(self._constants, clean, names)

    # --- readings --------------------------------------------------------------------------------

    def reading(
        self,
        part: TaskBatch,
        tensors: Mapping[str, Tensor],
        times: int = 1,
        cut: Narrowing | None = None,
        output: Tensor | None = None,
    ) -> Reading:
        """The output of a pass at the places of a batch, or of several sets stacked."""
        rows = self.end.rows(tensors[self.end.name])
        if self._of_units:  # no output is read
            rows = rows.new_zeros(len(rows), 0)
        flat = rows[:, None] if rows.ndim == 2 else rows.flatten(1, -2)
        own = part.places(flat.shape[1] if cut is None else part.inputs.shape[1])
        places = stacked(own, times, len(part.inputs))
        position = places.position if cut is None else cut.slots.repeat(times)
        mask = None if part.mask is None else copies(part.mask, times)
        kept = {s.name: tensors[s.name] for s in self.ends if cut is None or s != self.end}
        whole = output if self.keep_output else None
        return Reading(places, flat[places.row, position].double(), kept, mask, whole)

    def value(
        self, reading: Reading, intact: Reading, times: int = 1
    ) -> Float[Tensor, "set example"]:
        """The metric of each set and example.

        Raises:
            ValueError: if it is not a number.
        """
        same = intact if times == 1 else _repeated(intact, times)
        made = self.metric.of(reading, same)
        if not bool(torch.isfinite(made).all()):
            bad = int((~torch.isfinite(made)).nonzero()[0])
            raise ValueError(
                f"metric {self.metric.name} is {float(made[bad])} on example {bad % (len(made) // times)} of a batch: "
                "expected a number"
            )
        return made.unflatten(0, (times, -1))

    def corrupted(self, pair: Pair) -> Float[Tensor, " example"]:
        """The metric of each example with every edge patched."""
        if pair.corrupted is not None and self.graph.whole:
            return self.value(pair.corrupted, pair.intact)[0]
        return self.patched(pair, torch.ones(1, len(self.graph)))[0]

    # --- passes ----------------------------------------------------------------------------------

    def patched(
        self,
        pair: Pair,
        off: Float[Tensor, "set edge"],
        alone: str = "",
    ) -> Float[Tensor, "set example"]:
        """The metric with sets of edges patched, all in one pass.

        Args:
            pair: the batch and its two runs.
            off: for each set and edge 1 if it carries what it carried in the other run.
            alone: the one site at which targets are given something else, for sets of edges into its targets: what
                sources put out is then that of the clean run, to the bit.

        Gradients lead back to `off` and to what patched edges carry, where these require one.
        """
        touched = ((off.detach() != 0).any(0) | off.requires_grad).numpy()
        sites = {self.graph.first_site(int(t)) for t in {*self.graph.ends[touched, 1]}}
        changed = (
            [alone] if alone else sorted(sites or self.graph.slopes, key=self._order.__getitem__)
        )
        begin, reached = self._begin(pair, changed)
        # Rows of a set are alike but between a change of its own and `joined`.
        rows, joined = self.graph.rows(changed), self.graph.joined(changed, len(off))
        off = off if rows == 1 else off.repeat_interleave(rows, 0)
        n = len(off)
        known: dict[str, Tensor] = {}
        if alone:
            known = dict(pair.clean)
        elif reached is not None:
            known = {name: v for name, v in pair.clean.items() if name not in reached}
        elif begin is not None:
            stop = self._order[begin.site.name]
            order = self._order  # what is no site was there before
            known = {n: v for n, v in pair.clean.items() if n not in order or order[n] < stop}
        changes = merged(self.model, joined, self.graph.changes(off, pair.other, known))
        cut = self.cut(pair, changed[-1])
        edits = changes if cut is None else cut.added(changes)
        grad = off.requires_grad or any(value.requires_grad for value in pair.other.values())
        tensors, output = self._run(pair, n, begin, edits, reached, grad)
        # What lies before the start is the clean run's.
        before = [s.name for s in self.ends if s.name not in tensors]
        whole = {name: copies(pair.clean[name], n) for name in before}
        made = self.reading(pair.part, whole | tensors, n, cut, output)
        return self.value(made, pair.intact, n)[::rows]

    def cut(self, pair: Pair, changed: str) -> Narrowing | None:
        """Leave out the positions that do not count after the last attention layer, if nothing else needs them.

        Args:
            pair: the batch and its two runs.
            changed: the last site that is changed.
        """
        part, length = pair.part, pair.clean[self.end.name].shape[1]
        tokens = self.end.axes == ("batch", "position", "unit") and part.inputs.shape[1] == length
        if not tokens or length < 2 or len(self.ends) > 1 or self.keep_output:
            return None
        places = part.places(length)
        if not worth_narrowing(places, len(part.inputs), length):
            return None
        whole = [i for i in range(len(part.inputs)) if part.mask is None or part.mask[i].all()][:2]
        output = pair.clean[self.end.name]
        site = self._streams.first(part.inputs[whole], output[whole], self._order[changed])
        return None if site is None else Narrowing.at(site, places, len(part.inputs))

    def _run(
        self,
        pair: Pair,
        n: int,
        begin: Restart | None,
        changes: Mapping[str, Change],
        reached: frozenset[str] | None = None,
        grad: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        inputs, mask = pair.part.inputs, pair.part.mask
        if begin is None:
            inputs = copies(inputs, n)
            mask = None if mask is None else copies(mask, n)
            edits = merged(self.model, pair.edits, changes)
            cache = self.model.run(
                inputs, mask=mask, read=self.ends, edits=edits, until=self.last, grad=grad
            )
            return {s.name: cache[s] for s in self.ends}, output_of(cache)

        def putting(site: str) -> Change:
            value, own = pair.clean[site], changes.get(site)

            def put(_: Tensor) -> Tensor:
                whole = copies(value, n)
                return whole if own is None else own(whole)

            return put

        edits = dict(changes) | {s: putting(s) for s in (begin.site.name, *begin.also)}
        ends = [s for s in self.ends if self._after(s, begin.site, reached)]
        cache = self.model.run(
            begin.inputs(inputs), read=ends, edits=edits, until=self.last, grad=grad
        )
        return {s.name: cache[s] for s in ends}, output_of(cache)

    def _after(self, site: Site, begin: Site, reached: frozenset[str] | None) -> bool:
        """Whether a pass that starts somewhere computes a site."""
        if reached is not None:
            return site.name in reached
        return self._order[site.name] >= self._order[begin.name]

    @property
    def last(self) -> Site | None:
        """Where passes may end; None if the whole output is needed."""
        return None if self.keep_output else self.model.last(self.ends)

    def _begin(
        self, pair: Pair, changed: Sequence[str]
    ) -> tuple[Restart | None, frozenset[str] | None]:
        """Where a pass that changes some sites starts, and which sites it computes if that is not all after it."""
        cut = self.graph.cut(changed)
        if cut is not None:
            key = " ".join(cut.given)  # no site's name contains white space
            if key not in self._starts:
                self._starts[key] = self._tried(pair, self.model.site(cut.given[0]), cut)
            if (start := self._starts[key]) is not None:
                return start, cut.reached
        return self.start(pair, changed[0]), None

    def start(self, pair: Pair, site: str) -> Restart | None:
        """Where a pass that changes a site, and later ones, may start; tested once a site."""
        # A pass that starts inside the model is not told the mask, so it fits padded texts only if the model needs
        # none.
        if pair.part.mask is not None and self.model.padding != "right":
            return None
        for candidate in self.graph.starts(site):
            if candidate.name not in self._starts:
                self._starts[candidate.name] = self._tried(pair, candidate)
            if (start := self._starts[candidate.name]) is not None:
                return start
        return None

    def _tried(self, pair: Pair, candidate: Site, cut: Cut | None = None) -> Restart | None:
        """A start at a site, if everything that is read and changed after it depends on its tensor alone (or on those
        of a cut).
        """
        mask, reached = pair.part.mask, None if cut is None else cut.reached
        # Of padded texts the two shortest have the most padding, and would show it if the model needed the mask.
        rows = (0, 1) if mask is None else tuple(mask.sum(1).argsort()[:2].tolist())
        slopes = map(self.model.site, self.graph.slopes)
        changed = [s for s in slopes if self._after(s, candidate, reached)]
        ends = [s for s in self.ends if self._after(s, candidate, reached)]
        also = () if cut is None else cut.given[1:]
        return restart_at(
            self.model, candidate, ends, pair.part.inputs, pair.clean, changed, rows, also
        )

    def sets_per_pass(self, pair: Pair, site: str = "") -> int:
        """How many sets of edges fit into one pass, and are worth it: on a CPU larger passes are slower.

        Args:
            pair: the batch and its two runs.
            site: the first site that the sets change; any if empty.
        """
        like = pair.clean[self.graph.reads[0]]
        rows = self.graph.rows(self.graph.slopes)
        maps = isinstance(self.model.input, ImageInput) and not self.model.has_stream
        if maps:  # they become smaller on the way
            start = self._order[site] if site else 0
            after = [v for name, v in pair.clean.items() if self._order[name] >= start]
            like = max(after, key=torch.Tensor.numel)
        each = rows * (like.nbytes * PEAK_MEMORY + 2 * pair.clean[self.end.name].nbytes)
        each += _TABLES * len(self.graph) if len(self.graph) > LIMIT else 0
        fitting = max(1, self.memory // max(1, each))
        if like.device.type != "cpu":
            return fitting
        vectors = rows * like.numel() // like.shape[-1]
        worth = _NUMBERS // like.numel() if maps else _VECTORS // max(1, vectors)
        return min(fitting, max(1, worth))


def spread_out(
    constants: Mapping[str, Tensor], clean: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """Constants at some sites, the same at all positions of all examples of a batch."""
    return {name: constants[name].to(clean[name]).expand_as(clean[name]) for name in names}


def stacked(places: Places, times: int, n_rows: int) -> Places:
    """The places of several copies of a batch, one after the other."""
    if times == 1:
        return places
    copy = torch.arange(times).repeat_interleave(len(places.row))
    return Places(
        places.row.repeat(times) + copy * n_rows, places.position.repeat(times),
        places.example.repeat(times) + copy * places.n_examples, places.wanted.repeat(times, 1),
        places.against.repeat(times, 1), places.side.repeat(times), places.n_examples * times,
    )  # fmt: skip


def _repeated(reading: Reading, times: int) -> Reading:
    """A reading as often as there are copies."""
    rows = max(1, int(reading.places.row.max()) + 1)
    tensors = {n: copies(t, times) for n, t in reading.tensors.items()}
    mask = None if reading.mask is None else copies(reading.mask, times)
    return Reading(
        stacked(reading.places, times, rows), reading.logits.repeat(times, 1), tensors, mask
    )


def output_of(cache: ActivationCache) -> Tensor | None:
    """What the model returned; None if the pass ended before."""
    return None if cache.output is None else main_output(cache.output)


def copies(value: Tensor, n: int) -> Tensor:
    """A tensor n times along its first axis, one copy after the other."""
    return value.repeat(n, *(1,) * (value.ndim - 1))
