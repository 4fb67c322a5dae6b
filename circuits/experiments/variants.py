"""Variants: named versions of a model, each with some changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from circuits.edits.activations import ActivationEdit, changes
from circuits.edits.recipes import checked, rewritten
from circuits.edits.records import Edit
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks.task import TaskBatch

INTACT = "intact"
"""The name of the unchanged model, which is part of every experiment."""


@dataclass(frozen=True, eq=False)
class Context:
    """What a variant's changes may depend on, for one batch.

    Attributes:
        batch: the examples; None outside an experiment.
        intact: the tensors of the sites that variants read, in the intact model on the clean examples.
        counterpart: the same on the counterparts; empty if the task has none.
    """

    batch: TaskBatch | None
    intact: Mapping[str, Tensor]
    counterpart: Mapping[str, Tensor]


Live = Callable[[Context], Mapping[str, Change]]
"""Makes changes at sites that depend on the batch: activations from other examples or from the counterparts."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A model that differs from the intact one.

    Attributes:
        name: its name in tables, which has to be unique within an experiment.
        edits: changes as data.
        live: changes that depend on the examples, made after the edits.
        sites: the sites that `live` changes.
        reads: the sites whose tensors `live` reads.
        model: another model with the same outputs to make the changes in; the experiment's own model if None.
        tensors: parameters that replace the model's own after the edits, by name.
    """

    name: str
    edits: tuple[Edit, ...] = ()
    live: Live | None = None
    sites: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    model: HookedModel | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A variant that is checked and ready to run.

    Attributes:
        variant: the variant as it was given.
        model: the model that runs.
        tensors: changed parameters, by name.
        changes: the edits' changes at sites, by the site's name, in order of execution.
        sites: all sites that are changed, those of `live` included, in order of execution.
        reads: the sites whose tensors `live` reads.
    """

    variant: Variant
    model: HookedModel
    tensors: Mapping[str, Tensor]
    changes: Mapping[str, Change]
    sites: tuple[str, ...]
    reads: tuple[str, ...] = field(default=())

    def on(self, context: Context) -> Mapping[str, Change]:
        """All changes for a batch: at each site the edits' first, then those of `live`."""
        if self.variant.live is None:
            return self.changes
        made = {self.model.site(s).name: c for s, c in self.variant.live(context).items()}
        return {
            name: _after(self.changes.get(name), made.get(name))
            for name in dict(self.changes) | made
        }

    def fixed(self) -> Mapping[str, Change]:
        """All changes of a variant that does not depend on the examples."""
        return self.on(Context(None, {}, {}))


@contextmanager
def in_force(plan: Prepared) -> Iterator[HookedModel]:
    """Inside the block the model has a variant's changes; for variants that do not depend on the examples."""
    with plan.model.rewriting(plan.tensors), plan.model.intervening(dict(plan.fixed())):
        yield plan.model


def prepared(model: HookedModel, variant: Variant) -> Prepared:
    """A variant with its edits checked and composed.

    Raises:
        KeyError: if a site, layer or unit is unknown.
        ValueError: if an edit does not fit the model.
    """
    own = variant.model or model
    edits = checked(own, variant.edits)
    composed = changes(own, [e for e in edits if isinstance(e, ActivationEdit)])
    named = {*composed, *(own.site(s).name for s in variant.sites)}
    # In the model's order, so that the first site is where a pass for the variant may start.
    order = tuple(s.name for s in own.sites if s.name in named)
    # What `live` reads comes from the experiment's intact model, not from the variant's own.
    reads = tuple(model.site(s).name for s in variant.reads)
    tensors = rewritten(own, edits) | dict(variant.tensors)
    return Prepared(variant, own, tensors, composed, order, reads)


def _after(first: Change | None, then: Change | None) -> Change:
    if first is None or then is None:
        made = first or then
        assert made is not None, "one of two changes is there"
        return made
    return lambda value: then(first(value))
