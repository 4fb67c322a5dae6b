"""Weights between units: what builds a unit and what it builds (layer 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.topology import INPUT, Link, WeightLayer
from circuits.units import Unit

_PASSES_ON = ("Pool", "Norm", "Dropout", "Identity", "Upsample", "Flatten")
"""Modules that hand on the units of the site before them."""


@dataclass(frozen=True, eq=False)
class Connection:
    """The weights from one unit to another.

    Attributes:
        source: the unit that is read.
        target: the unit that is built.
        kernel: y x x for a convolution (cross-correlation: the middle is "same place"), a single
            number for a linear layer, (Q, K, V) composition scores between heads. Batch norm after
            the layer is multiplied in.
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
        model: the model.
        unit: the target.
        top: how many, by norm of the kernel.

    Raises:
        KeyError: if its site is unknown.
        ValueError: if the unit does not exist, or `top` is not positive.
    """
    _check_top(top)
    target = model.unit(unit)
    found: list[Connection] = []
    for layer in model.weight_layers:
        for link in _covering(layer.writes, target):
            for source in _sources(model, layer):
                found += list(_row(layer, target, link, source, top))
    return sorted(found, key=lambda c: -c.norm)[:top]


def outgoing(model: HookedModel, unit: str | Unit, top: int = 10) -> list[Connection]:
    """The strongest connections from a unit, to units of the sites directly after it.

    Arguments and errors as for `incoming`.
    """
    _check_top(top)
    source = model.unit(unit)
    found: list[Connection] = []
    for layer in model.weight_layers:
        for link in _covering(layer.reads, source):
            target = _target(model, layer)
            if target is not None:
                found += list(_column(layer, source, link, target, top))
    return sorted(found, key=lambda c: -c.norm)[:top]


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top {top} must be at least 1")


def _covering(links: tuple[Link, ...], unit: Unit) -> Iterator[Link]:
    """The link, if any, by which a layer touches the site of a unit."""
    for link in links:
        if link.site == unit.site:
            yield link
            return


def _sources(model: HookedModel, layer: WeightLayer) -> list[Link]:
    """The sites that a layer is said to read: the nearest that do not just pass on another's units.

    One, or several where their sum is read.
    """
    own = [link for link in layer.reads if not _passes_on(model, link.site)] or layer.reads[:1]
    by_tensor = {link.operation: link for link in reversed(own) if link.depth == own[0].depth}
    return list(reversed(by_tensor.values()))


def _passes_on(model: HookedModel, site: str) -> bool:
    return site != INPUT and any(word in model.site(site).module for word in _PASSES_ON)


def _target(model: HookedModel, layer: WeightLayer) -> Link | None:
    """The site that a layer is said to write: the nearest that other layers are said to read."""
    read = {link.site for other in model.weight_layers for link in _sources(model, other)}
    for link in layer.writes:
        if link.site in read:
            return link
    return layer.writes[0] if layer.writes else None


def _through(reads: tuple[Link, ...], source: Link) -> tuple[str, ...]:
    """The sites between a source and the layer, from the source on."""
    nearer = dict.fromkeys(r.site for r in reads if r.depth < source.depth)
    return tuple(reversed(nearer))


def _row(
    layer: WeightLayer, target: Unit, written: Link, read: Link, top: int
) -> Iterator[Connection]:
    """The strongest connections of one output channel with the input channels of a site."""
    out = target.index - written.offset
    if not 0 <= out < written.channels:
        return
    kernels = _scaled(layer.weight[out], written, out)
    first = _first_input(layer, out) - read.offset
    inside = [i for i in range(len(kernels)) if 0 <= first + i < read.channels]
    through = _through(layer.reads, read)
    for i, typical in _best(kernels, inside, top):
        source = Unit(read.site, first + i)
        yield Connection(source, target, kernels[i].clone(), layer.name, through, typical)


def _column(
    layer: WeightLayer, source: Unit, read: Link, written: Link, top: int
) -> Iterator[Connection]:
    """The strongest connections of one input channel with the output channels of a layer."""
    channel = source.index + read.offset
    outs = [
        out
        for out in range(len(layer.weight))
        if 0 <= channel - _first_input(layer, out) < layer.weight.shape[1]
    ]
    if not outs:
        return
    kernels = torch.stack(
        [_scaled(layer.weight[o, channel - _first_input(layer, o)], written, o) for o in outs]
    )
    through = _through(layer.reads, read)
    for i, typical in _best(kernels, range(len(outs)), top):
        target = Unit(written.site, written.offset + outs[i])
        yield Connection(source, target, kernels[i].clone(), layer.name, through, typical)


def _best(kernels: Tensor, among: Sequence[int], top: int) -> Iterator[tuple[int, float]]:
    """The strongest kernels among some, each with the median norm of all."""
    norms = kernels.reshape(len(kernels), -1).norm(dim=1)
    typical = norms.median().item()
    for i in sorted(among, key=lambda i: -norms[i].item())[:top]:
        yield i, typical


def _first_input(layer: WeightLayer, out: int) -> int:
    """The first input channel that an output channel of a grouped convolution reads."""
    return out // (len(layer.weight) // layer.groups) * layer.weight.shape[1]


def _scaled(kernel: Tensor, written: Link, out: int) -> Tensor:
    return kernel if written.scale is None else kernel * written.scale[_scale_index(written, out)]


def _scale_index(written: Link, out: int) -> int:
    """Batch norm sits on the channels of the tensor it normalises, which may be a whole concatenation."""
    assert written.scale is not None, "asked only where there is a scale"
    return out if len(written.scale) == written.channels else written.offset + out
