"""Path patching: one direct path of a transformer carries what it carried in another run.

Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching"; Wang et al. 2022, "Interpretability in the
Wild", appendix B. A path leads from a sender to a receiver through the residual stream alone. Patched, the receiver
reads the stream with the sender's contribution replaced, behind its own normalisation, which is recomputed; everything
else runs as it does, so that what the receiver then does differently has all its consequences. Nothing is linearised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.experiments.patched_runs import (
    Direction,
    Options,
    Progress,
    Runs,
    changes_of,
    positions_of,
    standing_at,
)
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import ActivationCache, HookedModel
from circuits.models.paths.contributions import check_mlps
from circuits.models.paths.residual import Path, PathName, Sender, Stream
from circuits.models.paths.routes import stream_of

LogitMetric = Callable[[Float[Tensor, "example position token"]], Float[Tensor, " example"]]
"""One number an example from the logits of all examples."""


@dataclass(frozen=True, eq=False)
class PathEffects:
    """What patching paths does, each by itself.

    Attributes:
        paths: the paths of each patch: one, or several that are patched together.
        direction: `noising`: the clean run with paths from the corrupted one; `denoising`: the opposite.
        through_mlps: whether a direct path may lead through MLPs, which then recompute (Wang et al. 2022), or
            through the residual stream alone.
        values: of the metric, in each patched run; without a metric the largest change of any logit at any position.
        effects: how far the values are from those of the run that was patched, patch x example.
        patched: the metric in the run that was patched; 0 without a metric.
        source: the metric in the run that paths come from; without a metric the largest difference of a logit.
        model_hash: of the weights.
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
        """Each patch as it is written, with its effects."""
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
    """Patch each path by itself, many in one pass.

    Args:
        model: a TransformerLens bridge.
        clean: tokens.
        corrupted: their counterparts, pair by pair.
        paths: pairs of a sender (`token`, `position`, `0.3`, `mlp:0`) and a receiver (`1.0.q`, `mlp:1`, `logits`,
            `resid_pre:1`); where several stand together they are patched together, and each receiver's other inputs
            are what they are in that run. None: every direct path of the model, each by itself.
        direction: `noising` patches the clean run from the corrupted one, `denoising` the opposite.
        through_mlps: MLPs between sender and receiver recompute, heads do not (Wang et al. 2022).
        metric: what is measured; None: the largest change of any logit at any position.
        clean_positions: at which positions the clean tokens stand, for the position embedding; 0, 1, 2, … if None.
        corrupted_positions: the same of the counterparts, e.g. rolled by one.
        where: at which positions of which examples the sender is replaced; everywhere if None.
        rows: how many examples one pass takes, all patches together; chosen by memory if None.
        progress: called with the patches that are done, and all there are.

    Raises:
        KeyError: if there is no such sender or receiver.
        ValueError: if counterparts do not go with the clean tokens, a path leads backwards, or the model's residual
            stream is not the sum of its senders.
    """
    stream = stream_of(model)
    sets = [_set_of(stream, path) for path in (stream.paths() if paths is None else paths)]
    if not sets:
        raise ValueError("paths name none: expected at least one pair of a sender and a receiver")
    runs = Runs.of(stream, (clean, clean_positions), (corrupted, corrupted_positions), direction)
    if through_mlps:
        check_mlps(stream)
    values, own, ends = [], [], list[Tensor]()
    for patched, base, source in runs.patched(sets, Options(through_mlps, where), rows, progress):
        values.append(measured(metric, patched, base))
        own.append(measured(metric, base, base))
        ends = ends or [measured(metric, source, base)]
    made, before = torch.stack(values), torch.stack(own)
    written = tuple(tuple(sorted(group)) for group in sets)
    return PathEffects(
        written, direction, through_mlps, made, made - before, before[0], ends[0], model.hash
    )


def record_senders(
    model: HookedModel,
    tokens: Int[Tensor, "example position"],
    positions: Int[Tensor, "..."] | None = None,
) -> ActivationCache:
    """A run with what every sender writes: where `path_changes` takes contributions from.

    Args:
        model: a TransformerLens bridge.
        tokens: examples.
        positions: where they stand, for the position embedding; 0, 1, 2, … if None.

    Raises:
        ValueError: if the model's residual stream is not the sum of its senders.
    """
    stream = stream_of(model)
    edits = standing_at(stream, positions_of(stream, tokens, positions))
    return model.run(tokens, read=stream.sender_sites(stream.senders), edits=edits)


def path_changes(
    model: HookedModel,
    source: Mapping[str, Tensor],
    paths: Iterable[PathName],
    *,
    through_mlps: bool = False,
    where: Bool[Tensor, "mask_example mask_position"] | None = None,
) -> dict[str, Change]:
    """Paths as changes of sites, for `HookedModel.run` and `intervening`; all are patched together.

    They hold for batches of the source's examples only, one forward pass at a time. No paths are no changes.

    Args:
        model: a TransformerLens bridge.
        source: the run that contributions come from: see `record_senders`.
        paths: pairs of a sender and a receiver.
        through_mlps: MLPs between sender and receiver recompute.
        where: at which positions of which examples; everywhere if None.

    Raises:
        KeyError: if there is no such sender or receiver, or the source does not show a sender.
        ValueError: if a path leads backwards.
    """
    stream = stream_of(model)
    group = frozenset(stream.path(path) for path in paths)
    if through_mlps:
        check_mlps(stream)
    other = {name: source[name] for name in stream.sender_sites({s for s, _ in group})}
    return changes_of(stream, [group], other, Options(through_mlps, where))


def _set_of(stream: Stream, path: PathName | Iterable[PathName]) -> frozenset[Path]:
    """One path, or several that are patched together."""
    several = tuple(path)
    if len(several) == 2 and isinstance(several[0], str | Sender):
        several = (several,)
    return frozenset(stream.path(cast(PathName, one)) for one in several)


def measured(metric: LogitMetric | None, logits: Tensor, base: Tensor) -> Tensor:
    """The metric of each example; without one the largest difference of any logit."""
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
