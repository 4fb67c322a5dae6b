"""Variants: the model with something else in it, by a name and edits."""

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
"""The name of the model as it is, which every experiment has."""


@dataclass(frozen=True, eq=False)
class Context:
    """What a variant may know of the batch that it is run on.

    Attributes:
        batch: the examples; None outside of an experiment.
        intact: sites' tensors in the intact model on the clean examples, as far as a variant reads them.
        counterpart: likewise on the counterparts; empty if the task has none.
    """

    batch: TaskBatch | None
    intact: Mapping[str, Tensor]
    counterpart: Mapping[str, Tensor]


Live = Callable[[Context], Mapping[str, Change]]
"""Changes at sites that depend on the examples: what they are in other examples, or in their counterparts."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A model that differs from the intact one.

    Attributes:
        name: as it stands in tables; different for each variant of an experiment.
        edits: what is changed, as data.
        live: changes that depend on the examples, on top of the edits.
        sites: the sites that `live` changes.
        reads: the sites whose tensors `live` looks at.
        model: another model with the same outputs, on which the edits are made; the experiment's own if None.
        tensors: parameters put in the place of the model's own, by name, on top of the edits.
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
    """A variant, ready to be run.

    Attributes:
        variant: as it was given.
        model: what is run.
        tensors: other parameters, by name.
        changes: at sites, by name, in order of execution.
        sites: all that are changed, `live` ones too, in order of execution.
    """

    variant: Variant
    model: HookedModel
    tensors: Mapping[str, Tensor]
    changes: Mapping[str, Change]
    sites: tuple[str, ...]
    reads: tuple[str, ...] = field(default=())

    def on(self, context: Context) -> Mapping[str, Change]:
        """All changes for a batch."""
        if self.variant.live is None:
            return self.changes
        made = {self.model.site(s).name: c for s, c in self.variant.live(context).items()}
        return {
            name: _after(self.changes.get(name), made.get(name))
            for name in dict(self.changes) | made
        }

    def fixed(self) -> Mapping[str, Change]:
        """All changes, of a variant in which none depends on the examples."""
        return self.on(Context(None, {}, {}))


@contextmanager
def in_force(plan: Prepared) -> Iterator[HookedModel]:
    """The model of a variant whose changes depend on no examples, as it is changed, inside the block."""
    with plan.model.rewriting(plan.tensors), plan.model.intervening(dict(plan.fixed())):
        yield plan.model


def prepared(model: HookedModel, variant: Variant) -> Prepared:
    """A variant with its edits checked and composed.

    Raises:
        KeyError: if a site, layer or unit is unknown.
        ValueError: if an edit does not fit, or the variant's model puts out something else.
    """
    own = variant.model or model
    edits = checked(own, variant.edits)
    composed = changes(own, [e for e in edits if isinstance(e, ActivationEdit)])
    named = {*composed, *(own.site(s).name for s in variant.sites)}
    order = tuple(s.name for s in own.sites if s.name in named)
    reads = tuple(model.site(s).name for s in variant.reads)
    tensors = rewritten(own, edits) | dict(variant.tensors)
    return Prepared(variant, own, tensors, composed, order, reads)


def _after(first: Change | None, then: Change | None) -> Change:
    if first is None or then is None:
        made = first or then
        assert made is not None, "one of two changes is there"
        return made
    return lambda value: then(first(value))
