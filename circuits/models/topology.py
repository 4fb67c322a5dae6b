"""Which weights connect which sites, found from the model itself (layer 3).

One traced forward pass with autograd on gives a graph of operations. Walking back from a tensor
through operations that keep channels apart (nonlinearities, pooling, batch norm, concatenation,
addition) leads to the layer whose weights wrote it; a layer's input leads to the sites it reads.
Along the way each channel keeps its place and the factor put on it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from circuits.hooks import Tap, record
from circuits.models.sites import evaluating
from circuits.units import Site

Node = Any  # torch.autograd.graph.Node: an operation of the forward pass

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
        for step in _upstream(_Step.start(node, site.unit_axis), stops, _writes_on)
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
    written: Sequence[tuple[Site, _Step]],
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

    def met(step: _Step) -> _Step:
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

    for _ in _upstream(_Step.start(call.given, call.axis), stops, _reads_on, met):
        pass
    if links and not any(link.direct for link in links):
        nearest = links[0].depth
        links = [replace(link, direct=link.depth == nearest) for link in links]
    yield from links


# --- walking back through the graph of operations ----------------------------------------------


@dataclass(frozen=True, eq=False)
class _Step:
    """A place reached while walking back from a tensor.

    Attributes:
        node: the operation.
        axis: where its output's channels are.
        index: per channel of the tensor at the start, the channel here that it comes from, or -1.
        factor: what multiplies it on the way.
        depth: operations passed.
        flattened: the map that a flatten on the way turned into channels.
        nonlinearities: how many were passed.
        met: whether a site with units of its own was passed.
    """

    node: Node
    axis: int
    index: Tensor
    factor: Tensor
    depth: int = 0
    flattened: tuple[int, ...] = ()
    nonlinearities: int = 0
    met: bool = False

    @classmethod
    def start(cls, node: Node, axis: int) -> _Step:
        """The walk's beginning."""
        n = _shape(node)[axis]
        return cls(node, axis, torch.arange(n), torch.ones(n))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the operation puts out."""
        return _shape(self.node)

    def behind(self, node: Node, **changes: Any) -> _Step:
        """The step to an operation before this one."""
        return replace(self, node=node, depth=self.depth + 1, **changes)

    def shifted(self, node: Node, by: int, n: int, **changes: Any) -> _Step:
        """The step to a tensor of `n` channels in which channel `c` is channel `c - by`."""
        index = self.index - by
        inside = (self.index >= 0) & (index >= 0) & (index < n)
        return self.behind(node, index=torch.where(inside, index, -1), **changes)

    def scaled(self, by: Tensor) -> Tensor:
        """The factors so far times one number a channel here."""
        return self.factor * by.detach().cpu().float()[self.index.clamp_min(0)]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _reads_on(step: _Step) -> bool:
    """What a layer reads: past a nonlinearity, a sum is a new unit and hides its summands."""
    return not (step.nonlinearities and _SUM.fullmatch(step.node.name()))


def _writes_on(step: _Step) -> bool:
    """What writes a site: a second nonlinearity belongs to another unit."""
    return not (step.nonlinearities and _NONLINEARITY.fullmatch(step.node.name()))


_MOST_STEPS = 4000  # of one walk: paths multiply where sums follow sums


def _upstream(
    start: _Step,
    stops: frozenset[Node],
    goes_on: Callable[[_Step], bool],
    visit: Callable[[_Step], _Step] = lambda step: step,
) -> Iterator[_Step]:
    """Walk back along every path of operations that keep channels apart, up to `stops`."""
    queue = [start]
    for _ in range(_MOST_STEPS):
        if not queue:
            return
        step = visit(queue.pop(0))
        yield step
        if step.node not in stops and goes_on(step):
            queue.extend(s for s in _behind(step) if s.node is not None and (s.index >= 0).any())


_NONLINEARITY = re.compile(
    "(Relu|Gelu|Silu|Sigmoid|Tanh|Hardtanh|LeakyRelu|Elu|Hardswish|Hardsigmoid|Softplus|Clamp|"
    "ClampMin|ClampMax|Threshold|Mish)Backward[0-9]"
)
_SUM = re.compile("(Add|Sub)Backward[0-9]")
_PRODUCT = re.compile("(Mul|Div)Backward[0-9]")
_ONE_TO_ONE = re.compile(
    "(MaxPool[23]DWithIndices|AvgPool[23]D|AdaptiveAvgPool[23]D|AdaptiveMaxPool2D|"
    "UpsampleBilinear2D|UpsampleNearest2D|NativeBatchNorm|CudnnBatchNorm|NativeDropout|"
    "NativeGroupNorm|NativeLayerNorm|Clone|Alias)Backward[0-9]"
)
_RESHAPE = re.compile("(View|ReshapeAlias|UnsafeView)Backward[0-9]")
_REDUCTION = re.compile("(Mean|Squeeze|Select)Backward[0-9]")


def _behind(step: _Step) -> Iterator[_Step]:
    """The operations behind one that keeps channels apart; none behind any other."""
    name = step.node.name()
    parents = [parent for parent, _ in step.node.next_functions]
    if name == "CatBackward0":
        yield from _behind_cat(step, parents)
    elif name == "ConstantPadNdBackward0":
        pad = step.node._saved_pad
        after = 2 * (len(step.shape) - 1 - step.axis)  # torch lists the last axis first
        before = _signed(pad[after]) if len(pad) > after else 0
        yield step.shifted(parents[0], before, _shape(parents[0])[step.axis])
    elif name == "SliceBackward0":
        yield from _behind_slice(step, parents[0])
    elif _RESHAPE.fullmatch(name):
        yield from _behind_reshape(step, parents[0])
    elif _REDUCTION.fullmatch(name):
        yield from _behind_reduction(step, parents[0])
    elif _NONLINEARITY.fullmatch(name):
        yield step.behind(parents[0], nonlinearities=step.nonlinearities + 1)
    elif _ONE_TO_ONE.fullmatch(name):
        if "BatchNorm" in name and step.node._saved_running_var is not None:
            yield step.behind(parents[0], factor=step.scaled(_norm_scale(step.node)))
        else:
            yield step.behind(parents[0])
    elif _SUM.fullmatch(name):
        yield from _behind_sum(step, parents)
    elif _PRODUCT.fullmatch(name):
        yield from _behind_product(step, parents)


def _signed(value: int) -> int:
    """Undo the wrap-around of negative numbers among saved attributes."""
    return value - 2**64 if value >= 2**63 else value


def _behind_cat(step: _Step, parents: Sequence[Node]) -> Iterator[_Step]:
    along = _signed(step.node._saved_dim) % len(step.shape)
    if along != step.axis:
        yield from (step.behind(parent) for parent in parents)
        return
    sizes = [None if p is None else _shape(p)[step.axis] for p in parents]
    if sizes.count(None) > 1:
        return  # constants of unknown size: where the others lie cannot be told
    rest = step.shape[step.axis] - sum(n for n in sizes if n is not None)
    offset = 0
    for parent, size in zip(parents, sizes, strict=True):
        if parent is not None and size is not None:
            yield step.shifted(parent, offset, size)
        offset += rest if size is None else size


def _behind_slice(step: _Step, parent: Node) -> Iterator[_Step]:
    along = _signed(step.node._saved_dim) % len(step.shape)
    if along != step.axis:
        yield step.behind(parent)
        return
    n, stride = _shape(parent)[step.axis], step.node._saved_step
    start = _signed(step.node._saved_start)
    first = start if start >= 0 else n + start
    index = torch.where(step.index >= 0, step.index * stride + first, -1)
    yield step.behind(parent, index=index)


def _behind_reshape(step: _Step, parent: Node) -> Iterator[_Step]:
    """Follow a reshape that leaves the channels where they are, or flattens what follows them."""
    before: list[int] = [int(n) for n in step.node._saved_self_sym_sizes]
    after, axis = step.shape, step.axis
    if before[: axis + 1] == list(after[: axis + 1]):
        yield step.behind(parent)
    elif axis == len(after) - 1 and before[-1] == after[-1]:  # tokens: channels stay last
        yield step.behind(parent, axis=len(before) - 1)
    elif axis == 1 and len(after) == 2 and after[1] == math.prod(before[1:]) and not step.flattened:
        places = math.prod(before[2:])
        index = torch.where(step.index >= 0, step.index // places, -1)
        yield step.behind(parent, index=index, flattened=tuple(before[2:]))


def _behind_reduction(step: _Step, parent: Node) -> Iterator[_Step]:
    """Follow a mean, squeeze or select over axes other than the channels'."""
    before, after = _shape(parent) if parent is not None else (), step.shape
    if len(before) == len(after):
        if before and before[step.axis] == after[step.axis]:
            yield step.behind(parent)
        return
    dims = getattr(step.node, "_saved_dim", None)
    if dims is None:  # squeeze of every axis of length 1
        gone = {a for a, n in enumerate(before) if n == 1}
    else:
        listed = dims if isinstance(dims, list | tuple) else [dims]
        gone = {_signed(d) % len(before) for d in listed}
    kept = [a for a in range(len(before)) if a not in gone]
    if len(kept) == len(after):
        yield step.behind(parent, axis=kept[step.axis])


def _behind_sum(step: _Step, parents: Sequence[Node]) -> Iterator[_Step]:
    minus = step.node.name().startswith("Sub")
    weight = float(getattr(step.node, "_saved_alpha", 1))
    for place, parent in enumerate(parents):
        if parent is not None and _shape(parent) == step.shape:
            sign = (-weight if minus else weight) if place == 1 else 1.0
            yield step.behind(parent, factor=step.factor * sign)


def _behind_product(step: _Step, parents: Sequence[Node]) -> Iterator[_Step]:
    """Follow the one full-size partner of a product; of a quotient the numerator."""
    divides = step.node.name().startswith("Div")
    candidates = parents[:1] if divides else parents
    full = [i for i, p in enumerate(candidates) if p is not None and _shape(p) == step.shape]
    if len(full) != 1:
        return  # a gate of the same size: the product is a unit of its own
    constant = None
    if len(parents) < 2 or parents[1 - full[0]] is None:
        name = "_saved_other" if full[0] == 0 else "_saved_self"
        constant = getattr(step.node, name, None)
    factor = step.factor
    if isinstance(constant, int | float):
        constant = torch.tensor(float(constant))
    if isinstance(constant, Tensor):
        if constant.numel() != 1:
            return  # a mask or a scale that differs by place
        factor = factor / constant.item() if divides else factor * constant.item()
    yield step.behind(parents[full[0]], factor=factor)


def _norm_scale(norm: Node) -> Tensor:
    """What batch norm multiplies each channel with: weight / sqrt(variance + eps)."""
    scale = (norm._saved_running_var + norm._saved_eps).rsqrt()
    return scale if norm._saved_weight is None else scale * norm._saved_weight.detach()


# --- transformers ------------------------------------------------------------------------------


def bridge_layers(bridge: Any, sites: Sequence[Site]) -> list[WeightLayer]:
    """Virtual weights of a TransformerLens bridge, between units that share the residual stream.

    Head to later head: the composition scores ||W_OV W_QK||, ||W_QK W_OV^T|| and ||W_OV W_OV||
    over the product of norms, in the order Q, K, V (Elhage et al. 2021, "Virtual weights"; row
    vectors on the left, as TransformerLens has them). Neuron to later neuron W_out W_in, and neuron
    to logit W_out W_U. What normalisation does beyond its own weights is left out. Each is computed
    when it is asked for.
    """
    by_name = {site.name: site for site in sites}
    n = bridge.cfg.n_layers
    heads = [by_name.get(f"blocks.{layer}.attn.hook_z") for layer in range(n)]
    posts = [by_name.get(f"blocks.{layer}.mlp.hook_post") for layer in range(n)]
    logits = by_name.get("hook_unembed")
    layers = []
    for i, j in itertools.combinations(range(n), 2):
        if (source := heads[i]) and (target := heads[j]):
            layers.append(_composition_layer(bridge, i, j, source, target))
        if (source := posts[i]) and (target := posts[j]):
            layers.append(_neuron_layer(bridge, i, j, source, target))
    if logits is not None:
        layers += [_neuron_layer(bridge, i, None, p, logits) for i, p in enumerate(posts) if p]
    return layers


def _virtual(
    name: str,
    row: Callable[[int], Tensor],
    column: Callable[[int], Tensor],
    source: Site,
    target: Site,
) -> WeightLayer:
    read, written = torch.arange(source.n_units), torch.arange(target.n_units)
    reads = (Link(source.name, read, torch.ones(source.n_units), 0, direct=True),)
    writes = (Link(target.name, written, torch.ones(target.n_units), 0),)
    return WeightLayer(name, row, column, reads, writes)


def _norm_weight(norm: Any) -> Tensor | float:
    """The weights of a normalisation layer, one a residual dimension; 1 if it has none."""
    weight = getattr(norm, "weight", None)
    return weight.detach()[:, None] if isinstance(weight, Tensor) else 1.0


def _qk(bridge: Any, layer: int, head: int) -> Tensor:
    """W_QK of a head: d_model x d_model, queries in front."""
    scale = _norm_weight(bridge.blocks[layer].ln1)
    shared = bridge.cfg.n_heads // len(bridge.W_K[layer])  # grouped queries share keys and values
    w_q, w_k = bridge.W_Q[layer][head], bridge.W_K[layer][head // shared]
    return ((scale * w_q) @ (scale * w_k).mT).detach()


def _ov(bridge: Any, layer: int, head: int) -> Tensor:
    """W_OV of a head: d_model x d_model, what is read in front."""
    scale = _norm_weight(bridge.blocks[layer].ln1)
    shared = bridge.cfg.n_heads // len(bridge.W_V[layer])
    return ((scale * bridge.W_V[layer][head // shared]) @ bridge.W_O[layer][head]).detach()


def _composition_layer(bridge: Any, i: int, j: int, source: Site, target: Site) -> WeightLayer:
    def score(before: int, after: int) -> Tensor:
        ov, qk, later = _ov(bridge, i, before), _qk(bridge, j, after), _ov(bridge, j, after)
        products = ((ov @ qk, qk), (qk @ ov.mT, qk), (ov @ later, later))
        return torch.stack([(p.norm() / (ov.norm() * m.norm())) for p, m in products])

    def row(after: int) -> Tensor:
        return torch.stack([score(before, after) for before in range(source.n_units)])

    def column(before: int) -> Tensor:
        return torch.stack([score(before, after) for after in range(target.n_units)])

    return _virtual(f"composition {i} to {j}", row, column, source, target)


def _neuron_layer(bridge: Any, i: int, j: int | None, source: Site, target: Site) -> WeightLayer:
    """Neurons of layer i to those of layer j, or to the logits."""

    def out_weights() -> Tensor:
        return bridge.W_out[i].detach()

    def in_weights() -> Tensor:
        if j is None:
            return _norm_weight(bridge.ln_final) * bridge.W_U.detach()
        return _norm_weight(bridge.blocks[j].ln2) * bridge.W_in[j].detach()

    return _virtual(
        f"neurons {i} to {'logits' if j is None else j}",
        lambda after: out_weights() @ in_weights()[:, after],
        lambda before: out_weights()[before] @ in_weights(),
        source,
        target,
    )
