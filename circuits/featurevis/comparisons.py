"""Objectives that compare with a model's activations on an image: caricature, inversion, attribution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.featurevis.objectives import (
    Objective,
    Response,
    as_objective,
    spatial_direction,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput


@recording_gradients()
def activations_on(
    model: HookedModel, site: str, image: Float[Tensor, "channel h w"]
) -> Float[Tensor, "1 *rest"]:
    """A site's tensor on an image in 0..1.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the image does not fit the model.
    """
    if not isinstance(model.input, ImageInput):
        raise ValueError(f"model {model.name} takes tokens: expected an image model")
    inputs = model.input.normalize(image[None])
    return model.run(inputs, read=[site], until=site)[site].detach()


# Compared as flat vectors over units and positions, so that the same units at other places count as different.
def _comparison(
    model: HookedModel,
    site: str,
    image: Tensor,
    text: str,
    compare: Callable[[Tensor, Tensor], Tensor],
) -> Objective:
    found = model.site(site)
    wanted = found.activations(activations_on(model, site, image))

    def value(r: Response) -> Tensor:
        own = found.activations(r.activations[found.name])
        if own.shape[1:] != wanted.shape[1:]:
            raise ValueError(
                f"image gives {wanted.shape[2]} positions of {found.name}: expected {own.shape[2]}, as in the picture"
            )
        return compare(own.flatten(1), wanted.to(own).flatten(1))

    return Objective(f"{text} {found.name}", (found.name,), value)


def inversion(model: HookedModel, site: str, image: Float[Tensor, "channel h w"]) -> Objective:
    """Feature inversion (Mahendran and Vedaldi 2015): minus the squared distance from the activations on an image.

    It is divided by the squared norm of those activations: 0 is the same, -1 as far away as zero activations.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the image does not fit the model.
    """

    def compare(own: Tensor, wanted: Tensor) -> Tensor:
        # 1e-12: an image on which the whole site is silent gives a norm of zero.
        return -(own - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)

    return _comparison(model, site, image, "inversion", compare)


def difference(model: HookedModel, site: str, image: Float[Tensor, "channel h w"]) -> Objective:
    """The root mean square difference of activations from those on an image.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the image does not fit the model.
    """

    def compare(own: Tensor, wanted: Tensor) -> Tensor:
        # The square root has an infinite derivative at 0, that is for equal activations; 1e-12 makes it finite.
        return ((own - wanted).square().mean(1) + 1e-12).sqrt()

    return _comparison(model, site, image, "difference", compare)


def caricature(
    model: HookedModel, site: str, image: Float[Tensor, "channel h w"], cosine_power: float = 1.0
) -> Objective:
    """A caricature of an image: the dot product with its activations times a power of the cosine.

    lucid's `cossim` divides by only one of the two norms; this is the true cosine, over all units and positions, so
    that the layout is kept.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the image does not fit the model, or the power is negative.
    """
    if not 0 <= cosine_power < 100:
        raise ValueError(f"cosine_power {cosine_power} must be 0 or more (and below 100)")

    def compare(own: Tensor, wanted: Tensor) -> Tensor:
        # Over the squared norm of what is wanted: 1 at the image itself, whatever the scale of the site.
        dot = (own * wanted).sum(1) / wanted.square().sum(1).clamp_min(1e-12)
        cosine = F.cosine_similarity(own, wanted, dim=1, eps=1e-8)
        return dot * cosine.clamp_min(0.1) ** cosine_power

    return _comparison(model, site, image, "caricature", compare)


@recording_gradients()
def attributed(
    model: HookedModel,
    site: str,
    image: Float[Tensor, "channel h w"],
    target: str | Objective,
    cosine_power: float = 1.0,
) -> Objective:
    """What in an image supports a target: activations weighted by their effect on it.

    The direction at each position is the positive part of activation x gradient of the target, as in the attributions
    of Olah et al. 2018 (Building Blocks).

    Args:
        model: the model.
        site: a site before the target.
        image: an image in 0..1.
        target: a unit or an objective.
        cosine_power: as in `direction`.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if the image does not fit the model, or no gradient leads from target to site.
    """
    aim, found = as_objective(model, target), model.site(site)
    assert isinstance(model.input, ImageInput), "checked by activations_on"
    # The site's tensor becomes a leaf that takes the place of the computed one, so that the gradient ends here and does
    # not go back through the layers before.
    own = activations_on(model, site, image).requires_grad_(True)
    inputs = model.input.normalize(image[None])
    sites = [*aim.sites]
    cache = model.run(
        inputs,
        read=sites,
        until=model.last(sites),
        edits={found.name: lambda value: own},
        grad=True,
    )
    value = aim.value(Response(image[None], {name: cache[name] for name in sites})).sum()
    if not value.requires_grad:
        raise ValueError(f"no gradient leads from {aim.text} to site {found.name}")
    (gradient,) = torch.autograd.grad(value, own, allow_unused=True)
    if gradient is None:
        raise ValueError(f"no gradient leads from {aim.text} to site {found.name}")
    # A negative product speaks against the target; only what supports it shall be shown.
    units = found.activations((own * gradient).detach())[0].clamp_min(0)
    vectors = units.reshape(len(units), *found.positions_of(own))
    made = spatial_direction(model, site, vectors, cosine_power)
    return Objective(f"{found.name} attributed to {aim.text}", made.sites, made.value)
