"""Which tokens of a vision transformer are patches of the image, and what the others are.

All of it is measured: the gradient says which token each patch ends in, and changing a parameter says which other token
is made of it, whose name then says what it is (`cls_token`, `register_tokens`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.models.adapter.hooked_model import ActivationCache, HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.units import Site

_NAMES = (
    (re.compile(r"(^|_)dist", re.IGNORECASE), "distillation token"),
    (re.compile(r"(^|_)reg", re.IGNORECASE), "register"),
    (re.compile(r"(^|_)cl(s|ass)", re.IGNORECASE), "class token"),
)
"""What a token is called, by the last part of the name of the parameter that it is made of."""

_AXES = (("position",), ("window", "position"))
"""The axes of positions that tokens may have; those of windows are counted window by window."""

_TRIED = 3
"""How many maps before a site are tried as its patches, the last first; and the first of all."""


@dataclass(frozen=True, eq=False)
class TokenMap:
    """What the tokens of a site stand for.

    Attributes:
        patches: the site whose map has one position for each patch.
        places: the token that holds each patch. Merged patches share one; the tokens of windows are counted window by
            window.
        others: what the tokens that hold no patch are, by number: `class token`, `register 1`, or the name of the
            parameter that they are made of. Filling of incomplete windows has no entry.
        n: how many tokens there are.
        window: how many tokens a window has; None without windows.
    """

    patches: str
    places: Int[Tensor, "y x"]
    others: Mapping[int, str]
    n: int
    window: int | None = None

    def name(self, token: int) -> str:
        """What a token stands for: the row and column of its (first) patch, or what it is instead."""
        found = (self.places == token).nonzero()
        if len(found):
            y, x = found[0].tolist()
            return f"patch {y},{x}"
        return self.others.get(token, f"token {token}")


def is_map(site: Site) -> bool:
    """Whether a site has a map of positions."""
    return site.position_axes == ("y", "x")


@recording_gradients()
def token_places(model: HookedModel, site: Site, inputs: Tensor) -> Int[Tensor, "y x"]:
    """Which token of a site holds which patch of the map before it; class tokens and registers hold none.

    Measured where the tokens are first put together: there each depends on its own patch alone.

    Args:
        model: the model.
        site: a site of tokens.
        inputs: as the model takes them; one is looked at.

    Raises:
        ValueError: if there is no map before it, or no token for each of its patches.
    """
    order = model.sites.index(site)
    patches = next((s for s in reversed(model.sites[:order]) if is_map(s)), None)
    if patches is None or site.position_axes != ("position",):
        raise ValueError(
            f"site {site.name} has the position axes {site.position_axes or 'none'}: expected a map (y, x), or tokens "
            "behind a map of patches"
        )
    between = model.sites[model.sites.index(patches) + 1 : order + 1]
    first = next(
        s
        for s in between
        if s.position_axes + s.position_shape == ("position", *site.position_shape)
    )
    cache = _leaf_run(model, [patches, first], inputs)
    places = _followed(cache[patches], cache[first], patches, first)
    if places is None or len(places.unique()) < len(places):
        n = len(first.activations(cache[first])[0, 0])
        raise ValueError(
            f"site {site.name}: its {n} tokens are not one for each of the "
            f"{patches.activations(cache[patches]).shape[2]} patches of {patches.name}, and some more"
        )
    return places.reshape(patches.positions_of(cache[patches]))


def _leaf_run(model: HookedModel, read: Sequence[Site], inputs: Tensor) -> ActivationCache:
    leaf = inputs[:1].detach().requires_grad_(True)
    return model.run(leaf, read=read, until=model.last(read), grad=True)


def _followed(
    source: Tensor, target: Tensor, before: Site, after: Site
) -> Int[Tensor, " position"] | None:
    """The position of a later site that each position of an earlier one ends in; None if one ends in several or none.

    With a weight w for every token, the gradient of their weighted sum at a patch is that of its token times the
    token's weight, so that the gradients for w = 1 and w = 1, 2, 3, … have the token's number as their quotient.
    """
    tokens = after.activations(target)[0]
    drawn = torch.randn(len(tokens), generator=torch.Generator().manual_seed(0)).to(tokens)
    each = drawn @ tokens
    weights = torch.arange(1, len(each) + 1).to(each)
    slopes = [
        torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)[0]
        for total in (each.sum(), each @ weights)
    ]
    if slopes[0] is None or slopes[1] is None:
        return None
    plain, counted = (before.activations(slope)[0] for slope in slopes)
    # Of a patch's channels the one with the largest gradient, where the quotient is most exact.
    best = plain.abs().argmax(0, keepdim=True)
    quotient = (counted.gather(0, best) / plain.gather(0, best))[0]
    places = quotient.round()
    # False for NaN too.
    if not bool(((quotient - places).abs() < 0.05).all()) or not places.min() >= 1:
        return None
    return places.long() - 1


_MAPS: WeakKeyDictionary[HookedModel, dict[str, TokenMap | str]] = WeakKeyDictionary()
"""What has been measured, by model: where patches go does not depend on the weights."""


def token_map(model: HookedModel, site: Site) -> TokenMap:
    """What the tokens of a site stand for, found by following patches through the layers that mix none of them.

    Layers that mix tokens and keep their number are taken to keep their order.

    Raises:
        ValueError: if the model takes no images, or its patches cannot be followed to the site; the message says why.
    """
    if not isinstance(model.input, ImageInput):
        raise ValueError(f"model {model.name} takes tokens: they are no patches of an image")
    if (
        model.edited
    ):  # an edit may overwrite what patches would have changed: measured, but not kept
        return _measured(model, site)
    known = _MAPS.setdefault(model, {})
    if site.name not in known:
        try:
            known[site.name] = _measured(model, site)
        except ValueError as error:
            known[site.name] = str(error)
    found = known[site.name]
    if isinstance(found, str):
        raise ValueError(found)
    return found


@recording_gradients()
def _measured(model: HookedModel, site: Site) -> TokenMap:
    if site.position_axes not in _AXES:
        raise ValueError(f"site {site.name} has no axis of tokens")
    maps = [s for s in model.sites[: model.sites.index(site)] if is_map(s)]
    maps = [s for s in maps if min(s.position_shape) > 1]
    inputs = model.fitted(model.input.example(1))
    # Each that fails costs a pass. Where stages show a map at their end, that is not what the next one is made of.
    for patches in dict.fromkeys([*maps[: -_TRIED - 1 : -1], *maps[:1]]):
        steps = _steps(model, patches, site)
        cache = _leaf_run(model, list({s.name: s for pair in steps for s in pair}.values()), inputs)
        places = torch.arange(patches.activations(cache[patches]).shape[2])
        for one, other in steps:
            found = _followed(cache[one], cache[other], one, other)
            if found is None:
                break
            places = found.cpu()[places]
        else:
            return _named(model, site, steps[-1][1], patches, places, inputs)
    raise ValueError(
        f"site {site.name} of {model.name}: "
        + (
            f"the patches of {maps[0].name} cannot be followed to its tokens"
            if maps
            else "no map of patches comes before it"
        )
    )


def _steps(model: HookedModel, patches: Site, site: Site) -> list[tuple[Site, Site]]:
    """The pairs of sites between which the number of tokens changes, from the map of patches to a site."""
    between = model.sites[model.sites.index(patches) + 1 : model.sites.index(site) + 1]
    tokens = [s for s in between if s.position_axes == ("position",)]
    steps = []
    goal = site
    if site.position_axes != ("position",):
        # Some models show the tokens of an earlier stage once more; windows that need no filling have all of a stage's.
        same = [s for s in tokens if s.position_shape == (math.prod(site.position_shape),)]
        goal = (same or tokens or [patches])[-1]
        places = site.position_axes, site.position_shape
        rest = between[between.index(goal) + 1 :] if goal is not patches else between
        steps.append((goal, next(s for s in rest if (s.position_axes, s.position_shape) == places)))
    while goal is not patches:
        first = next(i for i, s in enumerate(tokens) if s.position_shape == goal.position_shape)
        goal = tokens[first - 1] if first else patches
        steps.append((goal, tokens[first]))
    return steps[::-1]


def _named(
    model: HookedModel, site: Site, first: Site, patches: Site, places: Tensor, inputs: Tensor
) -> TokenMap:
    counts = places.bincount()
    counts = counts[counts > 0]
    n = site.activations(torch.zeros(1, *site.shape)).shape[2]
    if counts.min() != counts.max() or n < len(counts):
        raise ValueError(
            f"site {site.name} of {model.name}: its {n} tokens hold between {int(counts.min())} and "
            f"{int(counts.max())} patches of {patches.name}: expected equally many each"
        )
    window = site.position_shape[-1] if len(site.position_shape) > 1 else None
    free = set(range(n)) - set(places.tolist())
    others = {} if window else _others(model, first, free, set(places.tolist()), inputs)
    others = {
        t: name if list(others.values()).count(name) == 1 else f"{name} {t}"
        for t, name in others.items()
    }
    return TokenMap(patches.name, places.reshape(patches.position_shape), others, n, window)


def _others(
    model: HookedModel, first: Site, free: set[int], held: set[int], inputs: Tensor
) -> dict[int, str]:
    """What the tokens are that hold no patch: each is made of a parameter that no patch depends on."""

    def tokens() -> Float[Tensor, "unit token"]:
        return first.rows(model.run(inputs, read=[first], until=first)[first])[0]

    intact, found, missing = tokens(), {}, set(free)
    generator = torch.Generator().manual_seed(0)
    known = model.parameters
    for name in dict.fromkeys(model.program.sources.values()):
        if not missing:
            break
        parameter = known.get(name)
        if parameter is None or parameter.numel() > first.width * max(len(intact), 1):
            continue
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        with model.rewriting({name: parameter.detach() + drawn}):
            changed = set((tokens() != intact).any(1).nonzero()[:, 0].tolist())
        if changed and not changed & held:
            made = sorted(changed & missing)
            missing -= changed
            last = name.removesuffix(".weight").rpartition(".")[2]
            called = next((n for words, n in _NAMES if words.search(last)), f"`{name}`")
            for k, token in enumerate(made, 1):
                found[token] = f"{called} {k}" if len(made) > 1 else called
    return found
