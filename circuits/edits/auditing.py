"""Checks the logs of a workspace: the ledger, and the circuits, names and families that people saved.

What is in one file cannot prove that it is as it was written: whoever can write the file can write all its hashes. So
the word for a database without a fault is `consistent`; that it is the same as before is shown by a head that somebody
kept elsewhere.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from circuits.database import RECORDS, Database, schema_faults
from circuits.edits.entries import EVENTS, Entry, Event
from circuits.history import Head, content_hash
from circuits.json_files import parse_json

LOGS = (EVENTS, RECORDS)
"""What a head counts: events of the ledger, and versions of what people saved."""


def head(database: Database) -> Head:
    """The head of a workspace's logs: events of the ledger, then saved versions.

    Raises:
        ValueError: if the database is damaged, or no regular file.
    """
    if not database.there():
        with sqlite3.connect(":memory:") as nothing:
            return Head.of(nothing, LOGS)
    try:
        with _as_it_is(database) as connection:
            return Head.of(connection, LOGS)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise ValueError(f"database {str(database.path)!r} cannot be read: {error}") from error


def verify(database: Database, kept: Head | str | None = None) -> list[str]:
    """What is wrong with a workspace's logs, one line each; see `audit`."""
    return audit(database, kept)[0]


def audit(database: Database, kept: Head | str | None = None) -> tuple[list[str], Head | None]:
    """What is wrong with a workspace's logs, one line each, and the head that this is said of; None if it is damaged.

    Every hash is taken again: of entries, events, reports and original bytes; every reference is followed, saved
    versions are read and counted, tables and triggers are those that are made, and SQLite checks its own pages.

    Args:
        database: of the workspace.
        kept: a head that was printed or returned before and kept elsewhere; all rows up to it must be as they were.

    Raises:
        ValueError: if `kept` is no head, or the database no regular file.
    """
    if isinstance(kept, str):
        kept = Head.parse(kept, len(LOGS))
    if not database.there():
        gone = kept is not None and sum(kept.counts) > 0
        return ["there is no database any more"] if gone else [], head(database)
    try:
        with _as_it_is(database) as connection:
            since = [] if kept is None else _changed_since(connection, kept)
            found = [*_faults(connection), *since]
            return found, None if found else Head.of(connection, LOGS)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return [_damaged(error)], None


@contextmanager
def _as_it_is(database: Database) -> Iterator[sqlite3.Connection]:
    with database.reading() as connection:
        # An event that is written between two queries would look like one that is missing.
        connection.execute("BEGIN")  # all of it as it is now, whoever else writes
        yield connection


def _damaged(error: object) -> str:
    return f"the database is damaged: {str(error)[:200]}"


def _changed_since(connection: sqlite3.Connection, kept: Head) -> list[str]:
    now = Head.of(connection, LOGS, kept.counts)
    if now == kept:
        return []
    names = ("events of the ledger", "saved versions")
    short = [
        f"there are {n} {name}, and {wanted} at that head"
        for n, wanted, name in zip(now.counts, kept.counts, names, strict=True)
        if n < wanted
    ]
    return short or [f"what was written up to head {str(kept)[:40]}… is not what it was then"]


def _faults(connection: sqlite3.Connection) -> Iterator[str]:
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            yield _damaged(line)
    faults = schema_faults(connection)
    yield from faults
    yield from Database.faults(connection)
    (there,) = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE name IN ('edit_entries', 'edit_originals', 'edit_reports', "
        "'edit_events')"
    ).fetchone()
    if there == 4:
        yield from _ledger_faults(connection)


def _ledger_faults(connection: sqlite3.Connection) -> Iterator[str]:
    entries: dict[str, Entry] = {}
    query = "SELECT hash, model_hash, body FROM edit_entries"
    for name, model_hash, text in connection.execute(query):
        try:
            entries[name] = Entry.read(name, text)
            if entries[name].model_hash != model_hash:
                yield f"ledger entry {name[:12]} stands under another model"
        except ValueError as error:
            yield str(error)
    # Bytes are checked by their hash alone, since an entry names them by it: changed bytes are under a name that is
    # wrong.
    rows = connection.execute("SELECT hash, bytes FROM edit_originals")
    originals = yield from _changed(rows, bytes, "original bytes {} were changed")
    rows = connection.execute("SELECT hash, body FROM edit_reports")
    reports = yield from _changed(rows, str, "report {} was changed")
    for entry in entries.values():
        if entry.parent != entry.model_hash and entry.parent not in entries:
            yield f"ledger entry {entry.hash[:12]} stands on one that is missing: {entry.parent[:12]}"
        for parameter, name in entry.originals.items():
            if name not in originals:
                yield f"original bytes {name[:12]} of {parameter} are missing"
    yield from _event_faults(connection, entries, reports)


def _changed(rows: sqlite3.Cursor, kind: type, fault: str) -> Generator[str, None, set[str]]:
    """The rows whose contents have not the hash that they are under; returns the hashes of all."""
    found = set()
    for name, content in rows:
        # SQLite columns hold any type: a number in a text column has to be a fault and not a crash in the hash.
        if not isinstance(content, kind) or content_hash(content) != name:
            yield fault.format(str(name)[:12])
        found.add(name)
    return found


def _event_faults(
    connection: sqlite3.Connection, entries: Mapping[str, Entry], reports: set[str]
) -> Iterator[str]:
    last: dict[str, str] = {}
    reached: set[str] = set()
    heads: dict[tuple[str, str], str] = {}
    undone: dict[tuple[str, str], list[str]] = {}
    query = "SELECT id, model_hash, branch, hash, body FROM edit_events ORDER BY id"
    for i, model_hash, branch, name, text in connection.execute(query):
        try:
            event = Event.read(name, text)
            raw: Any = parse_json(text, f"event {i}")
        except ValueError as error:
            yield f"event {i}: {error}"
            continue
        if (raw.get("model_hash"), raw["branch"]) != (model_hash, branch):
            yield f"event {i} was changed: it stands under another model or branch"
            continue
        # The first event of a model has the model's own hash before it.
        if raw.get("previous") != last.get(model_hash, model_hash):
            yield f"event {i} does not follow the one before it: one is missing or out of order"
        last[model_hash] = name
        ends = {event.start, event.end} | ({event.entry} if event.entry else set())
        # The model's own hash stands for the state before any edit, of which there is no entry.
        for end in ends - {model_hash}:
            if end not in entries or entries[end].model_hash != model_hash:
                yield f"event {i} names an entry that is missing: {end[:12]}"
        if not _moves(event, entries):
            yield f"event {i} is no {event.kind}: its entries do not follow each other"
        # `main` is there from the beginning, at the model as it is; other branches are wherever their first event
        # begins.
        head = heads.get((model_hash, branch), model_hash if branch == "main" else event.start)
        if event.start != head:
            yield f"event {i} does not begin where branch {branch!r} was"
        heads[model_hash, branch] = event.end
        again = undone.setdefault((model_hash, branch), [])
        if event.kind == "undo":
            again.append(event.start)
        elif event.kind == "apply":
            again.clear()
        elif event.kind == "redo" and (not again or again.pop() != event.end):
            yield f"event {i} makes an edit again that was not undone last"
        if event.report and event.report not in reports:
            yield f"report {event.report[:12]} is missing"
        reached.update(ends)
    # Entries are only ever written together with the event that moves a head to them.
    for name in entries.keys() - reached:
        yield f"ledger entry {name[:12]} is in no event: one is missing"


def _moves(event: Event, entries: Mapping[str, Entry]) -> bool:
    """Whether an event's ends are what its kind says; True where an entry is missing, which is told apart."""
    if event.kind in ("branch", "measure"):
        return event.start == event.end
    # An undo leads from an entry to its parent, apply and redo from the parent to the entry.
    child, parent = (event.start, event.end) if event.kind == "undo" else (event.end, event.start)
    return child not in entries or entries[child].parent == parent
