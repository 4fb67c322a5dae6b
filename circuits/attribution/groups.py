"""A site's channels in a few groups, and the effect of each group on a target.

Olah et al. 2018, "The Building Blocks of Interpretability": a non-negative matrix factorization of the activations on
some examples. Each factor is a direction in the channels with a map of where it is active, and has an effect on the
target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import NMF
from torch import Tensor

from circuits.attribution.passes import Passes
from circuits.autograd import recording_gradients
from circuits.tables import Table


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """Groups of channels on some examples.

    Attributes:
        directions: the weight of each unit in a group.
        maps: the strength of a group at each position.
        effects: each group's activation x gradient for the target, summed over positions.
        removed: the target's loss when the group's part of the activations is subtracted.
        hidden: the share of the squared activations that the factorization does not explain.
        site: the channels' site.
        target: the target of the effects.
        model_hash: the hash of the model.
        seed: seed of the factorization.
    """

    directions: Float[Tensor, "group unit"]
    maps: Float[Tensor, "example group *position"]
    effects: Float[Tensor, "example group"]
    removed: Float[Tensor, "example group"]
    hidden: float
    site: str
    target: str
    model_hash: str
    seed: int

    def members(self, group: int, top: int = 5) -> str:
        """The units that a group has most of, with commas."""
        direction = self.directions[group]
        order = direction.argsort(descending=True)[:top].tolist()
        return ", ".join(str(u) for u in order if direction[u] > 0)

    def to_dict(self) -> list[dict[str, Any]]:
        """As JSON has it: for each example its groups."""
        return [
            {
                "hidden": self.hidden,
                "groups": [
                    {
                        "group": g + 1, "effect": float(effects[g]), "removed": float(removed[g]),
                        "units": self.members(g),
                    }
                    for g in range(len(effects))
                ],
            }
            for effects, removed in zip(self.effects, self.removed, strict=True)
        ]  # fmt: skip

    def table(self, example: int, name: str) -> Table:
        """What each group does on an example."""
        rows = [
            (
                g + 1,
                float(self.effects[example, g]),
                float(self.removed[example, g]),
                self.members(g),
            )
            for g in range(len(self.directions))
        ]
        columns = ("group", "activation x gradient", "lost without it", "units")
        return Table(columns, rows, f"{name}, groups")


@recording_gradients()
def channel_groups(passes: Passes, k: int = 6, seed: int = 0) -> ChannelGroups:
    """Factorize a site's activations on the examples and attribute the target's value to each factor.

    Args:
        passes: passes from the site, whose activations must not be negative, to the target.
        k: the number of groups.
        seed: seed of the factorization.

    Raises:
        ValueError: if `k` is not from 1 to the number of units, activations are negative, or the site has a
            tensor inside each unit (heads).
    """
    site = passes.site
    assert site is not None, "groups are of a site's channels"
    if site.inner_axis is not None:
        raise ValueError(
            f"site {site.name}: its units are heads, expected a site of channels or neurons"
        )
    if not 1 <= k <= site.n_units:
        raise ValueError(f"k {k} must be from 1 to {site.n_units}, the units of {site.name}")
    units = site.activations(passes.points).double().cpu()
    if float(units.min()) < 0:
        raise ValueError(
            f"site {site.name} has negative activations: expected the site after a ReLU"
        )
    n, _, places = units.shape
    if k > n * places:
        raise ValueError(
            f"k {k} must be at most {n * places}, the positions of {site.name} on {n} examples"
        )
    rows = units.movedim(1, 2).flatten(0, 1).numpy()
    made: Any = k  # scikit-learn's type is narrower than what it takes
    nmf = NMF(made, init="nndsvda", random_state=seed, max_iter=400, tol=1e-3)
    strengths = nmf.fit_transform(rows)
    directions = nmf.components_
    hidden = float(((rows - strengths @ directions) ** 2).sum() / max(1e-30, (rows**2).sum()))
    which = torch.arange(n)
    gradients = site.activations(passes.gradient(passes.points, which)[1]).double().cpu()
    # With activation a_up = sum_k map_kp direction_ku, the effect of group k is sum_p map_kp (direction_k .
    # gradient_p).
    along = np.einsum("eup,ku->ekp", gradients.numpy(), directions)
    maps = strengths.reshape(n, places, k).transpose(0, 2, 1)
    effects = (along * maps).sum(2)
    shape = site.positions_of(passes.points)
    removed = []
    for group in range(k):
        part = torch.tensor(np.einsum("ep,u->eup", maps[:, group], directions[group]))
        part = part.to(passes.points).reshape(n, site.n_units, *shape)
        less = passes.points - site.from_by_unit(part)
        removed.append(passes.values - passes.value(less, which))
    return ChannelGroups(
        torch.tensor(directions, dtype=torch.float32),
        torch.tensor(maps, dtype=torch.float32).reshape(n, k, *shape),
        torch.tensor(effects, dtype=torch.float32), torch.stack(removed, 1).cpu(), hidden, site.name,
        str(passes.target), passes.model.hash, seed,
    )  # fmt: skip
