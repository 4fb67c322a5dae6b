"""Raw weights: those of a single layer, between the units of the sites that it connects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import INPUT, WeightLayer
from circuits.weights.connections import directly_read, nearest_written, sites_between
from circuits.weights.kernels import by_site, kernels_into, written


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weights of one layer between two sites that it connects directly.

    Attributes:
        source: the site that the layer reads.
        target: the site that it writes.
        layer: the layer's name.
        units: the units of the target that the layer writes.
        channels: for each of them, the layer's output channel that it comes from.
        weight: unit x source unit x kernel axes, with batch norm and constants on either side of the layer multiplied
            in, and paths to the same unit added up. Kernels are cross-correlations.
        bias: each unit's bias before its nonlinearity: that of the layer, and what batch norm adds.
        through: sites between the source and the layer (pooling, normalisation), nearest to the layer last.
        model_hash: the hash of the model.
        lost: operations before the layer that could not be followed; the layer then reads more than these weights
            show, and `expand_weights` has all of it. Empty if nothing is missing.
    """

    source: str
    target: str
    layer: str
    units: tuple[int, ...]
    channels: tuple[int, ...]
    weight: Float[Tensor, "unit source *kernel"]
    bias: Float[Tensor, " unit"]
    through: tuple[str, ...]
    model_hash: str
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer, with a site that it reads directly and the site that it writes.

    Attributes:
        source: the site that it reads; `input` for the model's input.
        target: the site that it writes.
        layer: the layer between them.
        units: the units of the target that it writes.
    """

    source: str
    target: str
    layer: WeightLayer
    units: Tensor

    def kernels(self, units: Tensor, n_sources: int) -> Tensor:
        """Weights into some units of the target: unit x source unit x kernel axes."""
        reads = [r for r in self.layer.reads if r.site == self.source]
        return kernels_into(self.layer, self.target, units, reads, n_sources)

    @property
    def through(self) -> tuple[str, ...]:
        """The sites between the source and the layer, nearest to the layer last."""
        return sites_between(
            self.layer, min(r.depth for r in self.layer.reads if r.site == self.source)
        )


def connected_pairs(model: HookedModel) -> Iterator[Pair]:
    """Every pair of directly connected sites, layer by layer in order of execution.

    Raises:
        ValueError: if the model is edited, or its weights cannot be followed.
    """
    layers = model.weight_layers
    read = directly_read(layers)
    for layer in layers:
        target = nearest_written(layer, read)
        if target is None:
            continue
        for source in by_site(link for link in layer.reads if link.direct):
            yield Pair(source, target, layer, written(layer, target))


def raw_weights(model: HookedModel, source: str, target: str) -> list[LayerWeights]:
    """The weights between two directly connected sites, one entry for each layer between them.

    Args:
        model: the model, without edits in force.
        source: the earlier site, or `input`.
        target: the later site.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if no layer connects them directly; the message says what the target reads.
    """
    source = source if source == INPUT else model.site(source).name
    target = model.site(target).name
    pairs = [
        Pair(source, target, layer, written(layer, target))
        for layer in model.weight_layers
        if any(link.site == source for link in layer.reads)
        and any(link.site == target for link in layer.writes)
    ]
    if not pairs:
        raise ValueError(_not_direct(model, source, target))
    key = model.hash
    n = model.n_units(source)
    return [
        LayerWeights(
            source,
            target,
            pair.layer.name,
            tuple(pair.units.tolist()),
            tuple(_channels(pair).tolist()),
            pair.kernels(pair.units, n).detach().cpu(),
            _bias(pair).cpu(),
            pair.through,
            key,
            pair.layer.lost,
        )
        for pair in pairs
    ]


def _not_direct(model: HookedModel, source: str, target: str) -> str:
    sources = {
        link.site
        for layer in model.weight_layers
        if any(w.site == target for w in layer.writes)
        for link in layer.reads
        if link.direct
    }
    known = f"{target} reads {', '.join(sorted(sources))}" if sources else f"{target} reads no site"
    return (
        f"no layer of {model.name} connects {source} and {target} directly ({known}): "
        "expand_weights follows longer paths"
    )


def _links(pair: Pair) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Index, factor and shift of the paths that write a pair's units, unit by unit."""
    found = []
    for link in pair.layer.writes:
        if link.site == pair.target:
            shift = torch.zeros(len(link.index)) if link.shift is None else link.shift
            index = link.index[pair.units]
            found.append((index, link.factor[pair.units], shift[pair.units] * (index >= 0)))
    return found


def _channels(pair: Pair) -> Tensor:
    return torch.stack([index for index, _, _ in _links(pair)]).amax(0)


def _bias(pair: Pair) -> Tensor:
    total = torch.zeros(len(pair.units))
    for index, factor, shift in _links(pair):
        total += shift
        if pair.layer.bias is not None:
            own = pair.layer.bias.cpu().float()[index.clamp_min(0)]
            total += own * factor * (index >= 0)
    return total
