"""Attention that a person declares, where it is not found: which tensors it consists of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

CALL = re.compile(r"(?P<call>(?:[^/]+/)?\w+@[0-9]+)(?:\[(?P<place>[0-9]+)\])?")
"""`MODULE/FUNCTION@NUMBER`, with `[2]` for the third of several outputs."""


@dataclass(frozen=True)
class Declared:
    """Where the tensors of one attention are, each as the output of a call `MODULE/FUNCTION@NUMBER`.

    Attributes:
        name: of its sites, such as `blocks.0.attn`.
        pattern: what weighs the values.
        keys: which axis of the pattern runs over keys.
        scores: what the pattern is made of; the product of queries and keys by default.
        q, k: queries and keys; the factors of the product that the pattern is made of by default.
        q_axes, k_axes: what their axes run over, where no product of them says so: `batch head position d_head`, or
            `batch position (head d_head)`.
    """

    name: str
    pattern: str
    keys: int = -1
    scores: str = ""
    q: str = ""
    k: str = ""
    q_axes: str = ""
    k_axes: str = ""


def read_declarations(given: Mapping[str, Any], where: str = "attention") -> tuple[Declared, ...]:
    """The attentions that a person declares.

    Args:
        given: by the name of the attention, a mapping with the attributes of `Declared`.
        where: where it stands, for messages.

    Raises:
        ValueError: if a key is unknown, missing, or of another type.
    """
    return tuple(_declaration(name, own, where) for name, own in given.items())


def _declaration(name: Any, own: Any, where: str) -> Declared:
    known = {f.name: f.type for f in fields(Declared) if f.name != "name"}
    if not isinstance(name, str) or not re.fullmatch(r"[^\s:,+*-][^\s:,+*]*", name):
        raise ValueError(
            f"{where}: {name!r} is no name of an attention: expected one like 'blocks.0.attn'"
        )
    if not isinstance(own, Mapping):
        raise ValueError(f"{where}: {name} is {own!r}: expected a table with {', '.join(known)}")
    for key, value in own.items():
        if key not in known:
            raise ValueError(f"{where}: {name} has no {key!r}: expected {', '.join(known)}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole if key == "keys" else isinstance(value, str)):
            kind = "a whole number" if key == "keys" else "a text"
            raise ValueError(f"{where}: {key} of {name} is {value!r}: expected {kind}")
        if key in ("pattern", "scores", "q", "k") and not CALL.fullmatch(str(value)):
            raise ValueError(
                f"{where}: {key} of {name} is {value!r}: expected a call MODULE/FUNCTION@NUMBER, such as "
                "'blocks.0/softmax@0'"
            )
    if "pattern" not in own:
        raise ValueError(f"{where}: {name} lacks 'pattern': expected the call that puts it out")
    return Declared(name, **own)
