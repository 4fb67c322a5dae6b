"""The workspace's database: what people write, with its history.

SQLite in WAL mode. Nothing is changed or deleted: each save is a new version that says who made it, when,
and why. Two people who change the same thing are told: a save names the version that it started from.
"""

from __future__ import annotations

import getpass
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    model_hash TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    body TEXT,
    note TEXT NOT NULL,
    author TEXT NOT NULL,
    created TEXT NOT NULL,
    UNIQUE (kind, model_hash, name, version)
)
"""


@dataclass(frozen=True)
class Record:
    """A version of something that a person saved.

    Attributes:
        kind: what it is, e.g. `circuit`.
        model_hash: of the weights that it belongs to.
        name: what it is called.
        version: counted from 1.
        body: its contents; None if this version deletes it.
        note: why.
        author: who.
        created: when, in UTC.
    """

    kind: str
    model_hash: str
    name: str
    version: int
    body: Any
    note: str
    author: str
    created: str


class Database:
    """The records of a workspace.

    Args:
        path: of the file; made at the first save.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def open(self, *tables: str) -> Iterator[sqlite3.Connection]:
        """A connection, closed at the end, with its tables made.

        Args:
            tables: SQL statements that make more tables than the records' if they are not there.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as connection:
            _prepare(connection, (_SCHEMA, *tables))
            yield connection

    @contextmanager
    def writing(self, *tables: str) -> Iterator[sqlite3.Connection]:
        """The same inside a transaction: all of what the block writes, or none of it.

        Other writers wait for it to end.
        """
        with self.open(*tables) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite may have given up on its own
                    connection.execute("ROLLBACK")
                raise

    def save(
        self,
        kind: str,
        model_hash: str,
        name: str,
        body: Any,
        note: str = "",
        author: str | None = None,
        replaces: int | None = None,
    ) -> Record:
        """Save a new version.

        Args:
            kind: what it is.
            model_hash: of the weights that it belongs to.
            name: what it is called.
            body: its contents, as JSON has it; None deletes it (older versions stay).
            note: why.
            author: who; the user of the machine if not given.
            replaces: the version that it was made from; 0 for none. Not checked if not given.

        Raises:
            ValueError: if the name is empty, or a later version than `replaces` is there.
        """
        if not name.strip() or len(name) > 200:
            raise ValueError(f"name {name!r} of a {kind} must have 1 to 200 characters")
        text = None if body is None else json.dumps(body, allow_nan=False)
        author, created = user() if author is None else author, now()
        with self.writing() as connection:
            query = (
                "SELECT version, body IS NULL FROM records WHERE kind=? AND model_hash=? AND name=? "
                "ORDER BY version DESC LIMIT 1"
            )
            found = connection.execute(query, (kind, model_hash, name)).fetchone()
            latest, deleted = found or (0, True)
            anew = replaces == 0 and deleted
            if replaces is not None and replaces != latest and not anew:
                raise ValueError(
                    f"{kind} {name!r} was changed meanwhile: it is at version {latest}, "
                    f"yours started from {replaces}"
                )
            row = (kind, model_hash, name, latest + 1, text, note, author, created)
            connection.execute(
                "INSERT INTO records (kind, model_hash, name, version, body, note, author, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        return Record(kind, model_hash, name, latest + 1, body, note, author, created)

    def history(self, kind: str, model_hash: str, name: str) -> list[Record]:
        """All versions of something, oldest first; empty if there is none."""
        return self._select("kind=? AND model_hash=? AND name=? ORDER BY version", kind, model_hash, name)  # fmt: skip

    def latest(self, kind: str, model_hash: str) -> list[Record]:
        """The last version of everything of a kind that was not deleted, by name."""
        where = (
            "kind=? AND model_hash=? AND body IS NOT NULL AND version=(SELECT max(version) FROM "
            "records AS r WHERE r.kind=records.kind AND r.model_hash=records.model_hash AND "
            "r.name=records.name) ORDER BY name"
        )
        return self._select(where, kind, model_hash)

    def load(self, kind: str, model_hash: str, name: str, version: int | None = None) -> Record:
        """One version of something, the last if none is given.

        Raises:
            KeyError: if there is no such thing or version, or it was deleted.
        """
        found = self.history(kind, model_hash, name)
        wanted = [r for r in found if version is None or r.version == version]
        if not wanted or wanted[-1].body is None:
            known = ", ".join(r.name for r in self.latest(kind, model_hash)) or "none"
            which = name if version is None else f"{name} version {version}"
            raise KeyError(f"no {kind} {which!r} for weights {model_hash[:16]}: there are {known}")
        return wanted[-1]

    def _select(self, where: str, *values: str) -> list[Record]:
        if not self.path.is_file():
            return []
        columns = "kind, model_hash, name, version, body, note, author, created"
        rows = self._read(f"SELECT {columns} FROM records WHERE {where}", values)
        return [
            Record(k, h, n, v, None if body is None else json.loads(body), note, author, at)
            for k, h, n, v, body, note, author, at in rows
        ]

    def _read(self, query: str, values: Sequence[str]) -> list[Any]:
        """Rows, also where nothing can be written."""
        try:
            if os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK):
                with self.open() as connection:
                    return connection.execute(query, values).fetchall()
            # nobody else can write either: SQLite need not look for the files of a writer
            address = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
            with closing(sqlite3.connect(address, uri=True)) as connection:
                return connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "no such table" in str(error):
                return []
            raise ValueError(f"database {str(self.path)!r} cannot be read: {error}") from error


def _prepare(connection: sqlite3.Connection, tables: Sequence[str]) -> None:
    """Make the tables of a new database; whoever comes second waits (SQLite does not, here)."""
    for tries_left in reversed(range(300)):
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            for statement in tables:
                connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or not tries_left:
                raise
            time.sleep(0.1)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def user() -> str:
    """Who works at this machine."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run as a user without a name
        return "unknown"
