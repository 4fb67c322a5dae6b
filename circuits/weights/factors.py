"""Factored weights: groups of source units, each with maps of where it acts.

This is the one-sided non-negative factorisation of Voss et al. 2021, "Visualizing Weights": a unit belongs to a group
with a weight of 0 or more, while maps over space may be positive and negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.tables import Table
from circuits.weights.expanded import ExpandedWeights


@dataclass(frozen=True, eq=False)
class Factors:
    """A weight tensor as a sum over a few groups of source units, each with maps of where it acts.

    `weight[t, s, y, x]` is close to the sum over k of `groups[k, s] * maps[k, t, y, x]`.

    Attributes:
        groups: how much each source unit belongs to each factor, 0 or more; each row has norm 1.
        maps: the signed weights of each factor on each target unit over space, the strongest factor first.
        shares: the share of the weights' sum of squares that the first factor explains, the first two, and so on.
        hidden: the sum of the absolute residuals over the sum of the absolute weights.
        seed: the seed of the factorisation.
    """

    groups: Float[np.ndarray, "factor source"]
    maps: Float[np.ndarray, "factor target *offset"]
    shares: tuple[float, ...]
    hidden: float
    seed: int

    def reconstructed(self) -> Float[np.ndarray, "target source *offset"]:
        """The weights that the factors give."""
        return np.einsum("ks,kt...->ts...", self.groups, self.maps)

    def to_dict(self, sources: Sequence[int], top: int) -> dict[str, Any]:
        """As JSON has it: of each factor the `top` source units that belong to it most."""
        found = []
        for group, share in zip(self.groups, self.shares, strict=True):
            order = (-group).argsort(kind="stable")[:top]
            members = {str(sources[i]): float(group[i]) for i in order if group[i] > 0}
            found.append({"share": share, "units": members})
        return {"factors": found, "hidden": self.hidden, "seed": self.seed}

    def table(self, sources: Sequence[int], top: int) -> Table:
        """The same as a table."""
        rows = [
            (k, item["share"], ", ".join(f"{unit} {g:.2f}" for unit, g in item["units"].items()))
            for k, item in enumerate(self.to_dict(sources, top)["factors"], 1)
        ]
        note = f"not shown by the factors: {self.hidden:.1%} of the weights' mass"
        return Table(("factor", "share up to here", "units"), rows, note=note)


def factorize(expanded: ExpandedWeights, k: int = 3, seed: int = 0) -> Factors:
    """Factor weights into `k` groups of source units.

    The positive and the negative parts of the weights are concatenated, so that all numbers are at least zero, and
    factored by scikit-learn's NMF; the maps are then fitted to the signed weights by least squares.

    Args:
        expanded: weights of mode `linear` or `mean`.
        k: the number of groups; at most the number of sources.
        seed: the seed of the factorisation.

    Raises:
        ValueError: if `k` does not fit, the mode is `example`, or the weights are zero or not finite.
    """
    from sklearn.decomposition import (
        NMF,  # here and not at the top, since it takes a second to import
    )

    if expanded.mode == "example":
        raise ValueError(
            "mode 'example' gives weights for each example: expected mode 'linear' or 'mean'"
        )
    if not 1 <= k <= len(expanded.sources):
        raise ValueError(f"k {k} must be 1 to {len(expanded.sources)}, the number of sources")
    weight = expanded.weight.cpu().double().numpy()
    if not np.isfinite(weight).all() or not weight.any():
        raise ValueError("weights are zero or not finite: there is nothing to factor")
    flat = np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1)  # source x (target, offsets)
    # NMF takes no negative numbers. With both parts as columns of one matrix, a group must explain excitation and
    # inhibition by the same source units.
    sides = np.concatenate([flat.clip(min=0), (-flat).clip(min=0)], axis=1)
    settings: dict[str, Any] = {"n_components": k, "init": "nndsvda", "max_iter": 2000, "tol": 1e-5}
    model = NMF(**settings, random_state=seed)
    groups = model.fit_transform(sides / sides.max()).T
    norms = np.linalg.norm(groups, axis=1, keepdims=True)
    groups = np.divide(groups, norms, out=np.zeros_like(groups), where=norms > 0)
    # NMF has fitted the two parts apart, where only one of them is not zero at each place: the signed maps fit better.
    maps = np.linalg.lstsq(groups.T, flat, rcond=None)[0]
    order = np.argsort(-np.linalg.norm(maps, axis=1), kind="stable")
    groups, maps = groups[order], maps[order]
    total = np.square(flat).sum()
    shares = []
    for n in range(1, k + 1):
        # Groups are not orthogonal: with fewer of them, the best maps are others.
        fitted = groups[:n].T @ np.linalg.lstsq(groups[:n].T, flat, rcond=None)[0]
        shares.append(float(1 - np.square(flat - fitted).sum() / total))
    hidden = float(np.abs(flat - groups.T @ maps).sum() / np.abs(flat).sum())
    shape = (k, weight.shape[0], *weight.shape[2:])
    return Factors(groups, maps.reshape(shape), tuple(shares), hidden, seed)
