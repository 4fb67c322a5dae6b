"""Which part of the input a unit sees (layer 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput
from circuits.models.sites import unit_activations
from circuits.units import Site


@dataclass(frozen=True)
class ReceptiveField:
    """The box of input pixels that can change a unit at one position of its map.

    Attributes:
        center: the map position that was measured, (y, x); () for a site without a map.
        box: (top, left, bottom, right) of its pixels, bottom and right excluded.
        stride: input pixels from one map position to the next, (y, x).
        size: height and width of the input.
    """

    center: tuple[int, ...]
    box: tuple[int, int, int, int]
    stride: tuple[float, float]
    size: tuple[int, int]

    def at(self, position: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The box at a map position, cut off at the border of the input."""
        if len(position) != 2 or len(self.center) != 2:
            return (0, 0, *self.size)
        dy = (position[0] - self.center[0]) * self.stride[0]
        dx = (position[1] - self.center[1]) * self.stride[1]
        top, left, bottom, right = self.box
        height, width = self.size
        return (
            min(max(0, round(top + dy)), height - 1),
            min(max(0, round(left + dx)), width - 1),
            max(1, min(height, round(bottom + dy))),
            max(1, min(width, round(right + dx))),
        )


def receptive_field(model: HookedModel, site: Site) -> ReceptiveField:
    """Measure a site's receptive field: which pixels, made NaN, make its middle NaN.

    Exact for any architecture, since NaN passes through every operation that reads it; found by
    bisection from each side.

    Raises:
        ValueError: if the model does not take images.
    """
    spec = model.input
    if not isinstance(spec, ImageInput):
        raise ValueError(
            f"model {model.name} takes tokens: only image models have receptive fields"
        )
    size = (spec.height, spec.width)
    if site.position_axes != ("y", "x"):
        return ReceptiveField((), (0, 0, *size), (1.0, 1.0), size)
    rows, columns = site.position_shape
    center = (rows // 2, columns // 2)
    example = spec.example(1).to(model.device)

    def reached(mask: Callable[[Tensor, int], object], at: int) -> bool:
        spoiled = example.clone()
        mask(spoiled, at)
        cache = model.run(spoiled, read=[site], until=site)
        values = unit_activations(site, cache[site])[0]
        return bool(values[:, center[0] * columns + center[1]].isnan().any())

    def first(mask: Callable[[Tensor, int], object], length: int) -> int:
        """The smallest number of spoiled rows or columns that reaches the middle."""
        low, high = 1, length
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(mask, middle) else (middle + 1, high)
        return low

    height, width = size
    nan = torch.nan
    top = first(lambda x, n: x[..., :n, :].fill_(nan), height) - 1
    bottom = height - first(lambda x, n: x[..., height - n :, :].fill_(nan), height) + 1
    left = first(lambda x, n: x[..., :n].fill_(nan), width) - 1
    right = width - first(lambda x, n: x[..., width - n :].fill_(nan), width) + 1
    stride = (height / rows, width / columns)
    return ReceptiveField(center, (top, left, bottom, right), stride, size)
