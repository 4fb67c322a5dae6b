"""Copies of modules that share nothing with the original but constants: the one place where modules are copied."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


def deep_copy(value: Any) -> Any:
    """Copy a module, or a tuple of a module and what refers to parts of it; nothing in the copy leads to the original.

    `copy.deepcopy` passes on functions and weak references as they are. A hook that closes over a part of the original,
    or refers to it weakly, would run in the copy and write into the original, or fail once the original is gone
    (TransformerLens's blocks have such hooks). Here, functions with their closures and defaults, bound methods,
    partial functions, and weak references and proxies refer to the copies of what they referred to. Those that lead to
    no part of the original are shared, as are other objects that only a closure knows.
    """
    # `deepcopy` notes in it, by the original's address, every copy that it makes, and keeps the originals alive.
    copies: dict[int, Any] = {}
    for tensor in _computed(value):
        copies[id(tensor)] = tensor.detach().clone()
    made = copy.deepcopy(value, copies)
    _Redirection(copies).everywhere()
    return made


def _computed(value: Any) -> Iterator[Tensor]:
    """The tensors that modules have kept of a pass with gradients (patterns, caches), which `deepcopy` refuses."""
    parts = value if isinstance(value, tuple) else (value,)
    for module in chain.from_iterable(p.modules() for p in parts if isinstance(p, nn.Module)):
        for kept in vars(module).values():
            if isinstance(kept, Tensor) and kept.grad_fn is not None:
                yield kept


class _Redirection:
    """Replaces references to originals by references to their copies.

    Args:
        copies: the copies, by the addresses of their originals.
    """

    def __init__(self, copies: dict[int, Any]) -> None:
        self.copies = copies
        self.own = {id(each): each for key, each in copies.items() if key != id(copies)}
        # What takes the place of functions and cells, by their addresses, so that what was shared stays shared.
        self.new: dict[int, Any] = {}
        for original in copies.get(id(copies), ()):
            if type(original) in weakref.ProxyTypes:
                # `deepcopy` sees through a proxy, and has made another copy of the object behind it.
                again = copies[id(original)]
                self.new[id(again)] = weakref.proxy(self.of(_referent(original)))

    def everywhere(self) -> None:
        """Redirect what all copies hold, in place."""
        for each in self.own.values():
            if isinstance(each, list):
                each[:] = map(self.of, each)
            elif isinstance(each, set):
                # Only if needed: a set's order may change when it is filled again.
                if any(map(self.leads, each)):
                    redirected = [*map(self.of, each)]
                    each.clear()
                    each.update(redirected)
            elif isinstance(each, dict):
                self._within(each)
            if hasattr(each, "__dict__") and not isinstance(each, MethodType):
                self._within(vars(each))

    def _within(self, table: dict[Any, Any]) -> None:
        for key, value in table.items():
            if (redirected := self.of(value)) is not value:
                table[key] = redirected

    def leads(self, value: Any) -> bool:
        """Whether functions, references and containers lead from a value to an original."""
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            each = waiting.pop()
            if id(each) in self.copies:
                return True
            # Containers that are copies are redirected themselves.
            if id(each) not in seen and not (
                id(each) in self.own and isinstance(each, list | dict | set)
            ):
                seen.add(id(each))
                waiting += _parts(each)
        return False

    def of(self, value: Any) -> Any:
        """The value, with copies in the place of the originals that it leads to; itself if it leads to none."""
        value = self.copies.get(id(value), value)
        if id(value) in self.new:
            return self.new[id(value)]
        if not self.leads(value):
            return value
        if type(value) in weakref.ProxyTypes:
            return weakref.proxy(self.of(_referent(value)))
        if type(value) is weakref.ReferenceType:
            return weakref.ref(self.of(value()), self.of(value.__callback__))
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return MethodType(self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, partial):
            keywords = self._table(value.keywords)
            return type(value)(self.of(value.func), *map(self.of, value.args), **keywords)
        if isinstance(value, dict | list | set):
            # Noted while it is empty, since it may hold itself.
            made: Any = type(value)()
            self.new[id(value)] = made
            if isinstance(value, list):
                made.extend(map(self.of, value))
            else:
                made.update(self._table(value) if isinstance(value, dict) else map(self.of, value))
            return made
        kind = type(value)._make if hasattr(value, "_make") else type(value)  # a named tuple
        return kind(map(self.of, value))

    def _table(self, table: dict[Any, Any]) -> dict[Any, Any]:
        return {key: self.of(value) for key, value in table.items()}

    def _function(self, function: FunctionType) -> FunctionType:
        # Noted before its parts are redirected, since a function may close over itself.
        cells = function.__closure__ and tuple(map(self._empty_cell, function.__closure__))
        new = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self.new[id(function)] = new
        new.__qualname__, new.__annotations__ = function.__qualname__, function.__annotations__
        new.__defaults__ = self.of(function.__defaults__)
        new.__kwdefaults__ = self.of(function.__kwdefaults__)
        new.__dict__.update(self._table(function.__dict__))
        for cell, old in zip(cells or (), function.__closure__ or (), strict=True):
            if _filled(old) and not _filled(cell):
                cell.cell_contents = self.of(old.cell_contents)
        return new

    def _empty_cell(self, cell: CellType) -> CellType:
        """The cell in the place of another: one for all functions that share that, so that they still share it."""
        return self.new.setdefault(id(cell), CellType())


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading it is the only way to know
    except ValueError:
        return False
    return True


def _referent(proxy: Any) -> Any:
    """What a weak proxy stands for; None once that is gone."""
    # A proxy passes on every attribute: a method of the object is bound to the object itself.
    try:
        return proxy.__reduce_ex__.__self__
    except ReferenceError:
        return None


def _parts(value: Any) -> Iterable[Any]:
    """What a function, reference or container refers to; nothing for other objects, which have copies or are shared."""
    # First, since a proxy claims to be of the class of what it stands for.
    if type(value) in weakref.ProxyTypes:
        return [_referent(value)]
    if type(value) is weakref.ReferenceType:
        return [value()]
    if isinstance(value, FunctionType):
        held = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        return [
            *held,
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *vars(value).values(),
        ]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    # Exact types and named tuples: how to make others again is not known.
    if type(value) is dict:
        return value.values()
    if type(value) in (tuple, list, set, frozenset) or (
        isinstance(value, tuple) and hasattr(value, "_make")
    ):
        return value
    return ()
