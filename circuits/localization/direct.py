"""Direct effects of heads in closed form: what a metric loses if only the logits read another output of a head.

Wang et al. 2022, "Interpretability in the Wild", section 3.1: the path from a head to the logits is patched from the
counterpart's run. The logits read the stream with the head's contribution replaced, through the last normalisation,
which is computed again; nothing else changes. One pass of each run therefore holds it for every head, where
`head_effects` takes a pass for each (and measures total effects too). If heads are removed from the run first, the
growth of others' direct effects shows what stands in for them (section 3.4, backup name movers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import BATCH
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.norms import measure_norm
from circuits.models.adapter.sites import main_output
from circuits.models.adapter.transformer import Transformer
from circuits.models.paths.contributions import norm_of
from circuits.models.paths.residual import Receiver, Sender, Stream
from circuits.models.paths.routes import stream_of
from circuits.progress import Progress
from circuits.tasks.metrics import Metric, logit_difference
from circuits.tasks.reading import Places, Reading
from circuits.tasks.task import Task, TaskBatch

_TOLERANCE = 1e-3
"""How far logits may be from those that the unembedding gives, over the largest."""


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """What a metric changes by if only the logits read what a head put out in the counterpart's run.

    Attributes:
        heads: the heads, written `layer.head`.
        values: the change of the metric, head x example: negative where the head speaks for the answer under a metric
            of which more is better.
        base: the metric without the change, on each example.
        without: the heads that were removed from the run before.
    """

    heads: tuple[str, ...]
    values: Float[np.ndarray, "head example"]
    base: Float[np.ndarray, " example"]
    without: tuple[str, ...]


def direct_effects(
    model: HookedModel,
    task: Task,
    *,
    without: Sequence[str] = (),
    hold_norm: bool = False,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> DirectEffects:
    """The direct effect of every head on a task's metric, by path patching from the counterparts.

    Args:
        model: a transformer.
        task: a task with counterparts.
        without: heads, written `layer.head`, that put out what they put out in the counterpart's run; everything
            behind them is computed again.
        hold_norm: keep the scale of the last normalisation, as direct logit attribution does.
        batch: examples per batch.
        progress: called with the number of examples done and the total.

    Raises:
        KeyError: if there is no such head.
        ValueError: if the task has no counterparts or another metric than of the output, the model's residual stream
            is not the sum of what its parts write, or its logits are not the unembedding of that stream.
    """
    if task.counterparts is None:
        raise ValueError(f"task {task.name} has no counterparts: there is nothing to patch from")
    if task.metric.sites():
        raise ValueError(f"metric {task.metric.name} is of sites: expected one of the output")
    stream = stream_of(model)
    removed = tuple(stream.sender(head) for head in without)
    if wrong := [str(s) for s in removed if s.kind != "head"]:
        raise ValueError(f"without {wrong[0]!r} is no head: expected some written layer.head")
    heads = [s for s in stream.senders if s.kind == "head"]
    values, base = np.full((len(heads), len(task)), np.nan), np.full(len(task), np.nan)
    for part in task.batches(batch):
        which = list(part.which)
        with model.lock, torch.no_grad():
            made = _batch(stream, task.metric, part, heads, removed, hold_norm)
        values[:, which], base[which] = made
        if progress is not None:
            progress(int(np.isfinite(base).sum()), len(task))
    return DirectEffects(tuple(map(str, heads)), values, base, tuple(map(str, removed)))


def _batch(
    stream: Stream,
    metric: Metric,
    part: TaskBatch,
    heads: Sequence[Sender],
    removed: Sequence[Sender],
    hold_norm: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The change of the metric by each head, head x example, and the metric itself."""
    model, logits = stream.model, Receiver("logits")
    sites, last = stream.sender_sites(heads), stream.stream_site(logits)
    before = {
        w.before for s in heads if (w := stream.writers(s.layer, "attention")).norm is not None
    }
    assert part.counterparts is not None, "checked before"
    other = model.run(part.counterparts, mask=part.mask, read=sites)
    put = {s: _put([h for h in removed if stream.output_site(h) == s], other[s]) for s in sites}
    edits = {site: change for site, change in put.items() if change is not None}
    read = [*sites, *before, last, stream.input_site(logits)]
    intact = main_output(model.run(part.inputs, mask=part.mask).output) if removed else None
    own = model.run(part.inputs, mask=part.mask, read=read, edits=edits)
    out = main_output(own.output)
    places = part.places(out.shape[1])
    at = (places.row, places.position)
    tokens, asked = _asked(metric, places)
    weights, shifts = Transformer(model).unembedding()
    _check(model, own[stream.input_site(logits)][at], weights, shifts, out[at])
    weights = weights if tokens is None else weights[:, tokens]

    def reading(value: Tensor) -> Reading:
        return Reading(asked, (value[at] if tokens is None else value[at][:, tokens]).double())

    now = reading(out)
    unchanged = now if intact is None else reading(intact)
    base, each = metric.of(now, unchanged), []
    for head in heads:
        site, after = stream.output_site(head), stream.writers(head.layer, "attention")
        change = (other[site] - own[site])[at][:, head.head] @ stream.matrix("W_O", head.layer)[
            head.head
        ]
        if after.norm is not None:  # what all heads add is normalised together
            change = _moved(after.norm, own[after.before][at], change)
        given = _moved(norm_of(stream, logits), own[last][at], change, hold_norm)
        each.append(
            metric.of(replace(now, logits=now.logits + (given @ weights).double()), unchanged)
            - base
        )
    return torch.stack(each).cpu().numpy(), base.cpu().numpy()


def _moved(
    norm: Any,
    before: Float[Tensor, "place d_model"],
    change: Float[Tensor, "place d_model"],
    held: bool = False,
) -> Float[Tensor, "place d_model"]:
    """The change of a normalisation's output, with its scale computed again or held."""
    if held:
        return (
            measure_norm(norm, before.shape[-1], device=before.device)
            .held(change, before)
            .to(change)
        )
    # With an axis for the batch: modules that normalise may expect batch x position x d_model.
    return (norm((before + change)[None]) - norm(before[None]))[0]


def _put(heads: Sequence[Sender], other: Tensor) -> Change | None:
    """A change of a layer's heads that gives some of them what they put out in another run."""
    if not heads:
        return None
    own = [s.head for s in heads]

    def change(value: Tensor) -> Tensor:
        made = value.clone()
        made[:, :, own] = other[:, :, own].to(value)
        return made

    return change


def _asked(metric: Metric, places: Places) -> tuple[Tensor | None, Places]:
    """The tokens whose logits a metric reads, and places that name them by their number; None for all tokens."""
    if metric != logit_difference:
        return None, places
    tokens = torch.cat([places.wanted.flatten(), places.against.flatten()]).unique()
    tokens = tokens[tokens >= 0]

    def numbered(ids: Tensor) -> Tensor:
        return torch.where(ids >= 0, torch.searchsorted(tokens, ids.contiguous()), ids)

    return tokens, replace(places, wanted=numbered(places.wanted), against=numbered(places.against))


def _check(model: HookedModel, given: Tensor, weights: Tensor, shifts: Tensor, out: Tensor) -> None:
    """Raise ValueError unless logits are the unembedding of what it is given."""
    off = (given @ weights + shifts - out).abs().max()
    if float(off) > _TOLERANCE * float(out.abs().max()):
        raise ValueError(
            f"model {model.name}: its logits are not the unembedding of its stream (capped or scaled), so direct "
            "effects have no closed form: expected a model without, or head_effects"
        )
