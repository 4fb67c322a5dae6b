"""Whether a site's units are a better basis than any other: do activations look like rare features along them?

What follows a nonlinearity of single channels has a privileged basis: the nonlinearity acts along the channels. A
residual sum, or what a block adds to it, is read by linear layers only, so that a rotated basis would do as well, and a
channel of it is no unit that means anything by itself. Trained networks differ from this, since optimizers and
normalisation act along channels too, so it is measured: features are rare, so along them activations are near 0 at most
places and large at a few, and kurtosis (the fourth standardised moment, 3 for a normal distribution) is large; along
random directions features are mixed (Elhage et al. 2023, "Privileged Bases in the Transformer Residual Stream").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import Examples, as_examples
from circuits.experiments.statistics import least_p, p_value
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table, between
from circuits.tensors import random_frame

ROWS = 20_000
"""The most rows (activations of all units at one position) that are looked at: enough for a fourth moment."""


@dataclass(frozen=True, eq=False)
class BasisTest:
    """The kurtosis along a site's units, compared with that along random directions.

    Units are scaled to one variance first: else the loudest would make up every random direction.

    Attributes:
        site: the site.
        kurtosis: along each unit; NaN for units that never vary.
        random: the median kurtosis along the axes of each random basis.
        largest: the largest kurtosis along any axis of each random basis.
        p: the p-value of the median kurtosis along units, against random bases: of the median, as the kurtosis of a
            unit that is hardly ever active has no bound.
        n_rows: how many rows were looked at.
        model: the model's name.
        model_hash: the hash of the model.
        examples: which examples, and how they were chosen.
        seed: of the rows and of the random bases.
    """

    site: str
    kurtosis: Float[np.ndarray, " unit"]
    random: Float[np.ndarray, " draw"]
    largest: Float[np.ndarray, " draw"]
    p: float
    n_rows: int
    model: str
    model_hash: str
    examples: dict[str, Any]
    seed: int

    @property
    def median(self) -> float:
        """The median kurtosis along units that vary."""
        return float(np.nanmedian(self.kurtosis))

    @property
    def share_above(self) -> float:
        """The share of units along which the kurtosis is larger than along all axes of a random basis, in the mean over
        the random bases."""
        alive = self.kurtosis[np.isfinite(self.kurtosis)]
        return float((alive[:, None] > self.largest).mean())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "site": self.site, "median_kurtosis": self.median, "kurtosis": self.kurtosis.tolist(),
            "random_median_kurtosis": self.random.tolist(), "p": self.p, "least_p": least_p(len(self.random)),
            "share_above_random": self.share_above, "rows": self.n_rows, "model": self.model,
            "model_hash": self.model_hash, "examples": self.examples, "seed": self.seed,
        }  # fmt: skip


def basis_table(tests: Sequence[BasisTest]) -> Table:
    """A row for each site: its units, and random bases of it."""
    rows = []
    for one in tests:
        low, high = np.quantile(one.random, [0.025, 0.975])
        rows.append(
            (
                one.site, one.n_rows, len(one.kurtosis), int(np.isnan(one.kurtosis).sum()), one.median,
                f"{np.median(one.random):.4g} ({between(low, high)})", f"{one.share_above:.0%}", one.p,
            )
        )  # fmt: skip
    columns = (
        "site", "positions", "units", "constant", "median kurtosis", "random bases: median (95 %)",
        "units above all random axes", "p",
    )  # fmt: skip
    first = tests[0]
    note = f"{len(first.random)} random bases, seed {first.seed}; no p is below {least_p(len(first.random)):.2g}"
    return Table(
        columns,
        rows,
        "Kurtosis along units and along random directions (3: a normal distribution)",
        note,
    )


def basis_test(
    model: HookedModel, site: str, examples: Examples | Tensor, n_random: int = 99, seed: int = 0
) -> BasisTest:
    """Measure whether activations are more like rare features along a site's units than along random directions.

    Args:
        model: the model.
        site: the site, whose units are single numbers (not heads).
        examples: the examples; of each, equally many positions are looked at, `ROWS` in all at most.
        n_random: how many random orthonormal bases to compare with.
        seed: of the choice of positions, and of the bases.

    Raises:
        KeyError: if there is no such site.
        ValueError: if its units are heads, fewer than two of them vary, or `n_random` is not positive.
    """
    place = model.site(site)
    if place.inner_axis is not None:
        raise ValueError(
            f"site {place.name}: its units are heads, expected units of one number each"
        )
    if n_random < 1:
        raise ValueError(f"n_random {n_random} must be at least 1")
    given = as_examples(model, examples)
    rows = _rows(model, place.name, given, seed)
    rows = rows - rows.mean(0)
    varies = rows.abs().amax(0) > 1e-6 * rows.abs().max()
    alive = rows[:, varies] / rows[:, varies].square().mean(0).sqrt()
    if alive.shape[1] < 2:
        raise ValueError(
            f"site {place.name}: {alive.shape[1]} of its units vary, expected at least 2"
        )
    generator = torch.Generator().manual_seed(seed)
    if len(rows) < alive.shape[1]:
        raise ValueError(
            f"site {place.name}: there are {len(rows)} positions for {alive.shape[1]} units, expected as many or more; "
            "take more examples"
        )
    n = alive.shape[1]
    drawn = [_kurtosis(alive @ random_frame(n, n, generator)) for _ in range(n_random)]
    own = np.full(place.n_units, np.nan)
    own[varies.numpy()] = _kurtosis(alive)
    null, largest = (np.array([take(d) for d in drawn]) for take in (np.median, np.max))
    p = p_value(float(np.nanmedian(own)), null, "greater")
    return BasisTest(
        place.name, own, null, largest, p, len(rows), model.name, model.hash, given.describe(), seed
    )


def _rows(
    model: HookedModel, site: str, examples: Examples, seed: int
) -> Float[Tensor, "row unit"]:
    """The activations at some positions of each example."""
    place, found = model.site(site), []
    each = max(1, ROWS // len(examples))
    for part in examples.batches(8):
        value = model.run(part.inputs, mask=part.mask, read=[place], until=place)[place]
        for i, units in enumerate(place.activations(value)):
            real = torch.arange(units.shape[1])
            if part.mask is not None and place.position_axes == ("position",):
                real = real[part.mask[i].cpu()]
            # Seeded by the example, so that the choice does not depend on batches.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + part.which[i])
            chosen = real[torch.randperm(len(real), generator=generator)[:each]]
            found.append(units[:, chosen.to(units.device)].T.double().cpu())
    return torch.cat(found)


def _kurtosis(rows: Float[Tensor, "row axis"]) -> Float[np.ndarray, " axis"]:
    """The fourth standardised moment along each axis, of rows whose mean is 0."""
    square = rows.square()
    return (square.square().mean(0) / square.mean(0).square()).numpy()
