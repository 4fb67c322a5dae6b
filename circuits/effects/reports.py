"""What was measured of an edit."""

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
        size: root of the sum of squares of the change; of activations the mean over examples.
        relative: over that of the intact numbers.
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
    """What a recipe does: on target, off target, and compared with random edits.

    Attributes:
        recipe: what was done.
        targets: on target, by what was asked for: a logit, a unit's response, a probability; of an output also
            whether it is the first choice (reliability, in the words of the editing literature).
        generalisation: the same on other examples of the same thing (empty if none were given).
        effects: off target, by measure: the task's own first.
        others: how much the units of each edited site change that the edits are not about (all, where an edit is
            about a direction or a layer): root of the sum of squares over units and positions, over that of
            their activations.
        classes: classes whose accuracy changed, most first.
        tuning: units' tuning before and after.
        norms: how large the change is.
        null_norms: the same of the first random edit.
        null_is: what the random edits are.
        null: the random edits in words, where they are edits.
        record: model, task, examples and seed.
        restored: whether the weights and an output are afterwards what they were, to the bit.
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
        """The share of predictions that are what they were."""
        return 1.0 - self.effects["top1_changed"].change

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary; None for what is not finite."""
        groups = ("targets", "generalisation", "effects", "others")
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
