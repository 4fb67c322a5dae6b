"""What a unit does below zero: after a ReLU that is only seen before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import SiteLink, WeightLayer
from circuits.units import Site, Unit

_LINEAR = ("Conv", "Linear", "BatchNorm", "LayerNorm")
"""What the class names of modules that put out negative numbers contain."""


@dataclass(frozen=True)
class Before:
    """A unit before its nonlinearity.

    Attributes:
        unit: it; the unit itself where that can be negative.
        sign: 1 if it is large where the unit is, -1 if it is small there.
    """

    unit: Unit
    sign: float


def pre_activation(model: HookedModel, unit: Unit) -> Before:
    """The nearest place before a unit's nonlinearity where it can be negative.

    Where the nonlinearity is applied to a sum that no module puts out (a residual block), that is the
    sum's part that this block computes.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the unit is never negative and no such place is found.
    """
    site = model.site(unit.site)
    seen = model.run(model.input.example(4), read=[site], until=site)[site]
    if _linear(site) or float(site.by_unit(seen)[:, unit.index].min()) < 0:
        return Before(unit, 1.0)
    found = sorted(_candidates(model, unit), key=lambda candidate: -candidate[0])
    if not found:
        raise ValueError(
            f"unit {unit} is never negative, and no layer before its nonlinearity was found: name a "
            "unit there to see what it is least active on"
        )
    return found[0][1]


def _linear(site: Site) -> bool:
    return any(word in site.module for word in _LINEAR)


def _candidates(model: HookedModel, unit: Unit) -> Iterator[tuple[int, Before]]:
    """Places on the way to a unit, with how far along they are."""
    for layer in model.weight_layers:
        for link in layer.writes:
            if link.site == unit.site and int(link.index[unit.index]) >= 0:
                yield from _along(model, layer, link, unit)


def _along(
    model: HookedModel, layer: WeightLayer, link: SiteLink, unit: Unit
) -> Iterator[tuple[int, Before]]:
    out = link.index[unit.index]
    for other in layer.writes:
        site = model.site(other.site)
        if other.depth < link.depth and _linear(site):
            (same,) = (other.index == out).nonzero(as_tuple=True)
            for i in same.tolist():
                sign = float((link.factor[unit.index] * other.factor[i]).sign()) or 1.0
                yield other.depth, Before(site.unit(i), sign)
