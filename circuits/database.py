"""The workspace's database: what people write, with its history.

SQLite in WAL mode. Nothing is changed or deleted: each save is a new version that says who made it, when,
and why. Two people who change the same thing are told: a save names the version that it started from.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from circuits.history import Log, signed
from circuits.json_files import parse_json

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

LEDGER_TABLES = (
    "CREATE TABLE IF NOT EXISTS edit_entries (hash TEXT PRIMARY KEY, model_hash TEXT NOT NULL, "
    "body TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS edit_entries_of ON edit_entries (model_hash)",
    "CREATE TABLE IF NOT EXISTS edit_originals (hash TEXT PRIMARY KEY, bytes BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS edit_reports (hash TEXT PRIMARY KEY, body TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS edit_events (id INTEGER PRIMARY KEY, model_hash TEXT NOT NULL, "
    "branch TEXT NOT NULL, hash TEXT NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS edit_events_of ON edit_events (model_hash, branch, id)",
    "CREATE INDEX IF NOT EXISTS edit_events_all ON edit_events (model_hash, id)",
)
"""The tables of `circuits.edits`. Here, since a writer has to know all that may be in the file."""

_LONGEST = 200
"""How many characters a name has at most."""

RECORDS = Log(
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
        fault: what is wrong with its contents, if they cannot be read; `body` is then None.
    """

    kind: str
    model_hash: str
    name: str
    version: int
    body: Any
    note: str
    author: str
    created: str
    fault: str = ""


Check = Callable[[Any], object]
"""Raises ValueError, KeyError, TypeError or AttributeError if a body is not of the form that a kind has."""


def check_name(kind: str, name: str) -> None:
    """Raise ValueError unless something may be saved under a name.

    Args:
        kind: what is saved.
        name: what it is to be called.
    """
    if not name.strip() or len(name) > _LONGEST:
        shown = name if len(name) <= _LONGEST else f"{name[:20]}…"
        raise ValueError(f"name {shown!r} of a {kind} must have 1 to {_LONGEST} characters")


class Database:
    """The records of a workspace.

    Args:
        path: of the file; made at the first save.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def there(self) -> bool:
        """Whether the file has been made.

        Raises:
            ValueError: if something else has its name: a folder, a pipe, or a link to what is not there.
            OSError: if that cannot be found out.
        """
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError:
            if not self.path.is_symlink():
                return False
            what = "a link to a file that is not there"
        else:
            if stat.S_ISREG(mode):
                return True
            what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise ValueError(f"database {str(self.path)!r} is {what}")

    @contextmanager
    def open(self, *tables: str) -> Iterator[sqlite3.Connection]:
        """A connection, closed at the end, with its tables made.

        Args:
            tables: SQL statements that make more tables than the records' if they are not there.

        Raises:
            BlockingIOError: if another process keeps it locked for longer than `PATIENCE`.
            OSError: if it cannot be opened or written.
            ValueError: if its tables are not those that are made, or it is no regular file; nothing is written then.
        """
        self.there()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without Python's own transactions: each begins and ends where it is written here.
        with (
            self._in_words(),
            closing(
                sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
            ) as connection,
        ):
            _prepare(connection, self.path, (_SCHEMA, *tables))
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that only reads; the file must be there, and nothing is made in it.

        Raises:
            BlockingIOError, OSError: as `open`.
        """
        writable = os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
        address = f"{self.path.absolute().as_uri()}?mode={'rw' if writable else 'ro'}"
        # Where this process cannot write, nobody else can either, so that SQLite need not look for the files of a
        # writer, unless there are such: a writer's last words are in them.
        if not writable and not self.path.with_name(f"{self.path.name}-wal").exists():
            address += "&immutable=1"
        with (
            self._in_words(),
            closing(
                sqlite3.connect(address, PATIENCE, isolation_level=None, uri=True)
            ) as connection,
        ):
            connection.execute("PRAGMA query_only=ON")
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
            ValueError: if the name is empty or too long, or a later version than `replaces` is there.
        """
        check_name(kind, name)
        # None is a deletion, which is a version like any other.
        text = None if body is None else json.dumps(body, allow_nan=False)
        who, when = signed(author)
        with self.writing() as connection:
            last = RECORDS.last(connection, kind, model_hash, name)
            latest, deleted = (last[3], last[4] is None) if last else (0, True)
            # 0 says that there was nothing yet: also right where the last version is a deletion.
            if replaces not in (None, latest) and not (replaces == 0 and deleted):
                raise ValueError(
                    f"{kind} {name!r} was changed meanwhile: it is at version {latest}, "
                    f"yours started from {replaces}"
                )
            row = (kind, model_hash, name, latest + 1, text, note, who, when)
            RECORDS.append(connection, *row)
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

    def history(
        self, kind: str, model_hash: str, name: str, check: Check | None = None
    ) -> list[Record]:
        """All versions of something, oldest first; empty if there is none. `check` as for `latest`."""
        rows = self.rows(RECORDS.select(3), kind, model_hash, name)
        return [_record(row, check) for row in rows]

    def latest(self, kind: str, model_hash: str, check: Check | None = None) -> list[Record]:
        """The last version of everything of a kind that was not deleted, by name.

        What is damaged is there too, with its `fault`: also what `check` refuses.
        """
        # Ids grow with every row, and names are unique within kind and weights: the largest id is the last version.
        newest = "SELECT max(id) FROM records WHERE kind=?1 AND model_hash=?2 GROUP BY name"
        last = f"AND body IS NOT NULL AND id IN ({newest}) ORDER BY name"
        return [_record(row, check) for row in self.rows(RECORDS.select(2, last), kind, model_hash)]

    def load(self, kind: str, model_hash: str, name: str, version: int | None = None) -> Record:
        """One version of something, the last if none is given.

        Raises:
            KeyError: if there is no such thing or version, or it was deleted.
            ValueError: if it is damaged.
        """
        found = self.history(kind, model_hash, name)
        wanted = [r for r in found if version in (None, r.version)]
        if wanted and wanted[-1].fault:
            raise ValueError(wanted[-1].fault)
        if not wanted or wanted[-1].body is None:
            known = ", ".join(r.name for r in self.latest(kind, model_hash)) or "none"
            which = name if version is None else f"{name} version {version}"
            raise KeyError(f"no {kind} {which!r} for weights {model_hash[:16]}: there are {known}")
        return wanted[-1]

    def rows(self, query: str, *values: str) -> list[Any]:
        """What a query finds, also where nothing can be written; nothing if there is no file or no such table.

        Raises:
            ValueError: if the file is no database, a damaged one, or no regular file.
        """
        if not self.there():
            return []
        try:
            with self.reading() as connection:
                _check_foreign(connection, self.path)
                return connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "no such table" in str(error):
                return []
            raise ValueError(f"database {str(self.path)!r} cannot be read: {error}") from error

    @staticmethod
    def faults(connection: sqlite3.Connection) -> Iterator[str]:
        """What is wrong with the records: their types, their bodies, and versions that are missing, one line each."""
        last: dict[tuple[Any, ...], int] = {}
        for row in RECORDS.rows(connection):
            kind, model_hash, name, version, body, *texts = row
            what = f"{str(kind)[:60]} {str(name)[:60]!r} version {str(version)[:20]}"
            if not all(isinstance(text, str) for text in (kind, model_hash, name, *texts)):
                yield f"{what} is damaged: its columns are not texts"
            elif not isinstance(version, int) or not isinstance(body, str | None):
                yield f"{what} is damaged: its columns are of other types"
            elif fault := _record(row).fault:
                yield fault
            stream = (kind, model_hash, name)
            if version != (before := last.get(stream, 0)) + 1:
                yield f"{what} does not follow version {before}: one is missing or out of order"
            last[stream] = version if isinstance(version, int) else before + 1


_GROUPS = ((_SCHEMA,), LEDGER_TABLES)

_Row = tuple[str, str, str, str]
"""Of a database's schema: kind, name, table, and the statement, empty where SQLite made it without one."""

_SQLITE: tuple[_Row, ...] = tuple(
    ("table", name, name, f"CREATE TABLE {name}({columns})")
    for name, columns in (
        ("sqlite_sequence", "name,seq"),
        ("sqlite_stat1", "tbl,idx,stat"),
        ("sqlite_stat4", "tbl,idx,neq,nlt,ndlt,sample"),
    )
)
"""Tables that SQLite may add by itself: of ANALYZE, and of columns that count."""


def schema_faults(connection: sqlite3.Connection) -> list[str]:
    """How a database's tables, indices, triggers and views differ from those that are made, one line each.

    The records' table, and the ledger's, are there together with their indices or not at all.
    """
    found = _made(connection)
    names = {row[:2] for row in found}
    faults = _altered(found)
    for rows in map(_made_by, _GROUPS):
        gone = [row[:2] for row in rows if row[:2] not in names]
        if len(gone) < len(rows):
            faults += [f"{kind} {name!r} of the database is missing" for kind, name in gone]
    return sorted(faults)


def _altered(found: Sequence[_Row]) -> list[str]:
    """How the rows of a schema differ from those that are made, one line each; missing ones are left out."""
    known = {row[:2]: row for row in chain(_SQLITE, *map(_made_by, _GROUPS))}
    faults = []
    # Nothing is passed over by its name or kind: whoever may write the schema itself (`PRAGMA writable_schema`) gives a
    # trigger the name of an index that SQLite makes, and its kind in other letters; SQLite goes by the statement.
    for row, n in Counter(found).items():
        kind, name, table, text = row
        # Names may have line ends in them; a fault is one line.
        what = kind if kind in ("table", "index", "trigger", "view") else repr(kind[:20])
        if (kind, name) not in known:
            faults.append(
                f"the database holds the {what} {name[:60]!r}, which circuits does not make"
            )
        elif row != known[kind, name]:
            said = " ".join(text.split())[:200] or "without a statement"
            faults.append(f"{kind} {name!r} of the database was altered: it is {said}")
        elif n > 1:
            faults.append(f"{kind} {name!r} of the database, on {table!r}, is there {n} times")
    return faults


@cache
def _made_by(statements: tuple[str, ...]) -> tuple[_Row, ...]:
    """The schema that statements make."""
    with closing(sqlite3.connect(":memory:")) as made:
        for statement in statements:
            made.execute(statement)
        return tuple(_made(made))


def _made(connection: sqlite3.Connection) -> list[_Row]:
    """The schema of a database, each statement with spaces only where they matter."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    # Only what SQLite takes for a space is one: a no-break space is part of a name.
    return [
        (
            str(kind),
            str(name),
            str(table),
            re.sub(r" ?([(),]) ?", r"\1", re.sub(r"[ \t\n\f\r]+", " ", str(text or ""))),
        )
        for kind, name, table, text in rows
    ]


def _check_foreign(connection: sqlite3.Connection, path: Path) -> None:
    """Raise ValueError if the file would do something by itself when it is read or written."""
    for kind, name, _, text in _made(connection):
        if kind in ("table", "index") and re.match(r"CREATE (TABLE|(UNIQUE )?INDEX) |$", text):
            continue
        what = kind if kind in ("trigger", "view") else f"statement {text[:60]!r} under"
        raise ValueError(
            f"database {str(path)!r} holds the {what} {name[:60]!r}, which circuits does not make: nothing is read or "
            "written; `circuits edit verify` lists what is wrong"
        )


def _check_unaltered(connection: sqlite3.Connection, path: Path) -> None:
    """Raise ValueError if something in the file is not as it is made.

    A constraint can undo a save as a trigger can: `UNIQUE … ON CONFLICT REPLACE` deletes what was there. Tables and
    indices that are missing are no fault: earlier versions had fewer, and they are made.
    """
    if faults := _altered(_made(connection)):
        raise ValueError(
            f"database {str(path)!r}: {min(faults)}; nothing is written; `circuits edit verify` lists what is wrong"
        )


def _prepare(connection: sqlite3.Connection, path: Path, tables: Sequence[str]) -> None:
    """Make the tables of a new database; whoever comes second waits (SQLite does not, here).

    Raises:
        ValueError: if there are others.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            _check_unaltered(connection, path)
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


def _record(row: tuple[Any, ...], check: Check | None = None) -> Record:
    made = Record(*row)
    if made.body is None:
        return made
    what = f"{made.kind} {str(made.name)[:60]!r} version {made.version}"
    try:
        body = parse_json(made.body, "its text")
        if check is not None:
            check(body)
        return replace(made, body=body)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return replace(made, body=None, fault=f"{what} is damaged: {str(error)[:200]}")
