"""The rows of the ledger: entries and events, each under the hash of its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from circuits.edits.records import Edit, canonical, parse_edit
from circuits.history import Log, content_hash
from circuits.json_files import parse_json

SCHEMA = 1
"""Version of the layout of entries and events."""

EVENTS = Log("edit_events", ("model_hash", "branch", "hash", "body"))
"""What happened: a stream for each branch, one chain of hashes through all branches of a model."""

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
    def read(cls, name: str, text: Any) -> Entry:
        """From its row.

        Raises:
            LedgerError: if it is not what its hash says.
        """
        raw = _read("entry", name, text, cls)
        try:
            return cls(**raw | {"hash": name, "edit": parse_edit(raw["edit"])})
        except (KeyError, ValueError) as error:
            said = str(error.args[0])[:200]
            raise LedgerError(f"ledger entry {name[:12]} holds no edit: {said}") from None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"edit": self.edit.to_dict()}

    @property
    def text(self) -> str:
        """The canonical JSON of which its hash is taken."""
        # Without the hash, which is that of this very text.
        return canonical(
            {k: v for k, v in self.to_dict().items() if k != "hash"} | {"schema": SCHEMA}
        )

    def hashed(self) -> Entry:
        """The entry under the hash of its text."""
        # The parent's hash is in the text, so that an entry's hash stands for all edits below it too.
        return replace(self, hash=content_hash(self.text))


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
    def read(cls, name: str, text: Any) -> Event:
        """From its row.

        Raises:
            LedgerError: if it is not what its hash says.
        """
        raw = _read("event", name, text, cls)
        if raw["kind"] not in get_args(Kind):
            raise LedgerError(f"ledger event {name[:12]} is of a kind that is not known")
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name != "hash"}, hash=name)

    def text(self, model_hash: str, previous: str) -> str:
        """The canonical JSON of which its hash is taken.

        Args:
            model_hash: of the weights outside all edits.
            previous: the hash of the model's event before; of the weights, for a first one.
        """
        more = {"schema": SCHEMA, "model_hash": model_hash, "previous": previous}
        return canonical({k: v for k, v in vars(self).items() if k != "hash"} | more)


_FORMS = {"seed": int, "edit": dict, "before": dict, "after": dict, "originals": dict}
"""The types of the fields of an entry or event that are not texts; the dictionaries of hashes are by parameter."""


def _read(what: str, name: str, text: Any, record: type) -> dict[str, Any]:
    """What a row holds, if that has the hash which is its name, and the fields of a record."""
    # Checked on each read, not only by `verify`: nothing is ever computed from a row that was changed.
    if not isinstance(text, str) or content_hash(text) != name:
        raise LedgerError(f"ledger {what} {str(name)[:12]} was changed: its text has another hash")
    try:
        raw = parse_json(text, f"ledger {what} {name[:12]}")
    except ValueError as error:
        raise LedgerError(str(error)) from None
    if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
        raise LedgerError(f"ledger {what} {name[:12]} has a layout that is not known")
    for key in {field.name for field in fields(record)} - {"hash"}:
        value: Any = raw.get(key)
        if type(value) is not (form := _FORMS.get(key, str)):
            raise LedgerError(
                f"ledger {what} {name[:12]}: its {key} is not of type {form.__name__}"
            )
        if form is dict and key != "edit" and not all(isinstance(v, str) for v in value.values()):
            raise LedgerError(
                f"ledger {what} {name[:12]}: its {key} holds something else than hashes"
            )
    return raw
