"""Weights between units: what builds a unit and what it builds (layer 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.topology import Link, WeightLayer
from circuits.units import Unit


@dataclass(frozen=True, eq=False)
class Connection:
    """The weights from one unit to another.

    Attributes:
        source: the unit that is read.
        target: the unit that is built.
        kernel: y x x for a convolution (cross-correlation: the middle is "same place"), a single
            number for a linear layer, (Q, K, V) composition scores between heads. Batch norm and
            constants on either side of the layer are multiplied in; where a unit reaches it along
            several paths their kernels are added.
        layer: the layer's name.
        through: sites between the source and the layer (pooling, normalisation), nearest last.
        typical: the median norm of the kernels beside it: of all sources of the same target for an
            incoming connection, of all targets of the same source for an outgoing one.
    """

    source: Unit
    target: Unit
    kernel: Float[Tensor, "*kernel"]
    layer: str
    through: tuple[str, ...]
    typical: float

    @property
    def norm(self) -> float:
        """Euclidean norm of the kernel: how strong the connection is."""
        return self.kernel.norm().item()

    @property
    def total(self) -> float:
        """Sum of the kernel: above zero excites, below inhibits, on the whole."""
        return self.kernel.sum().item()

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return {
            "source": str(self.source),
            "target": str(self.target),
            "norm": self.norm,
            "typical_norm": self.typical,
            "sum": self.total,
            "kernel": self.kernel.tolist(),
            "layer": self.layer,
            "through": list(self.through),
        }


def incoming(model: HookedModel, unit: str | Unit, top: int = 10) -> list[Connection]:
    """The strongest connections into a unit, from units of the sites directly before it.

    Where the layer reads the model's input the sources are its channels, `input:0` …

    Args:
        model: the model, without edits in force.
        unit: the target.
        top: how many, by norm of the kernel.

    Raises:
        KeyError: if its site is unknown.
        ValueError: if the unit does not exist, `top` is not positive, or the model is edited.
    """
    _check_top(top)
    target = model.unit(unit)
    found: list[Connection] = []
    for layer in model.weight_layers:
        row = _into(layer, target)
        if row is None:
            continue
        for site, links in _by_site(link for link in layer.reads if link.direct).items():
            kernels = sum(_gathered(row, link, model.n_units(site)) for link in links)
            through = _through(layer, links[0].depth)
            for index, kernel, typical in _strongest(kernels, top):
                source = Unit(site, index)
                found.append(Connection(source, target, kernel, layer.name, through, typical))
    return sorted(found, key=lambda c: -c.norm)[:top]


def outgoing(model: HookedModel, unit: str | Unit, top: int = 10) -> list[Connection]:
    """The strongest connections from a unit, to units of the sites directly after it.

    Arguments and errors as for `incoming`.
    """
    _check_top(top)
    source = model.unit(unit)
    found: list[Connection] = []
    directly_read = {r.site for other in model.weight_layers for r in other.reads if r.direct}
    for layer in model.weight_layers:
        links = [link for link in layer.reads if link.site == source.site]
        column = _out_of(layer, source, links)
        writes = _by_site(iter(layer.writes))
        if column is None or not writes:
            continue
        # the nearest site that other layers read, or else the nearest
        site = next((s for s in writes if s in directly_read), next(iter(writes)))
        kernels = sum(
            column[link.index.clamp_min(0)] * _column_shape(link.factor * (link.index >= 0), column)
            for link in writes[site]
        )
        through = _through(layer, links[0].depth)
        for index, kernel, typical in _strongest(kernels, top):
            target = Unit(site, index)
            found.append(Connection(source, target, kernel, layer.name, through, typical))
    return sorted(found, key=lambda c: -c.norm)[:top]


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top {top} must be at least 1")


def _by_site(links: Iterator[Link]) -> dict[str, list[Link]]:
    grouped: dict[str, list[Link]] = {}
    for link in links:
        grouped.setdefault(link.site, []).append(link)
    return grouped


def _into(layer: WeightLayer, target: Unit) -> Tensor | None:
    """What a layer writes into a unit: input channel x kernel axes, summed over its paths."""
    rows = [
        layer.row(int(link.index[target.index])) * link.factor[target.index]
        for link in layer.writes
        if link.site == target.site and link.index[target.index] >= 0
    ]
    return sum(rows[1:], rows[0]) if rows else None


def _out_of(layer: WeightLayer, source: Unit, links: list[Link]) -> Tensor | None:
    """What a layer makes of a unit: output channel x kernel axes, summed over its paths."""
    columns = []
    for link in links:
        channels = (link.index == source.index).nonzero()[:, 0].tolist()
        parts = [layer.column(c) * link.factor[c] for c in channels]
        if parts and link.flattened:
            stacked = torch.stack(parts, dim=1)
            columns.append(stacked.reshape(len(stacked), *link.flattened))
        elif parts:
            columns.append(sum(parts[1:], parts[0]))
    return sum(columns[1:], columns[0]) if columns else None


def _gathered(row: Tensor, link: Link, n_units: int) -> Tensor:
    """Weights by input channel as weights by unit of the site that a link leads to."""
    used = link.index >= 0
    weighted = row[used] * _column_shape(link.factor[used], row)
    if link.flattened:
        return weighted.reshape(n_units, *link.flattened)
    return row.new_zeros(n_units, *row.shape[1:]).index_add_(0, link.index[used], weighted)


def _column_shape(factor: Tensor, like: Tensor) -> Tensor:
    """One factor a row of `like`, ready to be multiplied."""
    return factor.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _strongest(kernels: Tensor | int, top: int) -> Iterator[tuple[int, Tensor, float]]:
    """The strongest kernels with their places, and the median norm of all that are not zero."""
    assert isinstance(kernels, Tensor), "a sum over at least one path"
    norms = kernels.reshape(len(kernels), -1).norm(dim=1)
    connected = norms[norms > 0]
    if not len(connected):
        return
    typical = connected.median().item()
    for index in norms.argsort(descending=True, stable=True)[: min(top, len(connected))].tolist():
        yield index, kernels[index].detach().cpu().clone(), typical


def _through(layer: WeightLayer, depth: int) -> tuple[str, ...]:
    """The sites between a source and the layer, from the source on."""
    nearer = dict.fromkeys(link.site for link in layer.reads if link.depth < depth)
    return tuple(reversed(nearer))
