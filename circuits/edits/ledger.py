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
from dataclasses import dataclass
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
)

Kind = Literal["apply", "undo", "redo", "branch", "measure"]
"""What an event does: the first three move a branch's head, `branch` begins one, `measure` adds a report."""

_TRIES = 20


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
        if raw["schema"] != SCHEMA:
            raise LedgerError(
                f"ledger entry {digest[:12]} has layout {raw['schema']}: expected {SCHEMA}"
            )
        names = (
            "parent",
            "model_hash",
            "note",
            "author",
            "created",
            "before",
            "after",
            "originals",
        )
        return cls(hash=digest, edit=parse_edit(raw["edit"]), **{name: raw[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"hash": self.hash, **json.loads(self._text())}

    def _text(self) -> str:
        return entry_text(
            self.parent, self.model_hash, self.edit, self.note, self.author, self.created, self.before,
            self.after, self.originals,
        )  # fmt: skip


def entry_text(
    parent: str,
    model_hash: str,
    edit: Edit,
    note: str,
    author: str,
    created: str,
    before: Mapping[str, str],
    after: Mapping[str, str],
    originals: Mapping[str, str],
) -> str:
    """The canonical JSON of an entry, of which its hash is taken."""
    return canonical(
        {
            "schema": SCHEMA, "parent": parent, "model_hash": model_hash, "edit": edit.to_dict(),
            "note": note, "author": author, "created": created, "before": dict(before),
            "after": dict(after), "originals": dict(originals),
        }
    )  # fmt: skip


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
        report: the SHA-256 of the report that was added, if one was.
        hash: of all this and the event before.
    """

    kind: Kind
    branch: str
    start: str
    end: str
    author: str
    created: str
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

    Several processes may write at once: each sees what the others have made before its own is added. A
    ledger object belongs to one thread.

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
        events = self.events(branch)
        if not events and branch != "main":
            known = ", ".join(self.branches()) or "main"
            raise KeyError(f"no branch {branch!r} of {self.model.name}: there are {known}")
        return events[-1].end if events else self.model_hash

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

    def entries(self, branch: str = "main", at: str | None = None) -> list[Entry]:
        """The entries of a branch from the first to its head (or to another entry)."""
        found: list[Entry] = []
        digest = self.head(branch) if at is None else at
        if digest not in self._entries and digest != self.model_hash:
            query = "SELECT hash, body FROM edit_entries WHERE model_hash=?"
            fresh = [(h, text) for h, text in self._rows(query) if h not in self._entries]
            self._entries |= {h: Entry.read(h, text) for h, text in fresh}
        while digest != self.model_hash:
            entry = self.entry(digest)
            found.append(entry)
            digest = entry.parent
        return found[::-1]

    def recipe(self, branch: str = "main", at: str | None = None) -> Recipe:
        """A branch's edits as a recipe."""
        entries = self.entries(branch, at)
        notes = "; ".join(dict.fromkeys(e.note for e in entries if e.note))
        return Recipe(tuple(entry.edit for entry in entries), self.model_hash, notes)

    def reports(self, digest: str) -> list[dict[str, Any]]:
        """What was measured of an entry, oldest first."""
        wanted = [e.report for e in self.events() if e.kind == "measure" and e.end == digest]
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
    ) -> list[Entry]:
        """Put edits on top of a branch.

        If somebody else adds to the branch meanwhile, these come after.

        Args:
            edits: one, several, or a recipe (whose note is taken if none is given).
            note: why.
            branch: where.
            author: who; the user of the machine if not given.

        Raises:
            KeyError: if a site, a layer or the branch is unknown.
            ValueError: if an edit does not fit, or a recipe is for other weights. Nothing is written then.
        """
        if isinstance(edits, Recipe):
            edits.check(self.model)
            note, author = note or edits.note, author or edits.author or None
            given: Sequence[Edit] = edits.edits
        else:
            given = [edits] if isinstance(edits, Edit) else edits
        if not given:
            raise ValueError("edits: expected at least one")
        fitting = checked(self.model, given)
        name = user() if author is None else author
        for _ in range(_TRIES):
            start = self.head(branch)
            self.move_to(start)
            rows, originals, tensors = self._made(fitting, start, note, name)
            with self.database.writing(*_TABLES) as connection:
                if self._head(connection, branch) != start:
                    continue
                connection.executemany(
                    "INSERT OR IGNORE INTO edit_originals VALUES (?, ?)", list(originals.items())
                )
                connection.executemany(
                    "INSERT OR IGNORE INTO edit_entries VALUES (?, ?, ?)",
                    [(digest, self.model_hash, text) for digest, text in rows],
                )
                end = start
                for digest, _text in rows:
                    self._note(connection, "apply", branch, end, digest, name)
                    end = digest
            self._at, self._tensors = end, tensors
            self._entries |= {digest: Entry.read(digest, text) for digest, text in rows}
            return [self._entries[digest] for digest, _ in rows]
        raise ValueError(
            f"branch {branch!r} changes all the time: give edits a branch of their own"
        )

    def _made(
        self, edits: Sequence[Edit], start: str, note: str, author: str
    ) -> tuple[list[tuple[str, str]], dict[str, bytes], dict[str, Tensor]]:
        """The rows of edits on top of the head that the tensors are at, and the tensors after them."""
        weights = Weights(self.model, {name: t.clone() for name, t in self._tensors.items()})
        rows: list[tuple[str, str]] = []
        kept: dict[str, bytes] = {}
        created, parent = now(), start
        hashes: dict[str, str] = {}
        for edit in edits:
            names = (
                sorted(set(edit.parameters(weights.matrices)))
                if isinstance(edit, WeightEdit)
                else []
            )
            old = {name: weights.value(name).clone() for name in names}
            if isinstance(edit, WeightEdit):
                edit.apply(weights)
            before = {n: hashes.get(n) or tensor_hash(t) for n, t in old.items()}
            after = {n: tensor_hash(weights.value(n)) for n in names}
            hashes |= after
            differing = [n for n in names if before[n] != after[n]]
            originals = {n: original_bytes(old[n], weights.value(n)) for n in differing}
            digests = {n: hashlib.sha256(data).hexdigest() for n, data in originals.items()}
            kept |= {digests[n]: originals[n] for n in differing}
            text = entry_text(
                parent, self.model_hash, edit, note, author, created,
                {n: before[n] for n in differing}, {n: after[n] for n in differing}, digests,
            )  # fmt: skip
            parent = _sha(text)
            rows.append((parent, text))
        return rows, kept, weights.changed

    def undo(self, branch: str = "main", author: str | None = None) -> Entry:
        """Take the last edit of a branch back; returns it.

        Raises:
            ValueError: if there is none.
        """
        for _ in range(_TRIES):
            start = self.head(branch)
            if start == self.model_hash:
                raise ValueError(f"branch {branch!r} has no edit to undo")
            entry = self.entry(start)
            if self._moved(branch, "undo", start, entry.parent, author):
                return entry
        raise ValueError(f"branch {branch!r} changes all the time")

    def redo(self, branch: str = "main", author: str | None = None) -> Entry:
        """Make the edit again that was undone last; returns it.

        Raises:
            ValueError: if there is none, or something else was done since.
        """
        for _ in range(_TRIES):
            start, undone = self.head(branch), self.undone(branch)
            if not undone:
                raise ValueError(f"branch {branch!r} has no undone edit to make again")
            if self._moved(branch, "redo", start, undone[-1].hash, author):
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
            at: the entry that it begins at, or the model's hash; the head of `origin` if not given.
            origin: another branch.
            author: who.

        Raises:
            ValueError: if there is one of that name, or the name will not do.
            KeyError: if there is no such entry.
        """
        if not name.strip() or len(name) > 100 or any(not c.isprintable() for c in name):
            raise ValueError(f"branch name {name!r} must have 1 to 100 printable characters")
        if at is None:
            start = self.head(origin)
        else:
            start = self.model_hash if self.model_hash.startswith(at) else self.entry(at).hash
        with self.database.writing(*_TABLES) as connection:
            if name == "main" or self._head(connection, name, none="") != "":
                raise ValueError(f"there is a branch {name!r} already")
            self._note(
                connection, "branch", name, start, start, user() if author is None else author
            )

    def measured(
        self, report: Mapping[str, Any], branch: str = "main", author: str | None = None
    ) -> str:
        """Add a report to a branch's head; returns the report's hash."""
        text = canonical(report)
        digest = _sha(text)
        with self.database.writing(*_TABLES) as connection:
            head = self._head(connection, branch)
            connection.execute("INSERT OR IGNORE INTO edit_reports VALUES (?, ?)", (digest, text))
            name = user() if author is None else author
            self._note(connection, "measure", branch, head, head, name, digest)
        return digest

    def _moved(self, branch: str, kind: Kind, start: str, end: str, author: str | None) -> bool:
        """Move a head, if it is still where it was."""
        with self.database.writing(*_TABLES) as connection:
            if self._head(connection, branch) != start:
                return False
            self._note(connection, kind, branch, start, end, user() if author is None else author)
        return True

    def _note(
        self,
        connection: sqlite3.Connection,
        kind: Kind,
        branch: str,
        start: str,
        end: str,
        author: str,
        report: str = "",
    ) -> None:
        query = "SELECT hash FROM edit_events WHERE model_hash=? ORDER BY id DESC LIMIT 1"
        last = connection.execute(query, (self.model_hash,)).fetchone()
        text = canonical(
            {
                "schema": SCHEMA, "model_hash": self.model_hash, "kind": kind, "branch": branch,
                "start": start, "end": end, "author": author, "created": now(), "report": report,
                "previous": last[0] if last else self.model_hash,
            }
        )  # fmt: skip
        connection.execute(
            "INSERT INTO edit_events (model_hash, branch, hash, body) VALUES (?, ?, ?, ?)",
            (self.model_hash, branch, _sha(text), text),
        )

    def _head(self, connection: sqlite3.Connection, branch: str, none: str | None = None) -> str:
        query = "SELECT hash, body FROM edit_events WHERE model_hash=? AND branch=? ORDER BY id DESC LIMIT 1"
        row = connection.execute(query, (self.model_hash, branch)).fetchone()
        if row is None:
            return self.model_hash if none is None else none
        return _event(*row).end

    def _rows(self, query: str, *more: str) -> list[tuple[Any, ...]]:
        return self._all(query, self.model_hash, *more)

    def _all(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        if not self.database.path.is_file():
            return []
        with self.database.open(*_TABLES) as connection:
            return connection.execute(query, values).fetchall()

    # --- the weights -----------------------------------------------------------------------------

    def move_to(self, digest: str) -> dict[str, Tensor]:
        """Bring the changed parameters to an entry: back by the stored bytes, forward by making edits again.

        Raises:
            LedgerError: if a parameter then has not the hash that was noted.
        """
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
            weights = Weights(self.model, {name: t.clone() for name, t in self._tensors.items()})
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
        """The model with a branch's edits in force inside the block."""
        digest = self.head(branch) if at is None else at
        tensors = self.move_to(digest)
        edits = [e.edit for e in self.entries(at=digest) if isinstance(e.edit, ActivationEdit)]
        with self.model.rewriting(tensors), self.model.intervening(changes(self.model, edits)):
            yield self.model

    def replay(self, branch: str = "main", at: str | None = None) -> Iterator[Replayed]:
        """Make a branch's edits again from the model as it is, and compare each parameter's hashes."""
        weights = Weights(self.model)
        for entry in self.entries(branch, at):
            yield Replayed(entry, _made_again(entry, weights))

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
            return list(_faults(connection))
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
        known = {model_hash, *entries}
        if event.start not in known or event.end not in known:
            yield f"event {i} names an entry that is missing"
        head = heads.get((model_hash, branch), model_hash if branch == "main" else event.start)
        if event.start != head:
            yield f"event {i} does not begin where branch {branch!r} was"
        heads[model_hash, branch] = event.end
        if event.report and event.report not in reports:
            yield f"report {event.report[:12]} is missing"
        reached.update((event.start, event.end))
    for digest in entries.keys() - reached:
        yield f"ledger entry {digest[:12]} is in no event: one is missing"


def _event(digest: str, text: str) -> Event:
    if not isinstance(text, str) or _sha(text) != digest:
        raise LedgerError(f"ledger event {str(digest)[:12]} was changed: its text has another hash")
    raw = json.loads(text)
    if raw["schema"] != SCHEMA or raw["kind"] not in get_args(Kind):
        raise LedgerError(f"ledger event {digest[:12]} is of a layout or kind that is not known")
    names = ("kind", "branch", "start", "end", "author", "created", "report")
    return Event(**{name: raw[name] for name in names}, hash=digest)


def _made_again(entry: Entry, weights: Weights) -> bool:
    """Apply an entry's edit; whether its parameters had, and have, the hashes that were noted."""
    if not isinstance(entry.edit, WeightEdit):
        return True
    same = all(tensor_hash(weights.value(n)) == digest for n, digest in entry.before.items())
    entry.edit.apply(weights)
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
