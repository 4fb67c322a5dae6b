"""Reports of what was measured of an edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.edits.recipes import Recipe
from circuits.experiments.ablation import ClassChange, classes_table
from circuits.experiments.outcomes import Effect, Record, effects_table
from circuits.files import finite
from circuits.tables import Table, spread
from circuits.tuning.measures import TuningMeasures
from circuits.units import Unit


@dataclass(frozen=True)
class Norm:
    """How large a change is.

    Attributes:
        of: a parameter, or a site whose activations are changed.
        size: the L2 norm of the change; for activations its mean over examples.
        relative: the norm of the change divided by that of the intact values.
    """

    of: str
    size: float
    relative: float


@dataclass(frozen=True, eq=False)
class TuningChange:
    """A unit's tuning to curves before and after.

    Attributes:
        unit: which.
        angles: in degrees.
        before: its mean response at each angle.
        after: with the edits.
        measures: of `before`.
        changed: of `after`.
        null: the change of the echo that random edits make (at most `circuits.effects.measuring.TUNED` of them).
    """

    unit: Unit
    angles: Float[np.ndarray, " angle"]
    before: Float[np.ndarray, " angle"]
    after: Float[np.ndarray, " angle"]
    measures: TuningMeasures
    changed: TuningMeasures
    null: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {
            "unit": str(self.unit),
            "angles": self.angles.tolist(),
            "before": self.before.tolist(),
            "after": self.after.tolist(),
        }


@dataclass(frozen=True)
class EditReport:
    """The effects of a recipe: on target, off target, and compared with random edits.

    Attributes:
        recipe: the recipe.
        targets: effects on each target: a logit, a unit's response, a probability; for outputs also whether the target
            is the first choice (called reliability in the literature on model editing).
        generalisation: the same on other examples (empty if none were given).
        effects: effects off target, by measure, the task's own metric first.
        others: how much the units of each edited site that are not edited change (all units, for edits of directions
            and layers): the L2 norm of the change over units and positions, divided by that of their activations.
        classes: classes whose accuracy changed, the largest change first.
        tuning: units' tuning before and after.
        norms: the size of the change.
        null_norms: the same for the first random edit.
        null_is: what the random edits are.
        null: the random edits in words, if they are edits.
        record: model, task, examples and seed.
        restored: whether the weights and an output are the same afterwards, bit for bit.
    """

    recipe: Recipe
    targets: Mapping[str, Effect]
    generalisation: Mapping[str, Effect]
    effects: Mapping[str, Effect]
    others: Mapping[str, Effect]
    classes: tuple[ClassChange, ...]
    tuning: tuple[TuningChange, ...]
    norms: tuple[Norm, ...]
    null_norms: tuple[Norm, ...]
    null_is: str
    null: tuple[str, ...]
    record: Record
    restored: bool

    @property
    def locality(self) -> float:
        """The share of predictions that the recipe does not change."""
        return 1.0 - self.effects["top1_changed"].change

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary; None for what is not finite."""
        groups = ("targets", "generalisation", "effects", "others")
        # Tunings are left out of `asdict`, which would copy their arrays, and added as lists.
        whole = asdict(replace(self, tuning=())) | {
            "recipe": self.recipe.to_dict(),
            "locality": self.locality,
            **{name: {k: asdict(v) for k, v in getattr(self, name).items()} for name in groups},
            "tuning": [t.to_dict() for t in self.tuning],
        }
        return finite(whole)

    def tables(self) -> Iterator[Table | str]:
        """Effects, tunings and classes as tables, then lines on size, locality and whether all was restored."""
        groups = {
            "on target": self.targets, "on other examples": self.generalisation, "": self.effects,
            "other units of": self.others,
        }  # fmt: skip
        record = self.record
        yield effects_table(groups, f"{record.model}, {record.measured_on}; seed {record.seed}")
        if self.tuning:
            rows = [
                (
                    t.unit, t.measures.echo.value, t.changed.echo.value, t.measures.peak.value,
                    t.changed.peak.value, spread(t.null),
                )
                for t in self.tuning
            ]  # fmt: skip
            columns = (
                "unit",
                "echo",
                "echo, edited",
                "peak",
                "peak, edited",
                "echo's change: null",
            )
            yield Table(columns, rows)
        yield from classes_table(self.classes)
        for norm in self.norms:
            yield f"size of the change in {norm.of}: {norm.size:.4g}, {norm.relative:.2%} of its norm"
        yield f"predictions that stay: {self.locality:.1%}"
        yield f"undone: model {'identical to the bit' if self.restored else 'NOT restored'}"
