"""Input attribution by gradients: plain, smoothed, guided, integrated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from circuits.attribution.integrating import integrate
from circuits.attribution.passes import Passes
from circuits.checks import check_range
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress

Blank = Literal["zero", "black", "white", "blur"]
"""A blank image: zeros after preprocessing (the mean colour), black, white, or the image itself, blurred."""

Smoothing = Literal["mean", "variance", "square"]
"""How gradients on noisy copies are combined: SmoothGrad (Smilkov et al. 2017), VarGrad (Adebayo et al. 2018),
SmoothGrad-squared (Hooker et al. 2019)."""


def gradient(passes: Passes, progress: Progress | None = None) -> Tensor:
    """The target's signed gradient with respect to each pixel (Simonyan et al. 2013)."""
    parts = []
    for some in passes.chunks(len(passes)):
        which = torch.arange(some.start, some.stop)
        parts.append(passes.gradient(passes.points[some.start : some.stop], which)[1])
        if progress is not None:
            progress(some.stop, len(passes))
    return torch.cat(parts)


def smooth_gradient(
    passes: Passes,
    samples: int = 50,
    noise: float = 0.15,
    of: Smoothing = "mean",
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Gradients on noisy copies of each image: their mean, variance or mean square.

    Args:
        passes: passes from the input to the target.
        samples: number of noisy copies of each image.
        noise: standard deviation of the noise, as a share of the image's range.
        of: how the gradients are combined.
        seed: seed of the noise; an image's noise does not depend on the other images.
        progress: called with the number of examples done and the total.

    Raises:
        ValueError: if an option is out of range.
    """
    check_range("samples", samples, 1)
    check_range("noise", noise, 0)
    if of not in get_args(Smoothing):
        raise ValueError(f"of {of!r} is not one of {', '.join(get_args(Smoothing))}")
    found = []
    for example in range(len(passes)):
        total = torch.zeros_like(passes.points[example])
        square = torch.zeros_like(total)
        for noisy in noisy_copies(passes, example, samples, noise, seed):
            gradients = passes.gradient(noisy, example)[1]
            total += gradients.sum(0)
            square += gradients.square().sum(0)
        mean = total / samples
        moments = {"mean": mean, "square": square / samples}
        # E[g^2] - E[g]^2 may come out below 0 by rounding where all gradients are alike.
        moments["variance"] = (square / samples - mean.square()).clamp_min(0)
        found.append(moments[of])
        if progress is not None:
            progress(example + 1, len(passes))
    return torch.stack(found)


def noisy_copies(
    passes: Passes, example: int, samples: int, noise: float, seed: int
) -> Iterator[Tensor]:
    """Noisy copies of an example, a batch at a time."""
    x = passes.inputs[example]
    # Relative to the range of the image's values, as in SmoothGrad, so that one level suits every preprocessing.
    spread = noise * float(x.max() - x.min())
    generator = torch.Generator().manual_seed(seed)
    for chunk in passes.chunks(samples):
        # Copy by copy, so that the noise does not depend on the batch size.
        drawn = [torch.randn(x.shape, generator=generator) for _ in chunk]
        yield x + spread * torch.stack(drawn).to(x)


def guided_gradient(passes: Passes, progress: Progress | None = None) -> Tensor:
    """Guided backpropagation: ReLUs pass only positive gradients back (Springenberg et al. 2014).

    Raises:
        ValueError: if no ReLU ran before the target.
    """
    # A model without any ReLU would get its plain gradient under the name of guided backpropagation.
    with guided() as met:
        found = gradient(passes, progress)
    if not met:
        raise ValueError(
            f"model {passes.model.name} has no ReLU before {passes.target}: guided backpropagation needs one"
        )
    return found


@contextmanager
def guided() -> Iterator[list[str]]:
    """Make every ReLU inside the block a guided one; yields a list to which each ReLU that runs is added."""
    mode = _Guided()
    with mode:
        yield mode.met


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)  # not x, which a later in-place operation may overwrite
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        # Two conditions: the unit was active (backpropagation) and its gradient is positive (deconvolution).
        return torch.where(above, grads[0].clamp_min(0), 0)


_RELUS = frozenset({F.relu, torch.relu, Tensor.relu, F.relu_, torch.relu_, Tensor.relu_})


class _Guided(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RELUS:
            return func(*args, **(kwargs or {}))
        self.met.append(func.__name__)
        given = dict(zip(("input", "inplace"), args, strict=False)) | (kwargs or {})
        # In-place ReLUs too: many image models have nothing else.
        x = given["input"]
        made = _GuidedReLU.apply(x)
        if given.get("inplace") or func.__name__.endswith("_"):
            return x.copy_(made)  # the model may use its own tensor again instead of the result
        return made


def integrated_gradient(
    passes: Passes,
    blank: Blank | Tensor = "zero",
    steps: int = 50,
    tolerance: float | None = 0.01,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Integrated gradients from a blank image to the image.

    Returns:
        The values, the residual of their sum for each example, and the options used.

    Raises:
        ValueError: if an option is out of range.
    """
    check_range("steps", steps, 1)
    check_range("tolerance", tolerance or 0.0, 0)
    base = blanks(passes, blank)
    values, residual, used = integrate(passes, base, steps, tolerance, progress)
    return values, residual, {"steps": used, "tolerance": tolerance, "blank": name_of(blank)}


def name_of(blank: str | Tensor) -> str:
    """A blank's name in records."""
    return blank if isinstance(blank, str) else "given"


def blanks(passes: Passes, blank: Blank | Tensor) -> Tensor:
    """A blank for each image, as the model takes images.

    Raises:
        ValueError: if the name is unknown, or the tensor has another shape.
    """
    return blank_images(passes.model.input, passes.inputs, blank)


def blank_images(spec: Any, x: Tensor, blank: Blank | Tensor) -> Tensor:
    """A blank for each of some images that a model takes, as it takes them."""
    if isinstance(blank, Tensor):
        if blank.shape not in (x.shape, x.shape[1:]):
            raise ValueError(f"blank of shape {tuple(blank.shape)}: expected {tuple(x.shape[1:])}")
        return blank.to(x).expand_as(x)
    if blank not in get_args(Blank):
        raise ValueError(f"blank {blank!r} is not one of {', '.join(get_args(Blank))}")
    if blank == "zero":
        return torch.zeros_like(x)
    # A twentieth of the side removes what can be recognised and keeps colours and brightness.
    if blank == "blur":
        return blurred(x, max(x.shape[-2:]) / 20)
    assert isinstance(spec, ImageInput), "pixels are of images"
    return spec.normalize(torch.full_like(x, float(blank == "white")))


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Images blurred by a Gaussian of `sigma` pixels; beyond the border the edge pixels repeat."""
    if sigma < 0.05:
        return x
    # The Gaussian is separable: two one-dimensional convolutions, each channel by itself, cut off at 3 sigma.
    radius = max(1, round(3 * sigma))
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    for axis in (2, 3):
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        weight = kernel.reshape(shape).expand(channels, *[-1] * 3)
        x = F.conv2d(F.pad(x, pad, mode="replicate"), weight, groups=channels)
    return x
