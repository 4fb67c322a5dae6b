"""Walking back through the operations of a forward pass, channel by channel.

Autograd keeps the graph of operations that made a tensor. A walk goes back through those that keep
channels apart, and for every channel remembers where it comes from and what multiplies it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Node = Any
"""A `torch.autograd.graph.Node`: an operation of the forward pass."""


@dataclass(frozen=True, eq=False)
class Step:
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
        seen: whether any site was passed.
        norms: batch norms passed, each as a step before it was passed.
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
    norms: tuple[Step, ...] = ()

    @classmethod
    def start(cls, node: Node, axis: int) -> Step:
        """The walk's beginning."""
        n = _shape(node)[axis]
        return cls(node, axis, torch.arange(n), torch.ones(n))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the operation puts out."""
        return _shape(self.node)

    def behind(self, node: Node, **changes: Any) -> Step:
        """The step to an operation before this one."""
        return replace(self, node=node, depth=self.depth + 1, **changes)

    def shifted(self, node: Node, by: int, n: int, **changes: Any) -> Step:
        """The step to a tensor of `n` channels in which channel `c` is channel `c - by`."""
        index = self.index - by
        inside = (self.index >= 0) & (index >= 0) & (index < n)
        return self.behind(node, index=torch.where(inside, index, -1), **changes)

    def scaled(self, by: Tensor) -> Tensor:
        """The factors so far times one number a channel here."""
        return self.factor * by.detach().cpu().float()[self.index.clamp_min(0)]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def reads_on(step: Step) -> bool:
    """What a layer reads: past a nonlinearity, a sum is a new unit and hides its summands."""
    return not (step.nonlinearities and _SUM.fullmatch(step.node.name()))


def writes_on(step: Step) -> bool:
    """What writes a site: a second nonlinearity belongs to another unit."""
    return not (step.nonlinearities and _NONLINEARITY.fullmatch(step.node.name()))


_MOST_STEPS = 4000  # of one walk: paths multiply where sums follow sums


def upstream(
    start: Step,
    stops: frozenset[Node],
    goes_on: Callable[[Step], bool],
    visit: Callable[[Step], Step] = lambda step: step,
    lost: Callable[[Step], object] = lambda step: None,
) -> Iterator[Step]:
    """Walk back along every path of operations that keep channels apart, up to `stops`.

    Args:
        start: where.
        stops: operations to end at.
        goes_on: whether to look behind a step.
        visit: sees each step, and returns what to go on from.
        lost: sees each step behind which nothing can be followed.
    """
    queue = [start]
    for _ in range(_MOST_STEPS):
        if not queue:
            return
        step = visit(queue.pop(0))
        yield step
        if step.node not in stops and goes_on(step):
            behind = [s for s in _behind(step) if s.node is not None and (s.index >= 0).any()]
            queue.extend(behind)
            if not behind:
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
_REDUCTION = re.compile("(Mean|Squeeze|Select)Backward[0-9]")


def _behind(step: Step) -> Iterator[Step]:
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
            factor = step.scaled(norm_scale(step.node))
            yield step.behind(parents[0], factor=factor, norms=(*step.norms, step))
        else:
            yield step.behind(parents[0])
    elif _SUM.fullmatch(name):
        yield from _behind_sum(step, parents)
    elif _PRODUCT.fullmatch(name):
        yield from _behind_product(step, parents)


def _signed(value: int) -> int:
    """Undo the wrap-around of negative numbers among saved attributes."""
    return value - 2**64 if value >= 2**63 else value


def _behind_cat(step: Step, parents: Sequence[Node]) -> Iterator[Step]:
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


def _behind_slice(step: Step, parent: Node) -> Iterator[Step]:
    along = _signed(step.node._saved_dim) % len(step.shape)
    if along != step.axis:
        yield step.behind(parent)
        return
    n, stride = _shape(parent)[step.axis], step.node._saved_step
    start = _signed(step.node._saved_start)
    first = start if start >= 0 else n + start
    index = torch.where(step.index >= 0, step.index * stride + first, -1)
    yield step.behind(parent, index=index)


def _behind_reshape(step: Step, parent: Node) -> Iterator[Step]:
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


def _behind_reduction(step: Step, parent: Node) -> Iterator[Step]:
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


def _behind_sum(step: Step, parents: Sequence[Node]) -> Iterator[Step]:
    minus = step.node.name().startswith("Sub")
    weight = float(getattr(step.node, "_saved_alpha", 1))
    for place, parent in enumerate(parents):
        if parent is not None and _shape(parent) == step.shape:
            sign = (-weight if minus else weight) if place == 1 else 1.0
            yield step.behind(parent, factor=step.factor * sign)


def _behind_product(step: Step, parents: Sequence[Node]) -> Iterator[Step]:
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


def norm_scale(norm: Node) -> Tensor:
    """What batch norm multiplies each channel with: weight / sqrt(variance + eps)."""
    scale = (norm._saved_running_var + norm._saved_eps).rsqrt()
    return scale if norm._saved_weight is None else scale * norm._saved_weight.detach()
