"""Class activation maps from the gradient at a site: Grad-CAM and its successors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.passes import Passes
from circuits.autograd import recording_gradients
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.saliency.gradients import check_range, guided_gradient, noisy_copies
from circuits.tasks.targets import Target, output_site
from circuits.units import Site, Unit

Cam = Float[Tensor, "example y x"]


def last_map(model: HookedModel, target: Target) -> Site:
    """The last map of channels before the output: where class activation maps are usually taken.

    Raises:
        ValueError: if there is none, or the target is not an output.
    """
    # A unit inside the network has maps before and behind it, of which no last one is meant.
    if target.site != output_site(model).name:
        raise ValueError(f"target {target} is not an output: name the site to take the map at")
    for site in reversed(model.sites):
        # A map of one position (behind global pooling) says nothing about where.
        if site.position_axes == ("y", "x") and min(site.position_shape) > 1:
            return site
    raise ValueError(f"model {model.name} has no site with a map of more than one position")


def _maps(site: Site, value: Tensor) -> Float[Tensor, "example channel y x"]:
    if site.position_axes != ("y", "x"):
        raise ValueError(
            f"site {site.name} has the position axes {site.position_axes or 'none'}: expected a map (y, x)"
        )
    return site.activations(value).unflatten(2, (value.shape[2], value.shape[3]))


def grad_cam(passes: Passes) -> Cam:
    """Activations weighted by each channel's mean gradient (Selvaraju et al. 2017), signed.

    Args:
        passes: from the site to the target.

    Raises:
        ValueError: if the site has no map, or does not come before the target.
    """
    activations, gradients = _activations_and_gradients(passes)
    # Signed here; `enlarged` takes the positive part, which the paper has in the formula.
    return (activations * gradients.mean((2, 3), keepdim=True)).sum(1)


def grad_cam_plus_plus(passes: Passes) -> Cam:
    """Grad-CAM++: position-wise weights for features that occur several times (Chattopadhay et al. 2018).

    For the exponential of the score, whose higher derivatives are powers of the score's gradient (equation 19).
    """
    activations, g = _activations_and_gradients(passes)
    return _weighted(activations, g, g.square(), g.pow(3))


def smooth_grad_cam_plus_plus(
    passes: Passes,
    samples: int = 25,
    noise: float = 0.15,
    seed: int = 0,
    progress: Progress | None = None,
) -> Cam:
    """Grad-CAM++ with the derivatives averaged over noisy images (Omeiza et al. 2019).

    Args:
        passes: from the site to the target.
        samples: copies of each image.
        noise: standard deviation, as a share of the image's range.
        seed: of the noise.
        progress: called with examples done and all.

    Raises:
        ValueError: if an option is out of range.
    """
    check_range("samples", samples, 1)
    check_range("noise", noise, 0)
    # Derivatives are averaged over noisy images, activations are those of the image itself (Omeiza et al. 2019): only
    # the weights of the channels are smoothed.
    site = passes.site
    assert site is not None, "maps are taken at a site"
    found = []
    for example in range(len(passes)):
        sums: list[Tensor] = []
        for noisy in noisy_copies(passes, example, samples, noise, seed):
            copies = Passes(
                passes.model, noisy, passes.aim.of(example), site, passes.batch, size="keep"
            )
            g = _activations_and_gradients(copies)[1]
            powers = [
                g.sum(0, keepdim=True),
                g.square().sum(0, keepdim=True),
                g.pow(3).sum(0, keepdim=True),
            ]
            sums = [a + b for a, b in zip(sums, powers, strict=True)] if sums else powers
        activations = _maps(site, passes.points[example : example + 1])
        found.append(_weighted(activations, *[s / samples for s in sums]))
        if progress is not None:
            progress(example + 1, len(passes))
    return torch.cat(found)


def _activations_and_gradients(passes: Passes) -> tuple[Tensor, Tensor]:
    site = passes.site
    assert site is not None, "maps are taken at a site"
    activations = _maps(site, passes.points)
    gradients = passes.gradient(passes.points, torch.arange(len(passes)))[1]
    return activations, _maps(site, gradients)


def _weighted(activations: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Cam:
    # alpha = g^2 / (2 g^2 + sum_positions(A) g^3) (equation 19), with weights sum of alpha relu(g). Computed in units
    # of each example's largest gradient: the cube of a small gradient would underflow in float32.
    size = first.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(first.dtype).tiny)
    second, third = second / size**2, third / size**2
    below = 2 * second + activations.sum((2, 3), keepdim=True) * third
    alpha = torch.where(below == 0, 0.0, second / torch.where(below == 0, 1.0, below))
    weights = (alpha * first.clamp_min(0)).sum((2, 3), keepdim=True)
    return (activations * weights).sum(1)


def enlarged(cam: Cam, size: tuple[int, int]) -> Float[Tensor, "example 1 h w"]:
    """The positive part of a map, interpolated to the input's pixels."""
    # Grad-CAM's ReLU: a negative sum speaks for other classes.
    return F.interpolate(cam.clamp_min(0)[:, None], size, mode="bilinear", align_corners=False)


@recording_gradients()
def guided_grad_cam(
    model: HookedModel,
    inputs: Tensor,
    target: str | Unit | Target,
    cam: Float[Tensor, "example 1 h w"],
    batch: int = 32,
) -> Tensor:
    """Guided backpropagation times an enlarged Grad-CAM."""
    return guided_gradient(Passes(model, inputs, target, batch=batch, size="keep")) * cam
