"""Negative pictures: what a unit is least active on. After a ReLU that can only be seen before the ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import SiteLink, WeightLayer
from circuits.units import Site, Unit

_LINEAR = ("Conv", "Linear", "BatchNorm", "LayerNorm")
"""Parts of the class names of modules whose outputs can be negative."""


@dataclass(frozen=True)
class PreActivation:
    """A unit's pre-activation.

    Attributes:
        unit: the unit before the nonlinearity; the unit itself if it can be negative.
        sign: 1 if the two increase together, -1 if one decreases as the other increases.
    """

    unit: Unit
    sign: float


def pre_activation(model: HookedModel, unit: Unit) -> PreActivation:
    """The nearest site before a unit's nonlinearity, where the unit can be negative.

    If the nonlinearity acts on a sum that is no module's output (in a residual block), it is the summand that this
    block computes.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the unit is never negative and no such site is found.
    """
    site = model.site(unit.site)
    # Four random images stand in for a proof: a unit that goes below zero on one of them needs no other site. The class
    # names catch linear layers that happened not to.
    seen = model.run(model.input.example(4), read=[site], until=site)[site]
    if _linear(site) or float(site.by_unit(seen)[:, unit.index].min()) < 0:
        return PreActivation(unit, 1.0)
    # The deepest linear site before the unit is nearest to its nonlinearity: after batch norm rather than before it.
    found = sorted(_candidates(model, unit), key=lambda candidate: -candidate[0])
    if not found:
        raise ValueError(
            f"unit {unit} is never negative, and no layer before its nonlinearity was found: name a unit there to see "
            "what it is least active on"
        )
    return found[0][1]


def _linear(site: Site) -> bool:
    return any(word in site.module for word in _LINEAR)


def _candidates(model: HookedModel, unit: Unit) -> Iterator[tuple[int, PreActivation]]:
    """Sites between a layer and a unit, with their depth after the layer."""
    for layer in model.weight_layers:
        for link in layer.writes:
            if link.site == unit.site and int(link.index[unit.index]) >= 0:
                yield from _along(model, layer, link, unit)


def _along(
    model: HookedModel, layer: WeightLayer, link: SiteLink, unit: Unit
) -> Iterator[tuple[int, PreActivation]]:
    out = link.index[unit.index]
    for other in layer.writes:
        site = model.site(other.site)
        # `depth` counts the operations after the layer: shallower than the unit's site means between the layer and that
        # site.
        if other.depth < link.depth and _linear(site):
            (same,) = (other.index == out).nonzero(as_tuple=True)
            for i in same.tolist():
                # Each factor is what the layer's output was multiplied with on the way to that site; the sign of their
                # product says whether the two rise together. A factor of 0 (a dead batch norm) has no sign and counts
                # as positive.
                sign = float((link.factor[unit.index] * other.factor[i]).sign()) or 1.0
                yield other.depth, PreActivation(site.unit(i), sign)
