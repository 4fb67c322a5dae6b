"""The adjoints of operations, on gradients that are zero outside of a window.

There is one rule for an operation, found by its name in torch's list (`torch.ops.aten`). A rule looks at the
arguments of the operation and returns a pull: a function from a window of the gradient by the output to windows of
the gradients by the inputs (a vector-Jacobian product). Operations without a rule are left to torch's autograd,
which needs whole maps.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Paths = Literal["all", "absolute"]
"""Whether the sum over paths is of their weights, or of the absolute values of their weights."""


@dataclass(frozen=True, eq=False)
class Window:
    """Gradients of some numbers by a tensor, on a box of that tensor; zero elsewhere.

    Attributes:
        value: the gradients: one row for each number, then the axes of the box.
        start: the box's first index along each axis of the tensor.
    """

    value: Tensor
    start: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the box's last index along each axis."""
        return tuple(s + n for s, n in zip(self.start, self.value.shape[1:], strict=True))

    def cut(self, start: Sequence[int], stop: Sequence[int]) -> Window | None:
        """The part inside another box; None if the boxes do not meet."""
        low = tuple(map(max, self.start, start))
        high = tuple(map(min, self.stop, stop))
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        # Relative to the window: a box from 3 on, cut from 5 on, begins at its own index 2.
        places = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, self.start, strict=True))
        return Window(self.value[(slice(None), *places)], low)

    def within(self, start: Sequence[int], stop: Sequence[int]) -> Tensor:
        """The values on a larger box, padded with zeros."""
        pads = [
            (s - a, b - e) for s, e, a, b in zip(self.start, self.stop, start, stop, strict=True)
        ]
        if not any(itertools.chain(*pads)):
            return self.value
        return F.pad(
            self.value, [n for pair in reversed(pads) for n in pair]
        )  # listed from the last axis on

    def whole(self, shape: Sequence[int]) -> Tensor:
        """The values on the whole tensor."""
        return self.within([0] * len(shape), shape)

    def plus(self, other: Window) -> Window:
        """The sum, on the smallest box that holds both."""
        start = tuple(map(min, self.start, other.start))
        stop = tuple(map(max, self.stop, other.stop))
        return Window(self.within(start, stop) + other.within(start, stop), start)

    def times(self, factor: Tensor) -> Window:
        """The product with a tensor that broadcasts to the whole tensor's shape."""
        aligned = factor.reshape(*[1] * (len(self.start) - factor.ndim), *factor.shape)
        places = tuple(
            # Axes of length 1 broadcast, whatever part of the map the window is.
            slice(None) if n == 1 else slice(a, b)
            for n, a, b in zip(aligned.shape, self.start, self.stop, strict=True)
        )
        return Window(self.value * aligned[places].to(self.value), self.start)

    def moved(self, axis: int, start: int) -> Window:
        """The same values at another place along an axis."""
        return Window(self.value, (*self.start[:axis], start, *self.start[axis + 1 :]))


Pull = Callable[[Window, Paths], Sequence[Window | None]]
"""From the gradient by an operation's output to those by its recorded inputs."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation in the recorded pass.

    Attributes:
        function: the operation.
        values: its arguments, by name.
        output: the tensor that it returned, or one of several.
        dependents: the inputs that depend on the tape's start, in order.
        sources: the names of the arguments with those inputs.
        linear: whether nonlinearities are to be replaced by linear functions.
        mutates: whether the output is an input, changed in place.
        varies: whether another argument depends on the model's input, though not on the start.
        result: everything that it returned.
        place: which of several returned tensors `output` is.
    """

    function: Any
    values: dict[str, Any]
    output: Tensor
    dependents: tuple[Tensor, ...]
    sources: tuple[str, ...]
    linear: bool
    mutates: bool = False
    varies: bool = False
    result: Any = None
    place: int = 0

    @property
    def name(self) -> str:
        """The operation's name, without the `_` of its in-place form."""
        packet = getattr(self.function, "overloadpacket", self.function)
        name = getattr(packet, "__name__", str(packet))
        return name.removesuffix("_") if self.mutates else name

    def with_copies(self) -> Call:
        """The same call with copies of its tensors, if the operation is about to overwrite one of them."""
        if not self.mutates:
            return self
        # By identity: an operation may be given one tensor twice, and has to be again when it is repeated.
        copies = {id(v): v.clone() for v in self.values.values() if isinstance(v, Tensor)}
        values = {
            k: copies.get(id(v), v) if isinstance(v, Tensor) else v for k, v in self.values.items()
        }
        return replace(self, values=values)

    def with_output(self, output: Tensor, result: Any, place: int) -> Call:
        """The same call with what the operation returned."""
        return replace(self, output=output, result=result, place=place)


AdjointRule = Callable[[Call], Pull]


def adjoint(call: Call) -> Pull:
    """The pull of a call."""
    rule = _RULES.get(call.name)
    if call.varies and not (_ADDING.fullmatch(call.name) or _JOINING.fullmatch(call.name)):
        return _refuse(call, " with a tensor that depends on the input and not on the source")
    if call.place or any(value.is_complex() for value in (call.output, *call.dependents)):
        # The rules are for the first tensor that an operation returns, and for real numbers.
        return _by_torch(call)
    if rule is not None:
        return rule(call)
    if _ACTIVATIONS.fullmatch(call.name):
        return _activation(call)
    return _by_torch(call)


# --- elementwise operations --------------------------------------------------------------------


def _identity(call: Call) -> Pull:
    return lambda gradient, paths: [gradient]


def _detached(call: Call) -> Pull:
    """The gradient of a detached tensor is zero; in linear mode its effect counts all the same."""
    return (lambda g, paths: [g]) if call.linear else (lambda g, paths: [None])


def _scaled(factor: Tensor) -> Pull:
    """Multiplication by a constant."""

    def pull(g: Window, paths: Paths) -> list[Window]:
        return [g.times(factor.to(g.value).abs() if paths == "absolute" else factor)]

    return pull


def _relu(call: Call) -> Pull:
    if call.linear:
        return _identity(call)
    return _scaled(call.output > 0)


def _activation(call: Call) -> Pull:
    """An activation function: its derivative at the activations of the pass, or the identity in linear mode."""
    if len(call.dependents) != 1 or call.output.shape != call.dependents[0].shape:
        return _by_torch(call)
    if call.linear:
        return _identity(call)
    # A copy, as the model may go on to overwrite it.
    given = call.values["self"].detach().clone()

    # Computed at the first pull, not here: torch cannot differentiate inside the tape's dispatch mode. Elementwise
    # functions have a diagonal Jacobian, so that pulling back ones gives all derivatives at once.
    @cache
    def slope() -> Tensor:
        wide = {k: _in_precision(given if k == "self" else v) for k, v in call.values.items()}
        output, pull, *_ = torch.func.vjp(lambda x: _rerun(call, wide | {"self": x}), wide["self"])
        return pull(torch.ones_like(output))[0]

    return lambda g, paths: _scaled(slope())(g, paths)


def _sum(call: Call) -> Pull:
    """`self + alpha * other`, `self - alpha * other` and the reversed difference."""
    minus = call.name in ("sub", "rsub")
    alpha = float(call.values.get("alpha", 1))
    weights = {"self": 1.0, "other": -alpha if minus else alpha}
    if call.name == "rsub":
        weights = {"self": -alpha, "other": 1.0}
    factors = [weights[name] for name in call.sources]
    if any(value.shape != call.output.shape for value in call.dependents):
        return _by_torch(call)

    def pull(g: Window, paths: Paths) -> list[Window]:
        signed = [abs(f) if paths == "absolute" else f for f in factors]
        # The same window where nothing is to be multiplied: sums of a residual stream are passed on without a copy.
        return [g if f == 1 else Window(g.value * f, g.start) for f in signed]

    return pull


def _product(call: Call) -> Pull:
    """Products and quotients, elementwise."""
    places = call.sources
    divides = call.name == "div"
    # A product of two maps that both depend on the start has no linear reading: its derivative at zero is zero.
    curved = len(places) == 2 or (divides and places == ("other",))
    if curved and call.linear:
        return _refuse(call, " of two maps that both depend on the source")
    if any(value.shape != call.output.shape for value in call.dependents):
        return _by_torch(call)
    if call.values.get("rounding_mode") is not None:
        return _refuse(call, " with rounding") if call.linear else _by_torch(call)
    if curved:
        if divides:
            return _by_torch(call)
        a, b = (call.values[name].detach().clone() for name in ("self", "other"))
        return lambda g, paths: [*_scaled(b)(g, paths), *_scaled(a)(g, paths)]
    other = call.values["other" if places == ("self",) else "self"]
    factor = torch.as_tensor(other, dtype=None if isinstance(other, Tensor) else torch.float64)
    return _scaled(1 / factor if divides else factor)


def _negative(call: Call) -> Pull:
    return _scaled(torch.tensor(-1.0, dtype=torch.float64))


def _batch_norm(call: Call) -> Pull:
    """Batch norm in evaluation mode: a factor for each channel, weight / sqrt(variance + eps)."""
    v = call.values
    if v.get("training") or v.get("running_var") is None:
        return _by_torch(call)
    # In evaluation mode the mean is a constant, and has no part in the derivative.
    scale = (v["running_var"].double() + v.get("eps", v.get("epsilon"))).rsqrt()
    if v["weight"] is not None:
        scale = scale * v["weight"].double()
    return _scaled(scale.reshape(-1, *[1] * (call.output.ndim - 2)))


def _local_response_norm(call: Call) -> Pull:
    """x / (k + alpha / size * sum of x^2 over a window of channels)^beta; see `circuits.models.adapter.lrn`."""
    v = call.values
    x, size, alpha, beta, k = (v[n] for n in ("input", "size", "alpha", "beta", "k"))
    if call.linear:  # the derivative at zero: the denominator is k^beta there
        return _scaled(torch.tensor(float(k), dtype=torch.float64) ** -beta)
    x = x.detach().double()
    # y_i = x_i b_i^-beta with b_i = k + (alpha / n) sum over j in window(i) of x_j^2, hence dy_i / dx_j = [i = j]
    # b_i^-beta - (2 alpha beta / n) x_i b_i^(-beta - 1) x_j [j in window(i)]. Pulled back, the second part is x_j times
    # the sum of g_i x_i b_i^(-beta - 1) over all i whose windows hold j.
    base = k + alpha / size * _channel_sums(x.square(), size // 2, (size - 1) // 2)
    scale, inner = base.pow(-beta), x * base.pow(-beta - 1)

    def pull(g: Window, paths: Paths) -> list[Window]:
        n = x.shape[1]
        start, stop = (g.start[0], 0, *g.start[2:]), (g.stop[0], n, *g.stop[2:])
        g = Window(g.within(start, stop), start)
        direct = g.times(scale)
        # All channels in the window of a gradient's channels get some of it, so the box must span all channels.
        # Channel j is in the windows of the channels on its other side: the window mirrored.
        sums = _channel_sums(g.times(inner).value.flatten(0, 1), (size - 1) // 2, size // 2)
        indirect = Window(sums.reshape(g.value.shape), start).times(x * (-2 * alpha * beta / size))
        if paths == "absolute":
            raise ValueError("paths cannot be kept apart through local response normalisation "
                             "at the activations of a run: expected mode 'linear'")  # fmt: skip
        return [direct.plus(indirect)]

    return pull


def _channel_sums(x: Tensor, below: int, above: int) -> Tensor:
    """For each channel (axis 1), the sum from `below` channels before it to `above` channels after it."""
    # Padding is listed from the last axis; axis 1 comes before the axes of the map, the batch is not padded.
    pads = [0, 0] * (x.ndim - 2) + [below, above]
    return F.pad(x, pads).unfold(1, below + above + 1, 1).sum(-1)


# --- operations that mix or move positions ------------------------------------------------------


def _convolution(call: Call) -> Pull:
    """The transposed convolution, on the window alone."""
    v = call.values
    if v["transposed"] or call.sources != ("input",):
        return _by_torch(call)
    weight, size = v["weight"].detach(), tuple(call.dependents[0].shape)
    n = weight.ndim - 2
    stride, padding, dilation = (_each(v[name], n) for name in ("stride", "padding", "dilation"))
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    groups = v["groups"]

    def pull(g: Window, paths: Paths) -> list[Window | None]:
        kernels = weight.to(g.value)
        kernels = kernels.abs() if paths == "absolute" else kernels
        if groups == 1:  # output channels outside of the window have no gradient
            kernels = kernels[g.start[1] : g.stop[1]]
        else:
            # Torch divides the channels into groups by their number: a window that begins amid a group could not be
            # given to it, so that all channels are taken.
            start, stop = (g.start[0], 0, *g.start[2:]), (g.stop[0], len(weight), *g.stop[2:])
            g = Window(g.within(start, stop), start)
        # Rows and examples are one batch to torch. Without padding: what falls outside of the map is cut off below.
        value = transposed(
            g.value.flatten(0, 1), kernels, stride=stride, dilation=dilation, groups=groups
        )
        # Output position p reads input positions from p * stride - padding on.
        first = [p * s - q for p, s, q in zip(g.start[2:], stride, padding, strict=True)]
        spread = Window(value.unflatten(0, g.value.shape[:2]), (g.start[0], 0, *first))
        return [spread.cut([0] * len(size), size)]

    return pull


def _each(value: Any, n: int) -> list[int]:
    """One number for each axis; torch also accepts a single number for all."""
    return list(value) * n if len(value) == 1 else list(value)


def _max_pool(call: Call) -> Pull:
    """The gradient goes to the position of each maximum; in linear mode a maximum is the mean over the window."""
    v, size = call.values, tuple(call.dependents[0].shape)
    if call.output.ndim != 4:
        return _by_torch(call)
    kernel = _each(v["kernel_size"], 2)
    stride = _each(v["stride"], 2) if v["stride"] else kernel
    padding, dilation = _each(v["padding"], 2), _each(v["dilation"], 2)
    if call.linear:
        return _averaging(call, kernel, stride, padding, dilation, _Divisor("inside"))
    indices = call.result[1]

    def pull(g: Window, paths: Paths) -> list[Window | None]:
        # Output p looks at input p s - q to p s - q + (k - 1) d; outputs up to stop - 1.
        low = [max(0, p * s - q) for p, s, q in zip(g.start[2:], stride, padding, strict=True)]
        high = [
            min(n, (p - 1) * s - q + (k - 1) * d + 1)
            for n, p, s, q, k, d in zip(
                size[2:], g.stop[2:], stride, padding, kernel, dilation, strict=True
            )
        ]
        # Torch gives the position of each maximum as row * width + column of the whole map; `flat` is the same inside
        # the box [low, high) that the windows of the gradient's box cover.
        here = indices[tuple(slice(a, b) for a, b in zip(g.start, g.stop, strict=True))]
        width = high[1] - low[1]
        flat = (here // size[3] - low[0]) * width + here % size[3] - low[1]
        value = g.value.new_zeros(*g.value.shape[:3], (high[0] - low[0]) * width)
        # Added, since windows overlap and one position may be the maximum of several.
        value.scatter_add_(3, flat.flatten(2).expand(*g.value.shape[:3], -1), g.value.flatten(3))
        shaped = value.unflatten(3, (high[0] - low[0], width))
        return [Window(shaped, (*g.start[:2], *low))]

    return pull


@dataclass(frozen=True)
class _Divisor:
    """What an average is divided by: the window's places inside the map, those with padding, or a given number."""

    how: Literal["inside", "padded"] | int

    def along(self, size: int, out: int, k: int, s: int, p: int, d: int) -> Tensor:
        """The number of places that each output counts along one axis."""
        # For an axis of 5, kernel 3, stride 2, padding 1: outputs look at -1..1, 1..3 and 3..5, of which 2, 3 and 2 are
        # inside.
        first = torch.arange(out)[:, None] * s - p
        places = first + torch.arange(k) * d
        low, high = (0, size) if self.how == "inside" else (-p, size + p)
        return ((places >= low) & (places < high)).sum(1)


def _averaging(
    call: Call,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    count: _Divisor,
) -> Pull:
    """Average pooling: every place of a window gets an equal share of the gradient."""
    size = tuple(call.dependents[0].shape)
    if isinstance(count.how, int):
        divisor = torch.tensor(count.how, dtype=torch.float64)
    else:
        along = [
            count.along(size[2 + i], call.output.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i])
            for i in range(2)
        ]  # fmt: skip
        divisor = (along[0][:, None] * along[1]).double()
    ones = torch.ones(1, 1, *kernel, dtype=torch.float64)

    def pull(g: Window, paths: Paths) -> list[Window | None]:
        g = g.times(1 / divisor)
        # A transposed convolution with a kernel of ones adds up the shares; channels are independent, so all are batch.
        value = F.conv_transpose2d(
            g.value.flatten(0, 2)[:, None], ones.to(g.value), stride=tuple(stride), dilation=tuple(dilation)
        )  # fmt: skip
        value = value[:, 0].unflatten(0, g.value.shape[:3])
        first = [p * s - q for p, s, q in zip(g.start[2:], stride, padding, strict=True)]
        return [Window(value, (*g.start[:2], *first)).cut([0] * len(size), size)]

    return pull


def _avg_pool(call: Call) -> Pull:
    v = call.values
    if call.output.ndim != 4:
        return _by_torch(call)
    kernel = _each(v["kernel_size"], 2)
    stride = _each(v["stride"], 2) if v["stride"] else kernel
    override = v["divisor_override"]
    how = override or ("padded" if v["count_include_pad"] else "inside")
    return _averaging(call, kernel, stride, _each(v["padding"], 2), [1, 1], _Divisor(how))


def _mean(call: Call) -> Pull:
    """A mean or a sum over axes: every place gets an equal share of the gradient."""
    v, shape = call.values, tuple(call.dependents[0].shape)
    listed = v.get("dim")
    listed = range(len(shape)) if listed is None else listed
    dims = sorted({d % len(shape) for d in ([listed] if isinstance(listed, int) else listed)})
    if not dims or 0 in dims:  # over the batch: windows are of single examples
        return _by_torch(call)
    share = 1 / math.prod(shape[d] for d in dims) if call.name == "mean" else 1.0

    def pull(g: Window, paths: Paths) -> list[Window]:
        value, start = g.value * share, list(g.start)
        for d in dims:
            # In rising order, so that an axis that is put back does not move those before it. `value` has the row in
            # front: d + 1.
            if not v.get("keepdim"):
                value = value.unsqueeze(d + 1)
                start.insert(d, 0)
            value = value.expand(*value.shape[: d + 1], shape[d], *value.shape[d + 2 :])
        return [Window(value, tuple(start))]

    return pull


def _cat(call: Call) -> Pull:
    dim = call.values.get("dim", 0) % call.output.ndim
    recorded = {id(value) for value in call.dependents}
    parts, offset = [], 0
    for value in call.values["tensors"]:
        if value.ndim != call.output.ndim:
            continue  # torch.cat ignores empty tensors of one axis
        if id(value) in recorded:
            parts.append((offset, tuple(value.shape)))
        offset += value.shape[dim]

    def pull(g: Window, paths: Paths) -> list[Window | None]:
        found = []
        for offset, shape in parts:
            # The part begins at `offset` of the whole: counted from there the window is that much earlier, and what
            # lies outside of the part is cut off.
            here = g.moved(dim, g.start[dim] - offset)
            found.append(here.cut([0] * len(shape), shape))
        return found

    return pull


def _slice(call: Call) -> Pull:
    v, shape = call.values, tuple(call.dependents[0].shape)
    if v.get("step", 1) != 1:
        return _by_torch(call)
    dim = v.get("dim", 0) % len(shape)
    first, *_ = slice(v.get("start"), v.get("end")).indices(shape[dim])
    # Index 0 of the slice is index `first` of what it was cut from.
    return lambda g, paths: [g.moved(dim, g.start[dim] + first)]


def _pad(call: Call) -> Pull:
    pad, shape = call.values["pad"], tuple(call.dependents[0].shape)
    before = [0] * len(shape)
    for i in range(len(pad) // 2):  # padding is listed from the last axis backwards
        before[len(shape) - 1 - i] = pad[2 * i]

    def pull(g: Window, paths: Paths) -> list[Window | None]:
        start = tuple(s - b for s, b in zip(g.start, before, strict=True))
        return [Window(g.value, start).cut([0] * len(shape), shape)]

    return pull


def _matrix(call: Call) -> Pull:
    """Rows times a matrix that does not depend on the tape's start."""
    rows = "mat1" if call.name == "addmm" else "self"
    if call.sources != (rows,):
        return _by_torch(call)
    matrix = call.values["mat2"].detach() * call.values.get("alpha", 1)

    def pull(g: Window, paths: Paths) -> list[Window]:
        # y = x M gives dL/dx = dL/dy M^T, of which only the window's columns count.
        columns = matrix[:, g.start[1] : g.stop[1]].to(g.value)
        columns = columns.abs() if paths == "absolute" else columns
        return [Window(g.value @ columns.mT, (g.start[0], 0))]

    return pull


def _grouped_matrices(call: Call) -> Pull:
    """Rows times a matrix for each group of them, as mixtures of experts compute it; torch has it in no float64."""
    v = call.values
    if call.sources != ("self",) or v.get("offs") is None or v["mat2"].ndim != 3:
        return _by_torch(call)
    matrices, ends = v["mat2"].detach(), v["offs"].tolist()

    def pull(g: Window, paths: Paths) -> list[Window]:
        given = g.whole(call.output.shape)
        # Rows after the last group are in none.
        made = given.new_zeros(*given.shape[:2], matrices.shape[1])
        for matrix, start, end in zip(matrices, [0, *ends], ends, strict=False):
            factor = matrix.to(given)
            factor = factor.abs() if paths == "absolute" else factor
            made[:, start:end] = given[:, start:end] @ factor.mT
        return [Window(made, (0, 0))]

    return pull


# --- operations without a rule -------------------------------------------------------------------


def _refuse(call: Call, why: str = "") -> Pull:
    """A pull that raises: only paths that are asked for have to go through the operation."""

    def pull(g: Window, paths: Paths) -> list[Window]:
        also = ": modes 'mean' and 'example' can" if call.linear else ""
        raise ValueError(
            f"weights cannot be expanded through the operation {call.name}{why}"
            f"{' in mode linear' if call.linear else ''}{also}"
        )

    return pull


def _is_linear(call: Call) -> bool:
    """Whether an operation is linear in its recorded inputs."""
    if any(kind.fullmatch(call.name) for kind in (_MOVING, _ADDING, _TRANSFORMS)):
        return True
    divisor = call.name == "div" and "other" in call.sources
    return _BILINEAR.fullmatch(call.name) is not None and len(call.sources) == 1 and not divisor


def _by_torch(call: Call) -> Pull:
    """The gradient of the operation by torch's autograd, on whole maps."""
    if call.linear and not _is_linear(call):
        return _refuse(call)
    recorded = {id(value) for value in call.dependents}
    slots: list[tuple[str, int | None]] = []
    for name in call.sources:
        value = call.values[name]
        if isinstance(value, Tensor):
            slots.append((name, None))
        else:
            slots += [(name, i) for i, item in enumerate(value) if id(item) in recorded]
    signed = _TRANSFORMS.fullmatch(call.name) or any(
        value.is_complex() for value in (call.output, *call.dependents)
    )
    # The model may overwrite its tensors before the pull is called.
    given = {k: _copied(v) if k in call.sources else v for k, v in call.values.items()}

    def pull(g: Window, paths: Paths) -> list[Window]:
        if paths == "absolute" and not _is_linear(call):
            raise ValueError(
                f"paths cannot be kept apart through the operation {call.name} at the activations of "
                "a run: expected mode 'linear'"
            )
        if paths == "absolute" and signed:
            raise ValueError(
                f"paths cannot be kept apart through the operation {call.name}, a sum with weights of both signs: "
                "expected apart=False"
            )
        wide = {k: _in_precision(v) for k, v in given.items()}
        if paths == "absolute" and _BILINEAR.fullmatch(call.name):
            wide = {
                k: v.abs() if isinstance(v, Tensor) and k not in call.sources else v
                for k, v in wide.items()
            }

        def again(*values: Tensor) -> Tensor:
            changed = {k: list(v) if isinstance(v, list) else v for k, v in wide.items()}
            for (name, i), value in zip(slots, values, strict=True):
                if i is None:
                    changed[name] = value
                else:
                    changed[name][i] = value
            return _rerun(call, changed)

        first = [wide[name] if i is None else wide[name][i] for name, i in slots]
        output, back, *_ = torch.func.vjp(again, *first)
        # One vector-Jacobian product a row of gradients, all at once.
        grads = torch.func.vmap(back)(g.whole(output.shape))
        # With the constant factor made absolute, all weights from one input have one sign (a difference gives its
        # second input the negative one): then the absolute value of their sum is the sum of their absolute values.
        if paths == "absolute":
            grads = [grad.abs() for grad in grads]
        return [Window(grad, (0,) * (grad.ndim - 1)) for grad in grads]

    return pull


def _copied(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def _in_precision(value: Any) -> Any:
    if isinstance(value, list | tuple):  # an LSTM is given its two states as a tuple
        return [_in_precision(item) for item in value]
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _rerun(call: Call, changed: dict[str, Any]) -> Tensor:
    """Call the operation again, with some arguments changed."""
    values = call.values | changed
    function = _out_of_place(call.function) if call.mutates else call.function
    if call.mutates and function is call.function:
        # An operation in place would overwrite the copies that the next pull needs.
        values |= {name: values[name].clone() for name in call.sources}
    if not hasattr(call.function, "_schema"):  # a function of several operations, called by place
        output = call.function(*values.values())
        return output[call.place] if isinstance(output, tuple | list) else output
    arguments = call.function._schema.arguments
    args = [values[a.name] for a in arguments if not a.kwarg_only]
    kwargs = {a.name: values[a.name] for a in arguments if a.kwarg_only}
    output = function(*args, **kwargs)
    return output[call.place] if isinstance(output, tuple | list) else output


def _out_of_place(function: Any) -> Any:
    """The operation that makes a new tensor, of one that writes into its first argument; the same if there is none.

    `scatter_` and the like may write what depends on the source into a tensor that does not, which torch's derivatives
    of functions refuse.
    """
    packet, _, overload = function.name().partition("::")[2].partition(".")
    plain = getattr(torch.ops.aten, packet.removesuffix("_"), None)
    return getattr(plain, overload or "default", function)


_ACTIVATIONS = re.compile(
    "gelu|silu|sigmoid|tanh|hardtanh|leaky_relu|elu|hardswish|hardsigmoid|softplus|mish|clamp|"
    "clamp_min|clamp_max|threshold|celu|_?prelu(_kernel)?|log_sigmoid_forward"
)
"""Activation functions, which linear mode replaces by the identity."""

_MOVING = re.compile(
    "view|_unsafe_view|reshape|_reshape_alias|permute|transpose|t|expand|squeeze|unsqueeze|select|"
    "slice|flatten|mean|sum|_adaptive_avg_pool[23]d|avg_pool[123]d|flip|roll|pixel_(un)?shuffle|"
    "upsample_(nearest|bilinear)2d|cumsum|constant_pad_nd|index_select|index|gather|narrow|diagonal|repeat|"
    "(replication|reflection)_pad[123]d|(unsafe_)?split(_with_sizes)?|(unsafe_)?chunk|unbind|stack|cat"
)
"""Operations that move, average or copy numbers: they are linear, and no weight is negative."""

_ADDING = re.compile("add|sub|rsub")
"""Sums and differences, also of tensors that are broadcast."""

_TRANSFORMS = re.compile(
    "_fft_(r2c|c2r|c2c)|view_as_(real|complex)|complex|_?conj|_conj_physical|resolve_(conj|neg)|real|imag|neg|"
    "clone|alias|_to_copy"
)
"""Linear operations with weights of both signs, and those that take complex numbers apart and put them together."""

_JOINING = re.compile("cat|stack")
"""Operations that put tensors side by side."""

_BILINEAR = re.compile("convolution|addmm|mm|bmm|baddbmm|matmul|linear|mul|div")
"""Operations that are linear in one input while the other is constant."""

_RULES: dict[str, AdjointRule] = {
    "convolution": _convolution,
    "relu": _relu,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _avg_pool,
    "mean": _mean,
    "sum": _mean,
    "cat": _cat,
    "add": _sum,
    "sub": _sum,
    "rsub": _sum,
    "mul": _product,
    "div": _product,
    "neg": _negative,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "local_response_norm": _local_response_norm,
    "clone": _identity,
    "alias": _identity,
    "detach": _detached,
    "_to_copy": _identity,
    "constant_pad_nd": _pad,
    "slice": _slice,
    "addmm": _matrix,
    "mm": _matrix,
    "_grouped_mm": _grouped_matrices,
}
