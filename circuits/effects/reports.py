"""What was measured of an edit (layer 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.attribution.counting import ClassChange
from circuits.edits.recipes import Recipe
from circuits.files import finite
from circuits.tuning.measures import TuningMeasures
from circuits.units import Unit


@dataclass(frozen=True)
class Effect:
    """A number of the edited model, beside that of the model as it is and of random edits.

    Attributes:
        intact: of the model as it is.
        edited: with the edits.
        change: the difference.
        low: the 2.5th percentile of the change over resampled examples (paired bootstrap).
        high: the 97.5th.
        random: the change that each twin makes: the same operators on random other units of the sites.
        noise: the change that each random edit of the same size, of the same numbers, makes.
        p_value: how many of `random` (of `noise`, where there are no twins) change it at least as much, either
            way, counting the edit itself; at least 1 / (1 + how many there are).
    """

    intact: float
    edited: float
    change: float
    low: float
    high: float
    random: tuple[float, ...]
    noise: tuple[float, ...]
    p_value: float


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
        random: the change of the echo that each twin makes.
        noise: the change of the echo that each random edit of the same size makes.
    """

    unit: Unit
    angles: Float[np.ndarray, " angle"]
    before: Float[np.ndarray, " angle"]
    after: Float[np.ndarray, " angle"]
    measures: TuningMeasures
    changed: TuningMeasures
    random: tuple[float, ...]
    noise: tuple[float, ...]

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
    """What a recipe does: on target, off target, and beside random edits.

    Attributes:
        recipe: what was done.
        targets: on target, by what was asked for: a logit, a unit's response, a probability; of an output also
            whether it is the first choice (reliability, in the words of the editing literature).
        generalisation: the same on other examples of the same thing (empty if none were given).
        measures: off target: `kl` from the intact prediction (nats), `top1_changed`, `logit` (of the intact
            first choice), and with labels `top1`, `top5`, `loss` (of labels, or of next tokens).
        others: how much the units of each edited site change that the edits are not about (all, where an edit is
            about a direction or a layer): root of the sum of squares over units and positions, over that of
            their activations.
        classes: classes whose accuracy changed, most first.
        tuning: units' tuning before and after.
        norms: how large the change is.
        noise_norms: the same of the first random edit of the same size.
        twins: the twins' recipes, in words.
        model: the model's name.
        model_hash: of its weights.
        data: what it was measured on.
        n_examples: on how many.
        seed: of twins, noise and bootstrap.
        restored: whether the weights and an output are afterwards what they were, to the bit.
    """

    recipe: Recipe
    targets: Mapping[str, Effect]
    generalisation: Mapping[str, Effect]
    measures: Mapping[str, Effect]
    others: Mapping[str, Effect]
    classes: tuple[ClassChange, ...]
    tuning: tuple[TuningChange, ...]
    norms: tuple[Norm, ...]
    noise_norms: tuple[Norm, ...]
    twins: tuple[str, ...]
    model: str
    model_hash: str
    data: str
    n_examples: int
    seed: int
    restored: bool

    @property
    def locality(self) -> float:
        """The share of predictions that are what they were."""
        return 1.0 - self.measures["top1_changed"].change

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary; None for what is not finite."""
        groups = ("targets", "generalisation", "measures", "others")
        whole = asdict(replace(self, tuning=())) | {
            "recipe": self.recipe.to_dict(),
            "locality": self.locality,
            **{name: {k: asdict(v) for k, v in getattr(self, name).items()} for name in groups},
            "tuning": [t.to_dict() for t in self.tuning],
        }
        return finite(whole)
