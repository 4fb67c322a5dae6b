"""Reading the tables of pairs that the circuit-discovery community uses.

Files are CSV, TSV, JSON (a list of rows, or a list under `prompts` or `data`) or JSON lines. Their format is
recognised by their columns; a table of another form is refused by one line.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from circuits.tasks.files import parse_json
from circuits.tasks.formats import FORMATS, Format, NoCounterpartError, Reading, Row, listed
from circuits.tasks.generated import Generated
from circuits.tasks.items import Item, clipped
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.units import unknown

MAX_BYTES = 1 << 28
"""Size of the largest table that is read."""


def read_table(
    path: str | Path,
    format: str | None = None,
    *,
    counterpart: str | None = None,
    tokenizer: Tokenizer = None,
) -> Generated:
    """Read a table of pairs; see `FORMATS`.

    Answers that are token numbers stay so, and hold for the tokenizer that the table was made with. Texts are taken as
    they stand, except that MIB's names get the space in front that its own code adds.

    Args:
        path: ends in .csv, .tsv, .json or .jsonl.
        format: one of `FORMATS`; recognised by the columns if not given.
        counterpart: where a table has several: the column, or the name in a row's `corrupt_prompt`.
        tokenizer: a model's input or its `encode`; with it, the years of a greater-than table become tokens, each as
            it is encoded alone, and of the verbs of an agreement table those that are one token are taken.

    Returns:
        The items, and the rows that have no counterpart, which are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        KeyError: if there is no such format, or no such counterpart.
        ValueError: if the table has other columns, or a row is not what they say.
    """
    what = f"table {str(path)!r}"
    rows = _rows(Path(path), what)
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    if format is None:
        chosen = _recognised(columns, what)
    elif format not in FORMATS:
        raise unknown("format", format, FORMATS)
    else:
        chosen = FORMATS[format]
        if not chosen.fits(columns):
            raise ValueError(
                f"{what} has the columns {listed(columns)}: expected {chosen.expected}"
            )
    reading = Reading(columns, counterpart, Reader(tokenizer))
    items, lacking = [], []
    for i, row in enumerate(rows, 1):
        try:
            items.append(chosen.read(row, reading))
        except NoCounterpartError:
            lacking.append(f"row {i}")
        except ValueError as error:
            raise ValueError(f"{what}, row {i}: {error}") from None
    if not items:
        raise ValueError(f"{what} has no row with a counterpart: expected at least one")
    left = {"rows without a counterpart": tuple(lacking)} if lacking else {}
    return Generated(
        Path(path).stem, tuple(items), chosen.about, _metric(chosen, items), len(rows), left
    )


def _recognised(columns: tuple[str, ...], what: str) -> Format:
    for known in FORMATS.values():
        if known.fits(columns):
            return known
    forms = "; ".join(f"{name}: {known.expected}" for name, known in FORMATS.items())
    raise ValueError(f"{what} has the columns {listed(columns)}: expected {forms}")


def _metric(chosen: Format, items: list[Item]) -> str:
    return chosen.metric if all(item.against for item in items) else "log_probability"


# --- files -------------------------------------------------------------------------------------


def _rows(path: Path, what: str) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"{what} does not exist or is not a file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{what} has {path.stat().st_size} bytes: expected at most {MAX_BYTES}")
    readers = {".csv": _delimited, ".tsv": _delimited, ".json": _json, ".jsonl": _json_lines}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"{what} ends in {suffix!r}: expected {', '.join(readers)}")
    rows = readers[suffix](path, what)
    if not rows:
        raise ValueError(f"{what} has no row: expected at least one")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{what}, row {i} is {clipped(repr(row))}: expected fields and values")
    return rows


def _delimited(path: Path, what: str) -> list[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    lines = [line for line in lines if line]
    header = lines[0] if lines else []
    if len(set(header)) != len(header):
        raise ValueError(f"{what} has the columns {listed(header)}: expected each once")
    for i, line in enumerate(lines[1:], 1):
        if len(line) != len(header):
            raise ValueError(f"{what}, row {i} has {len(line)} cells: expected {len(header)}")
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _json(path: Path, what: str) -> list[Any]:
    made = parse_json(path.read_bytes(), what)
    if isinstance(made, dict):
        made = next((made[key] for key in ("prompts", "data") if key in made), made)
    if not isinstance(made, list):
        raise ValueError(f"{what} holds no rows: expected a list, or one under `prompts` or `data`")
    return made


def _json_lines(path: Path, what: str) -> list[Any]:
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    return [parse_json(line, f"{what}, line {n}") for n, line in lines if line.strip()]
