"""Which kind of drawing a unit prefers: found on some drawings of each kind, and tested on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from circuits.experiments.statistics import corrected
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.stimuli.kinds import KINDS, Drawings, Kind, draw_kind
from circuits.tuning.responding import of_one_site, responses, stimulus_size
from circuits.units import Unit

_CHOOSING = 2
"""Replicates that choose a unit's kind, and the drawing of it; the others test it."""


@dataclass(frozen=True, eq=False)
class Preference:
    """The kind of drawing that a unit responds to most.

    Attributes:
        unit: the unit.
        kind: the kind with the largest response on the replicates that choose.
        look: of the drawing of that kind with the largest response there.
        angle: its angle in degrees; NaN where nothing is turned.
        peak: the response to this drawing on the replicates that test, on average.
        rival: the other kind with the largest response there.
        rival_peak: the response to the rival's best drawing of each replicate, on average.
        wins: on how many of the replicates that test the drawing beats all of other kinds, as a share.
        ratio: peak over rival_peak; infinite if no other kind activates the unit, NaN if this one does not.
        p_value: one-sided, of the difference of both over replicates (paired t), corrected for all units of the call
            (Benjamini-Hochberg).
        holds: whether the p-value is at most the level, the ratio at least as asked for, and the peak positive.
        angles: in degrees; empty where nothing is turned.
        curve: the response at each angle of drawings of this look, averaged over the replicates that test.
        size: the size of the drawings, in pixels.
        model_hash: the hash of the model.
    """

    unit: Unit
    kind: Kind
    look: str
    angle: float
    peak: float
    rival: Kind
    rival_peak: float
    wins: float
    ratio: float
    p_value: float
    holds: bool
    angles: Float[np.ndarray, " angle"]
    curve: Float[np.ndarray, " angle"]
    size: int
    model_hash: str

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        return vars(self) | {
            "unit": str(self.unit),
            "angles": self.angles.tolist(),
            "curve": self.curve.tolist(),
        }


def preferences(
    model: HookedModel,
    site: str,
    units: Sequence[int] | None = None,
    *,
    replicates: int = 8,
    least: float = 1.2,
    level: float = 0.05,
    size: int | None = None,
    progress: Progress | None = None,
) -> list[Preference]:
    """Find the kind of drawing that each unit prefers (`circuits.stimuli.kinds`).

    Two replicates choose the kind and the drawing of it with the largest response. On the others the response to this
    one drawing is compared with the largest response to any drawing of any other kind, which favours the others.

    Args:
        model: a model of images.
        site: the site of the units.
        units: the units; by default all.
        replicates: of each drawing, at least 5: two choose.
        least: the smallest ratio of the peak to that of any other kind.
        level: of the test.
        size: the size of the images; by default the receptive field of a unit in the middle, plus a quarter.
        progress: called with the replicates done and all there are.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no photographs, a unit does not exist, or an argument is out of range.
    """
    if replicates < _CHOOSING + 3:
        raise ValueError(f"replicates {replicates} must be at least {_CHOOSING + 3}")
    if not 0 < level < 1 or not least > 0:
        raise ValueError(f"level {level} must be between 0 and 1, and least {least} positive")
    place = model.site(site)
    wanted = [place.unit(u) for u in (range(place.n_units) if units is None else units)]
    of_one_site(model, wanted)
    pixels, columns = stimulus_size(model, place, size), [unit.index for unit in wanted]
    shown: list[Drawings] = []
    measured: list[list[Tensor]] = []
    for r in range(replicates):
        shown = [draw_kind(kind, pixels, r) for kind in KINDS]
        every = responses(model, place, (d.images for d in shown))[:, columns]
        measured.append(list(every.double().split([len(d.looks) for d in shown])))
        if progress is not None:
            progress(r + 1, replicates)
    # kind -> replicate x drawing x unit
    of_kind = [torch.stack(some).numpy() for some in zip(*measured, strict=True)]
    found = [_chosen(of_kind, u) for u in range(len(wanted))]
    p = corrected([_p_value(each.own - each.others) for each in found], "benjamini-hochberg")
    return [
        _preference(unit, each, shown, of_kind, u, q, least, level, pixels, model.hash)
        for u, (unit, each, q) in enumerate(zip(wanted, found, p, strict=True))
    ]


@dataclass(frozen=True)
class _Chosen:
    """A unit's kind, drawing and rival, and its responses to both on each replicate that tests."""

    kind: int
    drawing: int
    rival: int
    own: Float[np.ndarray, " replicate"]
    others: Float[np.ndarray, " replicate"]


def _chosen(of_kind: Sequence[np.ndarray], u: int) -> _Chosen:
    # of each kind an array, replicate x drawing x unit
    mean = [some[:_CHOOSING, :, u].mean(0) for some in of_kind]
    kind = int(np.argmax([m.max() for m in mean]))
    drawing = int(mean[kind].argmax())
    own = of_kind[kind][_CHOOSING:, drawing, u]
    best = np.stack([some[_CHOOSING:, :, u].max(1) for some in of_kind])
    best[kind] = -np.inf
    return _Chosen(kind, drawing, int(best.mean(1).argmax()), own, best.max(0))


def _p_value(differences: Float[np.ndarray, " replicate"]) -> float:
    """One-sided p-value of a mean above 0, by Student's t."""
    n, spread = len(differences), float(differences.std(ddof=1))
    if spread == 0:
        return float(differences.mean() <= 0)
    return float(student.sf(differences.mean() / (spread / np.sqrt(n)), n - 1))


def _preference(
    unit: Unit, chosen: _Chosen, shown: Sequence[Drawings], of_kind: Sequence[np.ndarray], u: int, p: float,
    least: float, level: float, size: int, model_hash: str,
) -> Preference:  # fmt: skip
    drawn, each = shown[chosen.kind], of_kind[chosen.kind][_CHOOSING:, :, u].mean(0)
    look, peak, other = (
        drawn.looks[chosen.drawing],
        float(chosen.own.mean()),
        float(chosen.others.mean()),
    )
    turned = np.array([drawn.period > 0 and each_look == look for each_look in drawn.looks])
    ratio = float("nan") if peak <= 0 else peak / other if other > 0 else float("inf")
    return Preference(
        unit, drawn.kind, look, float(drawn.angles[chosen.drawing]), peak, shown[chosen.rival].kind, other,
        float((chosen.own > chosen.others).mean()), ratio, p,
        p <= level and ratio >= least, drawn.angles.double().numpy()[turned], each[turned], size, model_hash,
    )  # fmt: skip
