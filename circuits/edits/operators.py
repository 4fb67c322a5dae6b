"""Edits as data: an operator, the unit it changes, its parameters (layer 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from circuits.hooks import Change
from circuits.units import Site, Unit, unknown


@dataclass(frozen=True)
class Scale:
    """Multiply a unit's activation, everywhere, by a factor; 0 removes it.

    Attributes:
        target: the unit.
        factor: a finite number.
    """

    target: Unit
    factor: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise ValueError(f"factor {self.factor} of the edit of {self.target} must be finite")

    def change(self, site: Site) -> Change:
        """The function from the site's tensor to the edited one."""
        index = [slice(None)] * site.unit_axis + [self.target.index]

        def scale(value: Tensor) -> Tensor:
            edited = value.clone()
            edited[tuple(index)] = 0 if self.factor == 0 else edited[tuple(index)] * self.factor
            return edited

        return scale

    def moved(self, target: Unit) -> Scale:
        """The same edit of another unit."""
        return Scale(target, self.factor)

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return {"operator": "scale", "target": str(self.target), "factor": self.factor}


def zero(unit: Unit | str) -> Scale:
    """The edit that removes a unit: zero ablation.

    >>> zero("mixed3b:379")
    Scale(target=Unit(site='mixed3b', index=379), factor=0.0)
    """
    return Scale(Unit.parse(unit) if isinstance(unit, str) else unit, 0.0)


def scale(unit: Unit | str, factor: float) -> Scale:
    """The edit that multiplies a unit's activation by `factor`.

    Raises:
        ValueError: if the factor is not finite.
    """
    return Scale(Unit.parse(unit) if isinstance(unit, str) else unit, float(factor))


Edit = Scale
"""Any edit. The operators so far: scale (zero is scale by 0)."""


def parse_edit(raw: object) -> Edit:
    """Read an edit that `to_dict` wrote.

    Raises:
        KeyError: if the operator is unknown.
        ValueError: if a part is missing or of the wrong kind.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"edit {raw!r} is not a record with an operator, a target and a factor")
    operator = raw.get("operator")
    if operator != "scale":
        raise unknown("edit operator", str(operator), ["scale"])
    try:
        target, factor = Unit.parse(raw["target"]), raw["factor"]
        if not isinstance(factor, int | float):
            raise TypeError(f"factor {factor!r}")
        return Scale(target, float(factor))
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"edit {dict(raw)!r} needs a target SITE:INDEX and a factor") from error
