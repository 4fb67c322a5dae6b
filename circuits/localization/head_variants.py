"""Variants in which heads put out something else: what they do in the counterpart's run, or moved along directions.

Unlike the patched paths of `localization.paths`, everything behind the heads is computed again: these are edits of what
heads do, whose effect one can predict and then measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.experiments import Context, Variant
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.routes import stream_of
from circuits.tasks.task import Task

HeadVectors = Mapping[str, Float[Tensor, "head d_head"]]
"""A vector for each of some heads of a layer, by the site of the layer's outputs, in the order in which they were
named."""


def heads_by_site(model: HookedModel, heads: Sequence[str]) -> dict[str, list[int]]:
    """Heads, written `layer.head`, by the site of what their layer's heads put out.

    Raises:
        KeyError: if there is no such head.
        ValueError: if something else that writes to the stream is named.
    """
    stream, found = stream_of(model), dict[str, list[int]]()
    for head in heads:
        sender = stream.sender(head)
        if sender.kind != "head":
            raise ValueError(f"head {head!r} is no head: expected some written layer.head")
        found.setdefault(stream.output_site(sender), []).append(sender.head)
    return found


def exchanged_heads(name: str, model: HookedModel, heads: Sequence[str]) -> Variant:
    """The model with heads that put out what they put out in the counterpart's run.

    Args:
        name: the variant's.
        model: a transformer.
        heads: written `layer.head`.

    Raises:
        KeyError, ValueError: as `heads_by_site`.
    """
    sites = heads_by_site(model, heads)
    return Variant(name, live=_Exchanged(sites), sites=tuple(sites), reads=tuple(sites))


@dataclass(frozen=True)
class _Exchanged:
    sites: Mapping[str, Sequence[int]]

    def __call__(self, context: Context) -> Mapping[str, Change]:
        def at(own: Sequence[int], other: Tensor) -> Change:
            def change(value: Tensor) -> Tensor:
                made = value.clone()
                # Several variants may share a pass, one behind the other along the batch.
                made[:, :, own] = (
                    other[:, :, own].repeat(len(value) // len(other), 1, 1, 1).to(made)
                )
                return made

            return change

        return {site: at(own, context.counterpart[site]) for site, own in self.sites.items()}


def moved_heads(
    name: str,
    model: HookedModel,
    task: Task,
    heads: Sequence[str],
    along: Mapping[str, HeadVectors],
    times: float,
) -> Variant:
    """The model with heads whose outputs are moved at the counted position, by template along directions of its own.

    Args:
        name: the variant's.
        model: a transformer.
        task: the task that the variant is measured on, with one counted position an example.
        heads: written `layer.head`.
        along: by the template's name, what is added to each head's output.
        times: the multiple of it that is added.

    Raises:
        KeyError, ValueError: as `heads_by_site`; also if a template has no directions, or an example several positions.
    """
    sites = heads_by_site(model, heads)
    ends = _counted(task)
    if missing := sorted({q.template for q in task.questions} - along.keys()):
        raise KeyError(
            f"template {missing[0]!r} has no directions: expected one of {', '.join(along)}"
        )
    templates = [q.template for q in task.questions]
    return Variant(name, live=_Moved(sites, ends, templates, along, times), sites=tuple(sites))


@dataclass(frozen=True, eq=False)
class _Moved:
    sites: Mapping[str, Sequence[int]]
    ends: Sequence[int]
    templates: Sequence[str]
    along: Mapping[str, HeadVectors]
    times: float

    def __call__(self, context: Context) -> Mapping[str, Change]:
        assert context.batch is not None, "called in an experiment"
        which = list(context.batch.which)
        ends = torch.tensor([self.ends[i] for i in which])

        def at(site: str, own: Sequence[int]) -> Change:
            added = self.times * torch.stack([self.along[self.templates[i]][site] for i in which])

            def change(value: Tensor) -> Tensor:
                made, copies = value.clone(), len(value) // len(which)
                rows, places = torch.arange(len(value)), ends.repeat(copies)
                for k, head in enumerate(own):
                    made[rows, places, head] += added[:, k].repeat(copies, 1).to(made)
                return made

            return change

        return {site: at(site, own) for site, own in self.sites.items()}


def mean_changes(model: HookedModel, task: Task, heads: Sequence[str]) -> dict[str, HeadVectors]:
    """How heads' outputs at the counted positions differ in the counterparts, on average, in each template.

    Args:
        model: a transformer.
        task: a task with counterparts and one counted position an example.
        heads: written `layer.head`.

    Returns:
        By the template's name: counterpart less clean, of each head.

    Raises:
        KeyError, ValueError: as `heads_by_site`; also if there are no counterparts, or an example has several counted
            positions.
    """
    sites, ends = heads_by_site(model, heads), _counted(task)
    if task.counterparts is None:
        raise ValueError(f"task {task.name} has no counterparts: there is nothing to compare with")
    totals: dict[str, dict[str, Tensor]] = {}
    for part in task.batches():
        assert part.counterparts is not None, "checked before"
        clean, other = (
            model.run(given, mask=part.mask, read=[*sites], until=model.last([*sites]))
            for given in (part.inputs, part.counterparts)
        )
        for row, i in enumerate(part.which):
            total = totals.setdefault(task.questions[i].template, {})
            for site, own in sites.items():
                change = (other[site] - clean[site])[row, ends[i], own].double()
                total[site] = total[site] + change if site in total else change
    counts = {t: sum(q.template == t for q in task.questions) for t in totals}
    return {t: {site: v / counts[t] for site, v in total.items()} for t, total in totals.items()}


def _counted(task: Task) -> list[int]:
    """The one position of each example that counts."""
    found: list[int] = []
    for question, name in zip(task.questions, task.examples.names, strict=True):
        if question.positions is None or len(question.positions) != 1:
            raise ValueError(f"example {name!r} of task {task.name}: expected one counted position")
        found += question.positions
    return found
