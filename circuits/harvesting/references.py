"""What all shards of a store have in common: the centers of sums and the edges of histograms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.harvesting.observing import laid_out
from circuits.harvesting.shardwork import ShardWork, one_thread
from circuits.harvesting.workers import Send, share_out
from circuits.store.summaries import histogram_range
from circuits.units import Site

REFERENCE_EXAMPLES = 6
"""How many examples, spread over the data, determine the edges of histograms and the centers of sums."""


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Statistics of one reference example, for each unit, and for each column of sites with a covariance."""

    example: int
    least: Float[np.ndarray, " unit"]
    most: Float[np.ndarray, " unit"]
    count: Float[np.ndarray, " unit"]
    total: Float[np.ndarray, " unit"]
    columns: dict[str, Float[np.ndarray, " column"]]


def _statistics_of(work: ShardWork, example: int) -> ReferenceStatistics | None:
    """The statistics of one example; None if it cannot be read."""
    provenance, places = work.provenance, work.provenance.places
    n_units = sum(site.n_units for site in provenance.stored)
    least, most = np.full(n_units, np.inf), np.full(n_units, -np.inf)
    seen = ReferenceStatistics(example, least, most, np.zeros(n_units), np.zeros(n_units), {})
    covariances = provenance.kept(provenance.depth.covariance)

    def look(site: Site, value: Tensor) -> None:
        x, axis = laid_out(site, value)
        here, over = places[site.name], (0, axis)
        finite = x.isfinite()
        # Zero is inside every histogram's range, so that it widens none.
        clean = x if bool(finite.all()) else torch.where(finite, x, 0.0)
        seen.least[here] = clean.amin(over).cpu().numpy()
        seen.most[here] = clean.amax(over).cpu().numpy()
        seen.count[here] = finite.sum(over).cpu().numpy()
        seen.total[here] = clean.double().sum(over).cpu().numpy()
        if site.name in covariances:
            rows = site.rows(value).flatten(0, -2).double().nan_to_num(0.0, 0.0, 0.0)
            seen.columns[site.name] = rows.mean(0).cpu().numpy()

    for _, ready in work.loaded(range(example, example + 1), size=1):
        if ready is None:
            return None
        work.forward(ready, {s.name: lambda value, s=s: look(s, value) for s in provenance.stored})
    return seen


def references(
    work: ShardWork, workers: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Centers and histogram edges from a few examples, one at a time, so that they do not depend on the batch size."""
    n = len(work.provenance.examples)
    # Spread over the data, which may be sorted by class: of 600 examples 0, 100, … 500.
    examples = sorted({i * n // REFERENCE_EXAMPLES for i in range(REFERENCE_EXAMPLES)})
    seen_examples: list[ReferenceStatistics] = []

    def look(process: int | None, chosen: Sequence[int], send: Send) -> None:
        with one_thread(work.model.device):
            for example in chosen:
                seen = _statistics_of(work, example)
                if seen is not None:
                    send(seen)

    share_out(examples, workers, look, seen_examples.append)
    seen_examples.sort(
        key=lambda seen: seen.example
    )  # added up in one order, whichever worker was faster
    n_units = sum(site.n_units for site in work.provenance.stored)
    least, most = np.full(n_units, np.inf), np.full(n_units, -np.inf)
    count, total = np.zeros(n_units), np.zeros(n_units)
    columns = {
        site.name: np.zeros(site.width)
        for site in work.provenance.stored
        if site.name in work.provenance.kept(work.provenance.depth.covariance)
    }
    for seen in seen_examples:
        least, most = np.minimum(least, seen.least), np.maximum(most, seen.most)
        count, total = count + seen.count, total + seen.total
        for name, column in seen.columns.items():
            columns[name] += column / len(seen_examples)
    low, high = histogram_range(least, most)
    # Rounded to float32, which is what the loops subtract: sums about another value could not be corrected exactly.
    center = (total / np.maximum(count, 1)).astype(np.float32).astype(np.float64)
    fixed = {"center": center, "low": low, "high": high}
    return fixed, {n: c.astype(np.float32).astype(np.float64) for n, c in columns.items()}
