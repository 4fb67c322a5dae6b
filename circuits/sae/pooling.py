"""Units' activations an example: the largest or the mean over positions (layer 5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.normalisation import FastNormalisation
from circuits.models.sites import unit_activations

Pool = Literal["max", "mean"]
"""What becomes of positions: the largest activation, or the mean."""


def pooled(
    model: HookedModel,
    site: str,
    batches: Iterable[Tensor],
    pool: Pool = "max",
    leave_first: int = 0,
) -> Float[np.ndarray, "example unit"]:
    """How much each example excites each unit of a site.

    Args:
        model: the model, with its autoencoder attached if the site is one of latents.
        site: which.
        batches: examples, as the model takes them.
        pool: over positions.
        leave_first: of texts: so many positions are not looked at (see `Rule`).

    Raises:
        KeyError: if there is no such site.
        ValueError: if `pool` is unknown, there is no example, or a text has no position that is looked at.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool {pool!r} is not one of {', '.join(get_args(Pool))}")
    place = model.site(site)
    found = []
    for x in batches:
        with FastNormalisation():
            value = model.run(x, read=[place], until=place)[place]
        units = unit_activations(place, value)
        if "position" in place.axes:
            units = units[:, :, leave_first:]
        if not units.shape[2]:
            raise ValueError(f"leave_first {leave_first}: a text has no position beyond")
        found.append((units.amax(2) if pool == "max" else units.mean(2)).float().cpu().numpy())
    if not found:
        raise ValueError("batches hold no example")
    return np.concatenate(found)


def maps(model: HookedModel, site: str, batches: Iterable[Tensor]) -> Iterable[Tensor]:
    """Each batch's activations at a site of images: example x unit x y x x."""
    place = model.site(site)
    if place.position_axes != ("y", "x"):
        raise ValueError(f"site {place.name} has no maps: its positions are {place.position_axes}")
    for x in batches:
        with FastNormalisation():
            value = model.run(x, read=[place], until=place)[place]
        yield torch.as_tensor(value).movedim(place.unit_axis, 1).float().cpu()
