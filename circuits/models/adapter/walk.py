"""Walking back through the operations of a forward pass without losing track of channels.

Autograd keeps the graph of the operations that made a tensor. A walk goes back through those that do not mix
channels, and keeps for every channel which one it comes from and what it is multiplied by. What an operation was
given (dimensions, sizes, constants) is read off the attributes `_saved_…` of its node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuits.tensors import at_least_single

Node = Any
"""A `torch.autograd.graph.Node`: an operation of the forward pass."""


@dataclass(frozen=True, eq=False)
class WalkStep:
    """A place that a walk back from a tensor has reached.

    Attributes:
        node: the operation.
        axis: the axis of the channels in its output.
        index: for each channel of the tensor where the walk began, the channel here that it comes from, or -1.
        factor: what each of those channels is multiplied by on the way.
        depth: the number of operations passed.
        flattened: the shape of a map that a flatten on the way turned into channels.
        nonlinearities: the number of nonlinearities passed.
        met: whether a site with units of its own was passed.
        seen: whether any site was passed.
        norms: the batch norms passed, each as the step at which it was met.
    """

    node: Node
    axis: int
    index: Tensor
    factor: Tensor
    depth: int = 0
    flattened: tuple[int, ...] = ()
    nonlinearities: int = 0
    met: bool = False
    seen: bool = False
    norms: tuple[WalkStep, ...] = ()

    @classmethod
    def start(cls, node: Node, axis: int) -> WalkStep:
        """The first step of a walk, at the output of an operation."""
        n = _shape(node)[axis]
        return cls(node, axis, torch.arange(n), torch.ones(n))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the operation's output."""
        return _shape(self.node)

    def back_to(self, node: Node, **changes: Any) -> WalkStep:
        """The step back to an operation whose output this one reads."""
        return replace(self, node=node, depth=self.depth + 1, **changes)

    def shifted(self, node: Node, by: int, n: int, **changes: Any) -> WalkStep:
        """The step back to a tensor of `n` channels, where channel c here comes from channel c - by there."""
        index = self.index - by
        inside = (self.index >= 0) & (index >= 0) & (index < n)
        return self.back_to(node, index=torch.where(inside, index, -1), **changes)

    def scaled(self, by: Tensor) -> Tensor:
        """The factors so far, times one number for each channel here."""
        return self.factor * by.detach().cpu().float()[self.index.clamp_min(0)]


def _shape(node: Node) -> tuple[int, ...]:
    """The shape of a node's output: autograd keeps it as metadata of the gradient that the node takes in."""
    return tuple(node._input_metadata[0].shape)


def follows_reads(step: WalkStep) -> bool:
    """How far to look for what a layer reads: a sum that goes through a nonlinearity is a unit of its own, so its
    summands are not read directly.
    """
    return not (step.nonlinearities and _SUM.fullmatch(step.node.name()))


def follows_writes(step: WalkStep) -> bool:
    """How far to look for what writes a site: past one nonlinearity, since a second one belongs to another unit."""
    return not (step.nonlinearities and _NONLINEARITY.fullmatch(step.node.name()))


_MOST_STEPS = 4000
"""Steps of one walk: where sums follow sums (residual networks) the number of paths grows exponentially."""


def upstream(
    start: WalkStep,
    stops: frozenset[Node],
    follow: Callable[[WalkStep], bool],
    visit: Callable[[WalkStep], WalkStep] = lambda step: step,
    lost: Callable[[WalkStep], object] = lambda step: None,
) -> Iterator[WalkStep]:
    """Walk back, breadth first, along every path of operations that do not mix channels, up to `stops`.

    Args:
        start: where the walk begins.
        stops: operations at which it ends.
        follow: whether to continue beyond a step.
        visit: called with each step; returns the step to continue from.
        lost: called with each step beyond which no operation can be followed.
    """
    queue = [start]
    for _ in range(_MOST_STEPS):
        if not queue:
            return
        step = visit(queue.pop(0))
        yield step
        if step.node not in stops and follow(step):
            parents = [s for s in _parents(step) if s.node is not None and (s.index >= 0).any()]
            queue.extend(parents)
            if not parents:
                lost(step)


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
_PADDING = re.compile("Re(flec|plica)tionPad[123]DBackward0|CircularPadBackward")
_REDUCTION = re.compile("(Mean|Squeeze|Select)Backward[0-9]")


def _parents(step: WalkStep) -> Iterator[WalkStep]:
    """The steps back through an operation that does not mix channels; none for any other operation."""
    name = step.node.name()
    parents = [parent for parent, _ in step.node.next_functions]
    if name == "CatBackward0":
        yield from _through_cat(step, parents)
    elif name == "ConstantPadNdBackward0":
        pad = step.node._saved_pad
        after = 2 * (
            len(step.shape) - 1 - step.axis
        )  # padding is listed from the last axis backwards
        before = _signed(pad[after]) if len(pad) > after else 0
        yield step.shifted(parents[0], before, _shape(parents[0])[step.axis])
    elif name == "SliceBackward0":
        yield from _through_slice(step, parents[0])
    elif _PADDING.fullmatch(name):
        if _shape(parents[0])[step.axis] == step.shape[step.axis]:  # else the channels are padded
            yield step.back_to(parents[0])
    elif name in ("PermuteBackward0", "TransposeBackward0", "TBackward0", "UnsqueezeBackward0"):
        axis = _axis_before(step)
        if axis is not None:
            yield step.back_to(parents[0], axis=axis)
    elif _RESHAPE.fullmatch(name):
        yield from _through_reshape(step, parents[0])
    elif _REDUCTION.fullmatch(name):
        yield from _through_reduction(step, parents[0])
    elif _NONLINEARITY.fullmatch(name):
        yield step.back_to(parents[0], nonlinearities=step.nonlinearities + 1)
    elif _ONE_TO_ONE.fullmatch(name):
        if "BatchNorm" in name and step.node._saved_running_var is not None:
            factor = step.scaled(norm_scale(step.node))
            yield step.back_to(parents[0], factor=factor, norms=(*step.norms, step))
        else:
            yield from _through_one_to_one(step, parents[0])
    elif _SUM.fullmatch(name):
        yield from _through_sum(step, parents)
    elif _PRODUCT.fullmatch(name):
        yield from _through_product(step, parents)


def _through_one_to_one(step: WalkStep, parent: Node) -> Iterator[WalkStep]:
    """Follow pooling and the like; a norm whose size depends on the example only where its gain is one a channel."""
    gain = getattr(step.node, "_saved_weight", None)
    if gain is None:
        yield step.back_to(parent)
        return
    # What it divides by is left out, as it is the same for all channels; how they compare is a matter of the gain.
    last = "LayerNorm" in step.node.name()
    if gain.ndim == 1 and step.axis == (len(step.shape) - 1 if last else 1):
        yield step.back_to(parent, factor=step.scaled(gain))


def _axis_before(step: WalkStep) -> int | None:
    """The axis of the channels before axes were put in another order, or one was added; None if it is that one."""
    node, n = step.node, len(step.shape)
    if node.name() == "PermuteBackward0":
        return _signed(node._saved_dims[step.axis]) % n
    if node.name() == "UnsqueezeBackward0":
        added = _signed(node._saved_dim) % n
        return None if added == step.axis else step.axis - (step.axis > added)
    one, other = (0, 1) if node.name() == "TBackward0" else (node._saved_dim0, node._saved_dim1)
    pair = (_signed(one) % n, _signed(other) % n)
    return pair[1 - pair.index(step.axis)] if step.axis in pair else step.axis


def _signed(value: int) -> int:
    """Autograd shows saved integers as unsigned: undo the wrap-around of negative ones."""
    return value - 2**64 if value >= 2**63 else value


def _through_cat(step: WalkStep, parents: Sequence[Node]) -> Iterator[WalkStep]:
    along = _signed(step.node._saved_dim) % len(step.shape)
    if along != step.axis:
        yield from (step.back_to(parent) for parent in parents)
        return
    sizes = [None if p is None else _shape(p)[step.axis] for p in parents]
    if sizes.count(None) > 1:
        return  # parts without a gradient have no node, hence no size: two leave the offsets unknown
    rest = step.shape[step.axis] - sum(n for n in sizes if n is not None)
    offset = 0
    for parent, size in zip(parents, sizes, strict=True):
        if parent is not None and size is not None:
            yield step.shifted(parent, offset, size)
        offset += rest if size is None else size


def _through_slice(step: WalkStep, parent: Node) -> Iterator[WalkStep]:
    along = _signed(step.node._saved_dim) % len(step.shape)
    if along != step.axis:
        yield step.back_to(parent)
        return
    n, stride = _shape(parent)[step.axis], step.node._saved_step
    start = _signed(step.node._saved_start)
    first = start if start >= 0 else n + start
    index = torch.where(step.index >= 0, step.index * stride + first, -1)
    yield step.back_to(parent, index=index)


def _through_reshape(step: WalkStep, parent: Node) -> Iterator[WalkStep]:
    """Follow a reshape that keeps the channels' axis, or that flattens channels and map into one axis."""
    before: list[int] = [int(n) for n in step.node._saved_self_sym_sizes]
    after, axis = step.shape, step.axis
    if before[: axis + 1] == list(after[: axis + 1]):
        yield step.back_to(parent)
    elif (
        axis == len(after) - 1 and before[-1] == after[-1]
    ):  # channels last: only positions are reshaped
        yield step.back_to(parent, axis=len(before) - 1)
    elif axis == 1 and len(after) == 2 and after[1] == math.prod(before[1:]) and not step.flattened:
        places = math.prod(
            before[2:]
        )  # positions of the map, which follow each other inside a channel
        index = torch.where(step.index >= 0, step.index // places, -1)
        yield step.back_to(parent, index=index, flattened=tuple(before[2:]))


def _through_reduction(step: WalkStep, parent: Node) -> Iterator[WalkStep]:
    """Follow a mean, squeeze or select over axes other than that of the channels."""
    before, after = _shape(parent) if parent is not None else (), step.shape
    if len(before) == len(after):  # `keepdim`
        if before and before[step.axis] == after[step.axis]:
            yield step.back_to(parent)
        return
    dims = getattr(step.node, "_saved_dim", None)
    if dims is None:  # squeeze of every axis of length 1
        gone = {a for a, n in enumerate(before) if n == 1}
    else:
        listed = dims if isinstance(dims, list | tuple) else [dims]
        gone = {_signed(d) % len(before) for d in listed}
    kept = [a for a in range(len(before)) if a not in gone]
    if len(kept) == len(after):
        yield step.back_to(parent, axis=kept[step.axis])


def _through_sum(step: WalkStep, parents: Sequence[Node]) -> Iterator[WalkStep]:
    """Follow `a + alpha * b` or `a - alpha * b` to both summands, except one that is broadcast."""
    minus = step.node.name().startswith("Sub")
    weight = float(getattr(step.node, "_saved_alpha", 1))
    for place, parent in enumerate(parents):
        if parent is not None and _shape(parent) == step.shape:
            sign = (-weight if minus else weight) if place == 1 else 1.0
            yield step.back_to(parent, factor=step.factor * sign)


def _through_product(step: WalkStep, parents: Sequence[Node]) -> Iterator[WalkStep]:
    """Follow a product to its only factor of full size, a quotient to its numerator."""
    divides = step.node.name().startswith("Div")
    candidates = parents[:1] if divides else parents
    full = [i for i, p in enumerate(candidates) if p is not None and _shape(p) == step.shape]
    if len(full) != 1:
        return  # two maps multiplied with each other (a gate): the product is a unit of its own
    # A factor that is a number, or a tensor without gradient, is no node: the product has saved its value.
    constant = None
    if len(parents) < 2 or parents[1 - full[0]] is None:
        name = "_saved_other" if full[0] == 0 else "_saved_self"
        constant = getattr(step.node, name, None)
    factor = step.factor
    if isinstance(constant, int | float):
        constant = torch.tensor(float(constant))
    if isinstance(constant, Tensor):
        if constant.numel() != 1:
            return  # a mask, or a scale for each position: no single factor for a channel
        factor = factor / constant.item() if divides else factor * constant.item()
    yield step.back_to(parents[full[0]], factor=factor)


def norm_scale(norm: Node) -> Tensor:
    """What a batch norm in evaluation mode multiplies each channel by: weight / sqrt(variance + eps)."""
    scale = (at_least_single(norm._saved_running_var) + norm._saved_eps).rsqrt()
    return scale if norm._saved_weight is None else scale * norm._saved_weight.detach()
