"""Record, observe and intervene: context managers over torch forward hooks.

A `Tap` says where a tensor is: the output of a module, which of its calls, which part of a nested
output. `record` reads any number of taps in one forward pass and can stop the pass early; `observe`
shows them as they appear and keeps nothing; `intervene` changes any number of them. Each removes
exactly its own hooks, whatever happens inside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Change = Callable[[Tensor], Tensor]
"""Takes the tensor at a tap and returns the one to put in its place; never works in place."""


def placed(change: Change) -> bool:
    """Whether a change says (`change.placed`) that it names positions of a text."""
    return bool(getattr(change, "placed", False))


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a tensor is in a model.

    Attributes:
        module: the module whose output holds it.
        call: which call of the module within one forward pass, counted from 0.
        path: where in a nested output: indices of tuples and lists, keys of mappings.
        convert: from the module's layout to the site's (TransformerLens splits heads this way).
        revert: back again.
        overwritten: a later step of the model changes the tensor in place, so a record must copy it.
    """

    module: nn.Module
    call: int = 0
    path: tuple[Hashable, ...] = ()
    convert: Change | None = None
    revert: Change | None = None
    overwritten: bool = False

    def read(self, output: Any) -> Tensor:
        """The tensor at this tap in a module's output."""
        for key in self.path:
            output = output[key]
        return output if self.convert is None else self.convert(output)

    def write(self, output: Any, value: Tensor) -> Any:
        """The module's output with `value` at this tap; the rest is shared."""
        return _replaced(output, self.path, value if self.revert is None else self.revert(value))


def _replaced(output: Any, path: tuple[Hashable, ...], value: Tensor) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    inner = _replaced(output[key], rest, value)
    if type(output) is dict:
        return {**output, key: inner}
    if isinstance(output, Mapping):
        # model outputs of Hugging Face are mappings that only their own constructor builds rightly
        return type(output)(**{**dict(output), str(key): inner})
    items = [inner if i == key else item for i, item in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


_FORBIDDEN = re.compile(r"[\s:,+*]")  # what a site's name cannot hold


class Splice(nn.Module):
    """A change that is part of a model: its `visit` is a hook that comes behind all others of its module.

    What is read and changed at the module's output is so before the splice changes it. `visit` is a method of
    a module, so that a copy of the model has a copy of the splice.
    """

    def visit(self, module: nn.Module, args: Any, output: Any) -> Any:
        """What to put in the place of a module's output; None to leave it."""
        raise NotImplementedError


def _splices_last(module: nn.Module) -> None:
    """Move a module's splices behind the hooks that were just registered."""
    hooks = module._forward_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "__self__", None), Splice):
            hooks[key] = hooks.pop(key)


class _StopForwardError(Exception):
    """Ends a forward pass once the last tap that was asked for has been read."""


Visit = Callable[[Any], Any]
"""Sees a module's output; returns a new one, or None to leave it."""


@contextmanager
def _attached(root: nn.Module, visits: Iterable[tuple[Tap, Visit]]) -> Iterator[None]:
    """Call each visit at its tap's module and call, in forward passes of `root`."""
    by_module: dict[nn.Module, list[tuple[Tap, Visit]]] = {}
    for tap, visit in visits:
        by_module.setdefault(tap.module, []).append((tap, visit))
    calls: Counter[nn.Module] = Counter()
    handles: list[RemovableHandle] = []
    try:
        handles.append(root.register_forward_pre_hook(lambda module, args: calls.clear()))
        for module, own in by_module.items():
            handles.append(module.register_forward_hook(partial(_visited, calls, own)))
            _splices_last(module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _visited(
    calls: Counter[nn.Module],
    visits: Iterable[tuple[Tap, Visit]],
    module: nn.Module,
    args: Any,
    output: Any,
) -> Any:
    """A module's output after the visits of this call of it."""
    call = calls[module]
    calls[module] += 1
    for tap, visit in visits:
        if tap.call == call:
            changed = visit(output)
            output = output if changed is None else changed
    return output


Look = Callable[[Tensor], object]
"""Sees the tensor at a tap while the forward pass runs; it may be overwritten after that."""


@contextmanager
def observe(
    root: nn.Module, looks: Mapping[str, tuple[Tap, Look]], until: str | None = None
) -> Iterator[None]:
    """Show tensors as they appear during forward passes of `root` inside the block; keep nothing.

    Args:
        root: the model.
        looks: where to look, and what to call with the tensor there, by name.
        until: a name of `looks`: the forward pass ends as soon as it was shown, and so does the block.

    Raises:
        KeyError: if `until` is not one of `looks`.
    """
    if until is not None and until not in looks:
        raise KeyError(f"until {until!r} is not among the taps to look at")
    stop = _StopForwardError(until)
    # `until` comes last among the visits of its module: the others have been seen by then
    order = sorted(looks.items(), key=lambda item: item[0] == until)
    visits = [
        (tap, partial(_seen, tap, look, stop if name == until else None))
        for name, (tap, look) in order
    ]
    with _attached(root, visits):
        try:
            yield
        except _StopForwardError as error:
            if error is not stop:
                raise
            error.with_traceback(None)  # its frames refer to it, and to all that was looked at


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
        until: a name of `taps`: the forward pass ends as soon as it is read, and so does the block.

    Yields:
        A dict that fills up by name; each pass overwrites it. Tensors keep their autograd history.

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
    """Change the tensors at taps during forward passes of `root` inside the block.

    Changes at one tap apply in the order given. A record made inside the block sees the changed
    tensor, as everything downstream does.
    """
    with _attached(root, [(tap, partial(_written, tap, change)) for tap, change in changes]):
        yield


def _written(tap: Tap, change: Change, output: Any) -> Any:
    return tap.write(output, change(tap.read(output)))


@dataclass(frozen=True, eq=False)
class Trace:
    """One tensor seen in a traced forward pass."""

    tap: Tap
    name: str
    value: Tensor
    given: Tensor | None = None


def trace(
    root: nn.Module, modules: Mapping[str, nn.Module], forward: Callable[[], Any]
) -> list[Trace]:
    """Run `forward` once and list every tensor that `modules` put out, in order of execution.

    `given` is the first tensor that the module was called with. A module called several times
    gives `name@0`, `name@1`, …; a nested output gives `name[0]`, `name[key]`, …. A name that is
    taken gets a `_`. Tensors that a later step overwrites in place are marked on their taps.
    """
    seen: list[tuple[str, Tap, Tensor, int, Tensor | None]] = []
    calls: Counter[str] = Counter()

    def visitor(name: str, module: nn.Module) -> Callable[..., None]:
        def visit(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = next((v for _, v in _leaves((args, kwargs))), None)
            for path, value in _leaves(output):
                tap = Tap(module, calls[name], path)
                seen.append((name, tap, value, value._version, given))
            calls[name] += 1

        return visit

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_hook(visitor(name, module), with_kwargs=True))
        _splices_last(module)
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    parts = Counter((name, tap.call) for name, tap, *_ in seen)
    traces: list[Trace] = []
    taken: set[str] = set()
    for name, tap, value, version, given in seen:
        label = name if calls[name] == 1 else f"{name}@{tap.call}"
        if parts[name, tap.call] > 1:
            label += "".join(f"[{_FORBIDDEN.sub('_', str(key))}]" for key in tap.path)
        while label in taken:
            label += "_"
        taken.add(label)
        overwritten = value._version != version
        traces.append(Trace(replace(tap, overwritten=overwritten), label, value, given))
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
