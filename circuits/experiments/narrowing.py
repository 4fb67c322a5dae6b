"""Reading a model of tokens only where a task counts: other positions are left out before the unembedding.

Behind the last attention every position goes its own way, and for one counted position of sixteen the unembedding
is most of what a pass costs. Which streams may be cut is tried, not assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.restarting import narrowable, narrows
from circuits.tasks.reading import Places
from circuits.units import Site

_SHARE = 0.5
"""Positions are left out if at most this share of them counts."""


@dataclass(frozen=True, eq=False)
class Narrowing:
    """Positions of a batch that are kept behind a site.

    Attributes:
        site: a residual stream.
        kept: the positions kept of each row, as many of each.
        slots: where among them each place of the batch is read.
    """

    site: Site
    kept: Int[Tensor, "row slot"]
    slots: Int[Tensor, " place"]

    @classmethod
    def at(cls, site: Site, places: Places, n_rows: int) -> Narrowing:
        """Keep the places of a batch; rows that have fewer than the most keep one several times."""
        count = torch.bincount(places.row, minlength=n_rows)
        order = places.row.argsort(stable=True)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order)) - (count.cumsum(0) - count)[places.row[order]]
        kept = places.position.new_zeros(n_rows, int(count.max()))
        kept[places.row, slots] = places.position
        return cls(site, kept, slots)

    def after(self, change: Change | None) -> Change:
        """What is done at the site: a change, if there is one, then all but the kept positions go."""

        def narrow(value: Float[Tensor, "row position unit"]) -> Tensor:
            made = value if change is None else change(value)
            index = self.kept.repeat(len(made) // len(self.kept), 1).to(made.device)
            return made.gather(1, index[..., None].expand(-1, -1, made.shape[2]))

        return narrow

    def added(self, edits: Mapping[str, Change]) -> dict[str, Change]:
        """Changes of a pass with this one behind them."""
        return dict(edits) | {self.site.name: self.after(edits.get(self.site.name))}


def few(places: Places, n_rows: int, n_positions: int) -> bool:
    """Whether so few positions of each row count that it is worth leaving the others out."""
    most = int(torch.bincount(places.row, minlength=n_rows).max())
    return most <= _SHARE * n_positions


class Cuts:
    """Streams behind which a model works position by position, each tried once."""

    def __init__(self, model: HookedModel, end: Site) -> None:
        self.model, self.end = model, end
        self.order = {s.name: i for i, s in enumerate(model.sites)}
        self.known: dict[str, bool] = {}

    def first(self, inputs: Tensor, output: Tensor, behind: int) -> Site | None:
        """A stream behind which positions may be left out, as early as one is found; None if there is none.

        Args:
            inputs: examples to try it on, none of them padded.
            output: what is put out for them.
            behind: the place among the model's sites of the last that has to see all positions.
        """
        for site in narrowable(self.model, self.end):
            if self.order[site.name] < behind:
                continue
            if site.name not in self.known:
                self.known[site.name] = narrows(self.model, site, self.end, inputs, output)
            if self.known[site.name]:
                return site
        return None
