"""The rows of the ledger: entries and events, each under the hash of its text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from circuits.edits.records import Edit, canonical, parse_edit

SCHEMA = 1
"""Version of the layout of entries and events."""

TABLES = (
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
"""The ledger's tables in `workspace.db`."""

Kind = Literal["apply", "undo", "redo", "branch", "measure"]
"""What an event does: the first three move a branch's head, `branch` begins one, `measure` adds a report."""


class LedgerError(ValueError):
    """The ledger is not what it was when it was written, or a replay gave something else."""


@dataclass(frozen=True)
class Entry:
    """An edit in the ledger.

    Attributes:
        hash: SHA-256 of everything below, in hexadecimal.
        parent: the hash of the entry before; of the weights, for a first one.
        model_hash: of the weights outside all edits.
        edit: what was done.
        note: why.
        author: who.
        created: when, in UTC.
        seed: of whatever was random when the edit was made.
        before: SHA-256 of each parameter that it changed, as it was.
        after: as it became.
        originals: SHA-256 of the stored original bytes, by parameter.
    """

    hash: str
    parent: str
    model_hash: str
    edit: Edit
    note: str
    author: str
    created: str
    seed: int
    before: Mapping[str, str]
    after: Mapping[str, str]
    originals: Mapping[str, str]

    @classmethod
    def read(cls, digest: str, text: str) -> Entry:
        """From its row.

        Raises:
            LedgerError: if it is not what its hash says.
        """
        if text_hash(text) != digest:
            raise LedgerError(f"ledger entry {digest[:12]} was changed: its text has another hash")
        raw = json.loads(text)
        if raw.pop("schema") != SCHEMA:
            raise LedgerError(f"ledger entry {digest[:12]} has a layout that is not known")
        return cls(**raw | {"hash": digest, "edit": parse_edit(raw["edit"])})

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"edit": self.edit.to_dict()}

    @property
    def text(self) -> str:
        """The canonical JSON of which its hash is taken."""
        return canonical(
            {k: v for k, v in self.to_dict().items() if k != "hash"} | {"schema": SCHEMA}
        )

    def hashed(self) -> Entry:
        """The entry under the hash of its text."""
        return replace(self, hash=text_hash(self.text))


@dataclass(frozen=True)
class Event:
    """A move of a branch's head.

    Attributes:
        kind: what happened.
        branch: of which branch.
        start: the head before.
        end: the head after.
        author: who.
        created: when, in UTC.
        entry: what was measured, of a report; else empty.
        report: the SHA-256 of the report that was added, if one was.
        hash: of all this and the event before.
    """

    kind: Kind
    branch: str
    start: str
    end: str
    author: str
    created: str
    entry: str
    report: str
    hash: str

    @classmethod
    def read(cls, digest: str, text: str) -> Event:
        """From its row.

        Raises:
            LedgerError: if it is not what its hash says.
        """
        if not isinstance(text, str) or text_hash(text) != digest:
            raise LedgerError(
                f"ledger event {str(digest)[:12]} was changed: its text has another hash"
            )
        raw = json.loads(text)
        if raw["schema"] != SCHEMA or raw["kind"] not in get_args(Kind):
            raise LedgerError(
                f"ledger event {digest[:12]} is of a layout or kind that is not known"
            )
        names = ("kind", "branch", "start", "end", "author", "created", "entry", "report")
        return cls(**{name: raw[name] for name in names}, hash=digest)


def text_hash(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
