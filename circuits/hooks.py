"""Record, observe and intervene: context managers over torch forward hooks.

A `Tap` says where a tensor is: in the output of which module, at which of its calls, in which part of a
nested output. `record` keeps the tensors at any number of taps in one forward pass and can stop the pass
early; `observe` calls a function with each tensor as it appears and keeps nothing; `intervene` replaces
them. Each removes exactly the hooks that it registered, whatever happens inside.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from circuits.call_points import uncounted, watching

Change = Callable[[Tensor], Tensor]
"""Takes the tensor at a tap and returns the one to put in its place; never works in place."""


class _Pass(threading.local):
    """The number of examples that the pass under way in a thread was given."""

    examples = 0


_PASS = _Pass()


def note_examples(args: Iterable[Any]) -> None:
    """Note how many examples a model is called with: the length of the first tensor among its arguments."""
    _PASS.examples = next((len(a) for a in args if isinstance(a, Tensor) and a.ndim), 0)


@dataclass(frozen=True)
class ByExample:
    """The layout of a tensor whose first axis is examples times positions, as example x position x ….

    How many examples there are is that of the pass under way.
    """

    def read(self, held: Tensor) -> Tensor:
        return held.unflatten(0, (_PASS.examples, -1))

    def write(self, held: Tensor, value: Tensor) -> Tensor:
        return value.flatten(0, 1)


@dataclass(frozen=True)
class OfAll:
    """The layout of a tensor that is the same for all examples, as example x position x …."""

    def read(self, held: Tensor) -> Tensor:
        return held.expand(_PASS.examples, *held.shape[-2:])

    def write(self, held: Tensor, value: Tensor) -> Tensor:
        return value


def placed(change: Change) -> bool:
    """Whether a change refers to positions of a text by number, as its attribute `placed` says.

    In a batch of padded texts the same number means another token in each text.
    """
    return bool(getattr(change, "placed", False))


@runtime_checkable
class Layout(Protocol):
    """How a site's tensor lies in the tensor that a module returns."""

    def read(self, held: Tensor) -> Tensor:
        """The site's tensor in the module's."""
        ...

    def write(self, held: Tensor, value: Tensor) -> Tensor:
        """The module's tensor with the site's tensor in it; `held` itself stays as it is."""
        ...


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a tensor is in a model.

    Attributes:
        module: the module whose output holds it.
        call: which call of the module within one forward pass, counted from 0; None for a tensor that several
            functions take: it is read at the first of them, and changed at all.
        path: where in a nested output: indices of tuples and lists, keys of mappings, fields of dataclasses.
        layout: how the site's tensor lies in the module's, where it is another one (heads that are not split).
        overwritten: a later operation of the model changes the tensor in place, so `record` and `intervene` copy it.
    """

    module: nn.Module
    call: int | None = 0
    path: tuple[Hashable, ...] = ()
    layout: Layout | None = None
    overwritten: bool = False

    def read(self, output: Any) -> Tensor:
        """The tensor at this tap in a module's output."""
        for key in self.path:
            output = entry(output, key)
        return output if self.layout is None else self.layout.read(output)

    def write(self, output: Any, value: Tensor) -> Any:
        """The module's output with `value` at this tap; everything else in it is shared, not copied."""
        if self.layout is not None:
            value = self.layout.write(replace(self, layout=None).read(output), value)
        return _replaced(output, self.path, value)


def is_record(output: Any) -> bool:
    """Whether an output is an instance of a dataclass, and no mapping too, as those of Hugging Face are."""
    return is_dataclass(output) and not isinstance(output, type | Mapping)


def entry(output: Any, key: Hashable) -> Any:
    """An entry of a nested output."""
    return getattr(output, str(key)) if is_record(output) else output[key]


def _replaced(output: Any, path: tuple[Hashable, ...], value: Tensor) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    inner = _replaced(entry(output, key), rest, value)
    if is_record(output):
        made = copy.copy(output)
        object.__setattr__(made, str(key), inner)  # also where it is frozen
        return made
    if type(output) is dict:  # keys need not be strings, as keyword arguments would have to be
        return {**output, key: inner}
    if isinstance(output, Mapping):
        # `ModelOutput` of Hugging Face keeps its entries both as items and as attributes: only its own
        # constructor sets both.
        return type(output)(**{**dict(output), str(key): inner})
    items = [inner if i == key else item for i, item in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


_FORBIDDEN = re.compile(r"[\s:,+*]")
"""Characters that no site name may contain: they are the syntax of units and directions (`circuits.units`)."""


class LastHook(nn.Module):
    """A change that is part of a model: its hook `visit` runs after all other hooks of its module.

    So every other hook reads and edits the module's output as the model computed it. `visit` is a method of
    an `nn.Module`, so that a deep copy of the model gets hooks that are bound to the copy.
    """

    def visit(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return what replaces the module's output, or None to leave it as it is."""
        raise NotImplementedError


def _move_last_hooks_to_the_end(module: nn.Module) -> None:
    """Let a module's `LastHook`s run after the hooks that were just registered."""
    # Torch runs hooks in the order of this dictionary and offers only "before all others" (`prepend`).
    # Taking an entry out and putting it back moves it to the end.
    hooks = module._forward_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "__self__", None), LastHook):
            hooks[key] = hooks.pop(key)


class _StopForwardError(Exception):
    """Raised inside a hook to end a forward pass once the last tap asked for has been read."""


Visit = Callable[[Any], Any]
"""Takes a module's output; returns one to replace it, or None to leave it as it is."""


@contextmanager
def _attached(root: nn.Module, visits: Iterable[tuple[Tap, Visit]]) -> Iterator[None]:
    """Call each visit with the output of its tap's module, at that call of the module, in passes of `root`."""
    by_module: dict[nn.Module, list[tuple[Tap, Visit]]] = {}
    for tap, visit in visits:
        by_module.setdefault(tap.module, []).append((tap, visit))
    # One hook a module, not one a tap: all taps of a module then count its calls together.
    calls: Counter[nn.Module] = Counter()
    handles: list[RemovableHandle] = []
    try:
        # A pass that was stopped or failed leaves counts behind, so they are cleared when a pass begins.
        handles.append(root.register_forward_pre_hook(partial(_begun, calls)))
        for module, own in by_module.items():
            handles.append(module.register_forward_hook(partial(_visited, root, calls, own)))
            _move_last_hooks_to_the_end(module)
        with watching(by_module):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _begun(calls: Counter[nn.Module], root: nn.Module, args: Any) -> None:
    """The hook before a pass."""
    calls.clear()
    note_examples(args)


class _Visited(threading.local):
    """The models, by id, whose hooks this thread is running.

    A visit may itself call a module of the model, such as a normalisation that is measured: such a call belongs to no
    pass, and no hook sees it.
    """

    def __init__(self) -> None:
        self.roots: set[int] = set()


_VISITED = _Visited()


def _visited(
    root: nn.Module,
    calls: Counter[nn.Module],
    visits: Iterable[tuple[Tap, Visit]],
    module: nn.Module,
    args: Any,
    output: Any,
) -> Any:
    """Apply the visits that are meant for this call of a module to its output."""
    if id(root) in _VISITED.roots:
        return output
    # Counted before any visit, as one of them may end the pass.
    call = calls[module]
    calls[module] += 1
    _VISITED.roots.add(id(root))
    try:
        with uncounted():
            for tap, visit in visits:
                if tap.call in (None, call):
                    changed = visit(output)
                    output = output if changed is None else changed
    finally:
        _VISITED.roots.discard(id(root))
    return output


Look = Callable[[Tensor], object]
"""Called with the tensor at a tap while the forward pass runs; the model may overwrite that tensor later."""


@contextmanager
def observe(
    root: nn.Module, looks: Mapping[str, tuple[Tap, Look]], until: str | None = None
) -> Iterator[None]:
    """Call a function with each tensor as it appears in forward passes of `root` inside the block; keep nothing.

    Args:
        root: the model.
        looks: by name, where to look and what to call with the tensor there.
        until: a name of `looks`: the forward pass ends as soon as that tensor was seen, and so does the block.

    Raises:
        KeyError: if `until` is not one of `looks`.
    """
    if until is not None and until not in looks:
        raise KeyError(f"until {until!r} is not among the taps to look at: {', '.join(looks)}")
    stop = _StopForwardError(until)
    # Several taps may share a module and even a tensor (aliases). `until` is visited last among them, because
    # its visit raises and the ones after it would not run.
    order = sorted(looks.items(), key=lambda item: item[0] == until)
    visits = [
        (
            replace(tap, call=tap.call or 0),
            partial(_seen, tap, look, stop if name == until else None),
        )
        for name, (tap, look) in order
    ]
    with _attached(root, visits):
        try:
            yield
        except _StopForwardError as error:
            # Blocks can be nested: a stop belongs to the block that raised it.
            if error is not stop:
                raise
            # The traceback's frames hold the model's local tensors, and this frame holds the error: a
            # reference cycle that would keep them alive until the garbage collector runs.
            error.with_traceback(None)


def _seen(tap: Tap, look: Look, stop: _StopForwardError | None, output: Any) -> None:
    look(tap.read(output))
    if stop is not None:
        raise stop


@contextmanager
def record(
    root: nn.Module, taps: Mapping[str, Tap], until: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Record the tensors at `taps` during forward passes of `root` inside the block.

    Args:
        root: the model.
        taps: what to read, by name.
        until: a name of `taps`: the forward pass ends as soon as that tensor is read, and so does the block.

    Yields:
        A dict, by name, that is filled during the pass; each pass overwrites it. Tensors keep their autograd
        history.

    Raises:
        KeyError: if `until` is not one of `taps`.
    """
    found: dict[str, Tensor] = {}
    looks = {name: (tap, partial(_kept, found, name, tap)) for name, tap in taps.items()}
    with observe(root, looks, until):
        yield found


def _kept(found: dict[str, Tensor], name: str, tap: Tap, value: Tensor) -> None:
    found[name] = value.clone() if tap.overwritten else value


@contextmanager
def intervene(root: nn.Module, changes: Iterable[tuple[Tap, Change]]) -> Iterator[None]:
    """Replace the tensors at taps in forward passes of `root` inside the block.

    Changes at one tap apply in the order given. `record` inside the block sees the changed tensor, as
    everything downstream does.
    """
    with _attached(root, [(tap, partial(_written, tap, change)) for tap, change in changes]):
        yield


def _written(tap: Tap, change: Change, output: Any) -> Any:
    value = tap.read(output)
    # What a later operation overwrites is neither the tensor that a change was given and may have kept, nor the one
    # that it returned, which may be kept for another pass.
    made = change(value.clone() if tap.overwritten else value)
    made = made.clone() if tap.overwritten else made
    # A change may compute in more digits than the model has; what follows takes only the model's own type.
    return tap.write(output, made.to(value.dtype))


@dataclass(frozen=True, eq=False)
class Trace:
    """One tensor seen in a traced forward pass.

    Attributes:
        tap: how to reach it.
        name: the name for its site.
        value: the tensor.
        given: the first tensor that the module was called with.
        notes: what `trace` was told to note of `given` and of `value` when the module returned.
    """

    tap: Tap
    name: str
    value: Tensor
    given: Tensor | None = None
    notes: tuple[Any, Any] = (None, None)


def trace(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    forward: Callable[[], Any],
    note: Callable[[Tensor], Any] = lambda _: None,
) -> list[Trace]:
    """Run `forward` once and list every tensor that `modules` return, in order of execution.

    A module called several times gives `name@0`, `name@1`, …; a nested output gives `name[0]`,
    `name[key]`, …. A name that is taken gets a `_` appended. Tensors that a later operation overwrites in
    place are marked on their taps.

    Args:
        root: the model.
        modules: what to trace, by name.
        forward: runs the model.
        note: called with each tensor that a module is given or returns, at that moment; the result is kept.
    """
    seen: list[tuple[str, Tap, Tensor, int, Tensor | None, tuple[Any, Any]]] = []
    calls: Counter[str] = Counter()

    def visitor(name: str, module: nn.Module) -> Callable[..., None]:
        def visit(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # The first tensor among the arguments: what a layer reads, wherever in a nested structure it is passed.
            given = next((v for _, v in _leaves((args, kwargs))), None)
            for path, value in _leaves(output):
                tap = Tap(module, calls[name], path)
                # Read first: to a function mode this is a call that meets the tensor.
                version = value._version
                notes = None if given is None else note(given), note(value)
                seen.append((name, tap, value, version, given, notes))
            calls[name] += 1

        return visit

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_hook(visitor(name, module), with_kwargs=True))
        _move_last_hooks_to_the_end(module)
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    # Names are given after the pass: only then is it known how often each module ran.
    parts = Counter((name, tap.call) for name, tap, *_ in seen)
    traces: list[Trace] = []
    taken: set[str] = set()
    for name, tap, value, version, given, notes in seen:
        label = name if calls[name] == 1 else f"{name}@{tap.call}"
        if parts[name, tap.call] > 1:
            label += "".join(f"[{_FORBIDDEN.sub('_', str(key))}]" for key in tap.path)
        while label in taken:
            label += "_"
        taken.add(label)
        # Autograd counts the in-place writes to a tensor's memory in `_version`, with gradients off too.
        overwritten = value._version != version
        traces.append(Trace(replace(tap, overwritten=overwritten), label, value, given, notes))
    return traces


def _leaves(
    output: Any, path: tuple[Hashable, ...] = ()
) -> Iterator[tuple[tuple[Hashable, ...], Tensor]]:
    """Every tensor in a nested output, with the path to it."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, item in output.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(output, list | tuple):
        for index, item in enumerate(output):
            yield from _leaves(item, (*path, index))
    elif is_record(output):
        for field in fields(output):
            yield from _leaves(getattr(output, field.name, None), (*path, field.name))
