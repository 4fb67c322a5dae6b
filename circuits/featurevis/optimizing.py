"""Gradient ascent on images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.autograd import recording_gradients
from circuits.featurevis.gradients import RedirectedGradients
from circuits.featurevis.objectives import Objective, Response, side_by_side
from circuits.featurevis.parameterizations import Parameterization, fourier
from circuits.featurevis.transforms import NOTHING, Transform
from circuits.models.adapter.finiteness import where_nonfinite
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.tensors import in_fewer_digits

REDIRECTED_STEPS = 16
"""In this many first steps gradients pass through inactive ReLUs, as in lucid; longer while an image has no
gradient."""

MICRO_BATCH = 4
"""How many images go through the network at a time on a CPU, unless one objective needs more together."""


Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class Optimized:
    """Images after gradient ascent.

    Attributes:
        images: the images, in 0..1.
        values: the objective's value on each image, without transformation.
        start: its value on the initial images.
        steps: the number of steps done.
        alpha: the opacity of each pixel, if it was optimised or traced.
        at: the images after each of the `thresholds`.
    """

    images: Float[Tensor, "batch channel h w"]
    values: Float[Tensor, " batch"]
    start: Float[Tensor, " batch"]
    steps: int
    alpha: Float[Tensor, "batch 1 h w"] | None = None
    at: dict[int, Float[Tensor, "batch channel h w"]] = field(default_factory=dict)


def respond(
    model: HookedModel,
    images: Float[Tensor, "batch channel h w"],
    objective: Objective,
    *,
    before: Tensor | None = None,
    grad: bool = False,
) -> Float[Tensor, " batch"]:
    """An objective's value on images in 0..1; objectives of pixels see the images `before` transformation, if given."""
    assert isinstance(model.input, ImageInput), "checked by the caller"
    cache: dict[str, Tensor] = {}
    if objective.sites:
        # Channels last is the layout in which convolutions on a processor are fastest.
        inputs = model.input.normalize(images).to(memory_format=torch.channels_last)
        until = model.last(objective.sites)
        found = model.run(inputs, read=objective.sites, until=until, grad=grad)
        cache = {name: found[name] for name in objective.sites}
    return objective.value(Response(images if before is None else before, cache))


Part = tuple[Objective, int]
"""An objective, and how many images of the batch it is for."""


@recording_gradients()
def optimize(
    model: HookedModel,
    parts: Sequence[Part],
    made: Parameterization,
    *,
    steps: int,
    seed: int,
    transform: Transform = NOTHING,
    learning_rate: float | None = None,
    views: int = 1,
    thresholds: Sequence[int] = (),
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Optimized:
    """Maximise objectives over images with NAdam.

    For speed the forward pass stops after the last site needed, and images are in channels-last layout and go through
    the network a few at a time; none of this changes the result but by rounding.

    Args:
        model: an image model.
        parts: the objectives, the first one for the first images and so on; those without a site need no forward pass.
        made: the parameterized images.
        steps: number of optimisation steps.
        seed: seed of the transforms, which are the same for all images of a step.
        transform: applied to the images at each step.
        learning_rate: replaces the parameterization's own.
        views: how many random views of each image a step averages over.
        thresholds: after which steps to keep the images.
        precision: precision of the passes; reported values are in float32.
        progress: called with the number of steps done and the total; stops the work if it returns False.

    Raises:
        ValueError: if the model cannot run on the size, a value or gradient is not finite (the message names the first
            site), or no gradient leads to the image.
    """
    chunks = _chunks(parts, model.device)
    # Before the first step, so that a size that the model cannot run on ends here with one line and not amid a backward
    # pass.
    start = values_of(model, parts, made.image().detach())
    optimizer = torch.optim.NAdam(made.parameters, lr=learning_rate or made.learning_rate)
    kept: dict[int, Tensor] = {}
    trace: Tensor | None = None
    done, dead = 0, False
    for step in range(steps):
        optimizer.zero_grad()
        # The images are made once a step and detached: each chunk's backward pass stops there, so that its graph is
        # freed before the next chunk, and one pass through the parameterization takes all gradients at the end.
        results = [made.image(), *([made.alpha()] if made.alpha else [])]
        leaves = [result.detach().requires_grad_(True) for result in results]
        for begin, end, objective in chunks:
            for view in range(views):
                # From the step and the view only: every image sees the same transform, also when the batch is cut
                # otherwise.
                drawing = torch.Generator().manual_seed(_step_seed(seed, step, view))
                cut = [leaf[begin:end] for leaf in leaves]
                redirected = step < REDIRECTED_STEPS or dead
                own = _OptimizationStep(
                    step, step / steps, redirected, transform, drawing, precision
                )
                value = own.value(model, objective, cut) / views
                (-value.sum()).backward()
        _check_gradients(model, leaves, parts, step)
        # One image without any gradient is enough to redirect all of the next step. `RedirectedGradients` acts on dead
        # examples alone, hence the others are as good as untouched.
        dead = bool((_size_of(leaves[0].grad).flatten(1).amax(1) == 0).any())
        # Gradients on images become gradients on parameters by the chain rule, in one pass for the whole batch.
        torch.autograd.backward(results, [leaf.grad for leaf in leaves])
        if made.traced:
            seen = _size_of(leaves[0].grad)
            trace = seen if trace is None else trace + seen
        optimizer.step()
        done = step + 1
        if done in thresholds:
            kept[done] = made.image().detach().cpu()
        if progress and progress(done, steps) is False:
            break
    final = made.image().detach()
    with torch.no_grad():
        alpha = made.alpha().cpu() if made.alpha else _opacity(trace)
    value = values_of(model, parts, final)
    return Optimized(final.cpu(), value.cpu(), start.cpu(), done, alpha, kept)


def _chunks(parts: Sequence[Part], device: torch.device) -> list[tuple[int, int, Objective]]:
    """The batch cut into chunks of a few images, never within a part; larger ones do not fit a processor's cache."""
    # An accelerator is hardly busy with four images.
    most = MICRO_BATCH if device.type == "cpu" else 16 * MICRO_BATCH
    found: list[tuple[int, int, Objective]] = []
    begin = end = 0
    waiting: list[Part] = []
    for i, (objective, n) in enumerate(parts):
        waiting.append((objective, n))
        end += n
        last = i == len(parts) - 1
        # A chunk ends where the next part would no longer fit: parts of 3, 2, 2 images at most 4 give 3 | 2 + 2. A part
        # that is larger than the limit is a chunk by itself, since objectives such as diversity need all of its images.
        if last or end - begin + parts[i + 1][1] > most:
            found.append((begin, end, side_by_side(waiting)))
            begin, waiting = end, []
    return found


def _step_seed(seed: int, step: int, view: int) -> int:
    """A different seed for each step and view."""
    # Hashed, since a weighted sum of the three is the same for other steps of another seed. The seed comes last: it may
    # take two of the hash's words, and what follows would be read differently then.
    return int(np.random.default_rng([step, view, seed]).integers(2**63))


def values_of(model: HookedModel, parts: Sequence[Part], images: Tensor) -> Tensor:
    """Each image's value; a model that cannot run on this size raises a one-line error."""
    found = []
    try:
        for begin, end, objective in _chunks(parts, model.device):
            found.append(respond(model, images[begin:end], objective))
    except RuntimeError as error:
        height, width = images.shape[-2:]
        first = str(error).splitlines()[0]
        raise ValueError(
            f"size {height} x {width}: the model cannot run on images of this size ({first})"
        ) from error
    return torch.cat(found).detach()


@dataclass(frozen=True, eq=False)
class _OptimizationStep:
    """One optimisation step for some of the images."""

    number: int
    progress: float
    redirected: bool
    transform: Transform
    generator: Generator
    precision: Precision

    def value(
        self, model: HookedModel, objective: Objective, cut: Sequence[Tensor]
    ) -> Float[Tensor, " batch"]:
        """The objective on a random view of images, multiplied by their transparency if that is optimised."""
        images = cut[0]
        shown = images if len(cut) == 1 else self._on_background(images, cut[1])
        half = (
            in_fewer_digits(images.device.type, torch.bfloat16)
            if self.precision == "bfloat16"
            else nullcontext()
        )
        with RedirectedGradients() if self.redirected else nullcontext(), half:
            view = self.transform(shown, self.generator, self.progress)
            value = respond(model, view, objective, before=images, grad=True).float()
        if not torch.isfinite(value).all():
            where = _first_nonfinite(model, images.detach(), objective)
            raise ValueError(
                f"objective {objective.text} is not a finite number at step {self.number + 1}: {where}"
            )
        if not value.requires_grad:
            raise ValueError(f"objective {objective.text}: no gradient leads from it to the image")
        # The mean opacity is a price: without it an opaque image is always best, and opacity says nothing.
        return value if len(cut) == 1 else value * (1 - cut[1].flatten(1).mean(1))

    def _on_background(self, images: Tensor, alpha: Tensor) -> Tensor:
        """Transparent images on a random background, so that transparent pixels carry no information."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        shape = (1, images.shape[1], images.shape[2], images.shape[3])
        with torch.no_grad():  # sd 0.2: about the contrast of a finished picture
            background = fourier(shape, seed, [0], images.device, sd=0.2).values().sigmoid()
        return images * alpha + background * (1 - alpha)


def _size_of(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "every image had a backward pass"
    return gradient.abs().sum(1, keepdim=True)


def _opacity(trace: Tensor | None) -> Tensor | None:
    """Opacity from summed gradient sizes: the top 1 % of the pixels are opaque (Fel et al. 2023)."""
    if trace is None:
        return None
    # Relative to the 99th percentile and not the maximum: a single pixel would make all others transparent.
    top = trace.flatten(1).quantile(0.99, dim=1).clamp_min(1e-30)
    return (trace / top[:, None, None, None]).clamp(0, 1).cpu()


def _check_gradients(
    model: HookedModel, leaves: Sequence[Tensor], parts: Sequence[Part], step: int
) -> None:
    texts = [objective.text for objective, n in parts for _ in range(n)]
    for leaf in leaves:
        if leaf.grad is None:
            raise ValueError(f"objective {texts[0]}: no gradient leads from it to the image")
        finite = torch.isfinite(leaf.grad).flatten(1).all(1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0, 0])
            image = leaves[0].detach()[bad : bad + 1]
            where = _first_nonfinite(model, image, side_by_side(parts))
            raise ValueError(
                f"objective {texts[bad]}: the gradient is not a finite number at step {step + 1}: "
                f"{where}"
            )


def _first_nonfinite(model: HookedModel, images: Tensor, objective: Objective) -> str:
    """The first site before an objective whose values are not finite, in words."""
    assert isinstance(model.input, ImageInput), "checked by the caller"
    last = model.last(objective.sites or [model.sites[-1]])
    where = where_nonfinite(model, model.input.normalize(images), until=last)
    if where:
        return where
    return f"all sites up to {last.name} are finite on the untransformed image"
