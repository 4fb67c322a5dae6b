"""What is written of the edits of a model: branches of entries, and everything that happened to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from circuits.database import LEDGER_TABLES, Database
from circuits.edits.entries import EVENTS, Entry, Event, Kind, LedgerError
from circuits.edits.positions import Made
from circuits.edits.records import canonical
from circuits.files import finite
from circuits.history import LAST, content_hash, signed
from circuits.json_files import parse_json

_TRIES = 20
"""How often an edit is made on a branch to which somebody else adds meanwhile."""

_FEW = 20
"""Entries that are read one by one; the rest of a long branch is read at once."""


@dataclass(frozen=True)
class Step:
    """What is added to a branch at once.

    Attributes:
        kind: of its events.
        moves: for each event, the branch's head before and after it.
        made: the new entries.
        measured: the entry that a new report is of; else empty.
        report: the report's text.
    """

    kind: Kind
    moves: Sequence[tuple[str, str]]
    made: Made = field(default_factory=Made)
    measured: str = ""
    report: str = ""


class Journal:
    """The branches, entries and events of one model in a workspace's database.

    Several processes may write at once: each sees what the others have written before it adds to a branch.

    Args:
        database: of the workspace.
        model_hash: of the weights outside all edits.
        model_name: for messages.
    """

    def __init__(self, database: Database, model_hash: str, model_name: str) -> None:
        self.database = database
        self.model_hash = model_hash
        self.model_name = model_name
        self._entries: dict[str, Entry] = {}

    # --- reading ---------------------------------------------------------------------------------

    def head(self, branch: str = "main") -> str:
        """The hash of a branch's last entry; the model's own where there is none.

        Raises:
            KeyError: if there is no such branch (`main` always is).
        """
        return self._state(branch)[0]

    def _state(self, branch: str) -> tuple[str, str]:
        """A branch's head, and the hash of its last event: empty where it has none."""
        rows = self.database.rows(EVENTS.select(2, LAST), self.model_hash, branch)
        # `main` needs no event to exist; any other branch begins with one.
        if not rows and branch != "main":
            known = ", ".join(self.branches())
            raise KeyError(f"no branch {branch!r} of {self.model_name}: there are {known}")
        return (Event.read(*rows[0][2:]).end, rows[0][2]) if rows else (self.model_hash, "")

    def branches(self) -> list[str]:
        """The names of the branches, `main` first, others as they were begun."""
        rows = self.database.rows(EVENTS.select(1), self.model_hash)
        return list(dict.fromkeys(["main", *(branch for _, branch, _, _ in rows)]))

    def events(self, branch: str | None = None) -> list[Event]:
        """What happened, in order; on one branch or on all."""
        key = (self.model_hash,) if branch is None else (self.model_hash, branch)
        return [Event.read(*row[2:]) for row in self.database.rows(EVENTS.select(len(key)), *key)]

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
        found = self._beginning(digest)
        if len(found) != 1:
            what = f"{len(found)} entries begin with" if found else "no entry"
            raise KeyError(f"{what} {digest!r} in the ledger of {self.model_name}")
        return found[0]

    def _beginning(self, digits: str) -> list[Entry]:
        """The entries whose hashes begin so."""
        query = "SELECT hash, body FROM edit_entries WHERE model_hash=? AND hash GLOB ?"
        rows = self.database.rows(query, self.model_hash, f"{digits}*")
        self._entries |= {h: Entry.read(h, text) for h, text in rows if h not in self._entries}
        return [self._entries[h] for h, _ in rows]

    def resolved(self, digest: str) -> str:
        """The whole hash of an entry, or of the model, from its first digits.

        Raises:
            KeyError: if there is none, or several begin so.
        """
        if digest == self.model_hash or digest in self._entries:
            return digest
        if not digest or not self.model_hash.startswith(digest):
            return self.entry(digest).hash
        if self._beginning(digest):
            raise KeyError(f"both the model and an entry begin with {digest!r}: give more digits")
        return self.model_hash

    def entries(self, branch: str = "main", at: str | None = None) -> list[Entry]:
        """The entries of a branch from the first to its head (or to another entry)."""
        found: list[Entry] = []
        digest = self.head(branch) if at is None else self.resolved(at)
        asked = 0
        while digest != self.model_hash:
            # A head is reached from its last entry backwards, one query an entry; from _FEW on it is cheaper to fetch
            # them all.
            asked += digest not in self._entries
            if asked == _FEW:
                # Every hash begins with the empty text.
                self._beginning("")
            found.append(self.entry(digest))
            digest = found[-1].parent
        return found[::-1]

    def undone(self, branch: str = "main") -> list[Entry]:
        """What `redo` can make again, the next one last."""
        stack: list[str] = []
        for event in self.events(branch):
            if event.kind == "undo":
                # An undo's start is the entry that was taken back.
                stack.append(event.start)
            elif event.kind == "redo":
                if not stack:
                    raise LedgerError(
                        f"ledger event {event.hash[:12]} makes an edit again that was not undone"
                    )
                stack.pop()
            elif event.kind == "apply":
                # As in an editor: a new edit after an undo leaves nothing to redo. The entries stay in the ledger.
                stack.clear()
        return [self.entry(digest) for digest in stack]

    def reports(self, digest: str) -> list[dict[str, Any]]:
        """What was measured of an entry, oldest first."""
        whole = self.resolved(digest)
        wanted = [e.report for e in self.events() if e.kind == "measure" and e.entry == whole]
        return [parse_json(self._report(report), f"report {report[:12]}") for report in wanted]

    def _report(self, digest: str) -> str:
        fault = f"report {digest[:12]} was changed or is missing"
        return self._stored("SELECT body FROM edit_reports WHERE hash=?", digest, str, fault)

    def original(self, name: str, digest: str) -> bytes:
        """The stored bytes of a parameter that an edit replaced, by its name and their hash.

        Raises:
            LedgerError: if they were changed or are missing.
        """
        fault = f"original bytes {digest[:12]} of {name} were changed or are missing"
        return self._stored("SELECT bytes FROM edit_originals WHERE hash=?", digest, bytes, fault)

    def _stored(self, query: str, digest: str, kind: type, fault: str) -> Any:
        """What is stored under its hash."""
        rows = self.database.rows(query, digest)
        if not rows or not isinstance(rows[0][0], kind) or content_hash(rows[0][0]) != digest:
            raise LedgerError(fault)
        return rows[0][0]

    # --- writing ---------------------------------------------------------------------------------

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
        start = self.head(origin) if at is None else self.resolved(at)
        # `last` is empty: the step is only written if the branch has no event so far.
        if name == "main" or not self._written(name, "", author, Step("branch", [(start, start)])):
            raise ValueError(f"there is a branch {name!r} already")

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
        entry = None if at is None else self.resolved(at)

        def noted(head: str) -> Step:
            return Step("measure", [(head, head)], measured=entry or head, report=text)

        self.add(branch, author, noted)
        return content_hash(text)

    def add(self, branch: str, author: str | None, step: Callable[[str], Step]) -> Step:
        """Add to a branch.

        Args:
            branch: which.
            author: who; the user of the machine if not given.
            step: what to add on top of the branch's head; asked again if somebody else has moved it meanwhile.

        Raises:
            KeyError: if there is no such branch.
            ValueError: if somebody else was faster each time.
        """
        for _ in range(_TRIES):
            head, last = self._state(branch)
            # Outside the transaction, since making an edit may take seconds and would keep all other writers waiting;
            # whether the head is still the same is checked inside it.
            made = step(head)
            if self._written(branch, last, author, made):
                return made
        raise ValueError(
            f"branch {branch!r} changes all the time: give edits a branch of their own"
        )

    def _written(self, branch: str, last: str, author: str | None, step: Step) -> bool:
        """Write a step in one transaction; whether `last` still was the branch's last event, else nothing is."""
        who, when = signed(author)
        report = content_hash(step.report) if step.report else ""
        with self.database.writing(*LEDGER_TABLES) as connection:
            found = EVENTS.last(connection, self.model_hash, branch)
            if (found[2] if found else "") != last:
                return False
            entries = [(e.hash, self.model_hash, e.text) for e in step.made.entries]
            reports = [(report, step.report)] if report else []
            add = connection.executemany
            # Named by content, so that a row that is there already is the same one: an edit that was made, undone and
            # made again.
            add("INSERT OR IGNORE INTO edit_originals VALUES (?, ?)", step.made.originals.items())
            add("INSERT OR IGNORE INTO edit_entries VALUES (?, ?, ?)", entries)
            add("INSERT OR IGNORE INTO edit_reports VALUES (?, ?)", reports)
            for start, end in step.moves:
                event = Event(step.kind, branch, start, end, who, when, step.measured, report, "")
                # The chain runs over all branches of a model, so that no branch as a whole can be taken out unseen.
                before = EVENTS.last(connection, self.model_hash)
                text = event.text(self.model_hash, before[2] if before else self.model_hash)
                EVENTS.append(connection, self.model_hash, branch, content_hash(text), text)
        return True
