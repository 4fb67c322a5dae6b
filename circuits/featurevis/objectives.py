"""What a picture is optimised for (layer 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.units import Site, Unit


@dataclass(frozen=True)
class ChannelObjective:
    """Image i of a batch excites unit i: its mean activation over positions.

    Attributes:
        units: one a image.
        sites: their sites.
    """

    units: tuple[Unit, ...]
    sites: tuple[Site, ...]

    @classmethod
    def of(cls, model: HookedModel, units: Sequence[str | Unit]) -> ChannelObjective:
        """The objective for units of a model.

        Raises:
            KeyError: if a site is unknown.
            ValueError: if there is no unit, or one that its site lacks.
        """
        if not units:
            raise ValueError("units is empty: name at least one unit")
        found = tuple(model.unit(u) for u in units)
        return cls(found, tuple(model.site(u.site) for u in found))

    def value(self, cache: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
        """Each image's value: higher is better."""
        values = []
        for i, (unit, site) in enumerate(zip(self.units, self.sites, strict=True)):
            values.append(cache[site.name][i].select(site.unit_axis - 1, unit.index).mean())
        return torch.stack(values)
