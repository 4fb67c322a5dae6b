"""Which weights connect which sites, found from the model itself (layer 3).

One traced forward pass with autograd on gives a graph of operations. Walking back from a tensor
through operations that keep channels apart (nonlinearities, pooling, batch norm, concatenation,
addition) leads to the layer whose weights wrote it; a layer's input leads to the sites it reads.
Along the way each channel keeps its place and the factor put on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from circuits.hooks import Tap, record
from circuits.models.sites import evaluating
from circuits.models.walk import Node, Step, reads_on, upstream, writes_on
from circuits.units import Site

INPUT = "input"
"""The site name of the model's input channels, where a layer reads them directly."""


@dataclass(frozen=True, eq=False)
class Link:
    """A path between a weight layer and a site, channel by channel.

    Attributes:
        site: the site's name.
        index: for a site that is read, per input channel of the layer the site's channel that it
            comes from; for one that is written, per channel of the site the layer's output channel
            that it comes from. -1 for none.
        factor: what multiplies each on the way (batch norm, signs, constants).
        depth: how many operations lie between; 0 is next to the layer.
        direct: for a site that is read: the nearest one on its path that does not just pass on
            another's units.
        flattened: the map (y, x) that a flatten between turned into consecutive input channels.
    """

    site: str
    index: Tensor
    factor: Tensor
    depth: int
    direct: bool = False
    flattened: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """Weights with the sites that they read and write.

    Attributes:
        name: of the layer.
        row: the weights of an output channel: input channel x kernel axes.
        column: the weights of an input channel: output channel x kernel axes.
        reads: paths to sites whose units are its input channels, nearest first.
        writes: paths to sites whose units are its output channels, nearest first.
    """

    name: str
    row: Callable[[int], Tensor]
    column: Callable[[int], Tensor]
    reads: tuple[Link, ...]
    writes: tuple[Link, ...]


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_PASSES_ON = ("Pool", "Norm", "Dropout", "Identity", "Upsample", "Flatten")
"""Modules that hand on the units of the site before them."""


def find_weight_layers(
    module: nn.Module, example: Tensor, sites: Sequence[Site], taps: Mapping[str, Tap]
) -> list[WeightLayer]:
    """Every convolution and linear layer of a traced forward pass, with what it reads and writes.

    Args:
        module: the model.
        example: an input for it; images, since tokens have no gradient.
        sites: the model's sites.
        taps: how to reach them.
    """
    names: dict[nn.Module, str] = {
        m: n for n, m in module.named_modules() if isinstance(m, _LAYERS)
    }
    calls: list[_Call] = []
    handles = [
        m.register_forward_hook(
            lambda m, args, kwargs, out: calls.append(
                _Call(m, next(iter((*args, *kwargs.values()))).grad_fn, out.grad_fn, out.ndim)
            ),
            with_kwargs=True,
        )
        for m in names
    ]
    inputs = example.detach().clone().requires_grad_(True)
    try:
        entry = inputs * 1  # an operation of its own, even if the model overwrites its input
        source = entry.grad_fn
        with evaluating(module), torch.enable_grad(), record(module, taps) as found:
            module(entry)
    finally:
        for handle in handles:
            handle.remove()
    nodes = _site_nodes(sites, found)
    axes = ("batch", "channel", "y", "x")
    nodes[source] = [Site(INPUT, "channel", axes, 1, tuple(example.shape[1:]))]
    stops = frozenset(call.output for call in calls)
    written = [
        (site, step)
        for node, at in nodes.items()
        for site in at
        for step in upstream(Step.start(node, site.unit_axis), stops, writes_on)
        if step.node in stops and not step.flattened
    ]
    return [_layer(names[call.module], call, nodes, stops, written) for call in calls]


@dataclass(frozen=True)
class _Call:
    """One call of a layer: the operations that made its input and its output."""

    module: nn.Module
    given: Node
    output: Node
    ndim: int

    @property
    def axis(self) -> int:
        """Where its channels are: last for a linear layer, else 1."""
        return self.ndim - 1 if isinstance(self.module, nn.Linear) else 1


def _site_nodes(sites: Sequence[Site], found: Mapping[str, Tensor]) -> dict[Node, list[Site]]:
    """The operation that put out each site."""
    nodes: dict[Node, list[Site]] = {}
    for site in sites:
        node = found[site.name].grad_fn
        # a copy was recorded where a later step overwrites the tensor: look behind it
        while node is not None and node.name() == "CloneBackward0":
            node = node.next_functions[0][0]
        if node is not None:
            nodes.setdefault(node, []).append(site)
    return nodes


def _layer(
    name: str,
    call: _Call,
    nodes: Mapping[Node, list[Site]],
    stops: frozenset[Node],
    written: Sequence[tuple[Site, Step]],
) -> WeightLayer:
    weight = call.module.weight
    assert isinstance(weight, Tensor), f"{name} has no weight"
    groups = call.module.groups if isinstance(call.module, _LAYERS[:3]) else 1
    reads = tuple(_reads(call, nodes, stops)) if call.given is not None else ()
    writes = [
        Link(site.name, step.index, step.factor, step.depth)
        for site, step in written
        if step.node is call.output and step.axis == call.axis
    ]
    writes.sort(key=lambda link: link.depth)
    row, column = _grouped(weight.detach(), groups)
    return WeightLayer(name, row, column, reads, tuple(writes))


def _grouped(
    weight: Tensor, groups: int
) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor]]:
    """Rows and columns of a layer's weights; zero where a grouped convolution has none."""
    per_out, per_in = weight.shape[0] // groups, weight.shape[1]

    def row(out: int) -> Tensor:
        dense = weight.new_zeros(per_in * groups, *weight.shape[2:])
        first = out // per_out * per_in
        dense[first : first + per_in] = weight[out]
        return dense

    def column(channel: int) -> Tensor:
        dense = weight.new_zeros(weight.shape[0], *weight.shape[2:])
        first = channel // per_in * per_out
        dense[first : first + per_out] = weight[first : first + per_out, channel % per_in]
        return dense

    return row, column


def _reads(call: _Call, nodes: Mapping[Node, list[Site]], stops: frozenset[Node]) -> Iterator[Link]:
    """Paths from a layer's input back to sites, nearest first."""
    links = []

    def met(step: Step) -> Step:
        """List the sites at a step; past one with units of its own, paths are no longer direct."""
        for site in nodes.get(step.node, ()):
            if site.unit_axis != step.axis:
                continue
            own = not any(word in site.module for word in _PASSES_ON)
            direct = own and not step.met
            links.append(
                Link(site.name, step.index, step.factor, step.depth, direct, step.flattened)
            )
            step = replace(step, met=step.met or own)
        return step

    for _ in upstream(Step.start(call.given, call.axis), stops, reads_on, met):
        pass
    if links and not any(link.direct for link in links):
        nearest = links[0].depth
        links = [replace(link, direct=link.depth == nearest) for link in links]
    yield from links
