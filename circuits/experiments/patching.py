"""Path patching: one direct path of a transformer carries what it carried in another run.

Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching"; Wang et al. 2022, "Interpretability in the
Wild", appendix B. A path leads from a sender to a receiver through the residual stream alone. When it is patched, the
receiver reads the stream with the sender's contribution replaced, and its own normalisation is recomputed. Everything
else runs as usual, so the receiver's changed output has all its downstream consequences. Nothing is linearised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.experiments.patched_runs import (
    Direction,
    Options,
    Progress,
    RunPair,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.contributions import check_mlps
from circuits.models.paths.residual import Path, PathName, Sender, Stream
from circuits.models.paths.routes import stream_of

LogitMetric = Callable[[Float[Tensor, "example position token"]], Float[Tensor, " example"]]
"""Computes one number for each example from the logits of all examples."""


@dataclass(frozen=True, eq=False)
class PathEffects:
    """The effects of patching paths, one patch at a time.

    Attributes:
        paths: the paths of each patch: one, or several that are patched together.
        direction: `noising` patches the clean run with paths from the corrupted run, `denoising` the reverse.
        through_mlps: whether a direct path may lead through MLPs, which then recompute (Wang et al. 2022), or only
            through the residual stream.
        values: the metric in each patched run; without a metric the largest change of any logit at any position.
        effects: the values minus those of the run that was patched, patch x example.
        patched: the metric in the run that was patched, before the patch; 0 without a metric.
        source: the metric in the run that the paths come from; without a metric the largest difference of any logit.
        model_hash: the hash of the model.
    """

    paths: tuple[tuple[Path, ...], ...]
    direction: Direction
    through_mlps: bool
    values: Float[Tensor, "patch example"]
    effects: Float[Tensor, "patch example"]
    patched: Float[Tensor, " example"]
    source: Float[Tensor, " example"]
    model_hash: str

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Each patch in words, with its effects."""
        for group, effects in zip(self.paths, self.effects, strict=True):
            yield ", ".join(f"{sender} -> {receiver}" for sender, receiver in group), effects


def patch_paths(
    model: HookedModel,
    clean: Int[Tensor, "example position"],
    corrupted: Int[Tensor, "counterpart place"],
    paths: Sequence[PathName | Iterable[PathName]] | None = None,
    *,
    direction: Direction = "noising",
    through_mlps: bool = False,
    metric: LogitMetric | None = None,
    clean_positions: Int[Tensor, "..."] | None = None,
    corrupted_positions: Int[Tensor, "..."] | None = None,
    where: Bool[Tensor, "mask_example mask_position"] | None = None,
    rows: int | None = None,
    progress: Progress | None = None,
) -> PathEffects:
    """Measure the effect of each path by itself, with many patches in one pass.

    Args:
        model: a transformer.
        clean: clean tokens.
        corrupted: the corrupted tokens of each pair.
        paths: pairs of a sender (`token`, `position`, `0.3`, `mlp:0`) and a receiver (`1.0.q`, `mlp:1`, `logits`,
            `resid_pre:1`); the paths of a list within the list are patched together, each receiver's other inputs being
            those of that run. None: every direct path of the model, one at a time.
        direction: `noising` patches the clean run from the corrupted one, `denoising` the reverse.
        through_mlps: MLPs between sender and receiver recompute, heads do not (Wang et al. 2022).
        metric: what is measured; None: the largest change of any logit at any position.
        clean_positions: the positions of the clean tokens for the position embedding; 0, 1, 2, … if None.
        corrupted_positions: the same for the corrupted tokens, for example shifted by one.
        where: at which positions of which examples the sender is replaced; everywhere if None.
        rows: how many rows (examples times patches) one pass takes; chosen by memory if None.
        progress: called with the number of patches done and the total.

    Raises:
        KeyError: if there is no such sender or receiver.
        ValueError: if clean and corrupted tokens do not match, a path leads backwards, or the model's residual stream
            is not the sum of its senders.
    """
    stream = stream_of(model)
    sets = [_set_of(stream, path) for path in (stream.paths() if paths is None else paths)]
    if not sets:
        raise ValueError("paths are empty: expected at least one pair of a sender and a receiver")
    runs = RunPair.of(stream, (clean, clean_positions), (corrupted, corrupted_positions), direction)
    if through_mlps:
        check_mlps(stream)
    values, own, ends = [], [], list[Tensor]()
    for patched, base, source in runs.patched(sets, Options(through_mlps, where), rows, progress):
        values.append(measured(metric, patched, base))
        # Measured for every set and not once: with the batch as it was for that set, so that the difference is exactly
        # zero for a path without effect.
        own.append(measured(metric, base, base))
        ends = ends or [measured(metric, source, base)]
    made, before = torch.stack(values), torch.stack(own)
    written = tuple(tuple(sorted(group)) for group in sets)
    return PathEffects(
        written, direction, through_mlps, made, made - before, before[0], ends[0], model.hash
    )


def _set_of(stream: Stream, path: PathName | Iterable[PathName]) -> frozenset[Path]:
    """One path, or several that are patched together, as a set."""
    several = tuple(path)
    # A pair of names is one path; a pair of pairs is two.
    if len(several) == 2 and isinstance(several[0], str | Sender):
        several = (several,)
    return frozenset(stream.path(cast(PathName, one)) for one in several)


def measured(metric: LogitMetric | None, logits: Tensor, base: Tensor) -> Tensor:
    """The metric of each example; without a metric the largest absolute difference of any logit from the base run's."""
    if metric is None:
        return (logits - base).abs().flatten(1).amax(1)
    value = metric(logits)
    if value.shape != logits.shape[:1]:
        raise ValueError(
            f"metric returned shape {tuple(value.shape)}: expected one number for each of {len(logits)} examples"
        )
    if not bool(torch.isfinite(value).all()):
        at = int((~torch.isfinite(value)).nonzero()[0])
        raise ValueError(f"metric is {float(value[at])} on example {at}: expected a finite number")
    return value
