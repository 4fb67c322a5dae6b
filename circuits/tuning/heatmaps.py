"""Heat maps of orientation and curvature: a unit's response to curves of every radius at every angle."""

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
from circuits.tuning.responding import BATCH, check_step, of_one_site, responses, stimulus_size
from circuits.units import Unit


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A unit's responses to drawn curves, by orientation and curvature.

    Attributes:
        unit: the unit.
        angles: where curves bulge, in degrees.
        curvatures: 1 / radius, in 1 / pixels; 0 is a line.
        responses: activations, averaged over dark on light and light on dark.
        deviation: the unit's standard deviation on a dataset; NaN if it was not given.
        mean: the unit's mean on the dataset; NaN if it was not given.
        size: the size of the images, in pixels.
        model: the model's name.
        model_hash: the hash of the model.
        data: the name of the dataset.
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
        """Responses minus the mean on the dataset, in standard deviations."""
        return (self.responses - self.mean) / self.deviation

    @property
    def best(self) -> tuple[float, float]:
        """The angle and curvature with the largest response."""
        row, column = np.unravel_index(int(self.responses.argmax()), self.responses.shape)
        return float(self.angles[column]), float(self.curvatures[row])

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
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
    """Measure the responses of units of one site to curves of every orientation and curvature.

    Args:
        model: a model of images.
        units: units of one site.
        step: the step between angles, in degrees; must divide 360.
        curvatures: 1 / radius, in 1 / pixels, 0 for a line; by default nine from 0 to 12 / size.
        size: the size of the images; see `radial_tuning`.
        statistics: each unit's mean and standard deviation on a dataset.
        data: the name of the dataset.
        progress: called with the images done and in all.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no photographs, units are of several sites, or an option is out of
            range.
    """
    wanted, n_angles = of_one_site(model, units), check_step(step)
    if statistics is not None and len(statistics) != len(wanted):
        raise ValueError(
            f"statistics have {len(statistics)} entries: expected one for each of {len(wanted)} units"
        )
    pixels = stimulus_size(model, wanted[0].site, size)
    bends = np.linspace(0, 12 / pixels, 9) if curvatures is None else np.asarray(curvatures, float)
    if bends.ndim != 1 or not len(bends) or bends.min() < 0:
        raise ValueError(f"curvatures {bends.tolist()} must be 0 or more")
    angles = torch.arange(n_angles) * float(step)
    # A curvature of 0 is drawn as a curve of a very large radius.
    radii = [1 / max(float(c), 1 / STRAIGHT) for c in bends]
    total = 2 * len(radii) * n_angles

    def images(ink: float) -> Iterator[Tensor]:
        for radius in radii:
            for some in angles.split(BATCH):
                # A thirty-second of the image is the default thickness of `draw`, so that both measure the same curve.
                thick = max(2.0, pixels / 32)
                yield arcs(some, radius, pixels, thickness=thick, ink=ink, paper=1 - ink)

    def note(start: int, done: int) -> None:
        if progress is not None:
            progress(start + done, total)

    # Dark on light and light on dark: a response to one polarity alone counts half.
    found = sum(
        responses(model, wanted[0].site, images(ink), progress=partial(note, k * total // 2))
        for k, ink in enumerate((0.0, 1.0))
    )
    assert isinstance(found, torch.Tensor), "two polarities were shown"
    table = (found / 2).unflatten(0, (len(radii), n_angles)).double().numpy()
    model_hash = model.hash  # once for all units: hashing reads every weight
    return [
        HeatMap(
            unit, angles.double().numpy(), bends, table[:, :, unit.index],
            float("nan") if statistics is None else statistics[k][1],
            float("nan") if statistics is None else statistics[k][0], pixels, model.name, model_hash, data,
        )
        for k, unit in enumerate(wanted)
    ]  # fmt: skip
