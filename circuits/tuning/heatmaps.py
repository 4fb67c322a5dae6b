"""Orientation x curvature: a unit's response to curves of every radius at every angle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.stimuli.patterns import STRAIGHT, arcs
from circuits.tuning.responding import BATCH, responses, stimulus_size
from circuits.units import Unit


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Responses to drawn curves, by where they bulge and how much they are bent.

    Attributes:
        unit: which.
        angles: where curves bulge, in degrees.
        curvatures: 1 / radius, in 1 / pixels; 0 is a line.
        responses: activations, the mean of dark on light and light on dark.
        deviation: the unit's standard deviation on a dataset; NaN if none was given.
        mean: the unit's mean on it; NaN likewise.
        size: of the images, in pixels.
        model: its name.
        model_hash: of its weights.
        data: what mean and deviation are of.
    """

    unit: Unit
    angles: Float[np.ndarray, " angle"]
    curvatures: Float[np.ndarray, " curvature"]
    responses: Float[np.ndarray, "curvature angle"]
    deviation: float
    mean: float
    size: int
    model: str
    model_hash: str
    data: str

    @property
    def in_deviations(self) -> Float[np.ndarray, "curvature angle"]:
        """Responses as distances from the dataset's mean, in its standard deviations."""
        return (self.responses - self.mean) / self.deviation

    @property
    def best(self) -> tuple[float, float]:
        """The angle and curvature with the largest response."""
        row, column = np.unravel_index(int(self.responses.argmax()), self.responses.shape)
        return float(self.angles[column]), float(self.curvatures[row])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        arrays = {k: getattr(self, k).tolist() for k in ("angles", "curvatures", "responses")}
        angle, curvature = self.best
        return vars(self) | arrays | {
            "unit": str(self.unit), "best_angle": angle, "best_curvature": curvature
        }  # fmt: skip


def heat_map(
    model: HookedModel,
    units: Sequence[str | Unit],
    *,
    step: float = 10.0,
    curvatures: Sequence[float] | None = None,
    size: int | None = None,
    statistics: Sequence[tuple[float, float]] | None = None,
    data: str = "",
    progress: Progress | None = None,
) -> list[HeatMap]:
    """Responses of units of one site to curves of every orientation and curvature.

    Args:
        model: of images.
        units: of one site.
        step: from angle to angle, in degrees; must divide 360.
        curvatures: 1 / radius, in 1 / pixels, 0 for a line; nine from 0 to 12 / size if not given.
        size: of the images, as for `radial_tuning`.
        statistics: each unit's mean and standard deviation on a dataset.
        data: what dataset that is.
        progress: called with images done and all.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no photographs, units are of several sites, or an option is out of
            range.
    """
    wanted = [model.unit(unit) for unit in units]
    if len({unit.site for unit in wanted}) != 1:
        raise ValueError(
            f"units {', '.join(map(str, wanted)) or '(none)'}: expected units of one site"
        )
    n_angles = round(360 / step) if step > 0 else 0
    if n_angles < 4 or abs(n_angles * step - 360) > 1e-6:
        raise ValueError(f"step {step} must divide 360 degrees into at least four")
    if statistics is not None and len(statistics) != len(wanted):
        raise ValueError(f"statistics: {len(statistics)} for {len(wanted)} units")
    pixels = stimulus_size(model, wanted[0].site, size)
    bends = np.linspace(0, 12 / pixels, 9) if curvatures is None else np.asarray(curvatures, float)
    if bends.ndim != 1 or not len(bends) or bends.min() < 0:
        raise ValueError(f"curvatures {bends.tolist()} must be 0 or more")
    angles = torch.arange(n_angles) * float(step)
    radii = [1 / max(float(c), 1 / STRAIGHT) for c in bends]
    total = 2 * len(radii) * n_angles

    def images(ink: float) -> Iterator[Tensor]:
        for radius in radii:
            for some in angles.split(BATCH):
                thick = max(2.0, pixels / 32)
                yield arcs(some, radius, pixels, thickness=thick, ink=ink, paper=1 - ink)

    def note(start: int, done: int) -> None:
        if progress is not None:
            progress(start + done, total)

    found = sum(
        responses(model, wanted[0].site, images(ink), progress=partial(note, k * total // 2))
        for k, ink in enumerate((0.0, 1.0))
    )
    assert isinstance(found, torch.Tensor), "two polarities were shown"
    table = (found / 2).unflatten(0, (len(radii), n_angles)).double().numpy()
    model_hash = model.hash
    return [
        HeatMap(
            unit, angles.double().numpy(), bends, table[:, :, unit.index],
            float("nan") if statistics is None else statistics[k][1],
            float("nan") if statistics is None else statistics[k][0], pixels, model.name, model_hash, data,
        )
        for k, unit in enumerate(wanted)
    ]  # fmt: skip
