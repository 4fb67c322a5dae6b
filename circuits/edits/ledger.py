"""The ledger: every edit that was made, what it did to the weights, and how to undo it.

In `workspace.db`. An entry is an edit on top of its parent, the entry before, or of the model as it is. Its
hash is the SHA-256 of its canonical JSON, which holds the parent's hash: nobody can change an entry without
changing all that follow. Branches are heads that move from entry to entry; each move is an event, chained in
the same way. Nothing is ever changed or deleted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from circuits.database import Database
from circuits.edits.activations import ActivationEdit, changes
from circuits.edits.auditing import head, verify
from circuits.edits.entries import EVENTS, Entry, Kind
from circuits.edits.journal import Journal, Step
from circuits.edits.positions import Position, made_again
from circuits.edits.recipes import Recipe, checked
from circuits.edits.records import Edit
from circuits.edits.weights import Weights
from circuits.history import LAST, Head, signed
from circuits.models.adapter.hooked_model import HookedModel


@dataclass(frozen=True)
class Replayed:
    """An entry, made again.

    Attributes:
        entry: which.
        same: whether every parameter had the same hash, before and after.
    """

    entry: Entry
    same: bool


class Ledger(Journal):
    """The edits of one model in a workspace.

    Several processes may write at once: each sees what the others have made before its own is added. Nothing
    works while edits are in force, or once the model's weights are not those that the ledger is of.

    Args:
        database: of the workspace.
        model: whose edits; it is never changed outside `edited`.
    """

    def __init__(self, database: Database, model: HookedModel) -> None:
        digest, before = model.intact_hash, model.weights_hash
        # A ledger that an earlier version began is under the hash of the weights alone, and goes on under it: its
        # entries hold it, and each holds the hash of the one before.
        if database.rows(EVENTS.select(1, LAST), before) and not database.rows(
            EVENTS.select(1, LAST), digest
        ):
            digest = before
        super().__init__(database, digest, model.name)
        self.model = model
        self._position = Position(model, digest)

    def recipe(self, branch: str = "main", at: str | None = None) -> Recipe:
        """A branch's edits as a recipe, with all notes and authors; the seed is that of the last."""
        entries = self.entries(branch, at)
        notes = "; ".join(dict.fromkeys(e.note for e in entries if e.note))
        authors = "; ".join(dict.fromkeys(e.author for e in entries if e.author))
        seed = entries[-1].seed if entries else 0
        return Recipe(tuple(e.edit for e in entries), self.model_hash, notes, authors, seed)

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
            # What is given here wins over what the recipe says.
            note, seed = note or edits.note, seed or edits.seed
            author, edits = author or edits.author or None, edits.edits
        given = [edits] if isinstance(edits, Edit) else edits
        if not given:
            raise ValueError("edits: expected at least one")
        who, when = signed(author)
        # What all entries of one call have in common; parent, edit and hashes are filled in one by one.
        blank = Entry("", "", self.model_hash, given[0], note, who, when, seed, {}, {}, {})
        with self._alone():
            fitting = checked(self.model, given)

            def on_top(head: str) -> Step:
                # Called again with the new head if somebody else's edit came first: the same edits are then made on top
                # of theirs.
                self._move_to(head)
                made = self._position.make(fitting, blank)
                return Step("apply", [(e.parent, e.hash) for e in made.entries], made)

            made = self.add(branch, who, on_top).made
            self._entries |= {entry.hash: entry for entry in made.entries}
            self._position.at, self._position.tensors = made.entries[-1].hash, made.tensors
            return list(made.entries)

    def undo(self, branch: str = "main", author: str | None = None) -> Entry:
        """Take the last edit of a branch back; returns it.

        Raises:
            ValueError: if there is none.
            LedgerError: if the weights would not be what they were; nothing is written then.
        """

        def back(head: str) -> Step:
            if head == self.model_hash:
                raise ValueError(f"branch {branch!r} has no edit to undo")
            # Via the head: its parameters are what the stored bytes replace.
            self._move_to(head)
            return self._head_moved("undo", head, self.entry(head).parent)

        with self._alone():
            return self.entry(self.add(branch, author, back).moves[0][0])

    def redo(self, branch: str = "main", author: str | None = None) -> Entry:
        """Make the edit again that was undone last; returns it.

        Raises:
            ValueError: if there is none, or something else was done since.
            LedgerError: if it does not give the weights that it gave; nothing is written then.
        """

        def again(head: str) -> Step:
            undone = self.undone(branch)
            if not undone:
                raise ValueError(f"branch {branch!r} has no undone edit to make again")
            return self._head_moved("redo", head, undone[-1].hash)

        with self._alone():
            return self.entry(self.add(branch, author, again).moves[0][1])

    def _head_moved(self, kind: Kind, start: str, end: str) -> Step:
        """A move of a branch's head, once the weights at its end are known to be what they were."""
        self._move_to(end)
        return Step(kind, [(start, end)])

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
            if not self.model.has_hash(self.model_hash):
                raise ValueError(
                    f"model {self.model.name} is another one ({self.model.hash[:16]}) than the one that this "
                    f"ledger is of ({self.model_hash[:16]}): its weights have changed"
                )
            yield

    def move_to(self, digest: str) -> dict[str, Tensor]:
        """The parameters that are changed at an entry: back by the stored bytes, forward by making edits again.

        Raises:
            KeyError: if there is no such entry.
            LedgerError: if a parameter then has not the hash that was noted.
            ValueError: if edits are in force, or the model has other weights.
        """
        with self._alone():
            return {name: t.clone() for name, t in self._move_to(self.resolved(digest)).items()}

    def _move_to(self, digest: str) -> dict[str, Tensor]:
        # From where the model is, back until an entry that lies on the way to the goal (or the model itself, index 0),
        # then forward along the line from there: from a-b-c to a-b-d it is back over c, forward over d.
        entries, back, at = self.entries(at=digest), list[Entry](), self._position.at
        line = {self.model_hash: 0} | {entry.hash: i for i, entry in enumerate(entries, 1)}
        while at not in line:
            back.append(self.entry(at))
            at = back[-1].parent
        self._position.move(back, entries[line[at] :], self.original)
        return self._position.tensors

    @contextmanager
    def edited(self, branch: str = "main", at: str | None = None) -> Iterator[HookedModel]:
        """The model with a branch's edits (or those up to an entry) in force inside the block.

        Raises:
            KeyError: if there is no such branch or entry.
            LedgerError: if the weights would not be what they were.
            ValueError: if edits are in force, or the model has other weights.
        """
        with self.model.lock:
            digest = self.head(branch) if at is None else self.resolved(at)
            # Copies, so that moving on to another entry inside the block leaves these as they are.
            tensors = self.move_to(digest)
            edits = [e.edit for e in self.entries(at=digest) if isinstance(e.edit, ActivationEdit)]
            with self.model.rewriting(tensors), self.model.intervening(changes(self.model, edits)):
                yield self.model

    def replay(self, branch: str = "main", at: str | None = None) -> list[Replayed]:
        """Make a branch's edits again from the model as it is, and compare each parameter's hashes."""
        with self._alone():
            # From the model's own parameters and without any stored bytes, which is what makes it a check on both.
            weights = Weights(self.model)
            return [Replayed(e, made_again(e, weights)) for e in self.entries(branch, at)]

    # --- trust -----------------------------------------------------------------------------------

    def chain_head(self) -> Head:
        """How far the workspace's logs have come (of all models), with a hash over them: keep it elsewhere."""
        return head(self.database)

    def verify(self, head: Head | str | None = None) -> list[str]:
        """What is wrong with the workspace's logs, of all models: nothing if they are consistent.

        Args:
            head: of `chain_head` before: everything up to it must be as it was then. Without one, a log
                that somebody rewrote completely looks the same as the original.

        Raises:
            ValueError: if `head` is not a head, or the database is not a regular file.
        """
        return verify(self.database, head)
