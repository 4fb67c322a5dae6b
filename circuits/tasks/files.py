"""Task files: JSON lines, a header and then one item a line, as `docs/schemas/task.json` says.

What is read is checked line by line: an error names the line, the field and what would be valid.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from circuits.files import replacing
from circuits.tasks.items import Item, clipped
from circuits.tasks.schema import HEADER, ITEM, LAYOUT, Field, HowRead
from circuits.units import unknown

MAX_LINE = 1 << 20
"""Bytes that a line may have."""


@dataclass(frozen=True)
class Header:
    """What a task file says of its items.

    Attributes:
        name: of the task.
        about: one sentence on what a model does that shows the behaviour.
        metric: the name of the metric it is measured by; None leaves the choice to the reader.
        reading: how answers are read; None leaves it open.
        tokenizer: what tokens in the file are of, in words; empty where all is text.
        seed: of the split into halves.
    """

    name: str
    about: str = ""
    metric: str | None = None
    reading: HowRead | None = None
    tokenizer: str = ""
    seed: int = 0


def write_items(path: str | Path, header: Header, items: Iterable[Item]) -> None:
    """Write a task file, all or nothing.

    Raises:
        ValueError: if there is no item, or something is not what the schema says (a negative token, half of a
            surrogate pair, an item of more than `MAX_LINE` bytes).
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
        FileNotFoundError: if there is none.
        ValueError: if a line is not what the schema says; the message names it.
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
    """The fields of a record that are not at their default, as JSON has them."""
    found = {}
    for field in fields(record):
        value = getattr(record, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            found[field.name] = dict(value) if isinstance(value, Mapping) else value
    return found


def _line(raw: Mapping[str, Any], known: Mapping[str, Field], what: str) -> bytes:
    text = json.dumps(raw, ensure_ascii=False, allow_nan=False)
    _check(json.loads(text), known, what)
    line = text.encode() + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"{what} has {len(line)} bytes: expected at most {MAX_LINE}")
    return line


# --- reading -----------------------------------------------------------------------------------


def _lines(file: BinaryIO, what: str) -> Iterator[tuple[str, Any]]:
    """What each line that is not blank holds, and what error messages call the line."""
    number = 0
    while line := file.readline(MAX_LINE + 2):
        number += 1
        place = f"{what}, line {number}"
        if len(line) > MAX_LINE + 1:
            raise ValueError(f"{place} has more than {MAX_LINE} bytes: expected one item a line")
        if line.strip():
            yield place, parse_json(line, place)


def parse_json(line: bytes, place: str) -> Any:
    """Strict JSON: UTF-8 without a byte-order mark, each field once, no NaN, no numbers of many digits.

    Args:
        line: what to parse.
        place: what error messages call it.

    Raises:
        ValueError: if it is not that.
    """
    if line.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{place} starts with a byte-order mark: expected UTF-8 without one")
    try:
        text = line.decode("utf-8")
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refused, parse_int=_number)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"{place} is not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # a key twice, NaN, a number of thousands of digits
        raise ValueError(f"{place}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"field {clipped(key)!r} is there twice")
        made[key] = value
    return made


def _number(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"{clipped(digits, 20)} has {len(digits)} digits")
    return int(digits)


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not a number that JSON has")


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
    """Lists as tuples, and whole numbers as such (JSON may write 1.0)."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return int(value) if isinstance(value, float) else value


def _check(raw: dict[str, Any], known: Mapping[str, Field], place: str) -> None:
    """Raise ValueError unless a line has the fields that it should have, each in its form."""
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
    """Whether a text somewhere inside has no form in UTF-8."""
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(_broken(part) for part in parts)


def _short(value: Any) -> str:
    """A value of any size or depth in a few words."""
    return clipped(reprlib.repr(value))
