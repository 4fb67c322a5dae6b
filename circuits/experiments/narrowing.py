"""Runs a token model's last part only at the positions that a task counts.

After the last attention layer positions no longer interact, and where one position of sixteen counts, the unembedding
of the rest is most of a pass's cost. From which residual stream on this holds is tested on the model, not assumed.
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
"""Positions are left out if at most this share of them counts; otherwise gathering them saves too little."""


@dataclass(frozen=True, eq=False)
class Narrowing:
    """The positions of a batch that are kept from a site on.

    Attributes:
        site: a site of the residual stream.
        kept: the positions kept in each row, equally many in all rows.
        slots: for each place of the batch, its index among its row's kept positions.
    """

    site: Site
    kept: Int[Tensor, "row slot"]
    slots: Int[Tensor, " place"]

    @classmethod
    def at(cls, site: Site, places: Places, n_rows: int) -> Narrowing:
        """Keep the places of a batch; rows with fewer places are filled up with position 0."""
        # The k-th place of a row gets slot k. In `order`, places are sorted by row, and cumsum - count is where each
        # row begins there; the difference to a place's own index is its number within the row.
        count = torch.bincount(places.row, minlength=n_rows)
        order = places.row.argsort(stable=True)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order)) - (count.cumsum(0) - count)[places.row[order]]
        # Position 0 as a filler exists in every text; what is computed there is not read.
        kept = places.position.new_zeros(n_rows, int(count.max()))
        kept[places.row, slots] = places.position
        return cls(site, kept, slots)

    def after(self, change: Change | None) -> Change:
        """The change at the site: another change first, if there is one, and then only the kept positions stay."""

        def narrow(value: Float[Tensor, "row position unit"]) -> Tensor:
            made = value if change is None else change(value)
            # Several variants may be stacked along the batch; each of them keeps the same positions.
            # Stacked as variant after variant, each with all rows.
            index = self.kept.repeat(len(made) // len(self.kept), 1).to(made.device)
            return made.gather(1, index[..., None].expand(-1, -1, made.shape[2]))

        return narrow

    def added(self, edits: Mapping[str, Change]) -> dict[str, Change]:
        """The changes of a pass with the narrowing added after them."""
        return dict(edits) | {self.site.name: self.after(edits.get(self.site.name))}


def worth_narrowing(places: Places, n_rows: int, n_positions: int) -> bool:
    """Whether few enough positions of each row count to make narrowing worthwhile."""
    most = int(torch.bincount(places.row, minlength=n_rows).max())
    return most <= _SHARE * n_positions


class PositionwiseStreams:
    """The sites after which a model treats each position separately: residual streams, or what the logits are made of.

    Each is tested once.
    """

    def __init__(self, model: HookedModel, end: Site) -> None:
        self.model, self.end = model, end
        self.order = {s.name: i for i, s in enumerate(model.sites)}
        self.known: dict[str, bool] = {}

    def first(self, inputs: Tensor, output: Tensor, behind: int) -> Site | None:
        """The earliest stream after which positions may be left out, else the site that needs all; None if neither.

        Args:
            inputs: examples to test it on, none of them padded.
            output: the model's output for them.
            behind: the index, among the model's sites, of the last one that needs all positions.
        """
        late = [s for s in narrowable(self.model, self.end) if self.order[s.name] >= behind]
        own = self.model.sites[behind]
        if own != self.end and own.axes == ("batch", "position", "unit"):
            late.append(own)
        for site in late:
            if site.name not in self.known:
                self.known[site.name] = narrows(self.model, site, self.end, inputs, output)
            if self.known[site.name]:
                return site
        return None
