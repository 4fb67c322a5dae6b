"""Restarting a forward pass in the middle, at a site whose tensor determines everything after it.

A change at one site leaves everything before it as it was, so that many changed versions need not compute that part
again. Whether the result depends on the site's tensor alone is tested, not assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.hooks import Change
from circuits.models.adapter.attaching import PREFIX
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.units import Site

ALIKE = 1e-5
"""The largest difference, as a share of the largest number, at which tensors count as the same."""

_FAILURES = (RuntimeError, LookupError, ValueError, AssertionError)

_SMALLER = 4
"""The factor by which each side of the image that stands in for any other is shrunk."""

_BACK = 40
"""How many sites before a changed one are considered for a restart."""

_STREAM = re.compile(r"hook_resid_(pre|post)$")
"""Names of the residual stream in TransformerLens, without `hook_resid_mid`: that is only what the MLP reads."""

_KNOWN, _STREAMS = 2, 4
"""How many sites of the residual stream are tried: where they are known by name, and where they are not."""


@dataclass(frozen=True, eq=False)
class Restart:
    """A site at which a pass is restarted.

    Attributes:
        site: the site whose tensor is put in.
        small: an input that can stand in for any images; None: one of the batch's own inputs is used, since texts
            differ in length. Nothing that is read depends on it.
        also: further sites whose tensors are put in as they were: what follows depends on all of them together.
    """

    site: Site
    small: Tensor | None
    also: tuple[str, ...] = ()

    def inputs(self, own: Tensor) -> Tensor:
        """The input with which the model is run for a batch."""
        return own[:1] if self.small is None else self.small


def restart_at(
    model: HookedModel,
    site: Site,
    ends: Sequence[Site],
    inputs: Tensor,
    values: Mapping[str, Tensor],
    changed: Sequence[Site] = (),
    rows: Sequence[int] = (0, 1),
    also: Sequence[str] = (),
) -> Restart | None:
    """Test whether a pass may be restarted at a site; None unless everything read depends on its tensor alone.

    The model is run on a single other input, with the site's tensor replaced by that of two examples. If the outcome
    is that of the two examples, the input does not matter. For images a small input is tried first, since what
    comes before the site is computed in vain.

    Args:
        model: the model.
        site: the site of the restart.
        ends: the sites that are read, none of them before the site.
        inputs: examples.
        values: the tensors of the site and of the ends for these examples.
        changed: further sites that are to be changed; their tensors must have one row for each example.
        rows: the indices of two examples for the test; the same one twice if there is only one.
        also: further sites whose tensors are put in.
    """
    if len(values[site.name]) != len(inputs) or site.name.startswith(PREFIX):
        # The error of an autoencoder goes on around its latents, so they do not determine what comes after. And a
        # tensor without one row for each example (position embeddings) cannot be put in for a batch.
        return None
    two = [min(row, len(inputs) - 1) for row in rows]
    # `value * 1`: a copy, which operations in place may overwrite.
    put: dict[str, Change] = {
        name: lambda _, value=values[name][two]: value * 1 for name in (site.name, *also)
    }
    for other, stays in _others(model, inputs[:1]):
        try:
            found = model.run(other, read=[*ends, *changed], edits=put)
        except _FAILURES:  # a shape in the model follows the input's, and no longer fits
            continue
        # Position embeddings, say, have a single row whatever the batch: they cannot be changed for each example.
        whole = all(len(found[place]) == len(two) for place in changed)
        if whole and all(_alike(found[end], values[end.name][two]) for end in ends):
            return Restart(site, other if stays else None, tuple(also))
    return None


def _others(model: HookedModel, own: Tensor) -> list[tuple[Tensor, bool]]:
    """Inputs that are unlike the given one, and whether they can stand in for those of any batch."""
    if isinstance(model.input, TokenInput):
        return [(_other_tokens(model, own), False)]
    # Unlike the given image at every pixel: mirrored, negated and shifted.
    other = -own.flip(-1) - 1
    # The smaller one first: if it may stand in, the part before the site costs a sixteenth.
    return [(other[..., ::_SMALLER, ::_SMALLER], True), (other, False)]


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    # Relative to the largest number, as activations have no common scale; not by element, since small ones are
    # rounding.
    return bool(torch.allclose(found, expected, rtol=0, atol=ALIKE * float(expected.abs().max())))


def restart_candidates(model: HookedModel, site: Site) -> list[Site]:
    """Sites at which a pass that changes a site might be restarted, nearest first.

    They are the site itself and the residual stream before it. Where the stream is known by name, a site inside a
    block is not tried: the skip connection carries information around it.
    """
    names = [s.name for s in model.sites]
    at = names.index(site.name)
    before = {s.name for s in model.sites[max(0, at - _BACK) : at]}
    among = [s for s in streams(model) if s.name in before]
    known = [s for s in among if _STREAM.search(s.name)]
    own = [] if known and site.kind != "residual" else [site]
    # Slices backwards: the nearest one first, two or four of them.
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
    """Find the restart that is nearest to a changed site; None if the pass has to begin with the input.

    Args:
        model: the model.
        site: the first site that is changed.
        ends: the sites that are read after it.
        inputs: examples.
        values: the tensors of the candidates and of the ends for these examples.
        changed: see `restart_at`.
        rows: see `restart_at`.
    """
    tried = (
        restart_at(model, p, ends, inputs, values, changed, rows)
        for p in restart_candidates(model, site)
    )
    return next((start for start in tried if start is not None), None)


def narrows(model: HookedModel, site: Site, end: Site, inputs: Tensor, output: Tensor) -> bool:
    """Test whether the output at a position depends on the site's tensor at that position alone.

    Every second position is removed at the site, on at most two examples. If the output at the remaining ones stays
    as it was, the model works position by position after the site, and need not run where nothing is read.

    Args:
        model: a model of tokens.
        site: a site of the residual stream.
        end: the site of the output.
        inputs: examples of at least two positions.
        output: the tensor of `end` for them.
    """
    # Of those that remain the last position is one: it is what is read most often.
    # Every second position, counted so that the last is among them: of 6 positions 1, 3, 5, of 5 positions 0, 2, 4.
    own, some = inputs[:2], slice((inputs.shape[1] - 1) % 2, None, 2)
    try:
        found = model.run(own, read=[end], edits={site.name: lambda value: value[:, some]})[end]
    except (RuntimeError, IndexError):  # a shape in the model follows the number of tokens
        return False
    return _alike(found, output[:2, some])


def narrowable(model: HookedModel, end: Site) -> list[Site]:
    """Sites at which positions that nothing reads might be removed: the stream from the last attention layer on."""
    names = [s.name for s in model.sites]
    stop = names.index(end.name)
    mixing = [i for i, s in enumerate(model.sites[:stop]) if s.kind in ("head", "pattern")]
    late = [s for s in streams(model) if max(mixing, default=0) <= names.index(s.name) < stop]
    return [*(s for s in late if _STREAM.search(s.name)), *late[-1:]]


def streams(model: HookedModel) -> list[Site]:
    """The sites of the residual stream of a model of tokens, in order of execution."""
    axes = ("batch", "position", "unit")
    return [s for s in model.sites if s.kind == "residual" and s.axes == axes]


def _other_tokens(model: HookedModel, tokens: Tensor) -> Tensor:
    """Tokens of the same shape that differ at every position, each by another offset."""
    assert isinstance(model.input, TokenInput), "called for tokens"
    return (tokens + 1 + torch.arange(tokens.shape[1], device=tokens.device)) % model.input.n_vocab
