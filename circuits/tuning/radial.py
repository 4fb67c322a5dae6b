"""Radial tuning: how a unit's response changes as what it looks for is turned.

Cammarata et al. 2020, "Curve Detectors" (section on radial tuning curves).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.stimuli.patterns import STRAIGHT, arcs, gratings
from circuits.tuning.measures import TuningMeasures, measure_tuning
from circuits.tuning.responding import BATCH, responses, stimulus_size
from circuits.units import Unit

Shape = Literal["curve", "line", "grating"]
"""What is turned. Curves bulge at the angle; lines and stripes run at a right angle to it."""

RADII = (0.1, 0.15, 0.22, 0.32, 0.46)
"""Radii that are tried, as shares of the images' size; wavelengths of gratings are a quarter of these."""

Look = tuple[float, float, float]
"""Ink, paper and relative thickness of a curve or line; contrast, phase and nothing of a grating."""

_STROKES: tuple[Look, ...] = (
    (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.2, 0.6, 1.0), (0.0, 1.0, 1.5), (1.0, 0.0, 1.5), (0.6, 0.2, 1.5),
)  # fmt: skip
_WAVES: tuple[Look, ...] = (
    (1.0, 0.0, 0.0), (1.0, 90.0, 0.0), (1.0, 180.0, 0.0), (1.0, 270.0, 0.0), (0.5, 0.0, 0.0), (0.5, 180.0, 0.0),
)  # fmt: skip
LOOKS: dict[str, tuple[Look, ...]] = {"curve": _STROKES, "line": _STROKES, "grating": _WAVES}
"""Replicates: what should not matter to what a unit is tuned to."""

_REPLICATES = 6


@dataclass(frozen=True, eq=False)
class RadialTuning:
    """A unit's response as a shape is turned about the image's middle.

    Attributes:
        unit: which.
        shape: what was turned.
        angles: in degrees.
        curves: the response to each replicate (dark and light, thin and thick) at each angle.
        radius: of the curve, in pixels (the wavelength of a grating; infinity for a line), the one with the
            largest mean response of those tried.
        measures: in numbers.
        deviation: the unit's standard deviation on a dataset, in which responses can be expressed; NaN if
            none was given.
        size: of the images, in pixels.
        model: its name.
        model_hash: of its weights.
        data: what the deviation is of.
        seed: of the bootstrap.
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
        """The response at each angle, over replicates."""
        return self.curves.mean(0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
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
    """How units of one site respond to a shape at every angle.

    The radius is the one that a unit responds to most over angles 15 degrees apart; its curve is then
    measured finely, in six replicates that differ in polarity, contrast and thickness.

    Args:
        model: of images.
        units: of one site.
        shape: what is turned.
        step: from angle to angle, in degrees; must divide 360.
        radii: to try, in pixels; shares of the size if not given.
        size: of the images; what a unit in the middle of its map sees, and a quarter more, if not given.
        deviations: each unit's standard deviation on a dataset.
        data: what dataset that is.
        seed: of the bootstrap.
        progress: called with images done and about how many there are.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no photographs, units are of several sites or missing, or an option
            is out of range.
    """
    wanted = [model.unit(unit) for unit in units]
    if len({unit.site for unit in wanted}) != 1:
        raise ValueError(
            f"units {', '.join(map(str, wanted)) or '(none)'}: expected units of one site"
        )
    if shape not in get_args(Shape):
        raise ValueError(f"shape {shape!r} is not one of {', '.join(get_args(Shape))}")
    n_angles = round(360 / step) if step > 0 else 0
    if n_angles < 4 or abs(n_angles * step - 360) > 1e-6:
        raise ValueError(f"step {step} must divide 360 degrees into at least four")
    if deviations is not None and len(deviations) != len(wanted):
        raise ValueError(f"deviations: {len(deviations)} for {len(wanted)} units")
    site = wanted[0].site
    pixels = stimulus_size(model, site, size)
    tried = _radii(shape, radii, pixels)
    which = [unit.index for unit in wanted]
    coarse = torch.arange(24) * 15.0
    total = len(tried) * 3 * len(coarse) if len(tried) > 1 else 0
    done = 0

    def shown(angles: Tensor, radius: float, n: int) -> Float[Tensor, "replicate angle unit"]:
        nonlocal done
        before = done

        def note(k: int) -> None:
            nonlocal done
            done = before + k
            if progress is not None:
                progress(done, max(done, total))

        parts = (
            draw(shape, some, radius, pixels, look)
            for look in LOOKS[shape][:n]
            for some in angles.split(BATCH)
        )
        found = responses(model, site, parts, progress=note)[:, which]
        return found.unflatten(0, (n, len(angles)))

    if len(tried) > 1:
        strength = torch.stack([shown(coarse, r, 3).mean(0).amax(0) for r in tried])
        best = strength.argmax(0).tolist()
    else:
        best = [0] * len(wanted)
    angles = torch.arange(n_angles) * float(step)
    total += len(set(best)) * _REPLICATES * n_angles
    fine = {k: shown(angles, tried[k], _REPLICATES) for k in sorted(set(best))}
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


def _radii(shape: Shape, radii: Sequence[float] | None, size: int) -> tuple[float, ...]:
    if shape == "line":
        return (float("inf"),)
    if radii is None:
        share = 1.0 if shape == "curve" else 0.25
        return tuple(share * r * size for r in RADII)
    if not radii or not all(0 < r < float("inf") for r in radii):
        raise ValueError(f"radii {list(radii)} must be positive")
    return tuple(float(r) for r in radii)


def draw(
    shape: Shape,
    angles: Float[Tensor, " image"],
    radius: float,
    size: int,
    look: Look = _STROKES[0],
) -> Float[Tensor, "image 3 h w"]:
    """A shape at each angle, in one of the replicates."""
    if shape == "grating":
        contrast, phase, _ = look
        return gratings(angles + 90, max(2.0, radius), size, contrast=contrast, phase=phase)
    ink, paper, thick = look
    bent = min(radius, STRAIGHT)
    return arcs(angles, bent, size, thickness=thick * max(2.0, size / 32), ink=ink, paper=paper)
