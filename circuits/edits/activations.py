"""Edits of activations: what a site holds, changed while the model runs.

Each is in force at every forward pass, for every example, at all positions or at one (`at`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from circuits.edits.records import Edit, Others, of_same_norm
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.units import Site, Unit, Units


class ActivationEdit(Edit):
    """An edit of what one site holds."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The name of the site."""

    @property
    def placed(self) -> bool:
        """Whether it names positions, which texts of different lengths in one batch do not share."""
        return getattr(self, "at", None) is not None

    @abstractmethod
    def apply(self, site: Site, value: Tensor) -> None:
        """Change a tensor of the site in place.

        Raises:
            ValueError: if it has not the shape or the position that the edit needs.
        """

    @abstractmethod
    def moved(self, name: str) -> ActivationEdit:
        """The same edit with the site under another of its names."""


def changes(model: HookedModel, edits: Iterable[ActivationEdit]) -> dict[str, Change]:
    """The edits of each site as one function, in order."""
    by_site: dict[str, list[ActivationEdit]] = {}
    for edit in edits:
        by_site.setdefault(edit.where, []).append(edit)
    return {name: _Composed(model.site(name), tuple(steps)) for name, steps in by_site.items()}


@dataclass(frozen=True, eq=False)
class _Composed:
    """Edits of one site as a change of its tensor."""

    site: Site
    steps: tuple[ActivationEdit, ...]

    @property
    def placed(self) -> bool:
        """See `circuits.hooks.placed`."""
        return any(step.placed for step in self.steps)

    def __call__(self, value: Tensor) -> Tensor:
        made = value.clone()
        for step in self.steps:
            step.apply(self.site, made)
        return made


def _placed(edit: Any, site: Site, value: Tensor) -> Tensor:
    """A view of a site's tensor as batch x unit x …, at the edit's position if it has one."""
    if edit.at is None:
        return site.by_unit(value)
    try:
        return site.at(value, edit.at)
    except ValueError as error:
        raise ValueError(f"at {edit.at} of edit '{edit}': {error}") from error


def _along(edit: Any, site: Site, vector: Tensor) -> Tensor:
    """A vector of units so that it broadcasts over what `_placed` gives."""
    wide = site.spread(vector)
    return site.by_unit(wide) if edit.at is None else site.at(wide, (0,) * len(edit.at))


def _check_at(edit: Any, model: HookedModel, site: Site) -> None:
    if edit.at is None:
        return
    most = model.input.n_ctx if isinstance(model.input, TokenInput) else 100_000
    far = [i for i in edit.at if not -most <= i < most]
    if far:
        raise ValueError(
            f"position {far[0]} of edit {edit.operator!r} must be from {-most} to {most - 1}"
        )
    if len(edit.at) != len(site.position_axes):
        axes = ", ".join(site.position_axes) or "none"
        raise ValueError(
            f"at {edit.at} of edit '{edit}' does not fit the axes of {site.name} ({axes})"
        )


@dataclass(frozen=True, eq=False)
class UnitsEdit(ActivationEdit):
    """An edit of some units, each by itself.

    Attributes:
        units: of one site.
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

    def twin(self, model: HookedModel, others: Others) -> Edit | None:
        units = others.of(self.units)
        return None if units is None else replace(self, units=units)

    def own(self, model: HookedModel) -> Mapping[Unit, frozenset[int] | None]:
        site = model.site(self.units.site)
        return {site.unit(i): None for i in self.units.among(site)}

    def apply(self, site: Site, value: Tensor) -> None:
        view = _placed(self, site, value)
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
        """What takes the place of the units' activations, batch x unit x …"""


@dataclass(frozen=True, eq=False)
class Scale(UnitsEdit, operator="scale", about="Multiply units by a factor; 0 removes them."):
    """Multiply units' activations by a factor; 0 removes them (even where they are infinite).

    Attributes:
        factor: a finite number.
        at: a position along the site's `position_axes`, negative from the end; everywhere if None.
    """

    factor: float

    def new(self, site: Site, own: Tensor) -> Tensor:
        return torch.zeros_like(own) if self.factor == 0 else own * self.factor


@dataclass(frozen=True, eq=False)
class Clamp(UnitsEdit, operator="clamp", about="Keep units between two numbers."):
    """Keep units' activations between two numbers; equal ones pin them.

    Attributes:
        low: the least; none if None.
        high: the most; none if None.
        at: a position, everywhere if None.
    """

    low: float | None = None
    high: float | None = None

    def _check_values(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("edit 'clamp' needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} of edit 'clamp' must not be above high {self.high}")

    def new(self, site: Site, own: Tensor) -> Tensor:
        return own.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Set(UnitsEdit, operator="set", about="Set units to numbers, such as their means."):
    """Set units to numbers: their means over data, for mean ablation.

    Attributes:
        values: one a unit (unit x d_head for heads), or one for all.
        origin: what they are, e.g. `mean over photos`.
        at: a position, everywhere if None.
    """

    values: Tensor
    origin: str = ""

    def _check_shape(self, site: Site) -> None:
        n = len(self.units.among(site))
        wanted = (n, *site.unit_shape[1:])
        if tuple(self.values.shape) not in ((), (n,), wanted):
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} of edit '{self}' do not fit: expected one "
                f"number or shape {wanted}"
            )

    def new(self, site: Site, own: Tensor) -> Tensor:
        return _along(self, site, torch.atleast_1d(self.values).to(own)).expand_as(own)


class _Donated(UnitsEdit):
    """Units take what they were in other runs."""

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
        if self.values.shape[2:] != own.shape[2:]:
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} of edit '{self}' do not fit an input on which "
                f"the units have shape {tuple(own.shape[1:])}"
            )
        return self.values[order].to(own)


@dataclass(frozen=True, eq=False)
class Patch(_Donated, operator="patch", about="Put in units' activations from another run."):
    """Put in what units were in another run (activation patching).

    Attributes:
        values: 1 x unit x the site's other axes (without the position axes, if `at` is given).
        origin: which run.
        at: a position, everywhere if None.
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
    _Donated, operator="resample", about="Put in units' activations from other examples."
):
    """Put in what units were on other examples, a different one for each example of a pass.

    The i-th example of a pass gets the i-th donor, over and over: the same whenever the edit is replayed on
    the same batches.

    Attributes:
        values: donor x unit x the site's other axes.
        origin: which examples.
        at: a position, everywhere if None.
    """

    values: Tensor
    origin: str = ""

    def new(self, site: Site, own: Tensor) -> Tensor:
        return self._donors(torch.arange(len(own)) % len(self.values), own)


@dataclass(frozen=True, eq=False)
class Steer(ActivationEdit, operator="steer", about="Add a direction to what a site holds."):
    """Add a direction, times an amount (activation steering).

    Attributes:
        site: its name.
        vector: one number a unit (of heads: unit x d_head).
        amount: what it is multiplied by.
        at: a position, everywhere if None.
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

    def twin(self, model: HookedModel, others: Others) -> Edit | None:
        return replace(self, vector=of_same_norm(self.vector, others.generator))

    def apply(self, site: Site, value: Tensor) -> None:
        view = _placed(self, site, value)
        view += _along(self, site, self.vector.to(value) * self.amount)


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

    With U = V an orthonormal basis and m = 0 it is the orthogonal projection; with the parts that `leace`
    finds no linear classifier can tell the concept (Belrose et al. 2023, theorem 4.3).

    Attributes:
        site: its name.
        basis: U, unit x rank: what is taken away lies in its span.
        dual: V, unit x rank; U if None.
        mean: m, one number a unit; 0 if None.
        origin: what the directions are.
        at: a position, everywhere if None.
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
        if site.inner_axis is not None:
            raise ValueError(
                f"edit 'erase' of {site.name}: heads hold vectors, expected another site"
            )
        for name in ("basis", "dual"):
            if (array := getattr(self, name)) is not None:
                _check_vectors(own, site, array, name, k=True)
        if self.mean is not None:
            _check_vectors(own, site, self.mean, "mean")
        return own

    def twin(self, model: HookedModel, others: Others) -> Edit | None:
        return replace(self, basis=random_basis(self.basis, others.generator), dual=None)

    def apply(self, site: Site, value: Tensor) -> None:
        view = _placed(self, site, value).movedim(1, -1)
        basis = self.basis.to(value)
        dual = basis if self.dual is None else self.dual.to(value)
        inside = view if self.mean is None else view - self.mean.to(value)
        view -= (inside @ dual) @ basis.T


def check_projection(operator: str, basis: Tensor, dual: Tensor | None) -> None:
    """Raise ValueError if V^T U is not the identity."""
    if basis.ndim != 2 or (dual is not None and dual.shape != basis.shape):
        raise ValueError(f"basis of edit {operator!r} must be unit x rank, and dual like it")
    inner = (basis if dual is None else dual).double().T @ basis.double()
    off = (inner - torch.eye(len(inner), dtype=torch.float64)).abs().max().item()
    if off > 1e-3:
        raise ValueError(
            f"basis of edit {operator!r} is no projection: dual^T basis is {off:.2g} away from the identity"
        )


def random_basis(basis: Tensor, generator: Generator) -> Tensor:
    """An orthonormal basis of a random space of the same dimension."""
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
