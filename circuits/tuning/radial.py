"""Radial tuning curves: a unit's response to a shape at every angle.

After Cammarata et al. 2020, "Curve Detectors" (section on radial tuning curves).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.checks import check_range
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.stimuli.patterns import STRAIGHT, arcs, gratings
from circuits.tuning.measures import TuningMeasures, measure_tuning
from circuits.tuning.responding import BATCH, check_step, of_one_site, responses, stimulus_size
from circuits.units import Unit

Shape = Literal["curve", "line", "grating"]
"""The shape that is turned. Curves bulge at the angle; lines and stripes run at a right angle to it."""

RADII = (0.1, 0.15, 0.22, 0.32, 0.46)
"""Radii that are tried, as shares of the size of the images; wavelengths of gratings are a quarter of these."""

Look = tuple[float, float, float]
"""Ink, paper and relative thickness of a curve or line; of a grating its contrast and phase (the third is unused)."""

_STROKES: tuple[Look, ...] = (
    (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.2, 0.6, 1.0), (0.0, 1.0, 1.5), (1.0, 0.0, 1.5), (0.6, 0.2, 1.5),
)  # fmt: skip
_WAVES: tuple[Look, ...] = (
    (1.0, 0.0, 0.0), (1.0, 90.0, 0.0), (1.0, 180.0, 0.0), (1.0, 270.0, 0.0), (0.5, 0.0, 0.0), (0.5, 180.0, 0.0),
)  # fmt: skip
LOOKS: dict[str, tuple[Look, ...]] = {"curve": _STROKES, "line": _STROKES, "grating": _WAVES}
"""Replicates, which differ in what should not matter to a unit's tuning."""

_REPLICATES = 6
_COARSE = torch.arange(24) * 15.0
"""Angles at which radii are compared, in degrees."""


@dataclass(frozen=True, eq=False)
class RadialTuning:
    """A unit's response to a shape that is turned about the middle of the image.

    Attributes:
        unit: the unit.
        shape: the shape.
        angles: in degrees.
        curves: the response to each replicate (dark and light, thin and thick) at each angle.
        radius: the radius of the curve in pixels (the wavelength of a grating; infinity for a line): of those tried,
            the one with the largest mean response.
        measures: the measures of the tuning curve.
        deviation: the unit's standard deviation on a dataset, as a unit for responses; NaN if it was not given.
        size: the size of the images, in pixels.
        model: the model's name.
        model_hash: the hash of the model.
        data: the name of the dataset.
        seed: the seed of the bootstrap.
    """

    unit: Unit
    shape: Shape
    angles: Float[np.ndarray, " angle"]
    curves: Float[np.ndarray, "replicate angle"]
    radius: float
    measures: TuningMeasures
    deviation: float
    size: int
    model: str
    model_hash: str
    data: str
    seed: int

    @property
    def mean(self) -> Float[np.ndarray, " angle"]:
        """The response at each angle, averaged over replicates."""
        return self.curves.mean(0)

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        raw = {k: v for k, v in vars(self).items() if k not in ("measures", "angles", "curves")}
        return raw | {
            "unit": str(self.unit),
            "angles": self.angles.tolist(),
            "curves": self.curves.tolist(),
            "measures": asdict(self.measures),
        }


def radial_tuning(
    model: HookedModel,
    units: Sequence[str | Unit],
    shape: Shape = "curve",
    *,
    step: float = 1.0,
    radii: Sequence[float] | None = None,
    size: int | None = None,
    deviations: Sequence[float] | None = None,
    data: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[RadialTuning]:
    """Measure how units of one site respond to a shape at every angle.

    First the radius with the largest response is found, at angles 15 degrees apart; then the tuning curve is measured
    at this radius in fine steps, with six replicates that differ in polarity, contrast and thickness.

    Args:
        model: a model of images.
        units: units of one site.
        shape: the shape to turn.
        step: the step between angles, in degrees; must divide 360.
        radii: the radii to try, in pixels; by default shares of the size.
        size: the size of the images; by default the receptive field of a unit in the middle, plus a quarter.
        deviations: each unit's standard deviation on a dataset.
        data: the name of the dataset.
        seed: the seed of the bootstrap.
        progress: called with the images done, and about how many there are.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no photographs, units are of several sites or missing, or an option
            is out of range.
    """
    wanted, n_angles = of_one_site(model, units), check_step(step)
    if shape not in get_args(Shape):
        raise ValueError(f"shape {shape!r} is not one of {', '.join(get_args(Shape))}")
    if deviations is not None and len(deviations) != len(wanted):
        raise ValueError(
            f"deviations have {len(deviations)} entries: expected one for each of {len(wanted)} units"
        )
    pixels = stimulus_size(model, wanted[0].site, size)
    tried = _radii(shape, radii, pixels)
    shown = _Presentation(model, wanted, shape, pixels, progress)
    # In two passes: radii at a few angles first, then only the best ones at every angle. All radii at every step would
    # cost five times as much.
    best = _best_radii(shown, tried)
    angles = torch.arange(n_angles) * float(step)
    shown.total += len(set(best)) * _REPLICATES * n_angles
    # Each radius is drawn once for all units that prefer it.
    fine = {k: shown.responses(angles, tried[k], _REPLICATES) for k in sorted(set(best))}
    model_hash, period = model.hash, 360.0 if shape == "curve" else 180.0
    made = []
    for column, unit in enumerate(wanted):
        curves = fine[best[column]][:, :, column].double().numpy()
        made.append(
            RadialTuning(
                unit, shape, angles.double().numpy(), curves, tried[best[column]],
                measure_tuning(angles.double().numpy(), curves, seed=seed, period=period),
                float("nan") if deviations is None else float(deviations[column]), pixels, model.name,
                model_hash, data, seed,
            )
        )  # fmt: skip
    return made


@dataclass
class _Presentation:
    """Shows drawings to units, and reports progress over all that are shown.

    Attributes:
        model: the model.
        units: units of one site.
        shape: the shape that is drawn.
        size: the size of the images.
        progress: called with the images done and in all.
        total: how many images are planned so far.
        done: how many were shown.
    """

    model: HookedModel
    units: Sequence[Unit]
    shape: Shape
    size: int
    progress: Progress | None
    total: int = 0
    done: int = 0

    def responses(
        self, angles: Tensor, radius: float, n: int
    ) -> Float[Tensor, "replicate angle unit"]:
        """The responses to the shape at some angles, in the first n replicates."""
        before = self.done

        def note(k: int) -> None:
            self.done = before + k
            if self.progress is not None:
                self.progress(self.done, max(self.done, self.total))

        parts = (
            draw(self.shape, some, radius, self.size, look)
            for look in LOOKS[self.shape][:n]
            for some in angles.split(BATCH)
        )
        found = responses(self.model, self.units[0].site, parts, progress=note)
        return found[:, [unit.index for unit in self.units]].unflatten(0, (n, len(angles)))


def _best_radii(shown: _Presentation, tried: Sequence[float]) -> list[int]:
    """For each unit, the index of the radius to which it responds most, at any of a few angles."""
    if len(tried) == 1:
        return [0] * len(shown.units)
    shown.total += len(tried) * 3 * len(_COARSE)
    # Averaged over three replicates, so that the choice does not hang on one look of the drawing.
    strength = torch.stack([shown.responses(_COARSE, r, 3).mean(0).amax(0) for r in tried])
    return strength.argmax(0).tolist()


def _radii(shape: Shape, radii: Sequence[float] | None, size: int) -> tuple[float, ...]:
    """The radii (of gratings, wavelengths) to try, in pixels; a line has a single one, infinity."""
    if shape == "line":
        return (float("inf"),)
    if radii is None:
        share = 1.0 if shape == "curve" else 0.25
        return tuple(share * r * size for r in RADII)
    if not radii:
        raise ValueError("radii are empty: expected one or more, in pixels")
    for radius in radii:
        check_range("radius", radius, 0.1, 1e6)
    return tuple(float(r) for r in radii)


def draw(
    shape: Shape,
    angles: Float[Tensor, " image"],
    radius: float,
    size: int,
    look: Look = _STROKES[0],
) -> Float[Tensor, "image 3 h w"]:
    """Draw a shape at each angle, in one of the replicates."""
    if shape == "grating":
        contrast, phase, _ = look
        return gratings(angles + 90, max(2.0, radius), size, contrast=contrast, phase=phase)
    ink, paper, thick = look
    # A line has infinite radius, which cannot be drawn as an arc.
    bent = min(radius, STRAIGHT)
    return arcs(angles, bent, size, thickness=thick * max(2.0, size / 32), ink=ink, paper=paper)
