"""Where a model holds a variable: some units of a site at some positions; and interventions, as claim files write them.

    VARIABLE @ SITE[:UNITS] [@ POSITION] [; VARIABLE @ …]

`UNITS` are all units if none are named. `POSITION` is a number from 0, or negative from the end (-1 is the position
where the answer is read), or the name of a span of the task; without it all positions are meant. Interventions on
several variables at once are joined by `;`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.checks import clipped
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.units import Site, Units, unknown

_AT = re.compile(r"\s+@\s+")
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_FORM = "expected VARIABLE @ SITE[:UNITS] [@ POSITION], several joined by ;"

Positions = tuple[int, ...] | None
"""Positions of a text from 0; None stands for all."""


@dataclass(frozen=True)
class Place:
    """Where a model holds a variable.

    Attributes:
        units: some units of a site.
        position: from 0, or negative from the end, or the name of a span; None stands for all positions.
    """

    units: Units
    position: int | str | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read `SITE[:UNITS] [@ POSITION]`.

        Raises:
            ValueError: if it is not of that form.

        >>> Place.parse("blocks.0.hook_resid_mid:10,11 @ -1")
        Place(units=Units(site='blocks.0.hook_resid_mid', indices=(10, 11)), position=-1)
        """
        where, *positions = _AT.split(text.strip())
        if len(positions) > 1:
            raise ValueError(f"place {clipped(repr(text))}: {_FORM}")
        units = Units.parse(where) if ":" in where else Units(where, None)
        if not positions:
            return cls(units)
        return cls(units, int(positions[0]) if _NUMBER.fullmatch(positions[0]) else positions[0])

    def site(self, model: HookedModel) -> Site:
        """The site in a model.

        Raises:
            KeyError: if there is no such site.
            ValueError: if it lacks the units, or its tensor has no positions of a text and one is named.
        """
        site = model.site(self.units.site)
        self.units.among(site)
        if self.position is None:
            return site
        if not isinstance(model.input, TokenInput) or site.position_axes != ("position",):
            raise ValueError(
                f"place {self}: {site.name} has no positions of a text; expected no position"
            )
        return site

    def columns(self, site: Site) -> Int[Tensor, " column"]:
        """The numbers of a site's row that belong to the units; those of one unit are adjacent."""
        found = [(site.row_units == unit).nonzero().flatten() for unit in self.units.among(site)]
        return torch.cat(found)

    def positions(self, length: int, spans: Mapping[str, tuple[int, int]], text: str) -> Positions:
        """The positions in a text.

        Args:
            length: of the text, in tokens.
            spans: its named parts.
            text: its name, for messages.

        Raises:
            KeyError: if the task has no such span.
            ValueError: if the text is too short.
        """
        if self.position is None:
            return None
        if isinstance(self.position, str):
            if self.position not in spans:
                raise unknown(f"span of {text!r}", self.position, spans)
            first, stop = spans[self.position]
            found = tuple(range(first, stop))
        else:
            found = (self.position + length * (self.position < 0),)
        if not found or not all(0 <= p < length for p in found):
            raise ValueError(f"place {self}: {text!r} has {length} tokens")
        return found

    def __str__(self) -> str:
        where = self.units.site if self.units.indices is None else str(self.units)
        return where if self.position is None else f"{where} @ {self.position}"


@dataclass(frozen=True)
class Intervention:
    """Variables of an algorithm, each with the place at which a model is claimed to hold it.

    Attributes:
        places: by variable.
    """

    places: Mapping[str, Place]

    @classmethod
    def parse(cls, text: str) -> Intervention:
        """Read what claim files write; see this module.

        Raises:
            ValueError: if it is not of that form, or names a variable twice.

        >>> made = Intervention.parse("wave 3 @ mid:10,11 @ -1; wave 14 @ mid:12,13 @ -1")
        >>> print(made), made.variables
        wave 3 @ mid:10-11 @ -1; wave 14 @ mid:12-13 @ -1
        (None, ('wave 3', 'wave 14'))
        """
        places: dict[str, Place] = {}
        for part in text.split(";"):
            variable, *where = _AT.split(part.strip(), maxsplit=1)
            if not variable or not where:
                raise ValueError(f"variable {clipped(repr(part.strip()))}: {_FORM}")
            if variable in places:
                raise ValueError(
                    f"variable {clipped(repr(variable))} stands twice in {clipped(repr(text))}"
                )
            places[variable] = Place.parse(where[0])
        return cls(places)

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables that are set."""
        return tuple(self.places)

    def __str__(self) -> str:
        return "; ".join(f"{variable} @ {place}" for variable, place in self.places.items())


@dataclass(frozen=True, eq=False)
class Mixing:
    """Gives a place what it carries in another run.

    Attributes:
        site: the site.
        columns: the numbers of its row that belong to the place.
        basis: an orthonormal basis, column by dimension, along which alone values are taken over; None takes all.
    """

    site: Site
    columns: Int[Tensor, " column"]
    basis: Float[Tensor, "column dimension"] | None = None

    def mixed(
        self,
        value: Float[Tensor, "batch *rest"],
        other: Float[Tensor, "batch *rest"],
        at: Int[Tensor, "place 2"] | None = None,
        source: Int[Tensor, "place 2"] | None = None,
    ) -> Float[Tensor, "batch *rest"]:
        """The site's tensor with the place from another run: h + B B' (h' - h).

        Args:
            value: in the run that is changed.
            other: in the other run.
            at: rows of the batch with a position each, in any number; all positions of all rows if None.
            source: the rows and positions of the other run that belong to them.
        """
        rows, theirs = self.site.rows(value), self.site.rows(other)
        made = rows.clone()
        if at is None or source is None:
            made[..., self.columns] = self._taken(
                rows[..., self.columns], theirs[..., self.columns]
            )
            return self.site.from_rows(made)
        row, position = at.T
        own = rows[row, position][:, self.columns]
        given = self._taken(own, theirs[tuple(source.T)][:, self.columns])
        made[row[:, None], position[:, None], self.columns] = given
        return self.site.from_rows(made)

    def _taken(self, own: Tensor, other: Tensor) -> Tensor:
        if self.basis is None:
            return other
        return own + (other - own) @ self.basis @ self.basis.T
