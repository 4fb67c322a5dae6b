"""Append-only logs in SQLite: rows in streams, never changed, with who wrote them when; their hashes and head."""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from circuits.checks import clipped

_HEAD = re.compile(r"(?P<counts>[0-9]{1,15}(-[0-9]{1,15})*)-(?P<hash>[0-9a-f]{64})")

LAST = "ORDER BY id DESC LIMIT 1"
"""The end of a query for the last row only."""


@dataclass(frozen=True)
class Log:
    """A table to which rows are only added. Rows with equal first columns are a stream, in the order of their `id`.

    A writer reads the last row of a stream in the transaction in which it adds the next one. So it notices when
    somebody else has added to the stream meanwhile, and can chain rows: each holds the hash of the one before.

    Attributes:
        table: its name; it has a column `id`, an INTEGER PRIMARY KEY.
        columns: the columns of a row, those that name the stream first.
    """

    table: str
    columns: tuple[str, ...]

    def select(self, n: int, rest: str = "ORDER BY id") -> str:
        """The query for rows by their first `n` columns; `rest` says which of them, in which order.

        >>> Log("events", ("branch", "text")).select(1)
        'SELECT branch, text FROM events WHERE branch=?1 ORDER BY id'
        """
        # Numbered places, so that the rest of a query can use the same values (?1) once more.
        key = " AND ".join(f"{column}=?{i}" for i, column in enumerate(self.columns[:n], 1))
        return f"SELECT {', '.join(self.columns)} FROM {self.table} WHERE {key} {rest}"

    def last(self, connection: sqlite3.Connection, *key: str) -> tuple[Any, ...] | None:
        """The last row of a stream; None if it has none."""
        return connection.execute(self.select(len(key), LAST), key).fetchone()

    def rows(self, connection: sqlite3.Connection, most: int = -1) -> Iterator[tuple[Any, ...]]:
        """The first rows of all streams, as they were added; all by default, and none where there is no table."""
        there = "SELECT 1 FROM sqlite_master WHERE type='table' AND name=?"
        if connection.execute(there, (self.table,)).fetchone():
            columns = ", ".join(self.columns)
            query = f"SELECT {columns} FROM {self.table} ORDER BY id LIMIT ?"
            yield from connection.execute(query, (most,))

    def append(self, connection: sqlite3.Connection, *row: Any) -> None:
        """Add a row."""
        places = ", ".join("?" * len(self.columns))
        names = ", ".join(self.columns)
        connection.execute(f"INSERT INTO {self.table} ({names}) VALUES ({places})", row)


@dataclass(frozen=True)
class Head:
    """How far logs have come. Whoever keeps it can tell later whether their rows up to here are still the same.

    Nothing that is in a file can prove this: who can write the file can write all its hashes.

    Attributes:
        counts: the number of rows of each log.
        hash: SHA-256 over all these rows, in hexadecimal.
    """

    counts: tuple[int, ...]
    hash: str

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.counts))}-{self.hash}"

    @classmethod
    def parse(cls, text: str, n_logs: int) -> Head:
        """Read it as it is written.

        Raises:
            ValueError: if the text is not a head over `n_logs` logs.
        """
        found = _HEAD.fullmatch(text.strip())
        counts = tuple(map(int, found["counts"].split("-"))) if found else ()
        if found is None or len(counts) != n_logs:
            form = "-".join(["COUNT"] * n_logs)
            raise ValueError(
                f"head {clipped(text, 90)!r} is not of the form {form}-HASH, as it was printed"
            )
        return cls(counts, found["hash"])

    @classmethod
    def of(
        cls,
        connection: sqlite3.Connection,
        logs: Sequence[Log],
        counts: Sequence[int] | None = None,
    ) -> Head:
        """The head of logs, or what it was when they had fewer rows.

        Args:
            connection: to their database.
            logs: which; those without a table are empty.
            counts: how many of the first rows of each to take; all if not given.
        """
        digest = hashlib.sha256()
        taken = []
        for i, log in enumerate(logs):
            n = 0
            for row in log.rows(connection, -1 if counts is None else counts[i]):
                # ASCII, one line a row: no two lists of rows give the same text. SQLite columns hold bytes too.
                digest.update(
                    json.dumps(row, default=lambda b: {"bytes": b.hex()}).encode() + b"\n"
                )
                n += 1
            digest.update(b"\n")
            taken.append(n)
        return cls(tuple(taken), digest.hexdigest())


def content_hash(content: str | bytes) -> str:
    """SHA-256 of a text (as UTF-8) or of bytes, in hexadecimal."""
    # Surrogates stand for bytes of file names that are not UTF-8; they have to be hashed too.
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def signed(author: str | None) -> tuple[str, str]:
    """Who writes (the user of the machine, if no author is given), and the time in UTC, to the second."""
    return _user() if author is None else author, datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run as a user without a name
        return "unknown"
