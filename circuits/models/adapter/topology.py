"""Which weights connect which sites, found without knowing the architecture.

A forward pass with autograd on gives a graph of operations. Walking back from a site's tensor through operations
that do not mix channels (nonlinearities, pooling, batch norm, concatenation, addition) leads to the layer that
wrote it; walking back from a layer's input leads to the sites that it reads. On the way the walk keeps track of
which channel each one comes from and what it is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from circuits.autograd import recording_gradients
from circuits.hooks import Tap, record
from circuits.models.adapter.sites import evaluating
from circuits.models.adapter.walk import (
    Node,
    WalkStep,
    follows_reads,
    follows_writes,
    norm_scale,
    upstream,
)
from circuits.units import Site

INPUT = "input"
"""The site name of the model's input channels, where a layer reads them directly."""


@dataclass(frozen=True, eq=False)
class SiteLink:
    """A path between a layer and a site on which channels are not mixed.

    Attributes:
        site: the site's name.
        index: where channels come from, -1 for nowhere. For a site that is read: the site's channel, for each input
            channel of the layer. For one that is written: the layer's output channel, for each channel of the site.
        factor: what each channel is multiplied by on the way (batch norm, signs, constants).
        depth: the number of operations in between; 0 is next to the layer.
        direct: for a site that is read: it is the nearest one on its path that has units of its own, rather than
            passing another site's on (pooling, normalisation). For one that is written: it has units of its own.
        flattened: the shape (y, x) of a map that a flatten in between turned into consecutive input channels.
        shift: for a site that is written, what batch norm adds to each of its channels on the way.
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
    """A layer's weights, with the sites that they read and write.

    Attributes:
        name: of the layer.
        rows: function from output channels to their weights: output channel x input channel x kernel axes.
        columns: function from input channels to their weights: input channel x output channel x kernel axes.
        reads: paths to sites whose units are its input channels, nearest first.
        writes: paths to sites whose units are its output channels, nearest first.
        bias: one number for each output channel, or None.
        lost: the operations between its input and the sites that could not be followed: some of what the layer
            reads is then missing in `reads`.
    """

    name: str
    rows: Callable[[Tensor], Tensor]
    columns: Callable[[Tensor], Tensor]
    reads: tuple[SiteLink, ...]
    writes: tuple[SiteLink, ...]
    bias: Tensor | None = None
    lost: tuple[str, ...] = ()


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_PASSES_ON = ("Pool", "Norm", "Dropout", "Identity", "Upsample", "Flatten")
"""Parts of the names of modules that pass on the units of the site before them."""


@recording_gradients()
def find_weight_layers(
    module: nn.Module, example: Tensor, sites: Sequence[Site], taps: Mapping[str, Tap]
) -> list[WeightLayer]:
    """Every convolution and linear layer of a traced forward pass, with what it reads and writes.

    Args:
        module: the model.
        example: an input for it; images, since tokens have no gradient and so no graph.
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
        entry = (
            inputs * 1
        )  # a node that stands for the input, also if the model overwrites it in place
        source = entry.grad_fn
        with evaluating(module), record(module, taps) as found:
            module(entry)
    finally:
        for handle in handles:
            handle.remove()
    nodes = _site_nodes(sites, found)
    axes = ("batch", "channel", "y", "x")
    nodes[source] = [Site(INPUT, "channel", axes, 1, tuple(example.shape[1:]))]
    # A walk ends at the output of a layer, where channels are mixed. A flattened map on the way is not followed to
    # the layer that wrote it: several of the site's units would share one of its channels.
    stops = frozenset(call.output for call in calls)
    written = [
        (site, step)
        for node, at in nodes.items()
        for site in at
        for step in upstream(WalkStep.start(node, site.unit_axis), stops, follows_writes)
        if step.node in stops and not step.flattened
    ]
    shifts = _shifts(written, _norm_biases(module))
    return [_layer(names[call.module], call, nodes, stops, written, shifts) for call in calls]


@dataclass(frozen=True)
class _Call:
    """One call of a layer, with the autograd nodes of its input and its output."""

    module: nn.Module
    given: Node
    output: Node
    ndim: int

    @property
    def axis(self) -> int:
        """The axis of its channels: the last one for a linear layer, else axis 1."""
        return self.ndim - 1 if isinstance(self.module, nn.Linear) else 1


def _site_nodes(sites: Sequence[Site], found: Mapping[str, Tensor]) -> dict[Node, list[Site]]:
    """The sites by the autograd node that computed them."""
    nodes: dict[Node, list[Site]] = {}
    for site in sites:
        node = found[site.name].grad_fn
        # `record` copies a tensor that the model overwrites later; the node before the copy is the model's.
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
    written: Sequence[tuple[Site, WalkStep]],
    shifts: Sequence[Tensor],
) -> WeightLayer:
    weight = call.module.weight
    assert isinstance(weight, Tensor), f"{name} has no weight"
    groups = call.module.groups if isinstance(call.module, _LAYERS[:3]) else 1
    lost: list[str] = []
    reads = tuple(_reads(call, nodes, stops, lost)) if call.given is not None else ()
    writes = [
        SiteLink(
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
    """Whether a site's module computes new units, instead of passing on those before it."""
    return not any(word in site.module for word in _PASSES_ON)


def _norm_biases(module: nn.Module) -> dict[int, Tensor]:
    """The biases of batch norms, by the address of their running mean.

    Autograd saves weight, mean and variance in a node, but not the bias, which no gradient needs.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {
        m.running_mean.data_ptr(): m.bias.detach()
        for m in norms
        if m.running_mean is not None and m.bias is not None
    }


def _shifts(written: Sequence[tuple[Site, WalkStep]], biases: Mapping[int, Tensor]) -> list[Tensor]:
    """What the batch norms on each path add to each of the site's channels: bias - mean * scale, times the factor
    between that norm and the site.

    Where several layers add up before a batch norm, only the first path gets its shift: else the sum over layers
    would count it several times.
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
    """The functions `rows` and `columns` of a layer's weights; zero where a grouped convolution has none."""
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
) -> Iterator[SiteLink]:
    """Paths from a layer's input back to sites, nearest first; operations that cannot be followed go to `lost`."""
    links = []

    def met(step: WalkStep) -> WalkStep:
        """List the sites at a step; beyond a site with units of its own, paths are no longer direct."""
        for site in nodes.get(step.node, ()):
            if site.unit_axis != step.axis:
                continue
            own = _has_own_units(site)
            direct = own and not step.met
            links.append(
                SiteLink(site.name, step.index, step.factor, step.depth, direct, step.flattened)
            )
            step = replace(step, met=step.met or own, seen=True)
        return step

    def ended(step: WalkStep) -> None:
        if not step.seen:
            lost.append(step.node.name().removesuffix("0").removesuffix("Backward"))

    for _ in upstream(WalkStep.start(call.given, call.axis), stops, follows_reads, met, ended):
        pass
    # A layer that reads only sites that pass units on (the first layer after a normalised input, say) reads the
    # nearest of them directly.
    if links and not any(link.direct for link in links):
        nearest = links[0].depth
        links = [replace(link, direct=link.depth == nearest) for link in links]
    yield from links
