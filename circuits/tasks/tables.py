"""Reads the tables of prompt pairs that circuit-discovery projects publish.

Files are CSV, TSV, JSON (a list of rows, or one under `prompts` or `data`) or JSON lines. Their format is recognised by
their columns; a table of an unknown format is refused with an error that lists the known ones.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from circuits.checks import clipped
from circuits.json_files import parse_json
from circuits.tasks.formats import FORMATS, Format, NoCounterpartError, Row, TableContext, listed
from circuits.tasks.generated import Generated
from circuits.tasks.items import Item
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

    Answers given as token ids are kept as ids, which are only valid for the tokenizer that the table was made with.
    Texts are taken unchanged, except that MIB's names get the leading space that MIB's own code adds.

    Args:
        path: a file that ends in .csv, .tsv, .json or .jsonl.
        format: one of `FORMATS`; recognised by the columns if not given.
        counterpart: which counterpart to take if a table has several: a column, or a name in a row's `corrupt_prompt`.
        tokenizer: a model's input or its `encode`. With it, the years of a greater-than table become tokens, each
            encoded alone, and an agreement table keeps only the verbs that are one token.

    Returns:
        The items; rows without a counterpart are left out and listed.

    Raises:
        FileNotFoundError: if there is no such file.
        KeyError: if there is no such format, or no such counterpart.
        ValueError: if the table's columns fit no format, or a row does not fit its columns.
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
    reading = TableContext(columns, counterpart, Reader(tokenizer))
    items, lacking = [], []
    for i, row in enumerate(rows, 1):
        try:
            items.append(chosen.read(row, reading))
        except NoCounterpartError:
            lacking.append(f"row {i}")
        except ValueError as error:
            raise ValueError(f"{what}, row {i}: {error}") from None
    if not items:
        raise ValueError(f"{what} has no rows with a counterpart: expected at least one")
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
        raise ValueError(f"{what} has no rows: expected at least one")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{what}, row {i} is {clipped(repr(row))}: expected an object with fields"
            )
    return rows


def _delimited(path: Path, what: str) -> list[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        # utf-8-sig: spreadsheets write a byte-order mark, which would become part of the first column's name.
        # newline="": the csv module reads line ends inside quotes itself.
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
        raise ValueError(
            f"{what} is not a list of rows: expected a list, or one under `prompts` or `data`"
        )
    return made


def _json_lines(path: Path, what: str) -> list[Any]:
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    return [parse_json(line, f"{what}, line {n}") for n, line in lines if line.strip()]
