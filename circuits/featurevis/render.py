"""Feature visualization: the image that excites a unit (layer 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from circuits.featurevis.gradients import redirected_relus
from circuits.featurevis.objectives import ChannelObjective
from circuits.featurevis.parameterizations import fourier_image
from circuits.featurevis.transforms import RandomView
from circuits.files import replacing
from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput
from circuits.stimuli.images import to_image
from circuits.units import Unit

REDIRECTED_STEPS = 16
"""Steps at the start in which gradients pass silent units."""

Progress = Callable[[int, int], object]


@dataclass(frozen=True, eq=False)
class Picture:
    """A feature visualization.

    Attributes:
        unit: what it shows.
        image: in 0..1, in the model's channels.
        activation: the unit's mean activation over positions that the image reaches, untransformed.
        start: the same for the image that the optimisation started from.
        model_hash: of the model's weights.
        steps: of optimisation.
        seed: of the start and the transforms.
    """

    unit: Unit
    image: Float[Tensor, "channel h w"]
    activation: float
    start: float
    model_hash: str
    steps: int
    seed: int

    def metadata(self) -> dict[str, Any]:
        """Everything but the image, as a plain dictionary."""
        return {
            "unit": str(self.unit),
            "objective": "channel",
            "activation": self.activation,
            "start_activation": self.start,
            "model_hash": self.model_hash,
            "steps": self.steps,
            "seed": self.seed,
            "size": list(self.image.shape[1:]),
        }

    def to_pil(self) -> Image.Image:
        """As a picture; images with other than 1 or 3 channels show the mean of their channels."""
        image = self.image if self.image.shape[0] == 3 else self.image.mean(0, keepdim=True)
        return to_image(image.expand(3, -1, -1))

    def save(self, path: str | Path) -> None:
        """Write a PNG with the metadata inside (text chunk `circuits`)."""
        info = PngImagePlugin.PngInfo()
        info.add_text("circuits", json.dumps(self.metadata()))
        with replacing(Path(path)) as temporary:
            self.to_pil().save(temporary, format="PNG", pnginfo=info)


def visualize(
    model: HookedModel,
    unit: str | Unit,
    *,
    steps: int = 256,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Picture:
    """The image that excites a unit most, found by gradient ascent (Olah et al. 2017).

    See `visualize_units` for the arguments and errors.
    """
    return visualize_units(model, [unit], steps=steps, size=size, seed=seed, progress=progress)[0]


def visualize_units(
    model: HookedModel,
    units: Sequence[str | Unit],
    *,
    steps: int = 256,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    learning_rate: float = 0.05,
    transform: RandomView | None = None,
    progress: Progress | None = None,
) -> list[Picture]:
    """Visualize several units together, one image each.

    Fourier parameterization, decorrelated colour, random jitter, scale and turn, Adam. The forward
    pass stops at the deepest site needed.

    Args:
        model: an image model.
        units: what to visualize.
        steps: of optimisation.
        size: of the images in pixels, or (height, width); the model's input size if not given.
        seed: of the start and the transforms: same seed, same pictures on the same machine.
        learning_rate: of Adam.
        transform: instead of `RandomView` fitted to the size.
        progress: told the steps done and in all.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if a unit does not exist, the model does not take images, `steps`, `size` or `seed` is
            out of range, the site has no gradient, or the model's values are not finite.
    """
    spec = model.input
    if not isinstance(spec, ImageInput):
        raise ValueError(f"model {model.name} takes tokens: feature visualization needs images")
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must be from 0 to 2^63 - 1")
    height, width = _size(size, spec)
    objective = ChannelObjective.of(model, units)
    generator = torch.Generator().manual_seed(seed)
    parameters = fourier_image(
        len(units), spec.channels, height, width, generator, device=model.device
    )
    # small inputs cannot lose twelve pixels at the border
    view = transform or RandomView(jitter=min(12.0, min(height, width) / 16))
    optimizer = torch.optim.Adam(parameters.parameters, lr=learning_rate)

    def evaluate(image: Tensor, grad: bool) -> Tensor:
        until = model.last(objective.sites)
        cache = model.run(spec.normalize(image), read=objective.sites, until=until, grad=grad)
        return objective.value(cache)

    try:
        start = evaluate(parameters.image().detach(), grad=False)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"size {height} x {width}: the model cannot run on it ({first})"
        ) from error
    for step in range(steps):
        with ExitStack() as stack:
            if step < REDIRECTED_STEPS:
                stack.enter_context(model.lock)
                stack.enter_context(redirected_relus(model.module))
            value = evaluate(view(parameters.image(), generator), grad=True)
            _ascend(optimizer, value, objective)
        if progress:
            progress(step + 1, steps)
    final = parameters.image().detach()
    reached = evaluate(final, grad=False)
    model_hash = model.hash
    return [
        Picture(unit, image.cpu(), end.item(), begin.item(), model_hash, steps, seed)
        for unit, image, end, begin in zip(objective.units, final, reached, start, strict=True)
    ]


def _ascend(optimizer: torch.optim.Optimizer, value: Tensor, objective: ChannelObjective) -> None:
    """One step up each image's value."""
    if not torch.isfinite(value).all():
        bad = objective.units[int((~torch.isfinite(value)).nonzero()[0, 0])]
        raise ValueError(f"unit {bad}: the model's activation is not a finite number")
    if not value.requires_grad:
        raise ValueError(f"unit {objective.units[0]}: no gradient leads from its site to the image")
    optimizer.zero_grad()
    (-value.sum()).backward()
    optimizer.step()


def _size(size: int | tuple[int, int] | None, spec: ImageInput) -> tuple[int, int]:
    if size is None:
        return spec.height, spec.width
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 8 or max(height, width) > 4096:
        raise ValueError(f"size {height} x {width} is not valid: expected 8 to 4096 pixels a side")
    return height, width
