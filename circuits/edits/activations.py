"""Edits of activations: a site's tensor is changed while the model runs.

An edit acts in every forward pass and on every example, at all positions or at one (`at`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from circuits.edits.records import Edit, Substitutes, of_same_norm
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.units import Site, Unit, Units


class ActivationEdit(Edit):
    """An edit of one site's activations."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The name of the site."""

    @property
    def placed(self) -> bool:
        """Whether the edit names positions; texts of different lengths in one padded batch do not share these."""
        return getattr(self, "at", None) is not None

    @abstractmethod
    # In place on a clone that `_ComposedEdits` makes once, so that ten edits of a site cost one copy of its tensor.
    def apply(self, site: Site, value: Tensor) -> None:
        """Change a tensor of the site in place.

        Raises:
            ValueError: if the tensor lacks the shape or the position that the edit needs.
        """

    @abstractmethod
    def moved(self, name: str) -> ActivationEdit:
        """The same edit with the site under another of its names."""


def changes(model: HookedModel, edits: Iterable[ActivationEdit]) -> dict[str, Change]:
    """The edits of each site, composed in order into one change."""
    by_site: dict[str, list[ActivationEdit]] = {}
    for edit in edits:
        by_site.setdefault(edit.where, []).append(edit)
    # One change a site, since a site's tensor can be replaced only once in a pass; the order of the edits is kept
    # within it.
    return {name: _ComposedEdits(model.site(name), tuple(steps)) for name, steps in by_site.items()}


@dataclass(frozen=True, eq=False)
class _ComposedEdits:
    """Several edits of one site as one change of its tensor."""

    site: Site
    steps: tuple[ActivationEdit, ...]

    @property
    def placed(self) -> bool:
        """See `circuits.hooks.placed`."""
        return any(step.placed for step in self.steps)

    def __call__(self, value: Tensor) -> Tensor:
        # One clone for all edits of the site; the module's own output, which others may hold, is not written to.
        made = value.clone()
        for step in self.steps:
            step.apply(self.site, made)
        return made


def _view_at(edit: Any, site: Site, value: Tensor) -> Tensor:
    """A view of a site's tensor as batch x unit x …, only at the edit's position if it has one."""
    if edit.at is None:
        return site.by_unit(value)
    try:
        return site.at(value, edit.at)
    except ValueError as error:
        raise ValueError(f"at {edit.at} of edit '{edit}': {error}") from error


def _broadcast(edit: Any, site: Site, vector: Tensor) -> Tensor:
    """A vector with one entry for each unit, shaped to broadcast against what `_view_at` returns."""
    # `spread` puts the vector on the unit axis of the site's own layout, with length 1 elsewhere; whichever position is
    # then asked for is the only one, index 0.
    wide = site.spread(vector)
    return site.by_unit(wide) if edit.at is None else site.at(wide, (0,) * len(edit.at))


def _check_at(edit: Any, model: HookedModel, site: Site) -> None:
    if edit.at is None:
        return
    # The sides of a map depend on the image, hence only nonsense is refused here and the rest where the edit acts.
    most = model.input.n_ctx if isinstance(model.input, TokenInput) else 100_000
    far = [i for i in edit.at if not -most <= i < most]
    if far:
        raise ValueError(
            f"position {far[0]} of edit {edit.operator!r} is out of range: expected {-most} to {most - 1}"
        )
    if len(edit.at) != len(site.position_axes):
        axes = ", ".join(site.position_axes) or "none"
        raise ValueError(
            f"at {edit.at} of edit '{edit}' does not fit {site.name}: expected one index for each of its axes ({axes})"
        )


@dataclass(frozen=True, eq=False)
class UnitsEdit(ActivationEdit):
    """An edit of some units, each on its own.

    Attributes:
        units: units of one site.
        at: a position along the site's `position_axes`, negative from the end; all positions if None.
    """

    units: Units
    at: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def where(self) -> str:
        return self.units.site

    def moved(self, name: str) -> UnitsEdit:
        return replace(self, units=Units(name, self.units.indices))

    def checked(self, model: HookedModel) -> UnitsEdit:
        site = model.site(self.units.site)
        own = replace(self, units=Units(site.name, self.units.indices))
        own.units.among(site)
        _check_at(own, model, site)
        own._check_shape(site)
        return own

    def _check_shape(self, site: Site) -> None:
        """Raise ValueError if arrays do not fit the site."""

    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        units = substitutes.of(self.units)
        return None if units is None else replace(self, units=units)

    def edited_units(self, model: HookedModel) -> Mapping[Unit, frozenset[int] | None]:
        site = model.site(self.units.site)
        return {site.unit(i): None for i in self.units.among(site)}

    def apply(self, site: Site, value: Tensor) -> None:
        # Indexing with a list copies, so the result is assigned back; a single unit is written through a slice, which
        # is a view and much faster.
        view = _view_at(self, site, value)
        if self.units.indices is None:
            view.copy_(self.new(site, view))
        elif len(self.units.indices) == 1:
            at = self.units.indices[0]
            view[:, at : at + 1] = self.new(site, view[:, at : at + 1])
        else:
            which = list(self.units.indices)
            view[:, which] = self.new(site, view[:, which])

    @abstractmethod
    def new(self, site: Site, own: Tensor) -> Tensor:
        """The units' new activations, batch x unit x …, given their old ones."""


@dataclass(frozen=True, eq=False)
class Scale(UnitsEdit, operator="scale", about="Multiply units by a factor; 0 removes them."):
    """Multiply units' activations by a factor; 0 removes them (even where they are infinite).

    Attributes:
        factor: a finite number.
        at: a position along the site's `position_axes`, negative from the end; everywhere if None.
    """

    factor: float

    def new(self, site: Site, own: Tensor) -> Tensor:
        # Not 0 * own: infinity times 0 is NaN.
        return torch.zeros_like(own) if self.factor == 0 else own * self.factor


@dataclass(frozen=True, eq=False)
class Clamp(UnitsEdit, operator="clamp", about="Keep units between two numbers."):
    """Clamp units' activations between two numbers; if these are equal they fix the activations.

    Attributes:
        low: the lower bound; no bound if None.
        high: the upper bound; no bound if None.
        at: a position; everywhere if None.
    """

    low: float | None = None
    high: float | None = None

    def _check_values(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("edit 'clamp' needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} of edit 'clamp' is above high {self.high}")

    def new(self, site: Site, own: Tensor) -> Tensor:
        return own.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Set(UnitsEdit, operator="set", about="Set units to numbers, such as their means."):
    """Set units to numbers, such as their means over data (mean ablation).

    Attributes:
        values: one number for each unit (unit x d_head for heads), or one for all.
        origin: what the numbers are, for example `mean over photos`.
        at: a position; everywhere if None.
    """

    values: Tensor
    origin: str = ""

    def _check_shape(self, site: Site) -> None:
        n = len(self.units.among(site))
        wanted = (n, *site.unit_shape[1:])
        # One number for all units, one for each, or for heads one vector each.
        if tuple(self.values.shape) not in ((), (n,), wanted):
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} of edit '{self}' do not fit: expected one "
                f"number or shape {wanted}"
            )

    def new(self, site: Site, own: Tensor) -> Tensor:
        # `expand_as` repeats the values over examples and positions without copying them.
        return _broadcast(self, site, torch.atleast_1d(self.values).to(own)).expand_as(own)


class _FromOtherRuns(UnitsEdit):
    """Units take their activations from other runs."""

    values: Tensor

    def _check_values(self) -> None:
        if self.values.ndim < 2:
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} of edit {self.operator!r}: expected "
                "run x unit x the site's other axes"
            )

    def _check_shape(self, site: Site) -> None:
        n = len(self.units.among(site))
        wanted = len(site.unit_shape) - 1
        wanted += 0 if self.at is not None else len(site.position_axes)
        if self.values.shape[1] != n or self.values.ndim != 2 + wanted:
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} of edit '{self}' do not fit: expected run x {n} "
                f"units x {wanted} axes"
            )

    def _donors(self, order: Tensor, own: Tensor) -> Tensor:
        # Only known while the model runs: the positions follow from the input.
        if self.values.shape[2:] != own.shape[2:]:
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} of edit '{self}' do not fit an input on which "
                f"the units have shape {tuple(own.shape[1:])}"
            )
        return self.values[order].to(own)


@dataclass(frozen=True, eq=False)
class Patch(_FromOtherRuns, operator="patch", about="Put in units' activations from another run."):
    """Replace units' activations by those of another run (activation patching).

    Attributes:
        values: 1 x unit x the site's other axes (without the position axes if `at` is given).
        origin: which run the activations are from.
        at: a position; everywhere if None.
    """

    values: Tensor
    origin: str = ""

    def _check_values(self) -> None:
        super()._check_values()
        if len(self.values) != 1:
            raise ValueError(f"values of edit 'patch' hold {len(self.values)} runs: expected one")

    def new(self, site: Site, own: Tensor) -> Tensor:
        return self._donors(torch.zeros(1, dtype=torch.int64), own).expand_as(own)


@dataclass(frozen=True, eq=False)
class Resample(
    _FromOtherRuns, operator="resample", about="Put in units' activations from other examples."
):
    """Replace units' activations by those on other examples, another one for each example of a pass.

    The i-th example of a pass takes from donor i modulo the number of donors, so that replaying the edit on the same
    batches gives the same numbers.

    Attributes:
        values: donor x unit x the site's other axes.
        origin: which examples the activations are from.
        at: a position; everywhere if None.
    """

    values: Tensor
    origin: str = ""

    def new(self, site: Site, own: Tensor) -> Tensor:
        # In turn, so that an example's donor follows from its place in the pass and a replay gives the same numbers.
        return self._donors(torch.arange(len(own)) % len(self.values), own)


@dataclass(frozen=True, eq=False)
class Steer(ActivationEdit, operator="steer", about="Add a direction to what a site holds."):
    """Add a multiple of a direction (activation steering).

    Attributes:
        site: the site's name.
        vector: the direction, one number for each unit (unit x d_head for heads).
        amount: the factor of the direction.
        at: a position; everywhere if None.
    """

    site: str
    vector: Tensor
    amount: float = 1.0
    at: tuple[int, ...] | None = None

    @property
    def where(self) -> str:
        return self.site

    def moved(self, name: str) -> Steer:
        return replace(self, site=name)

    def checked(self, model: HookedModel) -> Steer:
        site = model.site(self.site)
        own = self.moved(site.name)
        _check_at(own, model, site)
        _check_vectors(own, site, self.vector, "vector")
        return own

    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        return replace(self, vector=of_same_norm(self.vector, substitutes.generator))

    def apply(self, site: Site, value: Tensor) -> None:
        view = _view_at(self, site, value)
        view += _broadcast(self, site, self.vector.to(value) * self.amount)


def _check_vectors(edit: Edit, site: Site, array: Tensor, name: str, k: bool = False) -> None:
    shape = tuple(array.shape[:-1]) if k and array.ndim else tuple(array.shape)
    if shape != site.unit_shape:
        wanted = (*site.unit_shape, *(("rank",) if k else ()))
        raise ValueError(
            f"{name} of shape {tuple(array.shape)} of edit '{edit}' does not fit {site.name}: expected "
            f"{' x '.join(map(str, wanted))}"
        )


@dataclass(frozen=True, eq=False)
class Erase(ActivationEdit, operator="erase", about="Project directions out of what a site holds."):
    """Project directions out: x' = x - U V^T (x - m), at every position.

    With U = V an orthonormal basis and m = 0 this is the orthogonal projection. With what `leace` finds, no linear
    classifier can predict the concept any more (Belrose et al. 2023, theorem 4.3).

    Attributes:
        site: the site's name.
        basis: U, unit x rank; what is removed lies in its span.
        dual: V, unit x rank; U if None.
        mean: m, one number for each unit; 0 if None.
        origin: what the directions are.
        at: a position; everywhere if None.
    """

    site: str
    basis: Tensor
    dual: Tensor | None = None
    mean: Tensor | None = None
    origin: str = ""
    at: tuple[int, ...] | None = None

    def _check_values(self) -> None:
        check_projection(self.operator, self.basis, self.dual)

    @property
    def where(self) -> str:
        return self.site

    def moved(self, name: str) -> Erase:
        return replace(self, site=name)

    def checked(self, model: HookedModel) -> Erase:
        site = model.site(self.site)
        own = self.moved(site.name)
        _check_at(own, model, site)
        # x in the formula is one number a unit; for heads it would have to be said along which axis the product runs.
        if site.inner_axis is not None:
            raise ValueError(
                f"edit 'erase': the units of {site.name} are heads, which hold vectors; expected another site"
            )
        for name in ("basis", "dual"):
            if (array := getattr(self, name)) is not None:
                _check_vectors(own, site, array, name, k=True)
        if self.mean is not None:
            _check_vectors(own, site, self.mean, "mean")
        return own

    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        # The mean is kept: the twin removes as many dimensions about the same point, so that only the choice of
        # directions differs.
        return replace(self, basis=random_basis(self.basis, substitutes.generator), dual=None)

    def apply(self, site: Site, value: Tensor) -> None:
        # Units last, so that both products run over the last axis whatever lies in front of it: x (n x units) times V
        # (units x rank) gives coordinates, these times U^T (rank x units) the part inside.
        view = _view_at(self, site, value).movedim(1, -1)
        basis = self.basis.to(value)
        dual = basis if self.dual is None else self.dual.to(value)
        inside = view if self.mean is None else view - self.mean.to(value)
        view -= (inside @ dual) @ basis.T


def check_projection(operator: str, basis: Tensor, dual: Tensor | None) -> None:
    """Raise ValueError unless V^T U is the identity, so that U V^T is a projection."""
    # (U V^T)^2 = U (V^T U) V^T, which is U V^T if V^T U is the identity.
    if basis.ndim != 2 or (dual is not None and dual.shape != basis.shape):
        raise ValueError(f"basis of edit {operator!r} must be unit x rank, and dual like it")
    # In float64, as the basis may be in float32 and orthonormal only to its rounding; 1e-3 allows for that and no more.
    inner = (basis if dual is None else dual).double().T @ basis.double()
    off = (inner - torch.eye(len(inner), dtype=torch.float64)).abs().max().item()
    if off > 1e-3:
        raise ValueError(
            f"basis of edit {operator!r} gives no projection: dual^T basis differs from the identity by {off:.2g}"
        )


def random_basis(basis: Tensor, generator: Generator) -> Tensor:
    """An orthonormal basis of a random subspace of the same dimension."""
    # The columns of Gaussian numbers span a uniformly random subspace; QR makes them orthonormal.
    drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float()


def scale(units: Units | Unit | str | Iterable[Unit | str], factor: float) -> Scale:
    """The edit that multiplies units' activations by `factor`.

    Raises:
        ValueError: if the factor is not finite, or units are of several sites.
    """
    return Scale(Units.of(units), factor=float(factor))


def zero(units: Units | Unit | str | Iterable[Unit | str]) -> Scale:
    """The edit that removes units: zero ablation.

    >>> str(zero("mixed3b:379"))
    'scale units=mixed3b:379 factor=0'
    """
    return scale(units, 0.0)
