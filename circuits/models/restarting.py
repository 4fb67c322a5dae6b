"""Where a pass may begin again: a site whose tensor decides everything behind it.

A change at one site leaves everything before it as it was, so that many changed versions need not run that part again.
Whether what is behind a site depends on its tensor alone is tried, not assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.attaching import PREFIX
from circuits.models.inputs import TokenInput
from circuits.units import Site

ALIKE = 1e-5
"""How far numbers may differ, as a share of the largest of them, and count as the same."""

_BACK = 40
"""How many sites before a changed one are looked through for one to begin at."""

_STREAM = re.compile(r"hook_resid_(mid|post)$")

_STREAMS = 4
"""How many residual streams among them are tried."""


def begins(
    model: HookedModel, site: Site, ends: Sequence[Site], inputs: Tensor, value: Tensor
) -> bool:
    """Whether all that is read behind a site depends on the site's tensor alone.

    Two tensors are put in behind another input, a single one: if the outcome is that of their own inputs, a pass may
    begin with any one input.

    Args:
        model: the model.
        site: where a pass would begin.
        ends: what is read, none of it before the site.
        inputs: examples, of which one is used.
        value: the site's tensor on them.
    """
    if len(value) != len(inputs) or site.name.startswith(PREFIX):
        return False  # what latents leave of the input goes on next to them
    own = inputs[:1]
    other = _other_tokens(model, own) if isinstance(model.input, TokenInput) else -own.flip(-1) - 1
    two = torch.cat([value[:1], value[:1] * 0.5])

    def ran(x: Tensor) -> list[Tensor]:
        cache = model.run(x, read=ends, edits={site.name: lambda _: two * 1})
        return [cache[end] for end in ends]

    try:
        expected, found = ran(torch.cat([own, own])), ran(other)
    except (RuntimeError, IndexError):  # shapes that follow the input's batch
        return False
    return all(
        a.shape == b.shape and bool(torch.allclose(a, b, rtol=0, atol=ALIKE * float(b.abs().max())))
        for a, b in zip(found, expected, strict=True)
    )


def candidates(model: HookedModel, site: Site) -> list[Site]:
    """Sites at which a pass that changes a site might begin: itself, or a residual stream before it, nearest first."""
    names = [s.name for s in model.sites]
    at = names.index(site.name)
    before = model.sites[max(0, at - _BACK) : at]
    among = [s for s in streams(model) if s in before]
    return [site, *among[: -_STREAMS - 1 : -1]]


def beginning(
    model: HookedModel,
    site: Site,
    ends: Sequence[Site],
    inputs: Tensor,
    values: Mapping[str, Tensor],
) -> Site | None:
    """The site nearest to a changed one at which a pass may begin; None if it has to begin with the input.

    Args:
        model: the model.
        site: the first that is changed.
        ends: what is read behind it.
        inputs: examples.
        values: the tensors of the candidates on them.
    """
    for place in candidates(model, site):
        if begins(model, place, ends, inputs, values[place.name]):
            return place
    return None


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
    wanted = output[:2, some]
    return found.shape == wanted.shape and bool(
        torch.allclose(found, wanted, rtol=0, atol=ALIKE * float(wanted.abs().max()))
    )


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
