"""Hook points inside a model's functions: tensors that no module returns can be read and changed as well.
A `CallPoint` stands for one tensor of one call of a torch function: its output, one of its arguments, or the scores
and the pattern that a fused attention kernel never shows. It is an identity module, so that the hooks of
`circuits.hooks` work on it as on every other module. Calls are counted while a module of the model runs, its scope:
"the second `matmul` during the first call of `blocks.3.attn`".

Nothing is watched, and nothing costs time, unless a point of the scope has a hook (`watching`).
"""

from __future__ import annotations

import math
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

Part = Literal["output", "argument", "scores", "pattern"]
"""What of a call a point stands for; scores and pattern are those of `scaled_dot_product_attention`."""


@dataclass(frozen=True)
class Address:
    """Which tensor of which call.

    Attributes:
        scope: the path of the module while which calls are counted; empty for the whole model.
        call: which call of that module within one pass, from 0.
        function: the function's full name, as `function_name` gives it.
        number: which of the calls of this function during that call of the scope, from 0.
        part: what of the call.
        place: the number of the argument, or of the output if there are several.
        key: the name of the argument, if it was passed by name.
        item: its number in the list that was passed, if it was passed in one.
    """

    scope: str
    call: int
    function: str
    number: int
    part: Part = "output"
    place: int = 0
    key: str = ""
    item: int | None = None


class CallPoint(nn.Module):
    """Returns its input: the place of a tensor that a torch function takes or gives.

    Args:
        address: where it is.
        scope: the calls that are watched.
    """

    def __init__(self, address: Address, scope: Scope) -> None:
        super().__init__()
        self.address, self.scope = address, scope

    def forward(self, value: Tensor) -> Tensor:
        return value

    @property
    def watched(self) -> bool:
        """Whether a hook reads or changes the tensor; one of a part of the model may say that it does not."""
        return any(_does(hook) for hook in self._forward_hooks.values())

    @property
    def is_last(self) -> bool:
        """Whether its hooks are a part of the model, which others are to see as it was before them."""
        return any(hasattr(_owner(hook), "watched") for hook in self._forward_hooks.values())


class Echo:
    """The same tensor where another call takes it: whatever the hooks of a point do, they do there too.

    Args:
        address: where it is.
        point: the point.
    """

    def __init__(self, address: Address, point: CallPoint) -> None:
        self.address, self._point = address, point

    def __call__(self, value: Tensor) -> Tensor:
        return self._point(value)

    @property
    def watched(self) -> bool:
        """Whether a hook reads or changes the tensor."""
        return self._point.watched

    @property
    def is_last(self) -> bool:
        """See `CallPoint.is_last`."""
        return self._point.is_last


def _owner(hook: Callable[..., Any]) -> Any:
    return getattr(hook, "__self__", None)


def _does(hook: Callable[..., Any]) -> bool:
    return getattr(_owner(hook), "watched", True)


class _Silence(threading.local):
    """Whether functions are called by hooks, in a thread, and not by the model."""

    depth = 0


_SILENCE = _Silence()


@contextmanager
def uncounted() -> Iterator[None]:
    """Do not count the functions that are called inside the block: the model has not called them."""
    _SILENCE.depth += 1
    try:
        yield
    finally:
        _SILENCE.depth -= 1


def is_uncounted() -> bool:
    """Whether the functions that this thread calls now are a hook's."""
    return _SILENCE.depth > 0


class Scope:
    """The calls of torch functions while a module runs, and the points among them.

    Args:
        module: the module; the model itself for what no other module encloses.
        root: the model.
    """

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        self.module, self.root = module, root
        self.points: list[CallPoint | Echo] = []
        self._users = 0
        self._handles: list[Any] = []
        self._calls = 0
        self._running: list[_Calls | None] = []

    def point(self, address: Address, also: Sequence[Address] = ()) -> CallPoint:
        """The point at an address, one for each; with `also`, a point of its own at all of these addresses."""
        for known in self.points:
            if known.address == address and isinstance(known, CallPoint) and not also:
                return known
        made = CallPoint(address, self)
        self.points += [made, *(Echo(other, made) for other in also)]
        return made

    def watch(self) -> None:
        """Let hooks on the points of this scope see their tensors, until `unwatch` was called as often."""
        self._users += 1
        if self._users > 1:
            return
        self._handles = [
            self.root.register_forward_pre_hook(self._begin, prepend=True),
            self.module.register_forward_pre_hook(self._enter),
            self.module.register_forward_hook(self._leave, always_call=True),
        ]

    def unwatch(self) -> None:
        """Undo one `watch`."""
        self._users -= 1
        if not self._users:
            while self._handles:
                self._handles.pop().remove()

    def _begin(self, *_: Any) -> None:
        self._calls = 0

    def _enter(self, *_: Any) -> None:
        own = [p for p in self.points if p.watched and p.address.call == self._calls]
        self._calls += 1
        running = _Calls(own) if own else None
        self._running.append(running)
        if running is not None:
            _SHOWING.begin(running)

    def _leave(self, *_: Any) -> None:
        running = self._running.pop() if self._running else None
        if running is not None:
            _SHOWING.end(running)


@contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the hooks of the points among some modules see their tensors inside the block."""
    scopes = {id(m.scope): m.scope for m in modules if isinstance(m, CallPoint)}
    with ExitStack() as stack:
        for scope in scopes.values():
            scope.watch()
            stack.callback(scope.unwatch)
        yield


class _Calls:
    """Counts the calls of functions during a call of a scope, and knows the points among them.

    Args:
        points: those of this call of the scope.
    """

    def __init__(self, points: Iterable[CallPoint | Echo]) -> None:
        self._seen: Counter[str] = Counter()
        self._points: dict[str, dict[int, list[CallPoint | Echo]]] = {}
        for point in points:
            numbers = self._points.setdefault(point.address.function, {})
            numbers.setdefault(point.address.number, []).append(point)

    def next(self, name: str) -> list[CallPoint | Echo]:
        """Count a call of a function; the points at it."""
        numbers = self._points.get(name)
        if numbers is None:
            return []
        number = self._seen[name]
        self._seen[name] = number + 1
        return numbers.get(number, [])


class _Mode(TorchFunctionMode):
    """Shows the tensors of calls to the hooks on the points of all scopes that run in a thread."""

    def __init__(self, running: list[_Calls]) -> None:
        super().__init__()
        self._running = running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _SILENCE.depth:
            return func(*args, **kwargs)
        name, inside = known_function(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        points = [point for calls in self._running for point in calls.next(name)]
        return _shown(points, func, args, kwargs) if points else func(*args, **kwargs)


class _Showing(threading.local):
    """The scopes that run in a thread. They share one mode: with one for each, those outside would not see what those
    inside call in the place of a function.
    """

    def __init__(self) -> None:
        self._running: list[_Calls] = []
        self._modes: list[_Mode] = []

    def begin(self, calls: _Calls) -> None:
        """Show the calls of a scope."""
        self._running.append(calls)
        if len(self._running) == 1:
            self._modes.append(_Mode(self._running))
            self._modes[-1].__enter__()

    def end(self, calls: _Calls) -> None:
        """Show them no more."""
        self._running.remove(calls)
        if not self._running:
            self._modes.pop().__exit__(None, None, None)


_SHOWING = _Showing()


def _shown(points: list[CallPoint | Echo], func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function, with what its points' hooks make of its arguments and its output."""
    args, kwargs = list(args), dict(kwargs)
    # The hooks of a part of the model come after those that read or change what it was given.
    points = sorted(points, key=lambda point: point.is_last)
    with uncounted():
        for point in points:
            if point.address.part == "argument":
                _replace_argument(args, kwargs, point)
    inside = {part: [p for p in points if p.address.part == part] for part in ("scores", "pattern")}
    if any(inside.values()):
        steps = {part: partial(_through, own) for part, own in inside.items()}
        with uncounted():
            made = attention_in_parts(*args, inside=steps, **kwargs)
    else:  # the model's own call, which a recorder counts
        made = func(*args, **kwargs)
    outputs = [p for p in points if p.address.part == "output"]
    with uncounted():
        if outputs and isinstance(made, Tensor) and _is_in_place(made, func, kwargs):
            return _shown_in_place(outputs, made)
        for point in outputs:
            made = _replaced(made, point)
    return made


def _replace_argument(args: list[Any], kwargs: dict[str, Any], point: CallPoint | Echo) -> None:
    place, key, item = point.address.place, point.address.key, point.address.item
    if item is not None:
        args[place] = holder = list(args[place])
        holder[item] = point(holder[item])
    elif key:
        kwargs[key] = point(kwargs[key])
    else:
        args[place] = point(args[place])


def _through(points: Iterable[CallPoint | Echo], value: Tensor) -> Tensor:
    for point in points:
        value = point(value)
    return value


def _is_in_place(made: Tensor, func: Any, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("out") is made or writes_in_place(known_function(func)[0])


def _shown_in_place(points: list[CallPoint | Echo], made: Tensor) -> Tensor:
    """The output of a function that works in place, which is often called as a statement, its output ignored.

    So a change is written in place, too. Hooks get a copy, which stays as it is.
    """
    given = shown = made.clone()
    for point in points:
        shown = point(shown)
    return made if shown is given else made.copy_(shown)


def writes_in_place(name: str) -> bool:
    """Whether a function changes its first argument, by its full name.

    >>> writes_in_place("torch.Tensor.add_"), writes_in_place("torch.Tensor.__add__")
    (True, False)
    """
    last = name.rpartition(".")[2]
    return (
        last == "__setitem__"
        or (last.endswith("_") and not last.endswith("__"))
        or (last.startswith("__i") and last.removeprefix("__i") in _IN_PLACE)
    )


_IN_PLACE = {
    f"{name}__" for name in (
        "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"
    )
}  # fmt: skip


def _replaced(made: Any, point: CallPoint | Echo) -> Any:
    if isinstance(made, Tensor):
        return point(made)
    place = point.address.place
    items = [point(item) if i == place else item for i, item in enumerate(made)]
    return type(made)(items)


def attention_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    inside: dict[str, Callable[[Tensor], Tensor]],
) -> Tensor:
    """Compute `scaled_dot_product_attention` step by step, as torch documents it, so that its parts can be seen.

    It differs from the fused kernels by rounding.

    Args:
        query, key, value: ... x position x d_head.
        attn_mask: added to the scores, or False where a query must not look.
        dropout_p: must be 0.
        is_causal: whether a query sees no later key.
        scale: what products are multiplied by; 1 / sqrt(d_head) by default.
        enable_gqa: whether groups of queries' heads share the heads of keys and values.
        inside: what is called with the `scores` and with the `pattern`, and returns what to go on with.
    """
    if dropout_p:
        raise ValueError(f"dropout_p {dropout_p} of an attention whose pattern is read: expected 0")
    if enable_gqa:
        n = query.shape[-3]
        key, value = (x.repeat_interleave(n // x.shape[-3], -3) for x in (key, value))
    # In place, which is as good for a gradient: each of these passes over the scores takes as long as the softmax.
    scores = (query @ key.mT).mul_(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill_(later, -math.inf)
    if attn_mask is not None:
        kept = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if kept else scores + attn_mask
    shown = inside.get("scores", _same)(scores)
    pattern = torch.softmax(shown, -1)
    if attn_mask is not None or shown is not scores:
        # A query that may look nowhere gets zeros, as torch's kernels give it.
        nowhere = shown.amax(-1, keepdim=True) == -math.inf
        pattern = pattern.masked_fill(nowhere, 0)
    pattern = pattern.to(value.dtype)
    return inside.get("pattern", _same)(pattern) @ value


def _same(value: Tensor) -> Tensor:
    return value


@cache
def known_function(func: Any) -> tuple[str, Callable[..., Any] | None]:
    """The full name of a torch function (`torch.nn.functional.conv2d`), and a function that does the same and shows its
    inner calls one by one, where those are to be seen.

    That is `multi_head_attention_forward`, which torch shows to a function mode as one call. The code that runs is
    torch's own.
    """
    name = resolve_name(func) or getattr(func, "__qualname__", type(func).__name__)
    if func is not F.multi_head_attention_forward:
        return name, None
    names = {**F.__dict__, "has_torch_function": lambda *_: False}
    code = F.multi_head_attention_forward.__code__
    made = types.FunctionType(code, names, func.__name__, func.__defaults__)
    made.__kwdefaults__ = func.__kwdefaults__
    return name, made
