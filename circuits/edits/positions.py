"""A model's parameters at an entry of its ledger, and the way from there to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from safetensors import SafetensorError
from torch import Tensor

from circuits.edits.entries import Entry, LedgerError
from circuits.edits.originals import original_bytes, tensor_hash, with_original
from circuits.edits.records import Edit
from circuits.edits.weights import WeightEdit, Weights
from circuits.history import content_hash
from circuits.models.adapter.hooked_model import HookedModel


@dataclass(frozen=True)
class Made:
    """Edits that were made on top of an entry.

    Attributes:
        entries: of the edits, each on top of the one before.
        originals: the bytes that they replaced, by their SHA-256.
        tensors: the parameters that differ from the model's at the last entry, by name.
    """

    entries: Sequence[Entry] = ()
    originals: Mapping[str, bytes] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Position:
    """An entry of a model's ledger, with the parameters that the edits up to it give.

    The model's own parameters are read, never written to.

    Args:
        model: whose ledger.
        at: where the position begins: the hash under which the ledger has the model as it is.

    Attributes:
        at: the hash of the entry; of the weights, for the model as it is.
        tensors: the parameters that differ from the model's, by name.
    """

    def __init__(self, model: HookedModel, at: str) -> None:
        self.model, self.at = model, at
        self.tensors: dict[str, Tensor] = {}

    def make(self, edits: Sequence[Edit], blank: Entry) -> Made:
        """Make edits on top of this position, which stays where it is.

        Args:
            edits: which.
            blank: an entry with what the new ones have in common.
        """
        weights = Weights(self.model, self.tensors)
        entries: list[Entry] = []
        originals: dict[str, bytes] = {}
        hashes: dict[str, str] = {}
        for edit in edits:
            entry = replace(blank, parent=entries[-1].hash if entries else self.at, edit=edit)
            if isinstance(edit, WeightEdit):
                # In a fixed order, since what is noted goes into the entry's hash.
                names = sorted(set(edit.parameters(weights.matrices)))
                # Clones: `apply` writes to the copies that `value` may return.
                old = {n: weights.value(n).clone() for n in names}
                weights.apply(edit)
                # A parameter that several edits change is hashed once and not twice: its hash after one is that before
                # the next.
                before = {n: hashes.get(n) or tensor_hash(t) for n, t in old.items()}
                after = {n: tensor_hash(weights.value(n)) for n in names}
                hashes |= after
                # An edit may leave a parameter bit for bit as it was (a factor of 1), of which there is nothing to
                # keep.
                changed = [n for n in names if before[n] != after[n]]
                data = {n: original_bytes(old[n], weights.value(n)) for n in changed}
                digests = {n: content_hash(data[n]) for n in changed}
                originals |= {digests[n]: data[n] for n in changed}
                before, after = ({n: of[n] for n in changed} for of in (before, after))
                entry = replace(entry, before=before, after=after, originals=digests)
            entries.append(entry.hashed())
        return Made(entries, originals, weights.changed)

    def move(
        self, back: Sequence[Entry], forward: Sequence[Entry], original: Callable[[str, str], bytes]
    ) -> None:
        """Go back over entries by the stored bytes, then forward by making edits again.

        Args:
            back: the entries to take back, the one that it is at first.
            forward: the entries to make, the next one first.
            original: the stored bytes of a parameter, by its name and their SHA-256.

        Raises:
            LedgerError: if a parameter then has not the hash that was noted.
        """
        for entry in back:
            self.tensors, self.at = self._taken_back(entry, original), entry.parent
        weights = Weights(self.model, self.tensors)
        for entry in forward:
            # The stored bytes lead back only; forward the edit itself has to give the weights that were noted, on this
            # machine too.
            if not made_again(entry, weights):
                raise LedgerError(
                    f"ledger entry {entry.hash[:12]} ({entry.edit.operator}) does not give the weights "
                    "that were noted"
                )
        if forward:
            self.tensors, self.at = weights.changed, forward[-1].hash

    def _taken_back(self, entry: Entry, original: Callable[[str, str], bytes]) -> dict[str, Tensor]:
        tensors = dict(self.tensors)
        for name, bytes_hash in entry.originals.items():
            data = original(name, bytes_hash)
            try:
                tensors[name] = with_original(tensors[name], data)
            except (SafetensorError, KeyError, ValueError, RuntimeError, IndexError) as error:
                raise LedgerError(
                    f"original bytes {bytes_hash[:12]} of {name} are not of that parameter"
                ) from error
            if tensor_hash(tensors[name]) != entry.before.get(name):
                raise LedgerError(f"undoing {entry.hash[:12]} does not give {name} back as it was")
        return tensors


def made_again(entry: Entry, weights: Weights) -> bool:
    """Make an entry's edit; whether its parameters had, and then have, the hashes that were noted."""
    if not isinstance(entry.edit, WeightEdit):
        return True

    def are(noted: Mapping[str, str]) -> bool:
        return all(tensor_hash(weights.value(n)) == wanted for n, wanted in noted.items())

    # Before the edit is made, which overwrites them.
    same = are(entry.before)
    weights.apply(entry.edit)
    return same and are(entry.after)
