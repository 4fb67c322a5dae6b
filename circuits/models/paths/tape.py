"""A tape of the operations between two sites, through which gradients are pulled back.

Autograd computes the gradient of one output at a time, on whole maps. A tape pulls back the gradients of many units
at once, and of each map only the window that is not zero, which is a unit's receptive field. The rules for single
operations are in `circuits.models.paths.adjoints`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from circuits.models.paths.adjoints import Call, Paths, Pull, Window, adjoint

Gates = Literal["linear", "gradient"]
"""How nonlinearities are treated: `linear` replaces activation functions by the identity, a maximum by an average
and local response normalisation by its derivative at zero; `gradient` takes the derivative of each at the
activations of the pass."""


class Tape:
    """Records the operations of a forward pass from one tensor (`start`) to another (`end`).

    Enter it around the pass (without edits that write in place to shared memory), and call `start` and `end` with
    the two tensors when the pass reaches them.

    Args:
        gates: how nonlinearities are treated.
    """

    def __init__(self, gates: Gates) -> None:
        self.gates: Gates = gates
        self._operations: list[tuple[int, tuple[int, ...], Pull]] = []
        # Tensors are known by their `id`. They are kept alive, since Python gives the id of a freed one to the next.
        self._tracked: dict[int, Tensor] = {}
        # For memory that was written to in place: the tensors in it that were made since. An older view of the same
        # memory has changed without an operation that the tape could see.
        self._written: dict[int, set[int]] = {}
        # Tensors that the model computes from its input, but not from the start.
        self._given: dict[int, Tensor] = {}
        self._first = self._last = 0
        self._modes = (_Composites(self), _Operations(self))
        self.shape: tuple[int, ...] = ()

    def __enter__(self) -> Tape:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, traceback)

    def start(self, value: Tensor) -> Tensor:
        """Start recording: the pass must continue with the tensor that this returns."""
        # A copy with an id of its own: the model may hold the tensor elsewhere, where it is not the start.
        own = value.clone()
        self._first = self._track(own)
        return own

    def given(self, value: Tensor) -> Tensor:
        """Mark the model's input: with linear gates nothing may be multiplied by what is computed from it alone."""
        self._given[id(value)] = value
        return value

    def end(self, value: Tensor) -> Tensor:
        """Mark the tensor from which gradients will be pulled back."""
        self._last = id(value)
        self.shape = tuple(value.shape)
        return value

    @property
    def connected(self) -> bool:
        """Whether the end depends on the start."""
        return self._last in self._tracked

    def pull(self, gradient: Window, paths: Paths = "all") -> Window | None:
        """Turn gradients by the end into gradients by the start; None if they are zero everywhere.

        Args:
            gradient: the gradients of any numbers (rows) by the tensor at the end.
            paths: `all` adds up the weights of all paths; `absolute` their absolute values.

        Raises:
            ValueError: if gates are linear and an operation in between has no linear replacement.
        """
        with torch.no_grad():
            return self._pull(gradient, paths)

    def _pull(self, gradient: Window, paths: Paths) -> Window | None:
        # Backpropagation: in reverse order of execution, a tensor's gradient is complete, since all operations that
        # read it have added to it, before it is popped and pulled through the operation that made it.
        found: dict[int, Window] = {self._last: gradient}
        for output, inputs, pull in reversed(self._operations):
            here = found.pop(output, None)
            if here is None:
                continue
            for key, window in zip(inputs, pull(here, paths), strict=True):
                if window is not None and window.value.numel():
                    there = found.get(key)
                    found[key] = window if there is None else there.plus(window)
        return found.get(self._first)

    def note(self, call: Call) -> None:
        """Record the call of an operation."""
        inputs = tuple(id(value) for value in call.dependents)
        self._operations.append((self._track(call.output), inputs, adjoint(call)))
        # Views share memory: a write through one changes what all others hold.
        memory = call.output.untyped_storage().data_ptr()
        if call.mutates:
            self._written[memory] = {id(call.output)}
        elif memory in self._written:
            self._written[memory].add(id(call.output))

    def dependents(self, values: Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
        """The tensors among these that depend on the start.

        Raises:
            ValueError: if one shares memory with a tensor that was written to in place since.
        """
        for value in values:
            shown = self._written.get(value.untyped_storage().data_ptr())
            if shown is not None and id(value) not in shown:
                raise ValueError(
                    f"operation {name} reads a tensor of which a part was changed in place: "
                    "weights cannot be expanded through it"
                )
        return tuple(value for value in values if id(value) in self._tracked)

    def varies(self, values: Sequence[Tensor]) -> bool:
        """Whether one of these tensors depends on the model's input, but not on the start."""
        return any(id(v) in self._given and id(v) not in self._tracked for v in values)

    def _track(self, value: Tensor) -> int:
        self._tracked[id(value)] = value
        return id(value)


class _Composites(TorchFunctionMode):
    """Intercepts torch functions that have one rule here but consist of many operations of torch."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad:
            names = ("input", "pad", "mode")
            values = {"mode": "constant"} | dict(zip(names, args, strict=False)) | kwargs
            if values["mode"] == "circular" and self.tape.dependents([values["input"]], "pad"):
                return _wrapped_around(values["input"], values["pad"])
        if func is F.local_response_norm:
            names = ("input", "size", "alpha", "beta", "k")
            values = {"alpha": 1e-4, "beta": 0.75, "k": 1.0}
            return self._whole(
                func, args, kwargs, values | dict(zip(names, args, strict=False)) | kwargs
            )
        if func in RECURRENT and not kwargs:
            return self._whole(func, args, kwargs, {f"argument {i}": v for i, v in enumerate(args)})
        return func(*args, **kwargs)

    def _whole(self, func: Any, args: Any, kwargs: Any, values: dict[str, Any]) -> Any:
        """Call a function whose parts are not recorded: the whole has a rule."""
        operations = self.tape._modes[1]
        operations.silent = True
        try:
            output = func(*args, **kwargs)
            found = self.tape.dependents(_tensors(values.values()), func.__name__)
            sources = tuple(k for k, v in values.items() if self.tape.dependents(_tensors([v]), ""))
            linear = self.tape.gates == "linear"
            for place, tensor in enumerate(_tensors([output]) if found else []):
                call = Call(
                    func, values, tensor, found, sources, linear, result=output, place=place
                )
                self.tape.note(call)
        finally:
            operations.silent = False
        return output


RECURRENT = (
    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
    torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell,
)  # fmt: skip
"""Functions that write into parts of tensors."""


def _wrapped_around(x: Tensor, pad: Sequence[int]) -> Tensor:
    """Circular padding as a concatenation: torch writes it into parts of a new tensor, in place."""
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = x.ndim - 1 - i  # listed from the last axis backwards
        x = x.narrow(dim, max(0, -before), x.shape[dim] + min(0, before) + min(0, after))
        n = x.shape[dim]
        ends = [(n - before, before), (0, n), (0, after)]
        x = torch.cat([x.narrow(dim, start, length) for start, length in ends if length > 0], dim)
    return x


class _Operations(TorchDispatchMode):
    """Intercepts every operation that torch executes."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.silent = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.silent:
            return func(*args, **kwargs)
        schema = func._schema
        values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        values |= dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        found = self.tape.dependents(_tensors(values.values()), str(func))
        if not found:
            output = func(*args, **kwargs)
            if self.tape.varies(_tensors(values.values())):
                for tensor in _tensors([output]):
                    self.tape.given(tensor)
            return output
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        linear = self.tape.gates == "linear"
        sources = tuple(k for k, v in values.items() if self.tape.dependents(_tensors([v]), ""))
        # Not every operation that writes to an argument is an in-place form (`out=`, batch norm's statistics).
        in_place = bool(written) and func.overloadpacket.__name__.endswith("_")
        varies = linear and self.tape.varies(_tensors(values.values()))
        call = Call(func, values, found[0], found, sources, linear, in_place, varies)
        call = call.with_copies()  # before the operation overwrites an argument
        output = func(*args, **kwargs)
        made = [values[written[0]]] if in_place else _tensors([output])
        self.silent = True  # what a rule computes is not part of the pass
        try:
            for place, tensor in enumerate(made):
                if tensor.is_floating_point() or tensor.is_complex():
                    self.tape.note(call.with_output(tensor, output, place))
        finally:
            self.silent = False
        return output


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def one_hot(
    shape: Sequence[int],
    unit_axis: int,
    units: Sequence[int],
    at: Sequence[int],
    device: torch.device,
) -> Window:
    """The gradients of some units' own values at one position: for each unit a row with a one there, in each example.

    Args:
        shape: the shape of the tensor, batch first.
        unit_axis: the axis of its units.
        units: the units.
        at: the position along the other axes.
        device: the device of the gradients.
    """
    # The box spans all units that are asked for, so that one pull serves all of them.
    first, last = min(units), max(units)
    places = iter(at)
    start = [0, *(first if axis == unit_axis else next(places) for axis in range(1, len(shape)))]
    size = [
        shape[0],
        *(last - first + 1 if axis == unit_axis else 1 for axis in range(1, len(shape))),
    ]
    value = torch.zeros(len(units), *size, dtype=torch.float64, device=device)
    for row, unit in enumerate(units):
        value[row].select(unit_axis, unit - first).fill_(1)
    return Window(value, tuple(start))
