"""Where a pass may begin again: a site whose tensor decides everything behind it.

A change at one site leaves everything before it as it was, so that many changed versions need not run that part again.
Whether what is behind a site depends on its tensor alone is tried, not assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.models.adapter.attaching import PREFIX
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.units import Site

ALIKE = 1e-5
"""How far numbers may differ, as a share of the largest of them, and count as the same."""

_FAILURES = (RuntimeError, LookupError, ValueError, AssertionError)

_SMALLER = 4
"""By how much each side of the image is shrunk that stands in for others."""

_BACK = 40
"""How many sites before a changed one are looked through for one to begin at."""

_STREAM = re.compile(r"hook_resid_(pre|post)$")
"""Streams of TransformerLens; what it calls the middle of a block is only what the MLP reads."""

_KNOWN, _STREAMS = 2, 4
"""How many residual streams among them are tried, of those known by name and else."""


@dataclass(frozen=True, eq=False)
class Restart:
    """Where a pass begins again.

    Attributes:
        site: whose tensor is put in.
        small: what the model is given in place of any images; None: one of the batch's own inputs, since texts differ
            in length. Nothing that is read depends on it.
    """

    site: Site
    small: Tensor | None

    def inputs(self, own: Tensor) -> Tensor:
        """What the model is given for a batch."""
        return own[:1] if self.small is None else self.small


def restart_at(
    model: HookedModel,
    site: Site,
    ends: Sequence[Site],
    inputs: Tensor,
    values: Mapping[str, Tensor],
    changed: Sequence[Site] = (),
    rows: Sequence[int] = (0, 1),
) -> Restart | None:
    """How a pass may begin at a site; None unless all that is read behind it depends on the site's tensor alone.

    The tensors of two examples are put in behind another input, a single one: if the outcome is theirs, a pass may
    begin with that one. Of images a small one is tried first, since what is before the site is computed for nothing.

    Args:
        model: the model.
        site: where a pass would begin.
        ends: what is read, none of it before the site.
        inputs: examples.
        values: the tensors of the site and of the ends on them.
        changed: further sites that are to be changed, which have to hold something for each example.
        rows: the places of two examples to try it on; the first one twice if there is no other.
    """
    if len(values[site.name]) != len(inputs) or site.name.startswith(PREFIX):
        return None  # what latents leave of the input goes on next to them
    two = [min(row, len(inputs) - 1) for row in rows]
    value = values[site.name][two]
    for other, stays in _others(model, inputs[:1]):
        try:
            found = model.run(other, read=[*ends, *changed], edits={site.name: lambda _: value * 1})
        except _FAILURES:  # shapes that follow the input's
            continue
        whole = all(len(found[place]) == len(two) for place in changed)
        if whole and all(_alike(found[end], values[end.name][two]) for end in ends):
            return Restart(site, other if stays else None)
    return None


def _others(model: HookedModel, own: Tensor) -> list[tuple[Tensor, bool]]:
    """Inputs that have nothing to do with the own one, and whether they can stand in for those of any batch."""
    if isinstance(model.input, TokenInput):
        return [(_other_tokens(model, own), False)]
    other = -own.flip(-1) - 1
    return [(other[..., ::_SMALLER, ::_SMALLER], True), (other, False)]


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(torch.allclose(found, expected, rtol=0, atol=ALIKE * float(expected.abs().max())))


def restart_candidates(model: HookedModel, site: Site) -> list[Site]:
    """Sites at which a pass that changes a site might begin, nearest first.

    The site itself, and residual streams before it. Where streams are known by name they are the ones that are tried,
    and inside of a block the site itself is not: the stream goes past it.
    """
    names = [s.name for s in model.sites]
    at = names.index(site.name)
    before = {s.name for s in model.sites[max(0, at - _BACK) : at]}
    among = [s for s in streams(model) if s.name in before]
    known = [s for s in among if _STREAM.search(s.name)]
    own = [] if known and site.kind != "residual" else [site]
    return [*own, *known[: -_KNOWN - 1 : -1]] if known else [*own, *among[: -_STREAMS - 1 : -1]]


def nearest_restart(
    model: HookedModel,
    site: Site,
    ends: Sequence[Site],
    inputs: Tensor,
    values: Mapping[str, Tensor],
    changed: Sequence[Site] = (),
    rows: Sequence[int] = (0, 1),
) -> Restart | None:
    """A pass that begins as near to a changed site as it may; None if it has to begin with the input.

    Args:
        model: the model.
        site: the first that is changed.
        ends: what is read behind it.
        inputs: examples.
        values: the tensors of the restart_candidates and of the ends on them.
        changed: see `restart_at`.
        rows: see `restart_at`.
    """
    tried = (
        restart_at(model, p, ends, inputs, values, changed, rows)
        for p in restart_candidates(model, site)
    )
    return next((start for start in tried if start is not None), None)


def narrows(model: HookedModel, site: Site, end: Site, inputs: Tensor, output: Tensor) -> bool:
    """Whether the output at some positions depends on the site's tensor at these positions alone.

    Every other position is left out behind the site, on two examples at most: if the output is what it was there, what
    is behind the site works position by position, and need not run where nobody reads.

    Args:
        model: a model of tokens.
        site: a residual stream.
        end: the output.
        inputs: examples of at least two positions.
        output: what is put out for them.
    """
    own, some = inputs[:2], slice(inputs.shape[1] % 2, None, 2)
    try:
        found = model.run(own, read=[end], edits={site.name: lambda value: value[:, some]})[end]
    except (RuntimeError, IndexError):  # shapes that follow the input's positions
        return False
    return _alike(found, output[:2, some])


def narrowable(model: HookedModel, end: Site) -> list[Site]:
    """Sites at which positions that nobody reads might be left out: the stream from the last attention on."""
    names = [s.name for s in model.sites]
    stop = names.index(end.name)
    mixing = [i for i, s in enumerate(model.sites[:stop]) if s.kind in ("head", "pattern")]
    late = [s for s in streams(model) if max(mixing, default=0) <= names.index(s.name) < stop]
    return [*(s for s in late if _STREAM.search(s.name)), *late[-1:]]


def streams(model: HookedModel) -> list[Site]:
    """The residual streams of a model of tokens, in order of execution."""
    axes = ("batch", "position", "unit")
    return [s for s in model.sites if s.kind == "residual" and s.axes == axes]


def _other_tokens(model: HookedModel, tokens: Tensor) -> Tensor:
    assert isinstance(model.input, TokenInput), "called for tokens"
    return (tokens + 1 + torch.arange(tokens.shape[1], device=tokens.device)) % model.input.n_vocab
