"""The operations of one forward pass, as calls of torch functions.

Autograd's graph and torch's dispatcher show what a pass executes after torch has chosen kernels, which differ between
machines, threads and versions. A `Program` holds what the model's code asks for: the functions that it calls, with
their constants, and which tensor goes where. What a model *is*, apart from its weights, follows from it: a changed
`forward`, an axis's meaning, dropout that is always on.
"""

from __future__ import annotations

import hashlib
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuits.call_points import is_uncounted, known_function, writes_in_place
from circuits.tensors import tensor_bytes


@dataclass(frozen=True)
class Value:
    """A tensor of the pass as it was at one moment: writing into it in place makes it another value.

    Attributes:
        number: in the order in which values appeared.
    """

    number: int


@dataclass(frozen=True)
class Operation:
    """One call of a torch function that made or changed a tensor.

    Attributes:
        name: the function's full name, e.g. `torch.nn.functional.conv2d`, `torch.Tensor.add`.
        args: its positional arguments, nested as they were, with a `Value` in the place of each tensor.
        kwargs: its keyword arguments, likewise.
        outputs: the values that it made; a tensor that it changed in place is one of them.
        running: the modules that were running, outermost first: the path of each, and which of its calls it was.
        autocast: the precision to which torch casts what it is given, if the model's code asks for that.
        function: the function itself.
        counted: whether the model's code called it, and not a hook.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    running: tuple[tuple[str, int], ...]
    autocast: str = ""
    function: Any = field(default=None, compare=False, repr=False)
    counted: bool = True

    @property
    def module(self) -> str:
        """The path of the innermost module that was running; empty where none of the model's parts was."""
        return self.running[-1][0] if self.running else ""

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The values among the arguments."""
        return tuple(v for v in _flat((self.args, self.kwargs)) if isinstance(v, Value))

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, whether it was passed by place or by name; `dim` may be called `axis`, as in numpy."""
        if place < len(self.args):
            return self.args[place]
        return self.kwargs.get(name, self.kwargs.get(name.replace("dim", "axis"), default))


@dataclass(frozen=True)
class Program:
    """What one forward pass does.

    Attributes:
        operations: in order of execution.
        sources: the values that no operation made: `input`, a parameter, buffer or plain tensor of a module by its
            name, `constant SHA256` for a tensor that belongs to no module, `unseen` for one that was made in a way
            that cannot be seen.
        shapes: each value's shape.
    """

    operations: tuple[Operation, ...] = ()
    sources: Mapping[Value, str] = field(default_factory=dict)
    shapes: Mapping[Value, tuple[int, ...]] = field(default_factory=dict)

    def following(self, source: str) -> set[Value]:
        """The values that depend on those of a source, such as `input`, with these themselves."""
        found = {value for value, name in self.sources.items() if name == source}
        for op in self.operations:
            if not found.isdisjoint(op.inputs):
                found.update(op.outputs)
        return found

    def describe(self) -> Iterator[str]:
        """One line a source and operation: the same wherever the same computation is traced.

        Devices are left out, since a computation is the same on each of them.
        """
        for value, source in self.sources.items():
            yield f"{value.number} = {source}"
        for op in self.operations:
            made = ",".join(str(value.number) for value in op.outputs)
            precision = f" in {op.autocast}" if op.autocast else ""
            yield f"{made} = {op.name} {_text(op.args)} {_text(dict(sorted(op.kwargs.items())))}{precision}"


_Watch = TypeVar("_Watch", bound="Watch")


class Watch(TorchFunctionMode):
    """A torch function mode that knows which module runs, in the thread that entered it.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._root = root
        self._stack: list[tuple[str, int, nn.Module]] = []
        self._calls: Counter[str] = Counter()
        self._handles: list[Any] = []
        self._thread = 0

    def __enter__(self: _Watch) -> _Watch:
        self._thread = threading.get_ident()
        try:
            for path, module in self._root.named_modules():
                entering = self._entering(path, module)
                self._handles.append(module.register_forward_pre_hook(entering, prepend=True))
                self._handles.append(module.register_forward_hook(self._leaving, always_call=True))
        except BaseException:
            self._let_go()
            raise
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._let_go()

    def _let_go(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def innermost(self) -> tuple[str, nn.Module]:
        """Its path and the module; the model itself where none of its modules runs."""
        if not self._stack:
            return "", self._root
        path, _, module = self._stack[-1]
        return path, module

    @property
    def running(self) -> tuple[tuple[str, int], ...]:
        """The path of each module that runs, outermost first, and which of its calls in the pass it is."""
        return tuple((path, call) for path, call, _ in self._stack)

    def _entering(self, path: str, module: nn.Module) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if threading.get_ident() == self._thread:  # another thread may run the same module
                self._stack.append((path, self._calls[path], module))
                self._calls[path] += 1

        return enter

    def _leaving(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            self._stack.pop()


class Recorder(Watch):
    """Records the `Program` of the forward pass that runs inside the block.

    Args:
        root: the model.
        examples: the tensors that the pass is given.
        before: the recorder of an earlier pass, if there was one. A tensor that no seen operation made is then known
            to be a constant if the earlier pass met it too; else it was made in a way that cannot be seen (a compiled
            function, numpy) and differs from pass to pass.
    """

    def __init__(
        self, root: nn.Module, examples: Sequence[Tensor], before: Recorder | None = None
    ) -> None:
        super().__init__(root)
        self._before = before
        self._operations: list[Operation] = []
        self._sources: dict[Value, str] = {}
        self._shapes: dict[Value, tuple[int, ...]] = {}
        self.constants: dict[Value, Tensor] = {}
        """The tensors that no operation of the pass made, other than the input."""
        # Tensors are known by their `id`, which Python gives to another once one is freed: the reference tells. Weak,
        # so that the pass needs no more memory than without a recorder.
        self._values: dict[int, tuple[Value, weakref.ref[Tensor]]] = {}
        # These are kept alive: a module may replace one of its tensors during the pass, whose `id` is then free.
        self._own = [*own_tensors(root).items(), *(("input", tensor) for tensor in examples)]
        kept = {id(tensor) for tensor in root.state_dict(keep_vars=True).values()}
        # What is not kept with the weights is known by its bytes as the pass met them: a module may let such a tensor
        # grow later (the angles of rotary positions for longer texts) and be the same model.
        self._names = {
            id(tensor): name
            if name == "input" or id(tensor) in kept
            else f"{name} {tensor_digest(tensor)}"
            for name, tensor in self._own
        }
        # Numbers that the model's code reads off tensors differ by rounding from machine to machine.
        self._read: set[float] = set()

    @property
    def program(self) -> Program:
        """What has been recorded so far."""
        return Program(tuple(self._operations), dict(self._sources), dict(self._shapes))

    def value(self, tensor: Tensor) -> Value | None:
        """The value that a tensor holds now; None if no operation of the pass has met it."""
        value, known = self._values.get(id(tensor), (None, None))
        return value if known is not None and known() is tensor else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, inside = known_function(func)
        if inside is not None:
            # Not `with self`, which would watch the modules a second time.
            TorchFunctionMode.__enter__(self)
            try:
                return inside(*args, **kwargs)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)
        # Arguments are looked up before the call: afterwards a tensor that was written in place is another value.
        given, named = self._referred(args), self._referred(kwargs)
        output = func(*args, **kwargs)
        if name.rpartition(".")[2] in ("item", "tolist", "__float__"):
            self._read.update(leaf for leaf in _flat(output) if isinstance(leaf, float))
        made = [leaf for leaf in _flat(output) if isinstance(leaf, Tensor)]
        if writes_in_place(name) and not made:  # `x[0] = y` returns nothing
            made = [leaf for leaf in _flat(args[:1]) if isinstance(leaf, Tensor)]
        if made:  # else it was asked for a shape, say
            outputs = tuple(self._new(tensor) for tensor in made)
            self._operations.append(
                Operation(
                    name, given, named, outputs, self.running, _autocast(), func, not is_uncounted()
                )
            )
        return output

    def _new(self, tensor: Tensor) -> Value:
        value = Value(len(self._shapes))
        self._values[id(tensor)] = value, weakref.ref(tensor)
        self._shapes[value] = tuple(tensor.shape)
        return value

    def _referred(self, given: Any) -> Any:
        """Arguments with a `Value` in the place of each tensor."""
        if isinstance(given, Tensor):
            known = self.value(given)
            if known is None:
                known = self._new(given)
                name = self._names.get(id(given))
                self._sources[known] = self._unnamed(given) if name is None else name
                if name != "input":
                    self.constants[known] = given
            return known
        if isinstance(given, Mapping):
            return {key: self._referred(item) for key, item in given.items()}
        if isinstance(given, list | tuple) and not isinstance(given, torch.Size):
            # `x[[0, 0]]` and `x[0, 0]` are two things.
            items = [self._referred(item) for item in given]
            return items if isinstance(given, list) else tuple(items)
        if isinstance(given, float) and given in self._read:
            return "a number read off a tensor"
        return given

    def _unnamed(self, given: Tensor) -> str:
        constant = self._before is not None and self._before.value(given) is not None
        return f"constant {tensor_digest(given)}" if constant else "unseen"


DEVICES = ("cpu", "cuda", "mps", "xpu")


def _autocast() -> str:
    """The precision of `torch.autocast`, where it is on."""
    found = [torch.get_autocast_dtype(kind) for kind in DEVICES if torch.is_autocast_enabled(kind)]
    return ", ".join(map(str, found))


def unsteady(program: Program) -> Iterator[str]:
    """What makes the numbers of a pass differ from run to run, or depend on the other examples of a batch."""
    following = program.following("input")
    for op in program.operations:
        name = op.name.rpartition(".")[2]
        where = f" in {op.module}" if op.module else ""
        if name in _DROPS:
            if op.argument(1, "p", 0.5) and op.argument(
                2, "training", op.kwargs.get("train", True)
            ):
                yield f"{name}{where} is on in evaluation mode"
        elif name == "scaled_dot_product_attention" and op.argument(4, "dropout_p", 0.0):
            yield f"dropout of attention{where} is on in evaluation mode"
        elif name in _DRAWS:
            yield f"{name}{where} draws random numbers"
        elif name == "batch_norm":
            # `torch.batch_norm` has weight and bias before the statistics.
            place = 3 if op.name == "torch.batch_norm" else 1
            own = op.argument(place, "running_mean") is None or op.argument(5, "training", False)
            if own and op.inputs[0] in following:  # else weights are standardised
                yield f"{name}{where} normalises by the batch's own statistics"


_DROPS = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "dropout_",
}
_DRAWS = {
    "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "bernoulli", "bernoulli_",
    "multinomial", "normal", "normal_", "uniform_", "exponential_", "poisson", "gumbel_softmax",
}  # fmt: skip


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, buffers and plain tensors among a model's attributes, by name; each tensor once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, part in module.named_modules():
        for kept in (part._parameters, part._buffers, vars(part)):
            for name, tensor in kept.items():
                if isinstance(tensor, Tensor):
                    found.setdefault(id(tensor), (f"{path}.{name}".lstrip("."), tensor))
    return dict(found.values())


def _flat(nested: Any) -> Iterator[Any]:
    if isinstance(nested, Mapping):
        for item in nested.values():
            yield from _flat(item)
    elif isinstance(nested, list | tuple):
        for item in nested:
            yield from _flat(item)
    else:
        yield nested


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:[0-9]+)?")


def _text(argument: Any) -> str:
    """An argument in words that do not depend on the machine."""
    match argument:
        case Value():
            return f"%{argument.number}"
        case torch.device():
            return "device"
        case str() if _DEVICE.fullmatch(argument):
            return "device"
        case dict():
            return "{" + ",".join(f"{key}:{_text(item)}" for key, item in argument.items()) + "}"
        case list():
            return "[" + ",".join(map(_text, argument)) + "]"
        case tuple():
            return "(" + ",".join(map(_text, argument)) + ")"
        case slice():
            return f"{_text(argument.start)}:{_text(argument.stop)}:{_text(argument.step)}"
        case np.ndarray():
            content = hashlib.sha256(argument.tobytes()).hexdigest()
            return f"array {argument.dtype} {argument.shape} {content}"
        case None | bool() | int() | float() | complex() | str() | torch.dtype():
            return repr(argument)
        case partial():
            return f"{_text(argument.func)} {_text(argument.args)} {_text(argument.keywords)}"
        case FunctionType():
            return f"{argument.__qualname__} {_code(argument)}"
        case _ if callable(argument):
            return getattr(argument, "__qualname__", type(argument).__qualname__)
        case _:
            return (
                f"{type(argument).__qualname__} {argument}"
                if _plain(argument)
                else type(argument).__qualname__
            )


def _code(function: FunctionType) -> str:
    """SHA-256 over what a function of Python computes: its code, constants, defaults and the variables it closes over.

    Such code differs between versions of Python, unlike all else that describes a program.
    """
    digest = hashlib.sha256()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        constants = [_text(c) for c in code.co_consts if not isinstance(c, CodeType)]
        digest.update(code.co_code)
        digest.update(f"{constants} {code.co_names}".encode())
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    bound = [tensor_digest(c) if isinstance(c, Tensor) else _text(c) for c in cells]
    digest.update(f"{bound} {_text(function.__defaults__)}".encode())
    return digest.hexdigest()


def _plain(argument: Any) -> bool:
    """Whether an argument's text says what it is, and holds no address in memory."""
    return isinstance(argument, torch.memory_format | torch.layout | np.generic) or argument is ...
