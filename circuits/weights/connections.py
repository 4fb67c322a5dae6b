"""Connections between units: which units a unit is computed from, and which it contributes to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Connection:
    """The weights from one unit to another.

    Attributes:
        source: the unit that is read.
        target: the unit that is computed.
        kernel: y x x for a convolution (as cross-correlation: the middle is the same place; for a transposed one over
            the map that it reads with zeros between its places, as many as its stride leaves), a single number for a
            linear layer, (Q, K, V) composition scores between heads (Q and K where a query attends to its own position:
            rotary embeddings turn them elsewhere). Batch norm and constants on either side of the layer are multiplied
            in, of other norms their gain; what depends on the example is left out: what a norm divides by, and a gate
            that is one number a channel (squeeze-excite). So is the mean that a layer norm subtracts, but for
            TransformerLens bridges. If the source reaches the layer along several paths, their kernels are added.
        layer: the layer's name.
        through: sites between the source and the layer (pooling, normalisation), nearest to the layer last.
        typical: for comparison, the median norm of the kernels from all sources of the same target (for an incoming
            connection), or to all targets of the same source (for an outgoing one).
    """

    source: Unit
    target: Unit
    kernel: Float[Tensor, "*kernel"]
    layer: str
    through: tuple[str, ...]
    typical: float

    @property
    def norm(self) -> float:
        """The strength of the connection: the Euclidean norm of the kernel."""
        return self.kernel.norm().item()

    @property
    def total(self) -> float:
        """The sum of the kernel: positive if the source excites the target on the whole, negative if it inhibits."""
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

    Where a layer reads the model's input, the sources are the input's channels, `input:0` and so on.

    Args:
        model: the model, without edits in force.
        unit: the target.
        top: how many connections, by the norm of the kernel.

    Raises:
        KeyError: if its site is unknown.
        ValueError: if the unit does not exist, no layer is found that writes it or nothing of what that reads, `top`
            is not positive, or the model is edited.
    """
    _check_top(top)
    target, layers = model.unit(unit), model.weight_layers
    if why := not_written(model, target, layers):
        raise ValueError(why)
    return _into(model, target, top, layers)


def outgoing(model: HookedModel, unit: str | Unit, top: int = 10) -> list[Connection]:
    """The strongest connections from a unit, to units of the sites directly after it.

    Arguments and errors are those of `incoming`.
    """
    _check_top(top)
    return _from(model.unit(unit), top, model.weight_layers)


def both_ways(
    model: HookedModel, unit: str | Unit, top: int = 10
) -> tuple[list[Connection], list[Connection]]:
    """The strongest connections into a unit and from it, as `incoming` and `outgoing` give them; the model's weights,
    which are hashed whenever they are read, are read once.

    Arguments and errors are those of `incoming`, except that a unit which no layer writes has none into it.
    """
    _check_top(top)
    one, layers = model.unit(unit), model.weight_layers
    writers = [layer for layer in layers if one.index in written(layer, one.site)]
    into = _into(model, one, top, layers) if any(w.reads or not w.lost for w in writers) else []
    return into, _from(one, top, layers)


def _into(
    model: HookedModel, target: Unit, top: int, layers: Sequence[WeightLayer]
) -> list[Connection]:
    _warn_of_lost(model, target, layers)
    wanted = torch.tensor([target.index])
    found: list[Connection] = []
    for layer in layers:
        # Several layers can write one site (branches of a concatenation, summands of a residual sum), each some units.
        if target.index not in written(layer, target.site):
            continue
        for site, links in by_site(link for link in layer.reads if link.direct).items():
            kernels = kernels_into(layer, target.site, wanted, links, model.n_units(site))[0]
            through = sites_between(layer, links[0].depth)
            for index, kernel, typical in _strongest(kernels, top):
                source = Unit(site, index)
                found.append(Connection(source, target, kernel, layer.name, through, typical))
    return sorted(found, key=lambda c: -c.norm)[:top]


def _from(source: Unit, top: int, layers: Sequence[WeightLayer]) -> list[Connection]:
    wanted = torch.tensor([source.index])
    found: list[Connection] = []
    read = directly_read(layers)
    for layer in layers:
        links = [link for link in layer.reads if link.site == source.site]
        site = nearest_written(layer, read)
        # A layer that reads the site may still not read this unit (a slice, or groups of a convolution).
        if site is None or not any((link.index == source.index).any() for link in links):
            continue
        kernels = kernels_from(layer, wanted, links, by_site(layer.writes)[site])[0]
        through = sites_between(layer, links[0].depth)
        for index, kernel, typical in _strongest(kernels, top):
            target = Unit(site, index)
            found.append(Connection(source, target, kernel, layer.name, through, typical))
    return sorted(found, key=lambda c: -c.norm)[:top]


def not_written(model: HookedModel, unit: Unit, known: Sequence[WeightLayer] | None = None) -> str:
    """Why a unit has no incoming weights: no layer is found that writes it, or none of what that reads. Else empty.

    Args:
        model: the model.
        unit: the unit.
        known: the model's layers, if the caller has them already.
    """
    every = model.weight_layers if known is None else known
    layers = [layer for layer in every if unit.index in written(layer, unit.site)]
    ends = [(m.name, m.end(unit.site, "writes")) for m in model.matrices] if not layers else []
    if names := [name for name, end in ends if end is not None and len(end.of((unit.index,)))]:
        return (
            f"the weights {', '.join(names)} of {model.name} write {unit}, and edits change them, but connections are "
            "followed here only through convolutions and linear layers whose inputs and outputs are sites' units"
        )
    if not layers:
        return (
            f"no convolution or linear layer of {model.name} is found that writes {unit}, only operations without "
            "weights or ones that mix units: expand_weights shows what it is computed from"
        )
    if any(layer.reads or not layer.lost for layer in layers):
        return ""
    lost = ", ".join(dict.fromkeys(name for layer in layers for name in layer.lost))
    return (
        f"layer {layers[0].name} of {model.name}, which writes {unit}, reads what comes through {lost}, which is not "
        "followed here: expand_weights has it all"
    )


def _warn_of_lost(model: HookedModel, unit: Unit, layers: Sequence[WeightLayer]) -> None:
    """Log of each layer that writes a unit which part of its input could not be followed to any site."""
    for layer in layers:
        if layer.lost and unit.index in written(layer, unit.site):
            log.warning(
                "layer %s of %s also reads what comes through %s, which is not followed: weights from there are "
                "missing, expand_weights has it all", layer.name, model.name, ", ".join(layer.lost),
            )  # fmt: skip


def directly_read(layers: Iterable[WeightLayer]) -> set[str]:
    """The sites that some layer reads directly."""
    return {r.site for layer in layers for r in layer.reads if r.direct}


def nearest_written(layer: WeightLayer, read: Set[str]) -> str | None:
    """The site whose units a layer computes: the nearest one that other layers read; if there is none, the last one
    after its nonlinearity, before modules that only pass units on.
    """
    sites = list(by_site(layer.writes))
    own = [link.site for link in takewhile(lambda link: link.direct, layer.writes)]
    return next((site for site in sites if site in read), (own or sites or [None])[-1])


def sites_between(layer: WeightLayer, depth: int) -> tuple[str, ...]:
    """The sites between a site that a layer reads, at some depth, and the layer, the nearest to the layer last."""
    nearer = dict.fromkeys(link.site for link in layer.reads if link.depth < depth)
    return tuple(reversed(nearer))


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top {top} must be at least 1")


def _strongest(kernels: Tensor, top: int) -> Iterator[tuple[int, Tensor, float]]:
    """The indices and kernels with the largest norms, each with the median norm of all that are not zero."""
    norms = kernels.reshape(len(kernels), -1).norm(dim=1)
    connected = norms[norms > 0]
    if not len(connected):
        return
    typical = connected.median().item()
    for index in norms.argsort(descending=True, stable=True)[: min(top, len(connected))].tolist():
        yield index, kernels[index].detach().cpu().clone(), typical
