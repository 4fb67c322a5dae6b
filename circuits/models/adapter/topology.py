"""Which weights connect which sites, found from the model itself.

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
from circuits.models.adapter.sites import evaluating
from circuits.models.adapter.walk import Node, Step, norm_scale, reads_on, upstream, writes_on
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
        shift: for a site that is written, what batch norm adds to each of its channels on the way.
        depth: how many operations lie between; 0 is next to the layer.
        direct: for a site that is read: the nearest one on its path that does not just pass on
            another's units; for one that is written: that it does not just pass them on.
        flattened: the map (y, x) that a flatten between turned into consecutive input channels.
    """

    site: str
    index: Tensor
    factor: Tensor
    depth: int
    direct: bool = False
    flattened: tuple[int, ...] = ()
    shift: Tensor | None = None


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """Weights with the sites that they read and write.

    Attributes:
        name: of the layer.
        rows: the weights of output channels: channel x input channel x kernel axes.
        columns: the weights of input channels: channel x output channel x kernel axes.
        reads: paths to sites whose units are its input channels, nearest first.
        writes: paths to sites whose units are its output channels, nearest first.
        bias: one number an output channel, or None.
        lost: operations between its input and the sites that it reads that could not be followed: some
            of what it reads is not in `reads`.
    """

    name: str
    rows: Callable[[Tensor], Tensor]
    columns: Callable[[Tensor], Tensor]
    reads: tuple[Link, ...]
    writes: tuple[Link, ...]
    bias: Tensor | None = None
    lost: tuple[str, ...] = ()


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
    shifts = _shifts(written, _norm_biases(module))
    return [_layer(names[call.module], call, nodes, stops, written, shifts) for call in calls]


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
    shifts: Sequence[Tensor],
) -> WeightLayer:
    weight = call.module.weight
    assert isinstance(weight, Tensor), f"{name} has no weight"
    groups = call.module.groups if isinstance(call.module, _LAYERS[:3]) else 1
    lost: list[str] = []
    reads = tuple(_reads(call, nodes, stops, lost)) if call.given is not None else ()
    writes = [
        Link(
            site.name,
            step.index,
            step.factor,
            step.depth,
            _has_own_units(site),
            shift=shift,
        )
        for (site, step), shift in zip(written, shifts, strict=True)
        if step.node is call.output and step.axis == call.axis
    ]
    writes.sort(key=lambda link: link.depth)
    rows, columns = _grouped(weight.detach(), groups)
    bias = call.module.bias
    given = bias.detach() if isinstance(bias, Tensor) else None
    unfollowed = tuple(dict.fromkeys(lost)) if reads else ()
    return WeightLayer(name, rows, columns, reads, tuple(writes), given, unfollowed)


def _has_own_units(site: Site) -> bool:
    return not any(word in site.module for word in _PASSES_ON)


def _norm_biases(module: nn.Module) -> dict[int, Tensor]:
    """Biases of batch norms, by where their running mean is: autograd does not keep them."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {
        m.running_mean.data_ptr(): m.bias.detach()
        for m in norms
        if m.running_mean is not None and m.bias is not None
    }


def _shifts(written: Sequence[tuple[Site, Step]], biases: Mapping[int, Tensor]) -> list[Tensor]:
    """What batch norms on each path add to each channel at its start: bias - mean * scale.

    Where several layers add up before a batch norm, the first gets it, so that biases add up too.
    """
    given: dict[tuple[str, Node], Tensor] = {}
    found = []
    for site, step in written:
        total = torch.zeros(len(step.factor))
        for norm in step.norms:
            mean = norm.node._saved_running_mean
            added = -mean * norm_scale(norm.node) + biases.get(mean.data_ptr(), 0.0)
            taken = given.setdefault(
                (site.name, norm.node), torch.zeros(len(total), dtype=torch.bool)
            )
            mine = (step.index >= 0) & ~taken
            total += norm.scaled(added) * mine
            taken |= mine
        found.append(total)
    return found


def _grouped(
    weight: Tensor, groups: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Rows and columns of a layer's weights; zero where a grouped convolution has none."""
    if groups == 1:
        return lambda outs: weight[outs], lambda ins: weight[:, ins].transpose(0, 1)
    per_out, per_in = weight.shape[0] // groups, weight.shape[1]

    def rows(outs: Tensor) -> Tensor:
        dense = weight.new_zeros(len(outs), per_in * groups, *weight.shape[2:])
        for i, out in enumerate(outs.tolist()):
            first = out // per_out * per_in
            dense[i, first : first + per_in] = weight[out]
        return dense

    def columns(ins: Tensor) -> Tensor:
        dense = weight.new_zeros(len(ins), weight.shape[0], *weight.shape[2:])
        for i, channel in enumerate(ins.tolist()):
            first = channel // per_in * per_out
            dense[i, first : first + per_out] = weight[first : first + per_out, channel % per_in]
        return dense

    return rows, columns


def _reads(
    call: _Call, nodes: Mapping[Node, list[Site]], stops: frozenset[Node], lost: list[str]
) -> Iterator[Link]:
    """Paths from a layer's input back to sites, nearest first; what cannot be followed goes to `lost`."""
    links = []

    def met(step: Step) -> Step:
        """List the sites at a step; past one with units of its own, paths are no longer direct."""
        for site in nodes.get(step.node, ()):
            if site.unit_axis != step.axis:
                continue
            own = _has_own_units(site)
            direct = own and not step.met
            links.append(
                Link(site.name, step.index, step.factor, step.depth, direct, step.flattened)
            )
            step = replace(step, met=step.met or own, seen=True)
        return step

    def ended(step: Step) -> None:
        if not step.seen:
            lost.append(step.node.name().removesuffix("0").removesuffix("Backward"))

    for _ in upstream(Step.start(call.given, call.axis), stops, reads_on, met, ended):
        pass
    if links and not any(link.direct for link in links):
        nearest = links[0].depth
        links = [replace(link, direct=link.depth == nearest) for link in links]
    yield from links
