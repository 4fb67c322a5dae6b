"""Weights between units: what builds a unit and what it builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import WeightLayer
from circuits.tables import Table
from circuits.units import Unit
from circuits.weights.kernels import by_site, kernels_from, kernels_into, written


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


def connections_table(
    connections: Sequence[Connection],
    end: Literal["source", "target"],
    title: str,
    more: Mapping[str, Sequence[object]] | None = None,
) -> Table:
    """Connections by the unit at one end of each, with `more` columns behind."""
    rows = [
        (
            getattr(c, end), c.norm, c.typical, c.total, " x ".join(map(str, c.kernel.shape)) or "1",
            *(values[i] for values in (more or {}).values()),
        )
        for i, c in enumerate(connections)
    ]  # fmt: skip
    return Table(("unit", "norm", "typical norm", "sum", "kernel", *(more or {})), rows, title)


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
    wanted = torch.tensor([target.index])
    found: list[Connection] = []
    for layer in model.weight_layers:
        if target.index not in written(layer, target.site):
            continue
        for site, links in by_site(link for link in layer.reads if link.direct).items():
            kernels = kernels_into(layer, target.site, wanted, links, model.n_units(site))[0]
            through = passed(layer, links[0].depth)
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
    wanted = torch.tensor([source.index])
    found: list[Connection] = []
    read = directly_read(model)
    for layer in model.weight_layers:
        links = [link for link in layer.reads if link.site == source.site]
        site = nearest_written(layer, read)
        if site is None or not any((link.index == source.index).any() for link in links):
            continue
        kernels = kernels_from(layer, wanted, links, by_site(layer.writes)[site])[0]
        through = passed(layer, links[0].depth)
        for index, kernel, typical in _strongest(kernels, top):
            target = Unit(site, index)
            found.append(Connection(source, target, kernel, layer.name, through, typical))
    return sorted(found, key=lambda c: -c.norm)[:top]


def directly_read(model: HookedModel) -> set[str]:
    """The sites that some layer reads directly."""
    return {r.site for layer in model.weight_layers for r in layer.reads if r.direct}


def nearest_written(layer: WeightLayer, read: Set[str]) -> str | None:
    """The site that a layer builds: the nearest one that other layers read, or else the last one, past
    its nonlinearity, before what just passes units on.
    """
    sites = list(by_site(layer.writes))
    own = [link.site for link in takewhile(lambda link: link.direct, layer.writes)]
    return next((site for site in sites if site in read), (own or sites or [None])[-1])


def passed(layer: WeightLayer, depth: int) -> tuple[str, ...]:
    """The sites between one that a layer reads and the layer, from there on."""
    nearer = dict.fromkeys(link.site for link in layer.reads if link.depth < depth)
    return tuple(reversed(nearer))


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top {top} must be at least 1")


def _strongest(kernels: Tensor, top: int) -> Iterator[tuple[int, Tensor, float]]:
    """The strongest kernels with their places, and the median norm of all that are not zero."""
    norms = kernels.reshape(len(kernels), -1).norm(dim=1)
    connected = norms[norms > 0]
    if not len(connected):
        return
    typical = connected.median().item()
    for index in norms.argsort(descending=True, stable=True)[: min(top, len(connected))].tolist():
        yield index, kernels[index].detach().cpu().clone(), typical
