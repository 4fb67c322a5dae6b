"""Kernels between the units of two sites, assembled from a layer's weights and its paths to the sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from circuits.models.adapter.topology import SiteLink, WeightLayer
from circuits.tensors import at_least_single


def by_site(links: Iterable[SiteLink]) -> dict[str, list[SiteLink]]:
    """Links grouped by the site that they lead to."""
    grouped: dict[str, list[SiteLink]] = {}
    for link in links:
        grouped.setdefault(link.site, []).append(link)
    return grouped


def written(layer: WeightLayer, site: str) -> Tensor:
    """The units of a site that a layer writes, in ascending order."""
    links = [link for link in layer.writes if link.site == site]
    if not links:
        return torch.zeros(0, dtype=torch.long)
    return torch.stack([link.index >= 0 for link in links]).any(0).nonzero()[:, 0]


def kernels_into(
    layer: WeightLayer, site: str, units: Tensor, reads: Sequence[SiteLink], n_sources: int
) -> Tensor:
    """The kernels into some units from all units of a site that a layer reads, summed over paths.

    Args:
        layer: the layer.
        site: the site that it writes.
        units: the units of that site.
        reads: the layer's paths to the site that it reads.
        n_sources: the number of units of that site.

    Returns:
        Unit x source x kernel axes.
    """
    # For target unit t: sum over paths that write it of factor_t * W[channel of t]. A channel of -1 (the path does not
    # reach t) is looked up as channel 0 and multiplied by 0.
    rows = [
        _times(layer.rows(link.index[units].clamp_min(0)), _path_factors(link)[units], 0)
        for link in layer.writes
        if link.site == site
    ]
    total = sum(rows[1:], rows[0])
    return _summed([_by_source(total, link, n_sources) for link in reads])


def kernels_from(
    layer: WeightLayer, units: Tensor, reads: Sequence[SiteLink], writes: Sequence[SiteLink]
) -> Tensor:
    """The kernels from some units to all units of a site that a layer writes, summed over paths: unit x target x
    kernel axes.

    Args:
        layer: the layer.
        units: units of a site that it reads.
        reads: the layer's paths to that site.
        writes: the layer's paths to the site that it writes.
    """
    columns = _summed([_of_units(layer, link, units) for link in reads])
    return _summed(
        [_times(columns[:, link.index.clamp_min(0)], _path_factors(link), 1) for link in writes]
    )


def _by_source(rows: Tensor, link: SiteLink, n_sources: int) -> Tensor:
    """Turn weights by input channel into weights by unit of the site that a path leads to."""
    used = link.index >= 0
    weighted = _times(rows[:, used], link.factor[used], 1)
    if link.flattened:  # consecutive input channels are the positions of one unit's map
        return weighted.reshape(len(rows), n_sources, *link.flattened)
    empty = rows.new_zeros(len(rows), n_sources, *rows.shape[2:])
    return empty.index_add_(1, link.index[used].to(rows.device), weighted)


def _of_units(layer: WeightLayer, link: SiteLink, units: Tensor) -> Tensor:
    """A layer's weights out of some units of the site that a path leads to: unit x output x kernel axes."""
    channels = torch.isin(link.index, units).nonzero()[:, 0]
    columns = _times(layer.columns(channels), link.factor[channels], 0)
    if link.flattened:
        shaped = columns.unflatten(0, (-1, *link.flattened)).movedim(1 + len(link.flattened), 1)
        # Channels come in the order of units; the caller's order may be another.
        order = link.index[channels].reshape(len(shaped), -1)[:, 0]
        return shaped[[int((order == unit).nonzero()[0, 0]) for unit in units]]
    place = torch.stack([(units == unit).nonzero()[0, 0] for unit in link.index[channels]])
    empty = columns.new_zeros(len(units), *columns.shape[1:])
    return empty.index_add_(0, place.to(columns.device), columns)


def _path_factors(link: SiteLink) -> Tensor:
    """The factors of a path, 0 for channels that it does not reach."""
    return link.factor * (link.index >= 0)


def _times(weights: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Multiply weights by factors along an axis."""
    shape = [-1 if a == axis else 1 for a in range(weights.ndim)]
    weights = at_least_single(weights)
    return weights * factor.to(weights).reshape(shape)


def _summed(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])
