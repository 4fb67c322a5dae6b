"""Activations of a task's examples and counterparts, one row for each example, by site and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import BATCH, Examples
from circuits.localization.cells import GridPosition
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks.task import Task
from circuits.units import Site


@dataclass(frozen=True, eq=False)
class Features:
    """A site's activations at one position.

    Attributes:
        clean: those of the examples; NaN where an example has no such position.
        corrupted: those of their counterparts; None if there are none.
    """

    clean: Float[np.ndarray, "example width"]
    corrupted: Float[np.ndarray, "example width"] | None


def features_of(
    model: HookedModel,
    task: Task,
    sites: Sequence[Site],
    columns: Sequence[GridPosition | None],
    batch: int = BATCH,
) -> Mapping[tuple[str, int], Features]:
    """The mean activations of each site over each column's positions, by site and column index, from a single pass.

    Args:
        model: the model.
        task: the examples.
        sites: the sites.
        columns: the positions; None means all positions, or the whole map.
        batch: examples per batch.
    """
    sides = [task.examples, *([] if task.counterparts is None else [task.counterparts])]
    found = [_rows(model, side, sites, columns, batch) for side in sides]
    return {
        key: Features(found[0][key], found[1][key] if len(found) > 1 else None) for key in found[0]
    }


def _rows(
    model: HookedModel,
    examples: Examples,
    sites: Sequence[Site],
    columns: Sequence[GridPosition | None],
    batch: int,
) -> dict[tuple[str, int], np.ndarray]:
    kept: dict[tuple[str, int], list[Tensor]] = {
        (s.name, c): [] for s in sites for c in range(len(columns))
    }
    order: list[int] = []
    for part in examples.batches(batch):
        cache = model.run(part.inputs, mask=part.mask, read=sites, until=model.last(sites))
        order += part.which
        first = [0] * len(part) if part.mask is None else part.mask.int().argmax(1).tolist()
        for site in sites:
            rows = site.rows(cache[site]).double()
            flat = rows[:, None] if rows.ndim == 2 else rows.flatten(1, -2)
            for c, column in enumerate(columns):
                kept[site.name, c].append(
                    torch.stack([
                        _mean(flat[k], None if column is None else column.places[i], first[k], part.mask, k)
                        for k, i in enumerate(part.which)
                    ]).cpu()
                )  # fmt: skip
    back = np.argsort(order)
    return {key: torch.cat(rows).numpy()[back] for key, rows in kept.items()}


def _mean(
    rows: Tensor, places: Sequence[int] | None, first: int, mask: Tensor | None, k: int
) -> Tensor:
    """The mean of some of an example's rows; NaN if there are none."""
    if places is None:
        return (rows if mask is None else rows[mask[k].to(rows.device)]).mean(0)
    if not places:
        return torch.full_like(rows[0], float("nan"))
    return rows[[first + p for p in places]].mean(0)
