"""Checks whether the ledger was changed by anything but itself."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Generator, Iterator, Mapping

from circuits.database import Database
from circuits.edits.entries import TABLES, Entry, Event
from circuits.history import content_hash

_TABLES = "SELECT 1 FROM sqlite_master WHERE name LIKE 'edit\\_%' ESCAPE '\\'"


def verify(database: Database) -> list[str]:
    """What is wrong with a workspace's ledger, one line each.

    Every hash is taken again: of entries, events, reports and original bytes; every reference is followed, and
    SQLite checks its own pages.
    """
    if not database.path.is_file():
        return []
    try:
        with database.reading(*TABLES) as connection:
            # An event that is written between two of the queries below would look like one that is missing.
            connection.execute("BEGIN")  # all of it as it is now, whoever else writes
            if not connection.execute(_TABLES).fetchone():
                return []  # nothing was ever edited, and nothing can be made here
            return list(_faults(connection))
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return [f"the database is damaged: {error}"]


def _faults(connection: sqlite3.Connection) -> Iterator[str]:
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            yield f"the database is damaged: {line}"
    entries: dict[str, Entry] = {}
    for name, model_hash, text in connection.execute("SELECT * FROM edit_entries"):
        try:
            entries[name] = Entry.read(name, text)
            if entries[name].model_hash != model_hash:
                yield f"ledger entry {name[:12]} stands under another model"
        except (ValueError, KeyError, TypeError) as error:
            yield str(error.args[0])
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
    query = "SELECT id, model_hash, branch, hash, body FROM edit_events ORDER BY id"
    for i, model_hash, branch, name, text in connection.execute(query):
        try:
            event = Event.read(name, text)
            raw = json.loads(text)
        except (ValueError, KeyError, TypeError) as error:
            yield f"event {i}: {error.args[0]}"
            continue
        if (raw["model_hash"], raw["branch"]) != (model_hash, branch):
            yield f"event {i} was changed: it stands under another model or branch"
            continue
        # The first event of a model has the model's own hash before it.
        if raw["previous"] != last.get(model_hash, model_hash):
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
