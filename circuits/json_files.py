"""Reading JSON that somebody else may have written, be it a file, a header inside a file or a row of a database.

The one place that parses JSON. It takes what the standard has and nothing on which two readers may differ: an object
that names a field twice, NaN, a number that overflows, a byte-order mark. Every fault is one line that says which file.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 28
"""The largest file that is read. It bounds the memory that a file which is none of ours can take."""

MOST_DEPTH = 100
"""How deeply lists and objects may be nested: what reads them further on calls itself once a level."""

_MOST_DIGITS = 300  # a whole number of more is no floating-point number either


def read_json(path: str | Path, what: str = "", nan: bool = False) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        what: its name in error messages; `file 'PATH'` if not given.
        nan: whether NaN and infinity are taken, which Python writes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder or a device, larger than `MOST_BYTES`, or no such JSON as `parse_json` takes.
    """
    path, what = Path(path), what or f"file {str(path)!r}"
    return parse_json(read_bytes(path, what), what, nan)


def read_bytes(path: Path, what: str) -> bytes:
    """A file's bytes, if it is a file and not too large.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, or larger than `MOST_BYTES`.
    """
    # Before it is opened: reading a pipe would wait, and a device may have no end.
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{what} is {'a folder' if path.is_dir() else 'no regular file'}")
        raise FileNotFoundError(f"{what} does not exist")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{what} has {size} bytes: expected at most {MOST_BYTES}")
    return path.read_bytes()


def read_text(path: Path, what: str) -> str:
    """A file's text, by the rules of `read_bytes`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, too large, or not UTF-8.
    """
    return _decoded(read_bytes(path, what), what)


def _decoded(text: bytes, place: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = text[error.start]
        raise ValueError(f"{place} is not UTF-8: byte {error.start} is 0x{byte:02x}") from None


def parse_json(
    text: str | bytes,
    place: str,
    nan: bool = False,
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> Any:
    """Parse JSON.

    Args:
        text: UTF-8 without a byte-order mark.
        place: its name in error messages.
        nan: whether NaN and infinity are taken, which Python writes.
        pairs: makes an object of its fields; by default a repeated field is refused.

    Raises:
        ValueError: if the text is not such JSON: a field is repeated, a number overflows or has hundreds of digits, or
            it is nested more than `MOST_DEPTH` deep.
    """
    if isinstance(text, bytes):
        text = _decoded(text, place)
    if text.startswith("\ufeff"):
        raise ValueError(f"{place} starts with a byte-order mark: expected UTF-8 without one")
    try:
        # Python's own reader makes Infinity of 1e999.
        made = json.loads(
            text,
            object_pairs_hook=pairs or _once,
            parse_constant=float if nan else _no_number,
            parse_float=_float,
            parse_int=_int,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"{place} is not JSON that can be read: nested too deeply") from None
    except _RefusedError as error:
        raise ValueError(f"{place}: {error}") from None
    _check_depth(made, place)
    return made


class _RefusedError(ValueError):
    """Raised while parsing, where the place is not known."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _RefusedError(f"field {reprlib.repr(again)} is repeated")
    return made


def _int(digits: str) -> int:
    # Python refuses to parse numbers of more than 4300 digits, with a message about its own settings.
    if len(digits) > _MOST_DIGITS:
        raise _RefusedError(f"{digits[:19]}… has {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _RefusedError(f"{digits[:20]} is larger than any number of 64 bits")
    return number


def _no_number(constant: str) -> float:
    raise _RefusedError(f"{constant} is not a number that JSON has")


def _check_depth(value: Any, place: str) -> None:
    # Level by level and not by recursion, which is what it guards against.
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            part
            for whole in level
            if isinstance(whole, list | dict)
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, list | dict)
        ]
        if not level:
            return
    raise ValueError(
        f"{place} is not JSON that can be read: nested too deeply, more than {MOST_DEPTH} levels"
    )
