"""Means of activations over examples: one definition, which ablations, edits and their random controls share.

Every token of every text counts once, and padding never does; of images, every place of the map counts. A mean for
each position, or for each template and position, has to be asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.examples import BATCH, Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Site

log = logging.getLogger(__name__)

By = Literal["token", "position", "template"]
"""One mean over all counted positions, one for each position, or one for each template and position."""

SINK = 5.0
"""A position is a sink if its rows are on average at least this many times as long as the median position's.

The first token of a text often is: models use it as an attention sink, with a very large norm."""

_ALIVE = 1e-6
"""A unit is dead if its root mean square is at most this share of the site's median, or its activation never varies."""


@dataclass(frozen=True, eq=False)
class Activity:
    """How active a site's units are on some examples.

    Attributes:
        mean: the mean of each unit over counted positions (unit x d_head for heads).
        rms: the root mean square of each unit's activation (a head's activation is the norm of its output).
        n: the number of positions counted.
        span: by how much each unit's largest activation exceeds its smallest; None if it was not measured.
    """

    mean: Float[Tensor, " *unit"]
    rms: Float[np.ndarray, " unit"]
    n: int
    span: Float[np.ndarray, " unit"] | None = None

    @property
    def alive(self) -> Bool[np.ndarray, " unit"]:
        """Which units are not dead: active at some position, and not equally active at all of them."""
        # Relative to the median of the active ones: what counts as zero depends on the site's scale.
        some = self.rms[self.rms > 0]
        active = self.rms > (_ALIVE * float(np.median(some)) if len(some) else 0.0)
        # A single position says nothing of whether a unit varies.
        return active if self.span is None or self.n == 1 else active & (self.span > 0)


@dataclass(frozen=True, eq=False)
class SiteMean:
    """The mean activation of a site's units.

    Attributes:
        values: unit (x d_head); by position, position x unit; by template, template x position x unit. NaN where no
            example has the position.
        by: what there is a mean for.
        keys: the templates, if the mean is by template.
        n: the number of positions counted.
        left_out: the positions that were left out.
        sinks: positions whose rows are much longer than the rest, and by what factor (see `SINK`).
    """

    values: Float[Tensor, "..."]
    by: By
    keys: tuple[str, ...]
    n: int
    left_out: tuple[int, ...]
    sinks: tuple[tuple[int, float], ...]

    @property
    def warning(self) -> str:
        """A warning for reports if sinks dominate the mean; else empty."""
        if not self.sinks or self.by != "token":
            return ""
        named = ", ".join(f"{at} ({times:.0f} times)" for at, times in self.sinks)
        return (
            f"rows at position {named} are far longer than elsewhere and dominate this mean: leave them out with "
            "leave_out, or take a mean for each position with by='position'"
        )


def warn_of_sinks(model: HookedModel, sites: Iterable[str], examples: Examples) -> None:
    """Log a warning for each site of texts whose mean is dominated by a few positions."""
    for site in dict.fromkeys(sites):
        if model.site(site).position_axes == ("position",):
            warning = site_mean(model, site, examples).warning
            if warning:
                log.warning("%s: %s", site, warning)


def activities(
    model: HookedModel, sites: Sequence[str | Site], examples: Examples, batch: int = BATCH
) -> dict[str, Activity]:
    """Measure how active the units of some sites are on examples, in one pass; by site."""
    places = list({s.name: s for s in map(model.site, sites)}.values())
    if not places:
        return {}
    total = {s.name: torch.zeros(s.unit_shape, dtype=torch.float64) for s in places}
    square = {s.name: torch.zeros(s.n_units, dtype=torch.float64) for s in places}
    low = {s.name: torch.full((s.n_units,), torch.inf, dtype=torch.float64) for s in places}
    high = {name: -values for name, values in low.items()}
    count = dict.fromkeys(total, 0)
    for part in examples.batches(batch):
        cache = model.run(part.inputs, mask=part.mask, read=places, until=model.last(places))
        for site in places:
            rows = counted_rows(site, cache[site], part.mask).double()
            # In float64: over a large dataset, float32 sums of squares would lose small terms.
            norms = rows if site.inner_axis is None else rows.norm(dim=-1)
            total[site.name] += rows.sum(0).cpu()
            square[site.name] += norms.square().sum(0).cpu()
            if len(norms):
                low[site.name] = low[site.name].minimum(norms.amin(0).cpu())
                high[site.name] = high[site.name].maximum(norms.amax(0).cpu())
            count[site.name] += len(rows)
    return {
        name: Activity(
            total[name] / n, (square[name] / n).sqrt().numpy(), n, (high[name] - low[name]).numpy()
        )
        for name, n in count.items()
    }


def counted_rows(
    site: Site, value: Tensor, mask: Bool[Tensor, "batch position"] | None
) -> Float[Tensor, "row *unit"]:
    """A site's tensor as one row for each counted position: row x unit (x d_head for heads)."""
    rows = site.rows(value)
    if mask is None or ("position" not in site.position_axes and "query" not in site.position_axes):
        flat = rows.flatten(0, -2)
    elif site.position_axes == ("position",):
        flat = rows[mask.to(rows.device)]
    else:
        keep = mask.to(rows.device)
        flat = rows[
            keep[:, :, None] & keep[:, None, :]
        ]  # of patterns, query and key must both be tokens
    return flat.unflatten(-1, site.unit_shape)


def site_mean(
    model: HookedModel,
    site: str | Site,
    examples: Examples,
    *,
    by: By = "token",
    leave_out: Sequence[int] = (),
    templates: Sequence[str] = (),
    batch: int = BATCH,
) -> SiteMean:
    """The mean activation of a site's units over examples.

    Args:
        model: the model.
        site: the site.
        examples: the examples to average over.
        by: one mean in all, one for each position, or one for each template and position.
        leave_out: positions, from 0, that do not count: usually the first, which often is an attention sink.
        templates: the template of each example, for means by template.
        batch: examples in a batch.

    Raises:
        KeyError: if there is no such site.
        ValueError: if positions are asked for at a site without positions of a text, there is not one template for
            each example, or every position is left out.
    """
    place = model.site(site)
    if by not in get_args(By):
        raise ValueError(f"by {by!r} is not one of {', '.join(get_args(By))}")
    if (by != "token" or leave_out) and place.position_axes != ("position",):
        raise ValueError(
            f"site {place.name} has no positions of a text: expected by='token' and no leave_out"
        )
    if by == "template" and len(templates) != len(examples):
        raise ValueError(
            f"templates have {len(templates)} entries: expected one for each of {len(examples)} examples"
        )
    keys = sorted(set(templates)) if by == "template" else [""]
    sums = _Sums(place, len(keys), list(leave_out))
    for part in examples.batches(batch):
        value = model.run(part.inputs, mask=part.mask, read=[place], until=place)[place]
        own = [keys.index(templates[i]) if by == "template" else 0 for i in part.which]
        sums.add(value, part.mask, own)
    if not sums.n:
        raise ValueError(f"leave_out {list(leave_out)} leaves no position to average over")
    return SiteMean(
        sums.mean(by),
        by,
        tuple(keys) if by == "template" else (),
        sums.n,
        tuple(leave_out),
        sums.sinks(),
    )


class _Sums:
    """Sums of a site's rows by template and position, in float64; all places of an image count as one position."""

    def __init__(self, site: Site, n_keys: int, leave_out: list[int]) -> None:
        self.site, self.leave_out, self.n = site, leave_out, 0
        self.total = torch.zeros(n_keys, 0, *site.unit_shape, dtype=torch.float64)
        self.length = torch.zeros(n_keys, 0, dtype=torch.float64)
        self.count = torch.zeros(n_keys, 0, dtype=torch.float64)

    def add(self, value: Tensor, mask: Tensor | None, keys: Sequence[int]) -> None:
        """Add a batch; `keys` is the number of the template of each of its texts."""
        texts = self.site.position_axes == ("position",)
        rows = self.site.rows(value).double().cpu()
        if not texts:
            # An image's places become the positions of one long text, which are then summed as a single position.
            rows = rows.flatten(1, -2).flatten(0, 1)[None] if rows.ndim > 2 else rows[None]
            keys = [0]
        elif rows.ndim == 2:
            rows = rows[:, None]
        keep = torch.ones(rows.shape[:2], dtype=torch.bool)
        if texts and mask is not None:
            rows, keep = _from_the_start(rows, mask.cpu())
        if not texts:
            self._grow(1)
            self._put(
                0,
                rows[0].sum(0, keepdim=True),
                rows[0].norm(dim=-1).sum()[None],
                torch.tensor([rows.shape[1]]),
            )
            return
        for at in self.leave_out:
            if 0 <= at < keep.shape[1]:
                keep[:, at] = False
        self._grow(rows.shape[1])
        for key in dict.fromkeys(keys):
            mine = torch.tensor([k == key for k in keys])
            own = rows[mine] * keep[mine][..., None]
            self._put(key, own.sum(0), own.norm(dim=-1).sum(0), keep[mine].sum(0))

    def _put(self, key: int, total: Tensor, length: Tensor, count: Tensor) -> None:
        n = len(total)
        self.total[key, :n] += total.unflatten(-1, self.site.unit_shape)
        self.length[key, :n] += length
        self.count[key, :n] += count
        self.n += int(count.sum())

    def _grow(self, n: int) -> None:
        """Make room for texts of `n` positions: batches are of different lengths."""
        more = n - self.total.shape[1]
        if more > 0:
            keys = len(self.total)
            self.total = torch.cat(
                [self.total, self.total.new_zeros(keys, more, *self.site.unit_shape)], 1
            )
            self.length = torch.cat([self.length, self.length.new_zeros(keys, more)], 1)
            self.count = torch.cat([self.count, self.count.new_zeros(keys, more)], 1)

    def mean(self, by: By) -> Tensor:
        """The means. By position, 0 / 0 where no example has the position makes them NaN, as documented."""
        if by == "token":
            return self.total.sum((0, 1)) / self.n
        made = self.total / self.count.reshape(*self.count.shape, *(1,) * len(self.site.unit_shape))
        return made if by == "template" else made[0]

    def sinks(self) -> tuple[tuple[int, float], ...]:
        """Positions whose rows are far longer than the median position's, and by what factor."""
        count, length = self.count.sum(0), self.length.sum(0)
        each = (length / count)[count > 0]
        where = torch.arange(len(count))[count > 0]
        if len(each) < 3:  # the median of one or two positions says nothing
            return ()
        times = each / each.median()
        return tuple((int(at), float(t)) for at, t in zip(where, times, strict=True) if t > SINK)


def _from_the_start(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move texts so that each begins at position 0, whichever side they are padded on."""
    first = mask.int().argmax(1)
    at = (torch.arange(mask.shape[1])[None] + first[:, None]) % mask.shape[1]
    moved = rows.gather(1, at[..., None].expand_as(rows))
    return moved, mask.gather(1, at)
