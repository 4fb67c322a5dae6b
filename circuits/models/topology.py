"""Which weights connect which sites, found from the model itself (layer 3).

One traced forward pass with autograd on gives a graph of operations. Walking back from a tensor
through operations that keep channels apart (nonlinearities, pooling, batch norm, concatenation,
addition) leads to the layer whose weights wrote it; a layer's input leads to the sites it reads.
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


@dataclass(frozen=True)
class Link:
    """How the channels of a site line up with the input or output channels of a weight layer.

    Attributes:
        site: the site's name.
        offset: channel `c` of the inner tensor is channel `offset + c` of the outer one (the layer's
            input for a site that is read; the site for a layer that writes it).
        channels: how many channels the inner tensor has.
        scale: the factor that batch norm puts on each written channel; None for 1.
        depth: how many operations lie between; 0 is next to the layer.
        operation: number of the operation that made the site's tensor: equal for sites that share it.
    """

    site: str
    offset: int
    channels: int
    depth: int
    operation: int = 0
    scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """A convolution or linear layer with the sites it reads and the sites it writes.

    Attributes:
        name: the module's name.
        weight: out x in/groups x kernel axes. For a linear layer that reads a flattened map the
            kernel axes are the map's height and width.
        groups: of the convolution.
        reads: sites whose units are its input channels, nearest first.
        writes: sites whose units are its output channels, nearest first.
    """

    name: str
    weight: Tensor
    groups: int
    reads: tuple[Link, ...]
    writes: tuple[Link, ...]


INPUT = "input"
"""The site name of the model's input channels, where a layer reads them directly."""

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


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
            lambda m, args, out: calls.append(_Call(m, args[0].grad_fn, out.grad_fn, out.ndim))
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
    nodes[source] = [
        Site(INPUT, "channel", ("batch", "channel", "y", "x"), 1, tuple(example.shape[1:]))
    ]
    stops = frozenset(call.output for call in calls)
    return [_layer(names[call.module], call, nodes, stops) for call in calls]


@dataclass(frozen=True)
class _Call:
    """One call of a layer: the operations that made its input and its output."""

    module: nn.Module
    given: Node
    output: Node
    ndim: int

    @property
    def axis(self) -> int:
        """Where its input channels are: last for a linear layer, else 1."""
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
    name: str, call: _Call, nodes: Mapping[Node, list[Site]], stops: frozenset[Node]
) -> WeightLayer:
    weight = call.module.weight
    assert isinstance(weight, Tensor), f"{name} has no weight"
    weight = weight.detach()
    operations = {node: i for i, node in enumerate(nodes)}
    reads: list[Link] = []
    for step in _upstream(call.given, call.axis, stops, _reads_on):
        for site in nodes.get(step.node, ()):
            if site.unit_axis == step.axis:
                if step.flattened and weight.ndim == 2:
                    weight = weight.reshape(len(weight), -1, *step.flattened)
                made_by = operations[step.node]
                reads.append(Link(site.name, step.offset, site.n_units, step.depth, made_by))
    out_axis = call.axis
    writes = [
        Link(site.name, step.offset, len(weight), step.depth, operations[node], step.scale)
        for node, sites in nodes.items()
        for site in sites
        for step in _upstream(node, site.unit_axis, stops, _writes_on)
        if step.node is call.output and step.axis == out_axis and not step.flattened
    ]
    writes.sort(key=lambda link: link.depth)
    groups = call.module.groups if isinstance(call.module, _LAYERS[:3]) else 1
    return WeightLayer(name, weight, groups, tuple(reads), tuple(writes))


# --- walking back through the graph of operations ----------------------------------------------


@dataclass(frozen=True, eq=False)
class _Step:
    """A place reached while walking back: channel `c` here is channel `offset + c` at the start."""

    node: Node
    axis: int
    offset: int = 0
    depth: int = 0
    scale: Tensor | None = None
    flattened: tuple[int, ...] = ()
    nonlinearities: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the operation puts out."""
        return tuple(self.node._input_metadata[0].shape)

    def behind(self, node: Node, **changes: Any) -> _Step:
        """The step to an operation before this one."""
        return replace(self, node=node, depth=self.depth + 1, **changes)


def _reads_on(step: _Step) -> bool:
    """What a layer reads: past a nonlinearity, a sum is a new unit and hides its summands."""
    return not (step.nonlinearities and _SUM.fullmatch(step.node.name()))


def _writes_on(step: _Step) -> bool:
    """What writes a site: a second nonlinearity belongs to another unit."""
    return not (step.nonlinearities and _NONLINEARITY.fullmatch(step.node.name()))


def _upstream(
    start: Node, axis: int, stops: frozenset[Node], goes_on: Callable[[_Step], bool]
) -> Iterator[_Step]:
    """Walk back through operations that keep channels apart, nearest first, up to `stops`."""
    queue = [_Step(start, axis)] if start is not None else []
    seen: set[tuple[Node, int]] = set()
    while queue:
        step = queue.pop(0)
        if (step.node, step.offset) in seen:
            continue
        seen.add((step.node, step.offset))
        yield step
        if step.node not in stops and goes_on(step):
            queue.extend(s for s in _behind(step) if s.node is not None)


_NONLINEARITY = re.compile(
    "(Relu|Gelu|Silu|Sigmoid|Tanh|Hardtanh|LeakyRelu|Elu|Hardswish|Hardsigmoid|Softplus|Clamp|"
    "ClampMin|ClampMax|Threshold|Mish)Backward[0-9]"
)
_SUM = re.compile("(Add|Sub)Backward[0-9]")
_ONE_TO_ONE = re.compile(
    "(MaxPool[23]DWithIndices|AvgPool[23]D|AdaptiveAvgPool[23]D|AdaptiveMaxPool2D|"
    "UpsampleBilinear2D|UpsampleNearest2D|NativeBatchNorm|CudnnBatchNorm|NativeDropout|"
    "NativeGroupNorm|NativeLayerNorm|Clone|Alias|Mul|Div)Backward[0-9]"
)
_RESHAPE = re.compile("(View|ReshapeAlias|UnsafeView|Mean|Squeeze)Backward[0-9]")


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
        yield step.behind(parents[0], offset=step.offset + before)
    elif name == "SliceBackward0":
        along = _signed(step.node._saved_dim) % len(step.shape)
        start = _signed(step.node._saved_start) if along == step.axis else 0
        if along != step.axis or (start >= 0 and step.node._saved_step == 1):
            yield step.behind(parents[0], offset=step.offset - start)
    elif name == "SelectBackward0":  # one position of several, e.g. a class token
        dropped = _signed(step.node._saved_dim) % (len(step.shape) + 1)
        yield step.behind(parents[0], axis=step.axis + (dropped <= step.axis))
    elif _RESHAPE.fullmatch(name):
        yield from _behind_reshape(step, parents[0])
    elif _NONLINEARITY.fullmatch(name):
        yield step.behind(parents[0], nonlinearities=step.nonlinearities + 1)
    elif _ONE_TO_ONE.fullmatch(name):  # of a quotient or product only the first partner: no gates
        yield step.behind(parents[0], scale=_scaled(step))
    elif _SUM.fullmatch(name):
        for parent in parents:
            if parent is not None and _Step(parent, step.axis).shape == step.shape:
                yield step.behind(parent)


def _signed(value: int) -> int:
    """Undo the wrap-around of negative numbers among saved attributes."""
    return value - 2**64 if value >= 2**63 else value


def _behind_cat(step: _Step, parents: Sequence[Node]) -> Iterator[_Step]:
    along = _signed(step.node._saved_dim) % len(step.shape)
    offset = step.offset
    for parent in parents:
        yield step.behind(parent, offset=offset)
        if along == step.axis and parent is not None:
            offset += _Step(parent, step.axis).shape[step.axis]


def _behind_reshape(step: _Step, parent: Node) -> Iterator[_Step]:
    """Follow a reshape that only drops or flattens what comes after the channels."""
    before: list[int] = [int(n) for n in step.node._saved_self_sym_sizes]
    channels = step.shape[step.axis]
    if step.axis > 1 and before[-1] == channels:  # tokens: channels stay last
        yield step.behind(parent, axis=len(before) - 1)
    elif step.axis == 1 and len(before) > 1 and before[1] == channels:
        yield step.behind(parent)
    elif step.axis == 1 and before[-1] == channels:  # a mean over tokens
        yield step.behind(parent, axis=len(before) - 1)
    elif len(before) > 2 and channels == math.prod(before[1:]) and step.offset == 0:
        yield step.behind(parent, flattened=tuple(before[2:]))


def _scaled(step: _Step) -> Tensor | None:
    """The factor on each channel so far, with batch norm's weight / sqrt(variance + eps) put in."""
    if "BatchNorm" not in step.node.name():
        return step.scale
    norm = step.node
    factor = (norm._saved_running_var + norm._saved_eps).rsqrt()
    if norm._saved_weight is not None:
        factor = factor * norm._saved_weight.detach()
    return factor if step.scale is None else factor * step.scale


# --- transformers ------------------------------------------------------------------------------


def bridge_layers(bridge: Any, sites: Sequence[Site]) -> list[WeightLayer]:
    """Virtual weights of a TransformerLens bridge, between units that share the residual stream.

    Head to later head: the composition scores ||W_OV W_QK||, ||W_QK W_OV^T|| and ||W_OV W_OV||
    over the product of norms, in the order Q, K, V (Elhage et al. 2021, "Virtual weights"; row
    vectors on the left, as TransformerLens has them). Neuron to later neuron W_out W_in, and neuron
    to logit W_out W_U. What normalisation does beyond its own weights is left out.
    """
    names = {site.name for site in sites}
    layers = []
    n = bridge.cfg.n_layers
    qk, ov = _head_matrices(bridge, n)
    for i, j in itertools.combinations(range(n), 2):
        source, target = f"blocks.{i}.attn.hook_z", f"blocks.{j}.attn.hook_z"
        if source in names and target in names:
            weight = _composition(ov[i], qk[j], ov[j])
            layers.append(_virtual(f"composition {i} to {j}", weight, source, target))
    if not bridge.cfg.attn_only:
        layers += _neuron_layers(bridge, names, n)
    return layers


def _virtual(name: str, weight: Tensor, source: str, target: str) -> WeightLayer:
    reads = (Link(source, 0, weight.shape[1], 0),)
    return WeightLayer(name, weight, 1, reads, (Link(target, 0, weight.shape[0], 0),))


def _norm_weight(norm: Any) -> Tensor | float:
    """The weights of a normalisation layer, one a residual dimension; 1 if it has none."""
    weight = getattr(norm, "weight", None)
    return weight.detach()[:, None] if isinstance(weight, Tensor) else 1.0


def _head_matrices(bridge: Any, n: int) -> tuple[list[Tensor], list[Tensor]]:
    """W_QK and W_OV of every head: layer -> head x d_model x d_model."""
    qk, ov = [], []
    for layer in range(n):
        scale = _norm_weight(bridge.blocks[layer].ln1)
        w_q, w_o = bridge.W_Q[layer].detach(), bridge.W_O[layer].detach()
        shared = len(w_q) // len(bridge.W_K[layer])  # grouped queries share keys and values
        w_k = bridge.W_K[layer].detach().repeat_interleave(shared, 0)
        w_v = bridge.W_V[layer].detach().repeat_interleave(shared, 0)
        qk.append((scale * w_q) @ (scale * w_k).mT)
        ov.append((scale * w_v) @ w_o)
    return qk, ov


def _composition(ov: Tensor, qk_after: Tensor, ov_after: Tensor) -> Tensor:
    """Composition scores: later head x earlier head x (Q, K, V)."""
    before, norm = ov[None], ov.norm(dim=(1, 2))[None]
    qk, later = qk_after[:, None], ov_after[:, None]
    qk_norm = qk_after.norm(dim=(1, 2))[:, None] * norm
    ov_norm = ov_after.norm(dim=(1, 2))[:, None] * norm
    return torch.stack(
        [
            (before @ qk).norm(dim=(2, 3)) / qk_norm,
            (qk @ before.mT).norm(dim=(2, 3)) / qk_norm,
            (before @ later).norm(dim=(2, 3)) / ov_norm,
        ],
        dim=-1,
    )


def _neuron_layers(bridge: Any, names: set[str], n: int) -> Iterator[WeightLayer]:
    """Neuron to later neuron, and neuron to logit."""
    w_in, w_out = bridge.W_in, bridge.W_out
    posts = [f"blocks.{layer}.mlp.hook_post" for layer in range(n)]
    for i, source in enumerate(posts):
        if source not in names:
            continue
        for j in range(i + 1, n):
            into = _norm_weight(bridge.blocks[j].ln2) * w_in[j].detach()
            weight = (w_out[i].detach() @ into).mT
            yield _virtual(f"neurons {i} to {j}", weight, source, posts[j])
        unembed = _norm_weight(bridge.ln_final) * bridge.W_U.detach()
        logits = (w_out[i].detach() @ unembed).mT
        yield _virtual(f"neurons {i} to logits", logits, source, "hook_unembed")
