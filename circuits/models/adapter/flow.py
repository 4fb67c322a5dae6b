"""What leads where in the recorded operations of a pass: products, what lies between two values, and replaying it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from circuits.call_points import Address, writes_in_place
from circuits.models.adapter.program import Operation, Program, Value


def short_name(op: Operation) -> str:
    """A function's own name: `matmul` for `torch.Tensor.matmul`, `T` for the property."""
    return op.name.removesuffix(".__get__").rpartition(".")[2]


def limits_of(op: Operation) -> tuple[float | None, float | None] | None:
    """The smallest and largest number that a function puts out which leaves the numbers in between as they are.

    None for functions that change the numbers in between, or have other inputs than one tensor.
    """
    name = short_name(op).removesuffix("_")
    if len(op.inputs) != 1:
        return None
    if name in ("relu", "relu6"):
        return 0.0, 6.0 if name == "relu6" else None
    if name in ("contiguous", "clone", "identity", "dropout", "dropout2d", "feature_dropout"):
        return None if op.argument(2, "training", False) else (None, None)
    if name == "hardtanh":
        low, high = op.argument(1, "min_val", -1.0), op.argument(2, "max_val", 1.0)
    elif name in ("clamp", "clip"):
        low, high = op.argument(1, "min"), op.argument(2, "max")
    elif name == "clamp_max":
        low, high = None, op.argument(1, "max")
    else:
        return None
    if not isinstance(high, int | float | None) or not isinstance(low, int | float | None):
        return None
    return None if low is None else float(low), None if high is None else float(high)


@dataclass(frozen=True)
class Product:
    """A sum of products over axes that two tensors share, such as a matrix product, as an einsum.

    Attributes:
        left, right: the two factors.
        left_axes, right_axes, made_axes: a letter for each of their axes and of the result's.
    """

    left: Value
    right: Value
    left_axes: str
    right_axes: str
    made_axes: str

    @property
    def summed(self) -> str:
        """The letters that are summed over."""
        return "".join(
            a for a in self.left_axes if a in self.right_axes and a not in self.made_axes
        )

    def axes_of(self, value: Value) -> str:
        """The letters of one of the factors."""
        return self.left_axes if value == self.left else self.right_axes


def product_of(op: Operation, shapes: Mapping[Value, tuple[int, ...]]) -> Product | None:
    """An operation as a product of two tensors; None if it is none."""
    name = short_name(op)
    if name == "einsum":
        return _einsum(op, shapes)
    if name not in _PRODUCTS:
        return None
    first, names = _PRODUCTS[name]
    left, right = (op.argument(first + n, key) for n, key in enumerate(names))
    if name == "__rmatmul__":
        left, right = right, left
    if not isinstance(left, Value) or not isinstance(right, Value):
        return None
    return _letters(name, left, right, shapes)


_PRODUCTS = {
    "matmul": (0, ("input", "other")), "__matmul__": (0, ("", "other")), "__rmatmul__": (0, ("", "other")),
    "bmm": (0, ("input", "mat2")), "mm": (0, ("input", "mat2")), "linear": (0, ("input", "weight")),
    "baddbmm": (1, ("batch1", "batch2")), "addmm": (1, ("mat1", "mat2")), "conv1d": (0, ("input", "weight")),
    "conv2d": (0, ("input", "weight")), "conv3d": (0, ("input", "weight")),
}  # fmt: skip
"""Products of two tensors: which argument is the first factor, and how both are called."""


def _letters(
    name: str, left: Value, right: Value, shapes: Mapping[Value, tuple[int, ...]]
) -> Product | None:
    n, m = len(shapes[left]), len(shapes[right])
    if name == "linear":
        lead = "abcdefg"[: n - 1]
        return Product(left, right, f"{lead}x", "yx"[2 - m :], f"{lead}{'y' * (m > 1)}")
    if name.startswith("conv"):
        # Pointwise convolutions only.
        if any(size != 1 for size in shapes[right][2:]):
            return None
        lead = "pqr"[: n - 2]
        return Product(left, right, f"bx{lead}", f"yx{'uvw'[: m - 2]}", f"by{lead}")
    if n < 2 or m < 2:
        return None
    lead = "abcdefgh"[: max(n, m) - 2]
    own = lead[len(lead) - (n - 2) :], lead[len(lead) - (m - 2) :]
    return Product(left, right, f"{own[0]}xy", f"{own[1]}yz", f"{lead}xz")


def _einsum(op: Operation, shapes: Mapping[Value, tuple[int, ...]]) -> Product | None:
    found = spelled_einsum(op, shapes)
    if found is None or len(op.inputs) != 2:
        return None
    (left, right), made = found
    return Product(*op.inputs, left, right, made)


def spelled_einsum(
    op: Operation, shapes: Mapping[Value, tuple[int, ...]]
) -> tuple[list[str], str] | None:
    """The letters of the axes that an einsum is given and makes, with letters in the place of `...`.

    None if its equation has no arrow, or is none of one text.
    """
    equation = op.args[0] if op.args else op.kwargs.get("equation")
    if not isinstance(equation, str) or "->" not in equation:
        return None
    given, _, made = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    if len(parts) != len(op.inputs):
        return None
    # As many axes as are left, counted from the last; letters that the equation has not.
    free = "".join(a for a in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if a not in equation)
    dots = [
        free[len(free) - (len(shapes[value]) - len(part) + 3) :] if "..." in part else ""
        for part, value in zip(parts, op.inputs, strict=True)
    ]
    letters = [part.replace("...", own) for part, own in zip(parts, dots, strict=True)]
    return letters, made.replace("...", max(dots, key=len))


SHAPE_ONLY = {
    "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like", "full_like",
    "empty_like", "rand_like", "randn_like",
}  # fmt: skip
"""Functions that take a tensor for its shape or device alone."""

_LAYOUT = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "squeeze", "unsqueeze", "expand",
    "movedim", "moveaxis", "swapaxes", "swapdims", "chunk", "split", "tensor_split", "split_with_sizes", "unbind",
    "__getitem__", "select", "narrow", "repeat_interleave", "repeat", "tile", "expand_as", "clone", "T", "mT", "t", "H",
    "mH", "adjoint", "view_as", "reshape_as", "roll", "flip", "cat", "concat", "concatenate", "stack", "index_select",
}  # fmt: skip
"""Functions that move numbers and do not change them."""

_VIEWS = _LAYOUT - {
    "repeat_interleave", "repeat", "tile", "clone", "roll", "flip", "cat", "concat", "concatenate", "stack",
    "index_select",
}  # fmt: skip
"""Those whose output may be a part of what they are given."""


ORDERS = {
    "view", "reshape", "transpose", "permute", "contiguous", "squeeze", "unsqueeze", "movedim", "moveaxis", "swapaxes",
    "flatten", "unflatten",
}  # fmt: skip
"""Functions that move the axes of examples and positions."""


def moves(op: Operation) -> bool:
    """Whether an operation moves or repeats numbers and does not change them."""
    return short_name(op) in _LAYOUT


@dataclass(frozen=True)
class Flow:
    """A program as a graph.

    Attributes:
        program: the operations of a pass.
    """

    program: Program

    @cached_property
    def made_by(self) -> dict[Value, int]:
        """Which operation made each value."""
        return {v: i for i, op in enumerate(self.program.operations) for v in op.outputs}

    @cached_property
    def taken_by(self) -> dict[Value, list[int]]:
        """The operations that take each value."""
        found: dict[Value, list[int]] = {}
        for i, op in enumerate(self.program.operations):
            for value in dict.fromkeys(op.inputs):
                found.setdefault(value, []).append(i)
        return found

    @cached_property
    def dependent(self) -> set[Value]:
        """The values that depend on the model's input, other than by its shape."""
        found = {value for value, name in self.program.sources.items() if name == "input"}
        for op in self.program.operations:
            if short_name(op) not in SHAPE_ONLY and not found.isdisjoint(op.inputs):
                found.update(op.outputs)
                if writes_in_place(op.name) and op.inputs:
                    found.add(self._whole(op.inputs[0]))
        return found

    @cached_property
    def _views(self) -> dict[Value, Value]:
        """For each value that may be a part of another's memory, that other one."""
        return {
            made: op.inputs[0]
            for op in self.program.operations
            if short_name(op) in _VIEWS and op.inputs
            for made in op.outputs
        }

    def _whole(self, value: Value) -> Value:
        """The value of whose memory another is a part."""
        while value in self._views:
            value = self._views[value]
        return value

    @cached_property
    def _writers(self) -> dict[Value, list[int]]:
        """The operations that write into a part of each value."""
        found: dict[Value, list[int]] = {}
        for i, op in enumerate(self.program.operations):
            if writes_in_place(op.name) and op.inputs and op.inputs[0] in self._views:
                found.setdefault(self._whole(op.inputs[0]), []).append(i)
        return found

    @cached_property
    def _overwritten(self) -> set[Value]:
        """The values into which, or into a part of which, an operation writes."""
        return {
            self._whole(op.inputs[0])
            for op in self.program.operations
            if writes_in_place(op.name) and op.inputs
        }

    def overwritten(self, value: Value) -> bool:
        """Whether an operation writes into the memory of a value."""
        return self._whole(value) in self._overwritten

    @cached_property
    def _numbers(self) -> dict[tuple[int, int], int]:
        """For each operation and each depth of the modules around it, which call of its function it is there."""
        seen: dict[tuple[Any, ...], int] = {}
        found = {}
        for i, op in enumerate(self.program.operations):
            if op.counted:
                for depth in range(len(op.running) + 1):
                    key = (op.running[:depth], op.name)
                    found[i, depth] = seen.get(key, 0)
                    seen[key] = found[i, depth] + 1
        return found

    @cached_property
    def calls(self) -> dict[str, int]:
        """Every call of a function by what a person calls it: `MODULE/FUNCTION@NUMBER`.

        Numbers count the calls of functions of that name while the module runs; `MODULE@1` is its second call. Without
        `MODULE/` no part of the model runs.
        """
        seen: Counter[tuple[Any, ...]] = Counter()
        found = {}
        for i, op in enumerate(self.program.operations):
            if not op.counted:
                continue
            name = short_name(op)
            for depth in range(len(op.running)):
                seen[op.running[: depth + 1], name] += 1
            path, call = op.running[-1] if op.running else ("", 0)
            where = f"{path}@{call}" if call else path
            number = seen[op.running, name] - 1 if op.running else seen[(), name]
            found[f"{where}/{name}@{number}".lstrip("/")] = i
        return found

    def called(self, i: int) -> str:
        """What a person calls a call of a function (see `calls`)."""
        return self._called[i]

    @cached_property
    def _called(self) -> dict[int, str]:
        return {i: name for name, i in self.calls.items()}

    def shape(self, value: Value) -> tuple[int, ...]:
        """A value's shape."""
        return self.program.shapes[value]

    def operation(self, value: Value) -> Operation | None:
        """The operation that made a value; None for a source."""
        i = self.made_by.get(value)
        return None if i is None else self.program.operations[i]

    def product(self, i: int) -> Product | None:
        """An operation as a product of two tensors."""
        return product_of(self.program.operations[i], self.program.shapes)

    def address(self, i: int, depth: int, **part: Any) -> Address:
        """The address of a part of an operation, counted in the module at a depth of those around it (0: the model)."""
        op = self.program.operations[i]
        scope, call = op.running[depth - 1] if depth else ("", 0)
        return Address(scope, call, op.name, self._numbers[i, depth], **part)

    def address_of(self, value: Value) -> Address | None:
        """The address of a value where it is made; None for a source, or what is written into part of another."""
        i = self.made_by.get(value)
        if i is None:
            return None
        op = self.program.operations[i]
        if short_name(op) == "__setitem__" or not op.counted:
            return None
        return self.address(i, len(op.running), place=op.outputs.index(value))

    def argument_address(self, i: int, value: Value) -> Address | None:
        """The address of a value where an operation takes it; None if it is no argument of its own."""
        op = self.program.operations[i]
        depth = len(op.running)
        for place, given in enumerate(op.args):
            if given == value:
                return self.address(i, depth, part="argument", place=place)
            if isinstance(given, list | tuple) and value in given:
                item = given.index(value)
                return self.address(i, depth, part="argument", place=place, item=item)
        for key, given in op.kwargs.items():
            if given == value:
                return self.address(i, depth, part="argument", key=key)
        return None

    def before(self, value: Value, stop: Callable[[int], bool]) -> Iterator[int]:
        """The operations that lead to a value, nearest first; not past those at which `stop` is true."""
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            given = waiting.pop(0)
            made = self.made_by.get(given)
            for i in [*([] if made is None else [made]), *self._writers.get(given, [])]:
                if i in seen:
                    continue
                seen.add(i)
                yield i
                if not stop(i):
                    inputs = self.program.operations[i].inputs
                    waiting += [v for v in dict.fromkeys(inputs) if v in self.dependent]

    def between(self, start: Value, end: Value) -> list[int]:
        """The operations on the ways from one value to another, in order."""
        forward = {start}
        own = []
        last = self.made_by.get(end, -1)
        for i in range(self.made_by.get(start, -1) + 1, last + 1):
            op = self.program.operations[i]
            if not forward.isdisjoint(op.inputs):
                forward.update(op.outputs)
                own.append(i)
        wanted, found = {end}, []
        for i in reversed(own):
            op = self.program.operations[i]
            if not wanted.isdisjoint(op.outputs):
                wanted.update(op.inputs)
                found.append(i)
        return found[::-1]

    def moved(self, start: Value, end: Value) -> Tensor | None:
        """Where each number of a value comes from in an earlier one, as its place in the flattened earlier value.

        What returns a tensor of the same shape counts as leaving numbers where they are, norms too. None if numbers are
        mixed on the way by anything that changes the shape.
        """
        shape = self.shape(start)
        held = {start: torch.arange(math.prod(shape)).reshape(shape)}
        for i in self.between(start, end):
            op = self.program.operations[i]
            if not held.keys().isdisjoint(op.inputs):
                held.update(zip(op.outputs, self._moved(op, held), strict=False))
        return held.get(end)

    def _moved(self, op: Operation, held: Mapping[Value, Tensor]) -> Sequence[Tensor]:
        """What an operation makes of places; nothing if it mixes numbers."""
        shape = self.shape(op.outputs[0])
        known = [held[v] for v in op.inputs if v in held]
        if short_name(op) in _LAYOUT:
            # A cache that is still empty.
            none = {
                v: torch.zeros(self.shape(v), dtype=torch.long)
                for v in op.inputs
                if 0 in self.shape(v)
            }
            held = {**none, **held}
            try:
                args, kwargs = (substituted(given, held) for given in (op.args, op.kwargs))
                made = op.function(*args, **kwargs)
            except (TypeError, ValueError, RuntimeError, LookupError):
                return []
            return list(made) if isinstance(made, tuple | list) else [made]
        return [each for each in known if tuple(each.shape) == shape][:1]

    def step(self, start: Value, end: Value) -> list[int] | None:
        """For each axis of a value, which axis of an earlier one it runs along; -1 for none, or several at once."""
        if start == end:
            return list(range(len(self.shape(start))))
        index = self.moved(start, end)
        if index is None:
            return None
        shape = self.shape(start)
        if index.shape == shape and torch.equal(index.flatten(), torch.arange(index.numel())):
            return list(range(len(shape)))
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        found = []
        for axis, size in enumerate(index.shape):
            here = -1
            if size > 1:
                steps = index.narrow(axis, 1, size - 1) - index.narrow(axis, 0, size - 1)
                same = {s: i for i, s in enumerate(strides) if shape[i] == size}
                first = int(steps.flatten()[0])
                if bool((steps == first).all()):
                    here = same.get(first, -1)
            found.append(here)
        return found


def substituted(given: Any, held: Mapping[Value, Tensor]) -> Any:
    """Arguments with tensors in the place of values.

    Raises:
        LookupError: if one is not held.
    """
    if isinstance(given, Value):
        return held[given]
    if isinstance(given, Mapping):
        return {key: substituted(item, held) for key, item in given.items()}
    if isinstance(given, list | tuple) and not isinstance(given, torch.Size):
        items = [substituted(item, held) for item in given]
        return items if isinstance(given, list) else tuple(items)
    return given
