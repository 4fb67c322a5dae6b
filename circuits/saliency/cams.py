"""Class activation maps from the gradient at a site: Grad-CAM and its successors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.passes import Passes
from circuits.autograd import recording_gradients
from circuits.checks import check_range
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.patches import is_map, token_places
from circuits.progress import Progress
from circuits.saliency.gradients import guided_gradient, noisy_copies
from circuits.tasks.targets import Target, output_site
from circuits.units import Site, Unit

Cam = Float[Tensor, "example y x"]


def last_map(model: HookedModel, target: Target) -> Site:
    """The last site with a map before the output: where class activation maps are usually taken.

    In a vision transformer its tokens are the map. A head that reads the class token alone leaves no gradient at the
    other tokens of the last layers, so it is the last site of the stream at which they have one.

    Raises:
        ValueError: if there is none, or the target is not an output.
    """
    # A unit inside the network has maps before and behind it, of which no last one is meant.
    if target.site != output_site(model).name:
        raise ValueError(f"target {target} is not an output: name the site to take the map at")
    # A map of one position (behind global pooling) says nothing about where.
    maps = [s for s in model.sites if is_map(s) and min(s.position_shape) > 1]
    if not maps:
        raise ValueError(f"model {model.name} has no site with a map of more than one position")
    behind = model.sites[model.sites.index(maps[-1]) + 1 :]
    tokens = [s for s in behind if _may_hold(s, maps[-1])]
    if not tokens:
        return maps[-1]
    inputs = model.fitted(model.input.example(1))
    try:
        places = token_places(model, tokens[-1], inputs)
    except ValueError as error:
        # A pooling by attention at the end of a CNN (CLIP's ResNets) also has tokens. What tells such a CNN from a
        # transformer whose tokens are no patches is where most of the layers are: before the last map in a CNN, after
        # it (the patch embedding) in a transformer.
        if 2 * len(behind) < len(model.sites):
            return maps[-1]
        raise ValueError(
            f"model {model.name} works on tokens that cannot be put back into a map, so that no last map is known: "
            f"name the site to take the map at ({error})"
        ) from error
    stream = [s for s in tokens if s.shape == tokens[-1].shape]
    return _last_with_gradient(model, stream, places, inputs)


def _may_hold(site: Site, patches: Site) -> bool:
    """Whether a site has a token for each patch and is no linear layer, which holds queries, values or neurons."""
    return (
        site.position_axes == ("position",)
        and site.position_shape[0] >= math.prod(patches.position_shape)
        and site.module != "Linear"
    )


def _last_with_gradient(
    model: HookedModel, stream: Sequence[Site], places: Int[Tensor, "y x"], inputs: Tensor
) -> Site:
    """The last of some sites at whose patches the output has a gradient."""
    end = output_site(model)
    cache = model.run(inputs.detach().requires_grad_(True), read=[*stream, end], grad=True)
    logits = cache[end].flatten()
    drawn = torch.randn(len(logits), generator=torch.Generator().manual_seed(0)).to(logits)
    slopes = torch.autograd.grad(logits @ drawn, [cache[s] for s in stream], allow_unused=True)
    for site, slope in zip(reversed(stream), reversed(slopes), strict=True):
        if slope is not None and site.activations(slope)[:, :, places].any():
            return site
    raise ValueError(
        f"model {model.name}: its output {end.name} has no gradient at any of its tokens, as with a head whose weights "
        "are zero: name the site to take the map at"
    )


Layout = Callable[[Tensor], Float[Tensor, "example channel y x"]]


def _layout(passes: Passes) -> Layout:
    """The function that lays a site's tensor out as maps of channels.

    Raises:
        ValueError: if the site has no map and no tokens of one.
    """
    site = passes.site
    assert site is not None, "maps are taken at a site"
    if is_map(site):
        return lambda value: site.activations(value).unflatten(2, site.positions_of(value))
    places = token_places(passes.model, site, passes.inputs)
    return lambda value: site.activations(value)[:, :, places]


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
    layout = _layout(passes)
    found = []
    for example in range(len(passes)):
        sums: list[Tensor] = []
        for noisy in noisy_copies(passes, example, samples, noise, seed):
            copies = Passes(
                passes.model, noisy, passes.aim.of(example), passes.site, passes.batch, size="keep"
            )
            g = _gradients(copies, layout)
            powers = [
                g.sum(0, keepdim=True),
                g.square().sum(0, keepdim=True),
                g.pow(3).sum(0, keepdim=True),
            ]
            sums = [a + b for a, b in zip(sums, powers, strict=True)] if sums else powers
        activations = layout(passes.points[example : example + 1])
        found.append(_weighted(activations, *[s / samples for s in sums]))
        if progress is not None:
            progress(example + 1, len(passes))
    return torch.cat(found)


def _activations_and_gradients(passes: Passes) -> tuple[Tensor, Tensor]:
    layout = _layout(passes)
    return layout(passes.points), _gradients(passes, layout)


def _gradients(passes: Passes, layout: Layout) -> Tensor:
    site = passes.site
    assert site is not None, "maps are taken at a site"
    found = layout(passes.gradient(passes.points, torch.arange(len(passes)))[1])
    if not is_map(site) and not found.any():
        raise ValueError(
            f"site {site.name}: no gradient leads from the target to the tokens of patches, since later layers read "
            "only others, such as the class token: name an earlier site, or none for the last one with a gradient"
        )
    return found


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
