"""Task files: JSON lines, with a header and then one item on each line; `docs/schemas/task.json` is the schema.

Files are checked line by line as they are read: an error names the line, the field and what is valid.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from circuits.checks import clipped
from circuits.files import replacing
from circuits.json_files import parse_json
from circuits.tasks.items import Item
from circuits.tasks.schema import HEADER, ITEM, LAYOUT, Feeding, Field
from circuits.units import unknown

MAX_LINE = 1 << 20
"""The largest size of a line, in bytes. It bounds the memory that a file which is no task file can take."""


@dataclass(frozen=True)
class Header:
    """The first line of a task file, which describes its items.

    Attributes:
        name: the task's name.
        about: one sentence on what a model does that shows the behaviour.
        metric: the name of the metric that the task is measured by; None leaves the choice to the reader.
        reading: how answers are read; None leaves the choice to the reader.
        tokenizer: which tokenizer the tokens in the file belong to (see `tokenizer_of`); empty if all items are text.
        seed: seed of the split into halves.
    """

    name: str
    about: str = ""
    metric: str | None = None
    reading: Feeding | None = None
    tokenizer: str = ""
    seed: int = 0


def write_items(path: str | Path, header: Header, items: Iterable[Item]) -> None:
    """Write a task file. Nothing is written if any item is invalid.

    Raises:
        ValueError: if there are no items, or one does not fit the schema (a negative token, half of a surrogate pair,
            more than `MAX_LINE` bytes).
    """
    lines = [_line({"circuits_task": LAYOUT, **_plain(header)}, HEADER, "header")]
    lines += [_line(_plain(item), ITEM, f"item {i}") for i, item in enumerate(items, 1)]
    if len(lines) < 2:
        raise ValueError(f"task {header.name!r} has no item: expected at least one")
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(b"".join(lines))


def read_items(path: str | Path) -> tuple[Header, tuple[Item, ...]]:
    """Read a task file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line does not fit the schema; the message names the line.
    """
    what = f"task file {str(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} does not exist or is not a file")
    with Path(path).open("rb") as file:
        lines = _lines(file, what)
        place, raw = next(lines, (f"{what}, line 1", None))
        header = _header(raw, place)
        items = tuple(_item(raw, place) for place, raw in lines)
    if not items:
        raise ValueError(f"{what} has a header but no item: expected one item a line")
    return header, items


# --- writing -----------------------------------------------------------------------------------


def _plain(record: Header | Item) -> dict[str, Any]:
    """The fields of a record that differ from their defaults, as JSON values."""
    found = {}
    for field in fields(record):
        value = getattr(record, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            found[field.name] = dict(value) if isinstance(value, Mapping) else value
    return found


def _line(raw: Mapping[str, Any], known: Mapping[str, Field], what: str) -> bytes:
    # What is written passes the same check as what is read: every file that this writes can be read again.
    text = json.dumps(raw, ensure_ascii=False, allow_nan=False)
    _check(parse_json(text, what), known, what)
    line = text.encode() + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"{what} has {len(line)} bytes: expected at most {MAX_LINE}")
    return line


# --- reading -----------------------------------------------------------------------------------


def _lines(file: BinaryIO, what: str) -> Iterator[tuple[str, Any]]:
    """Each non-blank line's name in error messages, and its parsed value."""
    # readline with a limit, not iteration over the file: a line without an end would be read into memory whole.
    # The limit is two bytes above the maximum, one for the newline and one to tell that a line is too long.
    number = 0
    while line := file.readline(MAX_LINE + 2):
        number += 1
        place = f"{what}, line {number}"
        if len(line) > MAX_LINE + 1:
            raise ValueError(f"{place} has more than {MAX_LINE} bytes: expected one item a line")
        if line.strip():
            yield place, parse_json(line, place)


def _header(raw: Any, place: str) -> Header:
    if not isinstance(raw, dict) or "circuits_task" not in raw:
        raise ValueError(
            f'{place} is not a header: expected {{"circuits_task": {LAYOUT}, "name": …}} first'
        )
    layout = raw["circuits_task"]
    if isinstance(layout, bool) or layout != LAYOUT:
        newer = isinstance(layout, int) and layout > LAYOUT
        hint = " (a newer version of circuits wrote it)" if newer else ""
        raise ValueError(f"{place} has layout {_short(layout)}{hint}: expected {LAYOUT}")
    _check(raw, HEADER, place)
    stated: dict[str, Any] = {name: _tuples(value) for name, value in raw.items()}
    del stated["circuits_task"]
    return Header(**stated)


def _item(raw: Any, place: str) -> Item:
    if not isinstance(raw, dict):
        raise ValueError(f'{place} is {_short(raw)}: expected an item, {{"clean": …}}')
    _check(raw, ITEM, place)
    made = {name: _tuples(value) for name, value in raw.items()}
    if "spans" in made:
        made["spans"] = {name: _tuples(span) for name, span in raw["spans"].items()}
    try:
        return Item(**made)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _tuples(value: Any) -> Any:
    """Lists as tuples, and whole numbers as `int` (JSON may write them as 1.0)."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return int(value) if isinstance(value, float) else value


def _check(raw: dict[str, Any], known: Mapping[str, Field], place: str) -> None:
    """Raise ValueError unless a line has all required fields, no unknown ones, and each in its form."""
    for name, field in known.items():
        if field.required and name not in raw:
            raise ValueError(f"{place} lacks the field {name!r}")
    for name, value in raw.items():
        if name not in known:
            raise ValueError(f"{place}: {unknown('field', clipped(name), known).args[0]}")
        if not known[name].form.fits(value):
            said = _short(value)
            raise ValueError(f"{place}: {name} is {said}: expected {known[name].expected}")
        if _broken(value):
            raise ValueError(
                f"{place}: {name} holds half of a surrogate pair, which is no character"
            )


def _broken(value: Any) -> bool:
    """Whether a text somewhere inside the value cannot be written as UTF-8."""
    # JSON may escape half of a surrogate pair ("\ud83d"); Python parses it into a str that encode() refuses.
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(_broken(part) for part in parts)


def _short(value: Any) -> str:
    """A value of any size or depth, shortened for an error message."""
    return clipped(reprlib.repr(value))
