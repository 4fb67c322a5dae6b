"""Which part of the input a unit sees (layer 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput
from circuits.models.sites import unit_activations
from circuits.units import Site

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels of the input; bottom and right are excluded."""


def receptive_field(model: HookedModel, site: Site, position: tuple[int, ...]) -> Box:
    """The box of input pixels that can change a site's units at a position of its map.

    Found by bisection from each side: which pixels, made NaN, make the position NaN. NaN passes
    through every operation that reads it, so the box is right for any architecture without
    operations that drop NaN.

    Args:
        model: an image model.
        site: the site.
        position: (y, x) on its map; the box is the whole input for a site without a map.

    Raises:
        ValueError: if the model does not take images.
    """
    spec = model.input
    if not isinstance(spec, ImageInput):
        raise ValueError(
            f"model {model.name} takes tokens: only image models have receptive fields"
        )
    height, width = spec.height, spec.width
    if site.position_axes != ("y", "x"):
        return (0, 0, height, width)
    place = position[0] * site.position_shape[1] + position[1]
    example = spec.example(1).to(model.device)

    def reached(spoil: Callable[[Tensor, int], object], at: int) -> bool:
        spoiled = example.clone()
        spoil(spoiled, at)
        cache = model.run(spoiled, read=[site], until=site)
        return bool(unit_activations(site, cache[site])[0, :, place].isnan().any())

    def first(spoil: Callable[[Tensor, int], object], length: int) -> int:
        """The smallest number of spoiled rows or columns that reaches the position."""
        low, high = 1, length
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(spoil, middle) else (middle + 1, high)
        return low

    nan = torch.nan
    top = first(lambda x, n: x[..., :n, :].fill_(nan), height) - 1
    bottom = height - first(lambda x, n: x[..., height - n :, :].fill_(nan), height) + 1
    left = first(lambda x, n: x[..., :n].fill_(nan), width) - 1
    right = width - first(lambda x, n: x[..., width - n :].fill_(nan), width) + 1
    return (top, left, bottom, right)
