"""Kernels between the units of two sites, out of a layer's weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from circuits.models.adapter.topology import SiteLink, WeightLayer


def by_site(links: Iterable[SiteLink]) -> dict[str, list[SiteLink]]:
    """Links grouped by the site that they lead to."""
    grouped: dict[str, list[SiteLink]] = {}
    for link in links:
        grouped.setdefault(link.site, []).append(link)
    return grouped


def written(layer: WeightLayer, site: str) -> Tensor:
    """The units of a site that a layer writes, ascending."""
    links = [link for link in layer.writes if link.site == site]
    if not links:
        return torch.zeros(0, dtype=torch.long)
    return torch.stack([link.index >= 0 for link in links]).any(0).nonzero()[:, 0]


def kernels_into(
    layer: WeightLayer, site: str, units: Tensor, reads: Sequence[SiteLink], n_sources: int
) -> Tensor:
    """What a layer builds units of from those of a site that it reads, summed over its paths.

    Args:
        layer: the layer.
        site: of the units that are built.
        units: which of its units.
        reads: the layer's paths to the site that is read.
        n_sources: how many units that has.

    Returns:
        Unit x source x kernel axes.
    """
    rows = [
        _times(layer.rows(link.index[units].clamp_min(0)), _reached(link)[units], 0)
        for link in layer.writes
        if link.site == site
    ]
    total = sum(rows[1:], rows[0])
    return _summed([_by_source(total, link, n_sources) for link in reads])


def kernels_from(
    layer: WeightLayer, units: Tensor, reads: Sequence[SiteLink], writes: Sequence[SiteLink]
) -> Tensor:
    """What a layer builds of units, summed over its paths: unit x target x kernel axes.

    Args:
        layer: the layer.
        units: units of a site that it reads.
        reads: the layer's paths to that site.
        writes: its paths to the site that is built.
    """
    columns = _summed([_of_units(layer, link, units) for link in reads])
    return _summed(
        [_times(columns[:, link.index.clamp_min(0)], _reached(link), 1) for link in writes]
    )


def _by_source(rows: Tensor, link: SiteLink, n_sources: int) -> Tensor:
    """Weights by input channel as weights by unit of the site that a link leads to."""
    used = link.index >= 0
    weighted = _times(rows[:, used], link.factor[used], 1)
    if link.flattened:
        return weighted.reshape(len(rows), n_sources, *link.flattened)
    empty = rows.new_zeros(len(rows), n_sources, *rows.shape[2:])
    return empty.index_add_(1, link.index[used].to(rows.device), weighted)


def _of_units(layer: WeightLayer, link: SiteLink, units: Tensor) -> Tensor:
    """Columns of a layer by unit of the site that a link leads to: unit x output x kernel axes."""
    channels = torch.isin(link.index, units).nonzero()[:, 0]
    columns = _times(layer.columns(channels), link.factor[channels], 0)
    if link.flattened:
        shaped = columns.unflatten(0, (-1, *link.flattened)).movedim(1 + len(link.flattened), 1)
        order = link.index[channels].reshape(len(shaped), -1)[:, 0]
        return shaped[[int((order == unit).nonzero()[0, 0]) for unit in units]]
    place = torch.stack([(units == unit).nonzero()[0, 0] for unit in link.index[channels]])
    empty = columns.new_zeros(len(units), *columns.shape[1:])
    return empty.index_add_(0, place.to(columns.device), columns)


def _reached(link: SiteLink) -> Tensor:
    return link.factor * (link.index >= 0)


def _times(weights: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Weights times one factor a place along an axis."""
    shape = [-1 if a == axis else 1 for a in range(weights.ndim)]
    return weights * factor.to(weights).reshape(shape)


def _summed(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])
