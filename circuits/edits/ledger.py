"""The ledger: every edit that was made, what it did to the weights, and how to undo it.

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
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from circuits.database import Database, now, user
from circuits.edits.activations import ActivationEdit, changes
from circuits.edits.auditing import verify
from circuits.edits.entries import SCHEMA, TABLES, Entry, Event, Kind, LedgerError, text_hash
from circuits.edits.originals import original_bytes, tensor_hash, with_original
from circuits.edits.recipes import Recipe, checked
from circuits.edits.records import Edit, canonical
from circuits.edits.weights import WeightEdit, Weights
from circuits.files import finite
from circuits.models.adapter.hooked_model import HookedModel

_LAST_OF = (
    "SELECT hash, body FROM edit_events WHERE model_hash=? AND branch=? ORDER BY id DESC LIMIT 1"
)

_TRIES = 20
_FEW = 20


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
        return (Event.read(*rows[0]).end, rows[0][0]) if rows else (self.model_hash, "")

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
        return [Event.read(digest, text) for digest, text in rows]

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
        if not rows or text_hash(rows[0][0]) != digest:
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
        digest, name = text_hash(text), user() if author is None else author
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
        with self.database.writing(*TABLES) as connection:
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
            (self.model_hash, branch, text_hash(text), text),
        )

    def _rows(self, query: str, *more: str) -> list[tuple[Any, ...]]:
        return self._all(query, self.model_hash, *more)

    def _all(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        if not self.database.path.is_file():
            return []
        with self.database.open(*TABLES) as connection:
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


def _made_again(entry: Entry, weights: Weights) -> bool:
    """Apply an entry's edit; whether its parameters had, and have, the hashes that were noted."""
    if not isinstance(entry.edit, WeightEdit):
        return True
    same = all(tensor_hash(weights.value(n)) == digest for n, digest in entry.before.items())
    weights.apply(entry.edit)
    return same and all(
        tensor_hash(weights.value(n)) == digest for n, digest in entry.after.items()
    )
