"""One activation for each example and unit: the maximum or the mean over positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import BATCH, Examples, as_examples, counted
from circuits.models.adapter.finiteness import check_finite
from circuits.models.adapter.hooked_model import HookedModel

Pool = Literal["max", "mean"]
"""How positions are pooled: the largest activation, or the mean."""


def pooled(
    model: HookedModel,
    site: str,
    examples: Examples | Tensor | Iterable[Tensor] | str,
    pool: Pool = "max",
    leave_first: int = 0,
    batch: int = BATCH,
) -> Float[np.ndarray, "example unit"]:
    """Measure how much each example activates each unit of a site.

    Args:
        model: the model, with the autoencoder attached if the site is one of latents.
        site: the site.
        examples: the examples.
        pool: how positions are pooled.
        leave_first: for texts, how many positions at the start are left out (see `RowFilter`).
        batch: examples in a batch.

    Raises:
        KeyError: if there is no such site.
        ValueError: if `pool` is unknown, there is no example, or a text has no position left.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool {pool!r} is not one of {', '.join(get_args(Pool))}")
    place = model.site(site)
    given = as_examples(model, examples)
    found = np.empty((len(given), place.n_units), np.float32)
    for part in given.batches(batch):
        value = model.run(part.inputs, mask=part.mask, read=[place], until=place)[place]
        units = place.activations(value)
        if place.position_axes == ("position",):
            keep = counted(part.inputs, part.mask, leave_first)[:, None].to(units.device)
        else:
            keep = torch.ones_like(units[:, :1], dtype=torch.bool)
        # A maximum over nothing would be minus infinity, a mean 0 / 0.
        if not bool(keep.any(2).all()):
            raise ValueError(f"leave_first {leave_first}: a text has no more positions than that")
        made = (
            units.masked_fill(~keep, -torch.inf).amax(2)
            if pool == "max"
            else (units * keep).sum(2) / keep.sum(2)
        )
        check_finite(model, made, part.inputs, part.mask, [given.names[i] for i in part.which])
        found[list(part.which)] = made.float().cpu().numpy()
    return found
