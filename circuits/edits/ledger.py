"""The ledger: every edit that was made, what it did to the weights, and how to undo it (layer 4).

In `workspace.db`. An entry is an edit on top of its parent, the entry before, or of the model as it is. Its
hash is the SHA-256 of its canonical JSON, which holds the parent's hash: nobody can change an entry without
changing all that follow. Branches are heads that move from entry to entry; each move is an event, chained in
the same way. Nothing is ever changed or deleted.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as written_tensors
from torch import Tensor

from circuits.database import Database, now, user
from circuits.edits.activations import ActivationEdit, changes
from circuits.edits.recipes import Recipe, checked
from circuits.edits.records import Edit, canonical, parse_edit
from circuits.edits.weights import WeightEdit, Weights
from circuits.files import finite
from circuits.models.adapter import HookedModel

SCHEMA = 1
"""Version of the layout of entries and events."""

_TABLES = (
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

_LAST_OF = (
    "SELECT hash, body FROM edit_events WHERE model_hash=? AND branch=? ORDER BY id DESC LIMIT 1"
)

Kind = Literal["apply", "undo", "redo", "branch", "measure"]
"""What an event does: the first three move a branch's head, `branch` begins one, `measure` adds a report."""

_TRIES = 20
_FEW = 20


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
        if _sha(text) != digest:
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
        return replace(self, hash=_sha(self.text))


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


@dataclass(frozen=True)
class Replayed:
    """An entry, made again.

    Attributes:
        entry: which.
        same: whether every parameter had the same hash, before and after.
    """

    entry: Entry
    same: bool


class Ledger:
    """The edits of one model in a workspace.

    Several processes may write at once: each sees what the others have made before its own is added. Nothing
    works while edits are in force, or once the model's weights are not those that the ledger is of.

    Args:
        database: of the workspace.
        model: whose edits; it is never changed outside `edited`.
    """

    def __init__(self, database: Database, model: HookedModel) -> None:
        self.database = database
        self.model = model
        self.model_hash = model.intact_hash
        self._at = self.model_hash
        self._tensors: dict[str, Tensor] = {}
        self._entries: dict[str, Entry] = {}

    # --- looking ---------------------------------------------------------------------------------

    def head(self, branch: str = "main") -> str:
        """The hash of a branch's last entry; the model's own where there is none.

        Raises:
            KeyError: if there is no such branch (`main` always is).
        """
        return self._state(branch)[0]

    def _state(self, branch: str) -> tuple[str, str]:
        """A branch's head, and the hash of its last event: empty where it has none."""
        rows = self._rows(_LAST_OF, branch)
        if not rows and branch != "main":
            known = ", ".join(self.branches())
            raise KeyError(f"no branch {branch!r} of {self.model.name}: there are {known}")
        return (_event(*rows[0]).end, rows[0][0]) if rows else (self.model_hash, "")

    def branches(self) -> list[str]:
        """The names of the branches, `main` first, others as they were begun."""
        rows = self._rows("SELECT branch FROM edit_events WHERE model_hash=? ORDER BY id")
        return list(dict.fromkeys(["main", *(branch for (branch,) in rows)]))

    def events(self, branch: str | None = None) -> list[Event]:
        """What happened, in order; on one branch or on all."""
        if branch is None:
            rows = self._rows("SELECT hash, body FROM edit_events WHERE model_hash=? ORDER BY id")
        else:
            query = "SELECT hash, body FROM edit_events WHERE model_hash=? AND branch=? ORDER BY id"
            rows = self._rows(query, branch)
        return [_event(digest, text) for digest, text in rows]

    def entry(self, digest: str) -> Entry:
        """An entry by its hash, or by the first digits of it.

        Raises:
            KeyError: if there is none, or several begin so.
            LedgerError: if it was changed.
        """
        if digest in self._entries:
            return self._entries[digest]
        if not digest or any(c not in "0123456789abcdef" for c in digest):
            raise KeyError(f"no entry {digest!r}: expected the first digits of its hash")
        query = "SELECT hash, body FROM edit_entries WHERE model_hash=? AND hash GLOB ?"
        found = [Entry.read(h, text) for h, text in self._rows(query, f"{digest}*")]
        if len(found) != 1:
            what = f"{len(found)} entries begin with" if found else "no entry"
            raise KeyError(f"{what} {digest!r} in the ledger of {self.model.name}")
        self._entries[found[0].hash] = found[0]
        return found[0]

    def _resolved(self, digest: str) -> str:
        """The whole hash of an entry, or of the model, from its first digits.

        Raises:
            KeyError: if there is none, or several begin so.
        """
        if digest in (self.model_hash, self._at) or digest in self._entries:
            return digest
        if not digest or not self.model_hash.startswith(digest):
            return self.entry(digest).hash
        try:
            self.entry(digest)
        except KeyError as error:
            if "no entry" in str(error):
                return self.model_hash
        raise KeyError(f"both the model and an entry begin with {digest!r}: give more digits")

    def entries(self, branch: str = "main", at: str | None = None) -> list[Entry]:
        """The entries of a branch from the first to its head (or to another entry)."""
        found: list[Entry] = []
        digest = self.head(branch) if at is None else self._resolved(at)
        asked = 0
        while digest != self.model_hash:
            asked += digest not in self._entries
            if asked == _FEW:  # the rest in one query
                rows = self._rows("SELECT hash, body FROM edit_entries WHERE model_hash=?")
                more = [(h, text) for h, text in rows if h not in self._entries]
                self._entries |= {h: Entry.read(h, text) for h, text in more}
            found.append(self.entry(digest))
            digest = found[-1].parent
        return found[::-1]

    def recipe(self, branch: str = "main", at: str | None = None) -> Recipe:
        """A branch's edits as a recipe, with all notes and authors; the seed is that of the last."""
        entries = self.entries(branch, at)
        notes = "; ".join(dict.fromkeys(e.note for e in entries if e.note))
        authors = "; ".join(dict.fromkeys(e.author for e in entries if e.author))
        seed = entries[-1].seed if entries else 0
        return Recipe(tuple(e.edit for e in entries), self.model_hash, notes, authors, seed)

    def reports(self, digest: str) -> list[dict[str, Any]]:
        """What was measured of an entry, oldest first."""
        whole = self._resolved(digest)
        wanted = [e.report for e in self.events() if e.kind == "measure" and e.entry == whole]
        return [json.loads(self._report(report)) for report in wanted]

    def _report(self, digest: str) -> str:
        rows = self._all("SELECT body FROM edit_reports WHERE hash=?", digest)
        if not rows or _sha(rows[0][0]) != digest:
            raise LedgerError(f"report {digest[:12]} was changed or is missing")
        return rows[0][0]

    # --- writing ---------------------------------------------------------------------------------

    def apply(
        self,
        edits: Edit | Sequence[Edit] | Recipe,
        note: str = "",
        branch: str = "main",
        author: str | None = None,
        seed: int = 0,
    ) -> list[Entry]:
        """Put edits on top of a branch.

        If somebody else adds to the branch meanwhile, these come after.

        Args:
            edits: one, several, or a recipe (whose note, author and seed are taken if none are given).
            note: why.
            branch: where.
            author: who; the user of the machine if not given.
            seed: of whatever was random when the edits were made.

        Raises:
            KeyError: if a site, a layer or the branch is unknown.
            ValueError: if an edit does not fit, a recipe is for other weights, or edits are in force. Nothing
                is written then.
        """
        if isinstance(edits, Recipe):
            edits.check(self.model)
            note, author, seed = (
                note or edits.note,
                author or edits.author or None,
                seed or edits.seed,
            )
            given: Sequence[Edit] = edits.edits
        else:
            given = [edits] if isinstance(edits, Edit) else edits
        if not given:
            raise ValueError("edits: expected at least one")
        blank = Entry(
            "", "", self.model_hash, given[0], note, user() if author is None else author, now(), seed, {}, {}, {}
        )  # fmt: skip
        with self._alone():
            fitting = checked(self.model, given)
            for _ in range(_TRIES):
                start, last = self._state(branch)
                self._move_to(start)
                made, originals, tensors = self._made(fitting, replace(blank, parent=start))
                with self._writing(branch, last) as connection:
                    if connection is None:
                        continue
                    connection.executemany(
                        "INSERT OR IGNORE INTO edit_originals VALUES (?, ?)",
                        list(originals.items()),
                    )
                    connection.executemany(
                        "INSERT OR IGNORE INTO edit_entries VALUES (?, ?, ?)",
                        [(entry.hash, self.model_hash, entry.text) for entry in made],
                    )
                    for entry in made:
                        self._note(
                            connection, "apply", branch, entry.parent, entry.hash, entry.author
                        )
                self._at, self._tensors = made[-1].hash, tensors
                self._entries |= {entry.hash: entry for entry in made}
                return made
        raise ValueError(
            f"branch {branch!r} changes all the time: give edits a branch of their own"
        )

    def _made(
        self, edits: Sequence[Edit], blank: Entry
    ) -> tuple[list[Entry], dict[str, bytes], dict[str, Tensor]]:
        """Entries of edits on top of where the tensors are, original bytes, and the tensors after them."""
        weights = self._weights()
        made: list[Entry] = []
        kept: dict[str, bytes] = {}
        hashes: dict[str, str] = {}
        parent = blank.parent
        for edit in edits:
            entry = replace(blank, parent=parent, edit=edit)
            if isinstance(edit, WeightEdit):
                names = sorted(set(edit.parameters(weights.matrices)))
                old = {name: weights.value(name).clone() for name in names}
                weights.apply(edit)
                before = {n: hashes.get(n) or tensor_hash(t) for n, t in old.items()}
                after = {n: tensor_hash(weights.value(n)) for n in names}
                hashes |= after
                differing = [n for n in names if before[n] != after[n]]
                data = {n: original_bytes(old[n], weights.value(n)) for n in differing}
                digests = {n: hashlib.sha256(data[n]).hexdigest() for n in differing}
                kept |= {digests[n]: data[n] for n in differing}
                entry = replace(
                    entry,
                    before={n: before[n] for n in differing},
                    after={n: after[n] for n in differing},
                    originals=digests,
                )
            entry = entry.hashed()
            made.append(entry)
            parent = entry.hash
        return made, kept, weights.changed

    def undo(self, branch: str = "main", author: str | None = None) -> Entry:
        """Take the last edit of a branch back; returns it.

        Raises:
            ValueError: if there is none.
            LedgerError: if the weights would not be what they were; nothing is written then.
        """
        with self._alone():
            for _ in range(_TRIES):
                start, last = self._state(branch)
                if start == self.model_hash:
                    raise ValueError(f"branch {branch!r} has no edit to undo")
                entry = self.entry(start)
                self._move_to(start)
                self._move_to(entry.parent)
                if self._moved(branch, "undo", last, start, entry.parent, author):
                    return entry
        raise ValueError(f"branch {branch!r} changes all the time")

    def redo(self, branch: str = "main", author: str | None = None) -> Entry:
        """Make the edit again that was undone last; returns it.

        Raises:
            ValueError: if there is none, or something else was done since.
            LedgerError: if it does not give the weights that it gave; nothing is written then.
        """
        with self._alone():
            for _ in range(_TRIES):
                start, last = self._state(branch)
                undone = self.undone(branch)
                if not undone:
                    raise ValueError(f"branch {branch!r} has no undone edit to make again")
                self._move_to(undone[-1].hash)
                if self._moved(branch, "redo", last, start, undone[-1].hash, author):
                    return undone[-1]
        raise ValueError(f"branch {branch!r} changes all the time")

    def undone(self, branch: str = "main") -> list[Entry]:
        """What `redo` can make again, the next one last."""
        stack: list[str] = []
        for event in self.events(branch):
            if event.kind == "undo":
                stack.append(event.start)
            elif event.kind == "redo":
                stack.pop()
            elif event.kind == "apply":
                stack.clear()
        return [self.entry(digest) for digest in stack]

    def branch(
        self, name: str, at: str | None = None, origin: str = "main", author: str | None = None
    ) -> None:
        """Begin a branch.

        Args:
            name: its name.
            at: the entry that it begins at, or the model's hash (first digits do); the head of `origin` if
                not given.
            origin: another branch.
            author: who.

        Raises:
            ValueError: if there is one of that name, or the name will not do.
            KeyError: if there is no such entry.
        """
        if not name.strip() or len(name) > 100 or any(not c.isprintable() for c in name):
            raise ValueError(f"branch name {name!r} must have 1 to 100 printable characters")
        start = self.head(origin) if at is None else self._resolved(at)
        with self._writing(name, "") as connection:
            if name == "main" or connection is None:
                raise ValueError(f"there is a branch {name!r} already")
            self._note(
                connection, "branch", name, start, start, user() if author is None else author
            )

    def measured(
        self,
        report: Mapping[str, Any],
        branch: str = "main",
        at: str | None = None,
        author: str | None = None,
    ) -> str:
        """Add a report to an entry; returns the report's hash.

        Args:
            report: as JSON has it.
            branch: whose history notes it.
            at: the entry that was measured; the branch's head if not given.
            author: who.

        Raises:
            KeyError: if there is no such branch or entry.
        """
        text = canonical(finite(dict(report)))
        digest, name = _sha(text), user() if author is None else author
        entry = None if at is None else self._resolved(at)
        for _ in range(_TRIES):
            head, last = self._state(branch)
            with self._writing(branch, last) as connection:
                if connection is None:
                    continue
                connection.execute(
                    "INSERT OR IGNORE INTO edit_reports VALUES (?, ?)", (digest, text)
                )
                self._note(connection, "measure", branch, head, head, name, entry or head, digest)
                return digest
        raise ValueError(f"branch {branch!r} changes all the time")

    def _moved(
        self, branch: str, kind: Kind, last: str, start: str, end: str, author: str | None
    ) -> bool:
        """Move a head, if nothing happened to the branch since its last event."""
        with self._writing(branch, last) as connection:
            if connection is None:
                return False
            self._note(connection, kind, branch, start, end, user() if author is None else author)
        return True

    @contextmanager
    def _writing(self, branch: str, last: str) -> Iterator[sqlite3.Connection | None]:
        """A transaction; None in it if the branch's last event is another by now."""
        with self.database.writing(*_TABLES) as connection:
            row = connection.execute(_LAST_OF, (self.model_hash, branch)).fetchone()
            yield connection if (row[0] if row else "") == last else None

    def _note(
        self,
        connection: sqlite3.Connection,
        kind: Kind,
        branch: str,
        start: str,
        end: str,
        author: str,
        entry: str = "",
        report: str = "",
    ) -> None:
        query = "SELECT hash FROM edit_events WHERE model_hash=? ORDER BY id DESC LIMIT 1"
        last = connection.execute(query, (self.model_hash,)).fetchone()
        text = canonical(
            {
                "schema": SCHEMA, "model_hash": self.model_hash, "kind": kind, "branch": branch,
                "start": start, "end": end, "author": author, "created": now(), "entry": entry,
                "report": report, "previous": last[0] if last else self.model_hash,
            }
        )  # fmt: skip
        connection.execute(
            "INSERT INTO edit_events (model_hash, branch, hash, body) VALUES (?, ?, ?, ?)",
            (self.model_hash, branch, _sha(text), text),
        )

    def _rows(self, query: str, *more: str) -> list[tuple[Any, ...]]:
        return self._all(query, self.model_hash, *more)

    def _all(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        if not self.database.path.is_file():
            return []
        with self.database.open(*_TABLES) as connection:
            return connection.execute(query, values).fetchall()

    # --- the weights -----------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The model locked, as it is, and with the weights that the ledger is of.

        Raises:
            ValueError: if it is not so.
        """
        with self.model.lock, self.model.steady():
            if self.model.edited:
                raise ValueError(
                    f"model {self.model.name} is edited: use its ledger outside the edit"
                )
            if self.model.hash != self.model_hash:
                raise ValueError(
                    f"model {self.model.name} has other weights ({self.model.hash[:16]}) than those that this "
                    f"ledger is of ({self.model_hash[:16]})"
                )
            yield

    def _weights(self) -> Weights:
        return Weights(self.model, self._tensors)

    def move_to(self, digest: str) -> dict[str, Tensor]:
        """The parameters that are changed at an entry: back by the stored bytes, forward by making edits again.

        Raises:
            KeyError: if there is no such entry.
            LedgerError: if a parameter then has not the hash that was noted.
            ValueError: if edits are in force, or the model has other weights.
        """
        with self._alone():
            return {name: t.clone() for name, t in self._move_to(self._resolved(digest)).items()}

    def _move_to(self, digest: str) -> dict[str, Tensor]:
        wanted = {entry.hash for entry in self.entries(at=digest)} | {self.model_hash}
        while self._at not in wanted:
            entry = self.entry(self._at)
            self._tensors = self._taken_back(entry)
            self._at = entry.parent
        path: list[Entry] = []
        at = digest
        while at != self._at:
            path.append(self.entry(at))
            at = path[-1].parent
        if any(isinstance(entry.edit, WeightEdit) for entry in path):
            weights = self._weights()
            for entry in reversed(path):
                if not _made_again(entry, weights):
                    raise LedgerError(
                        f"ledger entry {entry.hash[:12]} ({entry.edit.operator}) does not give the weights "
                        "that were noted"
                    )
            self._tensors = weights.changed
        self._at = digest
        return self._tensors

    def _taken_back(self, entry: Entry) -> dict[str, Tensor]:
        tensors = dict(self._tensors)
        for name, digest in entry.originals.items():
            rows = self._all("SELECT bytes FROM edit_originals WHERE hash=?", digest)
            if not rows or hashlib.sha256(rows[0][0]).hexdigest() != digest:
                raise LedgerError(
                    f"original bytes {digest[:12]} of {name} were changed or are missing"
                )
            restored = with_original(tensors[name], rows[0][0])
            if tensor_hash(restored) != entry.before[name]:
                raise LedgerError(f"undoing {entry.hash[:12]} does not give {name} back as it was")
            tensors[name] = restored
        return tensors

    @contextmanager
    def edited(self, branch: str = "main", at: str | None = None) -> Iterator[HookedModel]:
        """The model with a branch's edits (or those up to an entry) in force inside the block.

        Raises:
            KeyError: if there is no such branch or entry.
            LedgerError: if the weights would not be what they were.
            ValueError: if edits are in force, or the model has other weights.
        """
        with self.model.lock:
            digest = self.head(branch) if at is None else self._resolved(at)
            tensors = self.move_to(digest)
            edits = [e.edit for e in self.entries(at=digest) if isinstance(e.edit, ActivationEdit)]
            with self.model.rewriting(tensors), self.model.intervening(changes(self.model, edits)):
                yield self.model

    def replay(self, branch: str = "main", at: str | None = None) -> list[Replayed]:
        """Make a branch's edits again from the model as it is, and compare each parameter's hashes."""
        with self._alone():
            weights = Weights(self.model)
            return [Replayed(e, _made_again(e, weights)) for e in self.entries(branch, at)]

    # --- trust -----------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """What is wrong with the ledger, of all models: nothing, if nothing was changed since it was written."""
        return verify(self.database)


def verify(database: Database) -> list[str]:
    """What is wrong with a workspace's ledger, one line each.

    Every hash is taken again: of entries, events, reports and original bytes; every reference is followed, and
    SQLite checks its own pages.
    """
    if not database.path.is_file():
        return []
    try:
        with database.open(*_TABLES) as connection:
            connection.execute("BEGIN")  # all of it as it is now, whoever else writes
            return list(_faults(connection))
    except sqlite3.OperationalError as error:
        if any(word in str(error) for word in ("locked", "readonly", "unable to open", "full")):
            raise  # that says nothing about the ledger
        return [f"the database is damaged: {error}"]
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return [f"the database is damaged: {error}"]


def _faults(connection: sqlite3.Connection) -> Iterator[str]:
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            yield f"the database is damaged: {line}"
    entries: dict[str, Entry] = {}
    for digest, model_hash, text in connection.execute("SELECT * FROM edit_entries"):
        try:
            entries[digest] = Entry.read(digest, text)
            if entries[digest].model_hash != model_hash:
                yield f"ledger entry {digest[:12]} stands under another model"
        except (ValueError, KeyError, TypeError) as error:
            yield str(error.args[0])
    originals: set[str] = set()
    for digest, data in connection.execute("SELECT hash, bytes FROM edit_originals"):
        if not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != digest:
            yield f"original bytes {str(digest)[:12]} were changed"
        originals.add(digest)
    reports: set[str] = set()
    for digest, text in connection.execute("SELECT hash, body FROM edit_reports"):
        if not isinstance(text, str) or _sha(text) != digest:
            yield f"report {str(digest)[:12]} was changed"
        reports.add(digest)
    for entry in entries.values():
        if entry.parent != entry.model_hash and entry.parent not in entries:
            yield f"ledger entry {entry.hash[:12]} stands on one that is missing: {entry.parent[:12]}"
        for name, digest in entry.originals.items():
            if digest not in originals:
                yield f"original bytes {digest[:12]} of {name} are missing"
    yield from _event_faults(connection, entries, reports)


def _event_faults(
    connection: sqlite3.Connection, entries: Mapping[str, Entry], reports: set[str]
) -> Iterator[str]:
    last: dict[str, str] = {}
    reached: set[str] = set()
    heads: dict[tuple[str, str], str] = {}
    query = "SELECT id, model_hash, branch, hash, body FROM edit_events ORDER BY id"
    for i, model_hash, branch, digest, text in connection.execute(query):
        try:
            event = _event(digest, text)
            raw = json.loads(text)
        except (ValueError, KeyError, TypeError) as error:
            yield f"event {i}: {error.args[0]}"
            continue
        if (raw["model_hash"], raw["branch"]) != (model_hash, branch):
            yield f"event {i} was changed: it stands under another model or branch"
            continue
        if raw["previous"] != last.get(model_hash, model_hash):
            yield f"event {i} does not follow the one before it: one is missing or out of order"
        last[model_hash] = digest
        ends = {event.start, event.end} | ({event.entry} if event.entry else set())
        for end in ends - {model_hash}:
            if end not in entries or entries[end].model_hash != model_hash:
                yield f"event {i} names an entry that is missing: {end[:12]}"
        if not _moves(event, entries):
            yield f"event {i} is no {event.kind}: its entries do not follow each other"
        head = heads.get((model_hash, branch), model_hash if branch == "main" else event.start)
        if event.start != head:
            yield f"event {i} does not begin where branch {branch!r} was"
        heads[model_hash, branch] = event.end
        if event.report and event.report not in reports:
            yield f"report {event.report[:12]} is missing"
        reached.update(ends)
    for digest in entries.keys() - reached:
        yield f"ledger entry {digest[:12]} is in no event: one is missing"


def _moves(event: Event, entries: Mapping[str, Entry]) -> bool:
    """Whether an event's ends are what its kind says; True where an entry is missing, which is told apart."""
    if event.kind in ("branch", "measure"):
        return event.start == event.end
    child, parent = (event.start, event.end) if event.kind == "undo" else (event.end, event.start)
    return child not in entries or entries[child].parent == parent


def _event(digest: str, text: str) -> Event:
    if not isinstance(text, str) or _sha(text) != digest:
        raise LedgerError(f"ledger event {str(digest)[:12]} was changed: its text has another hash")
    raw = json.loads(text)
    if raw["schema"] != SCHEMA or raw["kind"] not in get_args(Kind):
        raise LedgerError(f"ledger event {digest[:12]} is of a layout or kind that is not known")
    names = ("kind", "branch", "start", "end", "author", "created", "entry", "report")
    return Event(**{name: raw[name] for name in names}, hash=digest)


def _made_again(entry: Entry, weights: Weights) -> bool:
    """Apply an entry's edit; whether its parameters had, and have, the hashes that were noted."""
    if not isinstance(entry.edit, WeightEdit):
        return True
    same = all(tensor_hash(weights.value(n)) == digest for n, digest in entry.before.items())
    weights.apply(entry.edit)
    return same and all(
        tensor_hash(weights.value(n)) == digest for n, digest in entry.after.items()
    )


# --- bytes -----------------------------------------------------------------------------------------


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(_as_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


_GAP = 4


def original_bytes(before: Tensor, after: Tensor) -> bytes:
    """What a tensor was where it changed, as safetensors: runs of elements and their bytes."""
    size = before.element_size()
    old, new = _as_bytes(before).reshape(-1, size), _as_bytes(after).reshape(-1, size)
    at = (old != new).any(1).nonzero().flatten()
    # a few unchanged elements between cost less than a run of their own
    breaks = (at.diff() > _GAP).nonzero().flatten()
    starts = at[torch.cat([torch.zeros(1, dtype=torch.int64), breaks + 1])]
    ends = at[torch.cat([breaks, torch.tensor([len(at) - 1])])] + 1
    kept = torch.cat([old[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
    runs = torch.stack([starts, ends - starts], 1)
    return written_tensors({"runs": runs.contiguous(), "bytes": kept.contiguous()})


def with_original(after: Tensor, data: bytes) -> Tensor:
    """The tensor as it was, from `original_bytes`."""
    stored = read_tensors(data)
    flat = _as_bytes(after).clone().reshape(-1, after.element_size())
    done = 0
    for start, n in stored["runs"].tolist():
        flat[start : start + n] = stored["bytes"][done : done + n]
        done += n
    made = flat.reshape(-1).view(after.dtype).reshape(after.shape)
    return made.to(after.device)
