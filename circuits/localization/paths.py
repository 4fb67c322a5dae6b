"""Path patching on tasks: which paths of a transformer carry a behaviour, and heads' direct and indirect effects.

Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching"; Wang et al. 2022, "Interpretability in the
Wild", appendix B. `experiments.patching` defines what it means to patch a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.examples import BATCH
from circuits.experiments import Context, Variant
from circuits.experiments.patched_runs import Options, changes_of, patches_of
from circuits.experiments.running import MEMORY
from circuits.experiments.statistics import Interval, mean_intervals
from circuits.files import finite
from circuits.hooks import Change
from circuits.localization.grids import PatchDirection, PatchGrid, means
from circuits.localization.pairing import OtherPairs
from circuits.localization.patching import Directions, GridPlan, measured_grid
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.contributions import check_mlps
from circuits.models.paths.residual import Path, PathName, Receiver, Sender, Stream
from circuits.models.paths.routes import stream_of
from circuits.progress import Progress
from circuits.tables import Table, between
from circuits.tasks.metrics import Metric, as_metric
from circuits.tasks.task import Task


@dataclass(frozen=True)
class PathCell:
    """A direct path.

    Attributes:
        sender: what writes to the residual stream.
        receiver: what reads it.
        options: how it is patched.
    """

    sender: Sender
    receiver: Receiver
    options: Options

    @property
    def path(self) -> Path:
        """Both ends."""
        return self.sender, self.receiver

    @property
    def row(self) -> str:
        """Its row in a matrix."""
        return str(self.sender)

    @property
    def place(self) -> str:
        """Its column in a matrix."""
        return str(self.receiver)

    def __str__(self) -> str:
        held = ", last normalisation held" if self.options.hold_norms else ""
        return f"{self.sender} -> {self.receiver}{held}"

    def reaches(self, n: int) -> Bool[Tensor, " example"]:
        """Every example has every path."""
        return torch.ones(n, dtype=torch.bool)

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "sender": str(self.sender), "receiver": str(self.receiver), "through_mlps": self.options.through_mlps,
            "hold_norms": self.options.hold_norms,
        }  # fmt: skip


def path_grid(
    model: HookedModel,
    task: Task,
    paths: Sequence[PathName] | None = None,
    *,
    direction: Directions = "both",
    through_mlps: bool = False,
    metric: str | Metric | Callable[[Tensor], Tensor] | None = None,
    n_random: int = 1,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> PatchGrid:
    """Patch each path, one at a time, from the other run of its pair, and measure a task.

    Args:
        model: a transformer.
        task: a task with counterparts.
        paths: pairs of a sender (`token`, `position`, `0.3`, `mlp:0`) and a receiver (`1.0.q`, `mlp:1`, `logits`);
            every direct path if None.
        direction: `noising`, `denoising` or `both`.
        through_mlps: MLPs between sender and receiver recompute, heads do not (Wang et al. 2022). Otherwise a path
            leads through the residual stream only.
        metric: as in `patch_grid`.
        n_random: as in `patch_grid`.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: seed of the random pairs, of intervals and p-values.
        progress: called with the work done and the total, in examples times runs.

    Returns:
        A grid of senders (rows) and receivers (columns).

    Raises:
        KeyError: if there is no such sender, receiver or metric.
        ValueError: if a path leads backwards, the model's residual stream is not the sum of its senders, the task has
            no counterparts, or the metric needs what the task does not have or is not a number.
    """
    stream = stream_of(model)
    if through_mlps:
        check_mlps(stream)
    chosen = stream.paths() if paths is None else [stream.path(path) for path in paths]
    if not chosen:
        raise ValueError("paths are empty: expected at least one pair of a sender and a receiver")
    cells = tuple(PathCell(s, r, Options(through_mlps)) for s, r in dict.fromkeys(chosen))
    asked = task if metric is None else task.with_metric(as_metric(metric))
    return _measured_paths(stream, asked, cells, direction, n_random, batch, memory, seed, progress)


@dataclass(frozen=True, eq=False)
class _PatchedPath:
    """Patches a path from the other run of its pair, or from that of another pair."""

    stream: Stream
    cell: PathCell
    others: OtherPairs | None
    draw: int

    def __call__(self, context: Context) -> Mapping[str, Change]:
        assert context.batch is not None, "called in an experiment"
        source = context.counterpart
        if self.others is not None:
            source = self.others.tensors(self.draw - 1, context.batch)
        return changes_of(
            self.stream,
            patches_of(self.stream, [frozenset({self.cell.path})]),
            source,
            self.cell.options,
        )


def _measured_paths(
    stream: Stream,
    task: Task,
    cells: Sequence[PathCell],
    direction: Directions,
    n_random: int,
    batch: int,
    memory: int,
    seed: int,
    progress: Progress | None,
) -> PatchGrid:
    if task.counterparts is None:
        raise ValueError(f"task {task.name} has no counterparts: there is nothing to patch from")
    if n_random < 0:
        raise ValueError(f"n_random {n_random} must be 0 or more")
    model = stream.model
    places = [model.site(name) for name in stream.sender_sites({cell.sender for cell in cells})]
    others = {
        "noising": OtherPairs(model, task, task.counterparts, places, n_random, seed),
        "denoising": OtherPairs(model, task, task.examples, places, n_random, seed),
    }

    def make(way: PatchDirection, cell: PathCell, draw: int) -> Variant:
        live = _PatchedPath(stream, cell, others[way] if draw else None, draw)
        changed = changes_of(stream, patches_of(stream, [frozenset({cell.path})]), {}, cell.options)
        return Variant(
            "", live=live, sites=tuple(changed), reads=tuple(stream.sender_sites({cell.sender}))
        )

    plan = GridPlan(
        task, "path", tuple(cells), make, n_random, lambda way, draw: others[way].there(draw - 1),
        "what it carries in the other run of its pair", "the same of another pair, drawn at random",
    )  # fmt: skip
    return measured_grid(
        model, plan, direction, batch=batch, memory=memory, seed=seed, progress=progress
    )


# --- heads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadEffect:
    """The effect of replacing a head's output on a metric, averaged over examples.

    Attributes:
        head: the head, written `layer.head`.
        total: the effect when everything downstream of the head recomputes.
        direct: the effect when only the logits read the change, through the recomputed final normalisation.
        indirect: total minus direct: what other heads and MLPs make of the change.
        self_repair: see `HeadEffects.self_repair`.
        null: the total effect of the head's output from another pair's run; NaN if it was not measured.
    """

    head: str
    total: Interval
    direct: Interval
    indirect: Interval
    self_repair: Interval
    null: float


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """The effects of replacing heads' outputs on a metric, head x example.

    Each is the metric with a head replaced minus the metric without.

    Attributes:
        heads: the heads, written `layer.head`.
        grid: the grid of patched paths: each head into everything that reads it, into the logits, and into the logits
            with the final normalisation held.
    """

    heads: tuple[str, ...]
    grid: PatchGrid

    def _part(self, k: int) -> Float[np.ndarray, "head example"]:
        n = len(self.heads)
        return self.grid.side().changes[k * n : (k + 1) * n]

    @property
    def total(self) -> Float[np.ndarray, "head example"]:
        """The effect when everything downstream of the head recomputes."""
        return self._part(0)

    @property
    def direct(self) -> Float[np.ndarray, "head example"]:
        """The effect when only the logits read the change, through the recomputed final normalisation."""
        return self._part(1)

    @property
    def direct_held(self) -> Float[np.ndarray, "head example"]:
        """The direct effect with the final normalisation's scale held, as in direct logit attribution."""
        return self._part(2)

    @property
    def indirect(self) -> Float[np.ndarray, "head example"]:
        """Total minus direct: what other heads and MLPs make of the change."""
        return self.total - self.direct

    @property
    def self_repair(self) -> Float[np.ndarray, "head example"]:
        """Total minus the head's direct effect with the final normalisation held.

        Its sign is opposite to that of `direct_held` if the rest of the model compensates for the head (McGrath et al.
        2023, "The Hydra Effect"; Rushing and Nanda 2024, "Explorations of Self-Repair", who also count what the final
        normalisation compensates).
        """
        return self.total - self.direct_held

    @property
    def repaired_by_norm(self) -> Float[np.ndarray, "head example"]:
        """The part of `self_repair` that is due to the final normalisation's new scale; `indirect` is the rest."""
        # self_repair = total - direct_held = (total - direct) + (direct - direct_held) = indirect + repaired_by_norm.
        return self.direct - self.direct_held

    def effects(self) -> tuple[HeadEffect, ...]:
        """Means over examples with 95 % intervals (bootstrap over examples, by template instance)."""
        total, direct, indirect, repair = map(
            self._intervals, (self.total, self.direct, self.indirect, self.self_repair)
        )
        null = means(self.grid.side().random_changes).tolist()
        return tuple(
            HeadEffect(head, total[i], direct[i], indirect[i], repair[i], null[i])
            for i, head in enumerate(self.heads)
        )

    def _intervals(self, values: Float[np.ndarray, "head example"]) -> list[Interval]:
        return mean_intervals(values, self.grid.clusters, self.grid.record.seed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        (way, side), *_ = self.grid.sides.items()
        return finite({
            "metric": self.grid.metric.name, "unit": self.grid.metric.unit, "direction": way,
            "patched": float(side.base.mean()), "other": float(side.other.mean()), "null_is": self.grid.null_is,
            "heads": [asdict(effect) for effect in self.effects()], "record": asdict(self.grid.record),
        })  # fmt: skip

    def tables(self, top: int) -> Iterator[Table | str]:
        """The heads with the largest total effects, and what the columns mean."""
        (way, side), *_ = self.grid.sides.items()
        effects = sorted(self.effects(), key=lambda e: -abs(e.total.value))
        rows = []
        for e in effects[:top]:
            parts = (e.total, e.direct, e.indirect, e.self_repair)
            rows.append(
                (e.head, *(f"{p.value:.4g} ({between(p.low, p.high)})" for p in parts), e.null)
            )
        columns = ("head", "total", "direct", "indirect", "self-repair", "another pair's total")
        chosen = f"{len(rows)} of {len(effects)} heads, seed {self.grid.record.seed}"
        yield Table(
            columns, rows, f"change of the metric by {self.grid.heading(way, side)}; {chosen}"
        )
        yield (
            "total: everything that reads the head recomputes; direct: only the logits read the change; indirect: "
            "total less direct; self-repair: total less the direct effect with the last normalisation held, which "
            "repairs where its sign is opposite to the direct effect's; in brackets 95 % intervals"
        )


def head_effects(
    model: HookedModel,
    task: Task,
    heads: str | Sender | Sequence[str | Sender] | None = None,
    *,
    direction: PatchDirection = "noising",
    metric: str | Metric | Callable[[Tensor], Tensor] | None = None,
    n_random: int = 1,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadEffects:
    """Total, direct and indirect effects of replacing heads' outputs by those of the other run of each pair.

    Args:
        model: a transformer.
        task: a task with counterparts.
        heads: written `layer.head`; any other sender works too (`mlp:0`). Every head if None.
        direction: `noising` replaces outputs in the clean run, `denoising` in the corrupted run.
        metric: as in `patch_grid`.
        n_random: as in `patch_grid`.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: seed of the random pairs and of intervals.
        progress: called with the work done and the total, in examples times runs.

    Raises:
        KeyError: if there is no such head or metric.
        ValueError: if the model's residual stream is not the sum of its senders, the task has no counterparts, or the
            metric needs what the task does not have or is not a number.
    """
    stream = stream_of(model)
    named = [heads] if isinstance(heads, str | Sender) else heads
    chosen = [s for s in stream.senders if s.kind == "head"]
    if named is not None:
        chosen = list(dict.fromkeys(stream.sender(head) for head in named))
    if not chosen:
        raise ValueError("heads are empty: expected at least one, written layer.head")
    asked = task if metric is None else task.with_metric(as_metric(metric))
    logits, usual, held = Receiver("logits"), Options(), Options(hold_norms=True)
    cells = [
        *(PathCell(head, stream.stream_after(head), usual) for head in chosen),
        *(PathCell(head, logits, usual) for head in chosen),
        *(PathCell(head, logits, held) for head in chosen),
    ]
    grid = _measured_paths(stream, asked, cells, direction, n_random, batch, memory, seed, progress)
    return HeadEffects(tuple(map(str, chosen)), grid)
