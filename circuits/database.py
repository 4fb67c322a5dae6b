"""The workspace's database: what people write, with its history.

SQLite in WAL mode. Nothing is changed or deleted: each save is a new version that says who made it, when,
and why. Two people who change the same thing are told: a save names the version that it started from.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuits.history import Log, signed

PATIENCE = 30.0
"""How long to wait for another process that writes, in seconds."""

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

_RECORDS = Log(
    "records", ("kind", "model_hash", "name", "version", "body", "note", "author", "created")
)


@dataclass(frozen=True)
class Record:
    """A version of something that a person saved.

    Attributes:
        kind: what it is, e.g. `circuit`.
        model_hash: of the model that it belongs to.
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

        Raises:
            BlockingIOError: if another process keeps it locked for longer than `PATIENCE`.
            OSError: if it cannot be opened or written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without Python's own transactions: each begins and ends where it is written here.
        with (
            self._in_words(),
            closing(
                sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
            ) as connection,
        ):
            _prepare(connection, (_SCHEMA, *tables))
            yield connection

    @contextmanager
    def reading(self, *tables: str) -> Iterator[sqlite3.Connection]:
        """A connection to what is there, also where nothing can be written; then no tables are made.

        Raises:
            BlockingIOError, OSError: as `open`.
        """
        if os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK):
            with self.open(*tables) as connection:
                yield connection
            return
        address = f"{self.path.absolute().as_uri()}?mode=ro"
        # Nobody else can write here either, so that SQLite need not look for the files of a writer, unless there are
        # such: a writer's last words are in them.
        if not self.path.with_name(f"{self.path.name}-wal").exists():
            address += "&immutable=1"
        with (
            self._in_words(),
            closing(
                sqlite3.connect(address, PATIENCE, isolation_level=None, uri=True)
            ) as connection,
        ):
            yield connection

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """What SQLite says of locks, disks and permissions, which is nothing about the content, in plain words."""
        try:
            yield
        except sqlite3.OperationalError as error:
            said = str(error)
            if "locked" in said or "busy" in said:
                raise BlockingIOError(
                    f"database {str(self.path)!r} was locked by another process for {PATIENCE:g} seconds: wait for it "
                    "or stop it, and try again"
                ) from error
            if any(word in said for word in ("readonly", "unable to open", "full")):
                raise OSError(
                    f"database {str(self.path)!r} cannot be opened or written: {said}"
                ) from error
            raise

    @contextmanager
    def writing(self, *tables: str) -> Iterator[sqlite3.Connection]:
        """The same inside a transaction: all of what the block writes, or none of it.

        Other writers wait for it to end.
        """
        with self.open(*tables) as connection:
            # The lock for writing is taken now. One that only reads at first and wants to write later could find that
            # somebody else has written meanwhile, and would fail without waiting.
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
            model_hash: of the model that it belongs to.
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
        # None is a deletion, which is a version like any other.
        text = None if body is None else json.dumps(body, allow_nan=False)
        who, when = signed(author)
        with self.writing() as connection:
            last = _RECORDS.last(connection, kind, model_hash, name)
            latest, deleted = (last[3], last[4] is None) if last else (0, True)
            # 0 says that there was nothing yet: also right where the last version is a deletion.
            if replaces not in (None, latest) and not (replaces == 0 and deleted):
                raise ValueError(
                    f"{kind} {name!r} was changed meanwhile: it is at version {latest}, "
                    f"yours started from {replaces}"
                )
            row = (kind, model_hash, name, latest + 1, text, note, who, when)
            _RECORDS.append(connection, *row)
        return _record(row)

    def take_over(self, before: str, now: str) -> None:
        """Copy what was saved under another hash of the same model to its present one, unless the name is taken there.

        What was saved stays as it is; copies name the new hash, also in their bodies.
        """
        if before == now or not self.rows(
            "SELECT 1 FROM records WHERE model_hash=?1 LIMIT 1", before
        ):
            return
        columns = "kind, name, version, note, author, created"
        with self.writing() as connection:
            connection.execute(
                f"INSERT INTO records (model_hash, body, {columns}) "
                f"SELECT ?2, replace(body, ?1, ?2), {columns} FROM records AS old WHERE model_hash=?1 AND NOT EXISTS "
                "(SELECT 1 FROM records WHERE kind=old.kind AND name=old.name AND model_hash=?2) ORDER BY id",
                (before, now),
            )

    def history(self, kind: str, model_hash: str, name: str) -> list[Record]:
        """All versions of something, oldest first; empty if there is none."""
        rows = self.rows(_RECORDS.select(3), kind, model_hash, name)
        return [_record(row) for row in rows]

    def latest(self, kind: str, model_hash: str) -> list[Record]:
        """The last version of everything of a kind that was not deleted, by name."""
        # Ids grow with every row, and names are unique within kind and weights: the largest id is the last version.
        newest = "SELECT max(id) FROM records WHERE kind=?1 AND model_hash=?2 GROUP BY name"
        last = f"AND body IS NOT NULL AND id IN ({newest}) ORDER BY name"
        return [_record(row) for row in self.rows(_RECORDS.select(2, last), kind, model_hash)]

    def load(self, kind: str, model_hash: str, name: str, version: int | None = None) -> Record:
        """One version of something, the last if none is given.

        Raises:
            KeyError: if there is no such thing or version, or it was deleted.
        """
        found = self.history(kind, model_hash, name)
        wanted = [r for r in found if version in (None, r.version)]
        if not wanted or wanted[-1].body is None:
            known = ", ".join(r.name for r in self.latest(kind, model_hash)) or "none"
            which = name if version is None else f"{name} version {version}"
            raise KeyError(f"no {kind} {which!r} for weights {model_hash[:16]}: there are {known}")
        return wanted[-1]

    def rows(self, query: str, *values: str) -> list[Any]:
        """What a query finds, also where nothing can be written; nothing if there is no file or no such table.

        Raises:
            ValueError: if the file is no database, or a damaged one.
        """
        if not self.path.is_file():
            return []
        try:
            with self.reading() as connection:
                return connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "no such table" in str(error):
                return []
            raise ValueError(f"database {str(self.path)!r} cannot be read: {error}") from error


def _prepare(connection: sqlite3.Connection, tables: Sequence[str]) -> None:
    """Make the tables of a new database; whoever comes second waits (SQLite does not, here)."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            # WAL: readers go on while somebody writes. Setting it takes a lock that asking does not.
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode=WAL")
            # FULL: what a person saved survives a power failure.
            connection.execute("PRAGMA synchronous=FULL")
            for statement in tables:
                connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.1)


def _record(row: tuple[Any, ...]) -> Record:
    made = Record(*row)
    return made if made.body is None else replace(made, body=json.loads(made.body))
