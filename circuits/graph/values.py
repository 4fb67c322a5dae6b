"""Values of attributes as JSON that gives them back with their types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

_TUPLE, _FLOAT, _DICT = "tuple:", "float:", "dict:"


def plain_number(value: Any) -> Any:
    """A number of numpy or torch (also an array or tensor without axes) as Python's; anything else as it is.

    >>> plain_number(np.float32(0.5)), plain_number(np.array(3)), plain_number("text")
    (0.5, 3, 'text')
    """
    single = isinstance(value, np.generic) or (
        isinstance(value, np.ndarray | Tensor) and value.ndim == 0
    )
    return value.item() if single else value


def encoded(value: Any) -> Any:
    """A value as JSON has it; what JSON has not is an object with one key that says what it is.

    Numbers of numpy and torch become Python's.

    Raises:
        TypeError: if it is none of None, truth value, number, text, list, tuple, or dictionary by text.

    >>> encoded({"a": (1, None), "b": float("inf")})
    {'a': {'tuple:': [1, None]}, 'b': {'float:': 'inf'}}
    """
    value = plain_number(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, tuple):
        return {_TUPLE: [encoded(item) for item in value]}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        made = {key: encoded(item) for key, item in value.items()}
        # A dictionary that looks like one of our marks is wrapped in a mark itself, so that it comes back as what it
        # was.
        marked = len(made) == 1 and next(iter(made)) in (_TUPLE, _FLOAT, _DICT)
        return {_DICT: made} if marked else made
    if isinstance(value, np.ndarray | Tensor):
        raise TypeError(
            f"attribute of type {type(value).__name__} and shape {tuple(value.shape)} cannot be written: expected a "
            "number, or nested lists, as its tolist() gives"
        )
    raise TypeError(
        f"attribute {value!r} cannot be written: expected None, numbers, text, lists, tuples or "
        "dictionaries of them"
    )


def decoded(value: Any) -> Any:
    """The value that `encoded` was given.

    >>> decoded(encoded({"a": (1, None), "b": [float("inf")]}))
    {'a': (1, None), 'b': [inf]}
    """
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (key, inner), *_ = value.items()
        if key == _TUPLE and isinstance(inner, list):
            return tuple(decoded(item) for item in inner)
        # Only what `encoded` writes: a dictionary of another program with a key `float:` stays one.
        if key == _FLOAT and inner in ("nan", "inf", "-inf"):
            return float(inner)
        if key == _DICT and isinstance(inner, dict):
            value = inner
    return {key: decoded(item) for key, item in value.items()}
