"""What a unit's page is about: the unit, its model, and what has been harvested."""

from __future__ import annotations

from dataclasses import dataclass

from apps import cached
from apps.address import TROUBLE, choose
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.store import ActivationStore
from circuits.units import Unit
from circuits.workspace import ModelRecord


@dataclass(frozen=True)
class Look:
    """A unit, and what is known of it.

    Attributes:
        record: of the model in the workspace.
        model: the model, shared by all sessions.
        unit: which.
        store: a dataset's activations of the unit's site; None if it was not harvested.
        examples: the dataset's examples; None if they cannot be read.
        trouble: why not; None if they can.
    """

    record: ModelRecord
    model: HookedModel
    unit: Unit
    store: ActivationStore | None
    examples: Examples | None
    trouble: BaseException | None = None


def look_at(record: ModelRecord, model: HookedModel, unit: Unit) -> Look:
    """A unit with the store that the person chooses."""
    having = {s.provenance.data: s for s in cached.stores_of(record) if unit.site in s.sites}
    if not having:
        return Look(record, model, unit, None, None)
    store = having[choose("Data", list(having), "data")]
    try:
        return Look(record, model, unit, store, cached.examples_of(model, store))
    except TROUBLE as error:
        return Look(record, model, unit, store, None, error)
