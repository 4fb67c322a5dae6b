"""An edit, its random twins and random edits of the same size, as they are put in force (layer 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from circuits.edits.activations import ActivationEdit, changes
from circuits.edits.recipes import checked, rewritten
from circuits.edits.records import Edit, of_same_norm, twin_of
from circuits.effects.reports import Norm
from circuits.hooks import Change
from circuits.models.adapter import HookedModel
from circuits.units import Site


@dataclass
class _Size:
    """Sums of the norms of a site's changes."""

    change: float = 0.0
    relative: float = 0.0
    n: int = 0


@dataclass(eq=False)
class Variant:
    """A changed model.

    Attributes:
        tensors: other parameters, by name.
        changes: at sites, by name.
        sizes: how large the changes at sites were, so far.
    """

    tensors: Mapping[str, Tensor]
    changes: Mapping[str, Change]
    sizes: dict[str, _Size] = field(default_factory=dict)

    @contextmanager
    def inside(self, model: HookedModel) -> Iterator[None]:
        """The model so changed."""
        seen = {
            name: self._sized(model.site(name), change) for name, change in self.changes.items()
        }
        with model.rewriting(self.tensors), model.intervening(seen):
            yield

    def _sized(self, site: Site, change: Change) -> Change:
        size = self.sizes.setdefault(site.name, _Size())

        def measured(value: Tensor) -> Tensor:
            made = change(value)
            gone = (made - value).detach().double().flatten(1).norm(dim=1)
            size.change += float(gone.sum())
            size.relative += float(
                (gone / value.detach().double().flatten(1).norm(dim=1).clamp_min(1e-30)).sum()
            )
            size.n += len(gone)
            return made

        return measured

    def norms(self, model: HookedModel) -> tuple[Norm, ...]:
        """How large the changes are, of parameters and of what was seen of activations."""
        own = model.parameters
        found = []
        for name, tensor in self.tensors.items():
            before = own[name].data.double()
            gone = (tensor.double() - before).norm().item()
            found.append(Norm(name, gone, gone / max(before.norm().item(), 1e-30)))
        for name, size in self.sizes.items():
            found.append(Norm(name, size.change / max(size.n, 1), size.relative / max(size.n, 1)))
        return tuple(found)


def variant_of(model: HookedModel, edits: Sequence[Edit]) -> Variant:
    """The model with edits."""
    fitting = checked(model, edits)
    found = changes(model, [edit for edit in fitting if isinstance(edit, ActivationEdit)])
    return Variant(rewritten(model, fitting), found)


def twins_of(
    model: HookedModel, edits: Sequence[Edit], n: int, generator: Generator
) -> list[tuple[Edit, ...]]:
    """The same operators on random other units, n times; none where a site has too few."""
    made = [twin_of(model, edits, generator) for _ in range(n)]
    return [twin for twin in made if twin]


def noise_of(model: HookedModel, variant: Variant, generator: Generator) -> Variant:
    """A random change of the same numbers and of the same size.

    Of a parameter: Gaussian noise on the weights that the variant changes, of the same norm. At a site: at
    each position a change along one random direction, as long as the variant's there.
    """
    own = model.parameters
    tensors = {}
    for name, tensor in variant.tensors.items():
        before = own[name].data
        gone = (tensor - before).cpu()
        drawn = torch.randn(gone.shape, generator=generator, dtype=torch.float64) * (gone != 0)
        scaled = drawn * (gone.double().norm() / drawn.norm().clamp_min(1e-300))
        tensors[name] = before + scaled.to(before)
    return Variant(
        tensors,
        {
            name: _noisy(model.site(name), change, generator)
            for name, change in variant.changes.items()
        },
    )


def _noisy(site: Site, change: Change, generator: Generator) -> Change:
    inside = [site.unit_axis, *(i for i, a in enumerate(site.axes) if a == "d_head")]
    shape = [1] * len(site.axes)
    for axis in inside:
        shape[axis] = site.shape[axis - 1]
    direction = of_same_norm(torch.ones(shape), generator)
    direction = direction / direction.norm()

    def add(value: Tensor) -> Tensor:
        gone = change(value) - value
        length = gone.square().sum(inside, keepdim=True).sqrt()
        return value + length * direction.to(value)

    return add
