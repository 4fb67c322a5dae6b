"""The type checker that the whole suite runs under: an int is welcome where a float is.

Checks are compiled when a function is first called, as most functions are not called in most runs of pytest, and
those of functions inside others once, not with every call of the outer one: compiling them took most of the suite's
time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

from beartype import BeartypeConf, beartype

_compiled = beartype(conf=BeartypeConf(is_pep484_tower=True))
_known: dict[Hashable, Callable[..., Any]] = {}


def typechecker(check: FunctionType) -> Callable[..., Any]:
    """What jaxtyping calls for its checks: functions that have the checked function's signature and no body."""
    compiled: Callable[..., Any] | None = None

    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = _once(check)
        return compiled(*args, **kwargs)

    return checked


def _once(check: FunctionType) -> Callable[..., Any]:
    """The compiled check, shared by all functions that one inner `def` makes."""
    if "<locals>" not in check.__qualname__ or check.__defaults__ or check.__kwdefaults__:
        return _compiled(check)
    key = (check.__module__, check.__qualname__, check.__code__, *check.__annotations__.items())
    try:
        return _known.setdefault(key, _known.get(key) or _compiled(check))
    except TypeError:  # an annotation that is not hashable
        return _compiled(check)
