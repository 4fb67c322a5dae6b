"""Comparing dictionaries: of different seeds and sizes, or with the known ground truth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from circuits.autoencoders import Autoencoder
from circuits.tables import Table


@dataclass(frozen=True)
class Matching:
    """Directions of one dictionary matched one to one with those of another (Hungarian algorithm).

    Attributes:
        mcc: the mean absolute cosine of matched directions. If the dictionaries differ in size, every direction of
            the smaller one is matched.
        shared: the share of matched pairs with an absolute cosine of at least 0.7.
        close: the share with at least 0.9.
        random: the mcc of two dictionaries of random directions, of the same sizes.
        pairs: for each direction of the first dictionary the index of its partner, -1 without one.
        cosines: the absolute cosine of each pair; 0 without a partner.
    """

    mcc: float
    shared: float
    close: float
    random: float
    pairs: tuple[int, ...]
    cosines: tuple[float, ...]


def match(
    first: Float[Tensor, "one width"], second: Float[Tensor, "two width"], seed: int = 0
) -> Matching:
    """Match directions one to one so that the sum of their absolute cosines is the largest.

    Args:
        first: a dictionary, directions as rows.
        second: another of the same width.
        seed: the seed of the random dictionaries.

    Raises:
        ValueError: if widths differ.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"dictionaries have directions of {first.shape[1]} and {second.shape[1]} numbers: expected one width"
        )
    rows, columns, cosine = _assigned(first, second)
    found = cosine[rows, columns]
    pairs, cosines = np.full(len(first), -1), np.zeros(len(first))
    pairs[rows], cosines[rows] = columns, found
    return Matching(
        float(found.mean()), float((found >= 0.7).mean()), float((found >= 0.9).mean()),
        _by_chance(len(first), len(second), first.shape[1], seed), tuple(pairs.tolist()), tuple(cosines.tolist()),
    )  # fmt: skip


@lru_cache(maxsize=16)
def _by_chance(first: int, second: int, width: int, seed: int) -> float:
    """The mean absolute cosine of matched random directions: what matching alone achieves."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, width, generator=generator) for n in (first, second))
    rows, columns, cosine = _assigned(a, b)
    return float(cosine[rows, columns].mean())


def _assigned(first: Tensor, second: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows and columns of the best assignment, and all absolute cosines."""
    a, b = (
        d.double() / d.double().norm(dim=1, keepdim=True).clamp_min(1e-12) for d in (first, second)
    )
    cosine = (a @ b.T).abs().cpu().numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    return rows, columns, cosine


@dataclass(frozen=True)
class Stability:
    """How similar dictionaries are that were trained with different seeds.

    Attributes:
        names: the names of the dictionaries.
        matchings: the matching of each pair.
        mcc: the mean over pairs.
        shared: the mean over pairs.
        random: the mean over pairs.
        in_all: the share of the first dictionary's directions that have a partner with an absolute cosine of at
            least 0.7 in every other dictionary.
    """

    names: tuple[str, ...]
    matchings: dict[str, Matching]
    mcc: float
    shared: float
    random: float
    in_all: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def tables(self) -> Iterator[Table]:
        """How alike the directions of each pair are."""
        rows = [(pair, m.mcc, m.random, m.shared, m.close) for pair, m in self.matchings.items()]
        share = f"{100 * self.in_all:.1f} %"
        note = f"in all: {share} of the first one's directions have a partner in every other"
        yield Table(
            ("pair", "mean cosine", "of random ones", "shared (0.7)", "close (0.9)"),
            rows,
            note=note,
        )


def stability(codes: Mapping[str, Autoencoder], seed: int = 0) -> Stability:
    """Match dictionaries that were trained on the same rows with different seeds.

    Raises:
        ValueError: if there are fewer than two, or widths differ.
    """
    names = list(codes)
    if len(names) < 2:
        raise ValueError(f"autoencoders: {len(names)} given, expected at least two to compare")
    theirs = codes[names[0]].about
    for name, code in codes.items():
        ours = code.about
        if (ours.model_hash, ours.target) != (theirs.model_hash, theirs.target):
            raise ValueError(
                f"autoencoder {name!r} writes {ours.target} of weights {ours.model_hash[:16]}, {names[0]!r} "
                f"{theirs.target} of {theirs.model_hash[:16]}: expected autoencoders of one site"
            )
    found = {
        f"{a} and {b}": match(codes[a].W_dec.detach(), codes[b].W_dec.detach(), seed)
        for a, b in combinations(names, 2)
    }
    own = [np.array(found[f"{names[0]} and {b}"].cosines) >= 0.7 for b in names[1:]]
    each = list(found.values())
    return Stability(
        tuple(names), found, _mean([m.mcc for m in each]), _mean([m.shared for m in each]),
        _mean([m.random for m in each]), float(np.logical_and.reduce(own).mean()),
    )  # fmt: skip


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Recovery:
    """How well a dictionary recovers known directions.

    Attributes:
        matching: of the true directions with those of the dictionary.
        fvu: the fraction of variance unexplained.
        warning: what the FVU alone would hide; empty if nothing.
    """

    matching: Matching
    fvu: float
    warning: str


def recovery(
    code: Autoencoder, truth: Float[Tensor, "feature width"], fvu: float, seed: int = 0
) -> Recovery:
    """Compare an autoencoder with the directions from which its rows were generated.

    Args:
        code: the autoencoder.
        truth: the true directions.
        fvu: the fraction of the rows' variance that it leaves unexplained (see `reconstruction`).
        seed: the seed of the random dictionaries.
    """
    found = match(truth, code.W_dec.detach(), seed)
    warning = ""
    if fvu < 0.2 and found.mcc < 0.9:
        warning = (
            f"it explains {100 * (1 - fvu):.1f} % of the variance, and its directions are not the true ones (mcc "
            f"{found.mcc:.2f}; random ones {found.random:.2f}): a low FVU alone does not prove recovery"
        )
    return Recovery(found, fvu, warning)


def known_dictionary(
    n: int = 64, width: int = 32, rows: int = 200_000, active: int = 3, seed: int = 0
) -> tuple[Float[Tensor, "feature width"], Float[np.ndarray, "row width"]]:
    """Generate rows from a known dictionary: sums of a few random directions with factors from 0.5 to 1.5.

    Args:
        n: the number of directions.
        width: the length of a direction.
        rows: the number of rows.
        active: directions in each row.
        seed: the seed of directions and rows.

    Returns:
        The directions, and the rows.
    """
    if not 1 <= active <= n:
        raise ValueError(f"active {active} must be from 1 to the number of directions, {n}")
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((n, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    made = np.empty((rows, width), np.float32)
    for start in range(0, rows, 65536):
        size = min(65536, rows - start)
        codes = np.zeros((size, n))
        # The places of the smallest of n random numbers: a draw without replacement in each row.
        chosen = generator.random((size, n)).argpartition(active - 1, 1)[:, :active]
        np.put_along_axis(codes, chosen, generator.uniform(0.5, 1.5, (size, active)), 1)
        made[start : start + size] = codes @ directions
    return torch.from_numpy(directions).float(), made
