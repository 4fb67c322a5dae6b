"""Which weights connect which sites, found without knowing the architecture.

A forward pass with autograd on gives a graph of operations. Layers are the calls of torch's convolution and linear
functions in it, with the weights that they are given: these may be parameters, or computed from them (weight norm,
pruning, standardised weights). Walking back from a site's tensor through operations
that do not mix channels (nonlinearities, pooling, batch norm, concatenation, addition) leads to the layer that
wrote it; walking back from a layer's input leads to the sites that it reads. On the way the walk keeps track of
which channel each one comes from and what it is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.autograd import recording_gradients
from circuits.hooks import Tap, record
from circuits.models.adapter.program import Watch
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
        stored: the parameter that it uses, unless its weights are computed from others.
    """

    name: str
    rows: Callable[[Tensor], Tensor]
    columns: Callable[[Tensor], Tensor]
    reads: tuple[SiteLink, ...]
    writes: tuple[SiteLink, ...]
    bias: Tensor | None = None
    lost: tuple[str, ...] = ()
    stored: StoredWeight | None = None


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A parameter that a layer uses as it is.

    Attributes:
        weight: the parameter.
        bias: that of the bias, or None.
        groups: groups of a convolution.
        transposed: whether it is stored columns (inputs) first.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None = None
    groups: int = 1
    transposed: bool = False


LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
"""Modules with weights that channels are multiplied with."""
_PASSES_ON = ("Pool", "Norm", "Dropout", "Identity", "Upsample", "Flatten", "Pad", "Permute")
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
    inputs = example.detach().clone().requires_grad_(True)
    # a node that stands for the input, also if the model overwrites it in place
    entry = inputs * 1
    source = entry.grad_fn
    with evaluating(module), record(module, taps) as found, _Calls(module) as noted:
        module(entry)
    calls = noted.found
    nodes = _site_nodes(sites, found)
    axes = ("batch", "channel", "y", "x")
    nodes[source] = [Site(INPUT, "channel", axes, 1, tuple(example.shape[1:]))]
    # A walk ends at the output of a layer, where channels are mixed. A flattened map on the way is not followed to
    # the layer that wrote it: several of the site's units would share one of its channels.
    stops = frozenset(call.output for call in calls if call.output is not None)
    written = [
        (site, step)
        for node, at in nodes.items()
        for site in at
        for step in upstream(WalkStep.start(node, site.unit_axis), stops, follows_writes)
        if step.node in stops and not step.flattened
    ]
    shifts = _shifts(written, _norm_biases(module))
    return [_layer(call, nodes, stops, written, shifts) for call in calls]


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer, with the autograd nodes of its input and its output.

    Attributes:
        name: the layer's.
        weight: output channel x input channel of its group x kernel axes, as a cross-correlation.
        bias: one number for each output channel, or None.
        groups: groups of a convolution.
        given: the node of its input.
        output: the node of its output.
        axes: those of the channels in its input and its output.
        stored: the parameter that the weights are.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    groups: int
    given: Node
    output: Node
    axes: tuple[int, int]
    stored: StoredWeight | None


class CircularPad(torch.autograd.Function):
    """Circular padding as one operation: torch writes it into parts of a tensor, in which a walk would lose its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pad: Sequence[int]) -> Tensor:
        return F.pad(x, tuple(pad), mode="circular")


class _Calls(Watch):
    """Notes the calls of convolution and linear functions in the pass inside the block, in order of execution."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.found: list[_Call] = []
        self._names = {id(p): name for name, p in root.named_parameters()}
        self._parameters = {_memory(p): p for p in root.parameters() if p.numel()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad:
            pad = dict(zip(("input", "pad", "mode"), args, strict=False)) | kwargs
            if pad.get("mode") == "circular":
                return CircularPad.apply(pad["input"], pad["pad"])
        output = func(*args, **kwargs)
        form = _FORMS.get(func)
        if form is not None and isinstance(output, Tensor):
            names, read = form
            self._note(func.__name__, read(dict(zip(names, args, strict=False)) | kwargs), output)
        return output

    def _note(self, function: str, layer: _Given | None, output: Tensor) -> None:
        if layer is None or layer.weight.requires_grad:
            return  # it multiplies two activations
        path, module = self.innermost
        weight, transposed = self._parameters.get(_memory(layer.weight)), False
        if weight is None and layer.mirrored is not None:
            weight, transposed = self._parameters.get(_memory(layer.mirrored)), True
        inside = isinstance(module, LAYERS)
        if inside and (weight is None or weight is module.weight):
            name = path
        elif weight is not None:
            name = self._names[id(weight)].removesuffix(".weight")
        else:
            name = f"{path}.{function}".lstrip(".")
        bias = layer.bias
        if bias is None and inside and isinstance(module.bias, Tensor):
            bias = module.bias  # it may be added later
        stored = None
        if weight is not None and layer.editable:
            known = None if bias is None else self._parameters.get(_memory(bias))
            stored = StoredWeight(weight, known, layer.groups, transposed)
        given, axes = layer.input, layer.axes
        self.found.append(
            _Call(
                name, layer.weight.detach(), None if bias is None else bias.detach(), layer.groups,
                given.grad_fn, output.grad_fn, (axes % given.ndim, axes % output.ndim), stored,
            )
        )  # fmt: skip


def _memory(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


@dataclass(frozen=True, eq=False)
class _Given:
    """What a function was given: its input, weights (as in `_Call`), and the axis of the channels.

    Attributes:
        mirrored: the weights as they were given, where that is input channels first.
        editable: whether a matrix can stand for the weights.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    groups: int = 1
    axes: int = -1
    mirrored: Tensor | None = None
    editable: bool = True


def _given_convolution(values: Mapping[str, Any]) -> _Given | None:
    x, weight, groups = values["input"], values["weight"], int(values.get("groups", 1))
    if x.ndim != weight.ndim:
        return None  # a single example: its first axis is no batch
    return _Given(x, weight, values.get("bias"), groups, 1)


def _given_transposed(values: Mapping[str, Any]) -> _Given | None:
    """A transposed convolution is a cross-correlation with the mirrored kernel, over the input with zeros between its
    places where it strides.
    """
    made = _given_convolution(values)
    if made is None:
        return None
    apart = made.weight.unflatten(0, (made.groups, -1)).transpose(1, 2).flatten(0, 1)
    kernel = apart.flip(*range(2, apart.ndim))
    return replace(made, weight=kernel, editable=False)


def _given_linear(values: Mapping[str, Any]) -> _Given | None:
    return _Given(values["input"], values["weight"], values.get("bias"))


def _given_product(values: Mapping[str, Any]) -> _Given | None:
    """Rows times a matrix of weights, or such a matrix times columns."""
    left, right = values["input"], values["other"]
    alpha, beta = values.get("alpha", 1), values.get("beta", 1)
    if (alpha, beta) != (1, 1):  # no parameter holds what `torch.addmm` multiplies and adds then
        own = _given_product({**values, "bias": values["bias"] * beta, "alpha": 1, "beta": 1})
        return own and replace(own, weight=own.weight * alpha, mirrored=None, editable=False)
    if right.ndim == 2 and left.ndim > 1 and left.requires_grad:
        return _Given(left, right.mT, values.get("bias"), mirrored=right)
    if left.ndim == 2 and right.ndim > 1 and right.requires_grad:
        return _Given(right, left, axes=-2)
    return None


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
_FORMS: dict[Any, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], _Given | None]]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (_CONVOLUTION, _given_convolution)),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        (_TRANSPOSED, _given_transposed),
    ),
    F.linear: (("input", "weight", "bias"), _given_linear),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm),
        (("input", "other"), _given_product),
    ),
    torch.addmm: (("bias", "input", "other"), _given_product),
}


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
    call: _Call,
    nodes: Mapping[Node, list[Site]],
    stops: frozenset[Node],
    written: Sequence[tuple[Site, WalkStep]],
    shifts: Sequence[Tensor],
) -> WeightLayer:
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
        if step.node is call.output and step.axis == call.axes[1]
    ]
    writes.sort(key=lambda link: link.depth)
    rows, columns = _grouped(call.weight, call.groups)
    unfollowed = tuple(dict.fromkeys(lost))
    return WeightLayer(
        call.name, rows, columns, reads, tuple(writes), call.bias, unfollowed, call.stored
    )


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

    for step in upstream(
        WalkStep.start(call.given, call.axes[0]), stops, follows_reads, met, ended
    ):
        if step.node in stops:  # another layer's output, which no site shows
            ended(step)
    # A layer that reads only sites that pass units on (the first layer after a normalised input, say) reads the
    # nearest of them directly.
    if links and not any(link.direct for link in links):
        nearest = links[0].depth
        links = [replace(link, direct=link.depth == nearest) for link in links]
    yield from links
