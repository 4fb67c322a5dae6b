"""Objectives that compare with what a model does on an image: caricature, inversion, attribution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.featurevis.objectives import (
    Objective,
    Response,
    as_objective,
    spatial_direction,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput


def activations_on(
    model: HookedModel, site: str, image: Float[Tensor, "channel h w"]
) -> Float[Tensor, "1 *rest"]:
    """A site's tensor on an image in 0..1.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the image does not fit the model.
    """
    if not isinstance(model.input, ImageInput):
        raise ValueError(f"model {model.name} takes tokens: an image cannot be compared with")
    inputs = model.input.normalize(image[None])
    return model.run(inputs, read=[site], until=site)[site].detach()


def _compared(
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
                f"the picture gives {own.shape[2]} positions of {found.name}, the image to compare "
                f"with {wanted.shape[2]}: use one size for both"
            )
        return compare(own.flatten(1), wanted.to(own).flatten(1))

    return Objective(f"{text} {found.name}", (found.name,), value)


def inversion(model: HookedModel, site: str, image: Float[Tensor, "channel h w"]) -> Objective:
    """Activations like those on an image: minus the squared distance, in units of their own square.

    Feature inversion (Mahendran and Vedaldi 2015): 0 is the same, -1 as far away as nothing at all.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the image does not fit the model.
    """

    def compare(own: Tensor, wanted: Tensor) -> Tensor:
        return -(own - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)

    return _compared(model, site, image, "inversion", compare)


def difference(model: HookedModel, site: str, image: Float[Tensor, "channel h w"]) -> Objective:
    """How far activations are from those on an image: the root mean square difference.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the image does not fit the model.
    """

    def compare(own: Tensor, wanted: Tensor) -> Tensor:
        return ((own - wanted).square().mean(1) + 1e-12).sqrt()

    return _compared(model, site, image, "difference", compare)


def caricature(
    model: HookedModel, site: str, image: Float[Tensor, "channel h w"], cosine_power: float = 1.0
) -> Objective:
    """An image exaggerated: the dot product with its activations times a power of the true cosine.

    lucid's `cossim` divides by one of the two norms only; this is the cosine over all units and
    positions, so that layout is kept.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the image does not fit the model, or the power is negative.
    """
    if not 0 <= cosine_power < 100:
        raise ValueError(f"cosine_power {cosine_power} must be 0 or more (and below 100)")

    def compare(own: Tensor, wanted: Tensor) -> Tensor:
        dot = (own * wanted).sum(1) / wanted.square().sum(1).clamp_min(1e-12)
        cosine = F.cosine_similarity(own, wanted, dim=1, eps=1e-8)
        return dot * cosine.clamp_min(0.1) ** cosine_power

    return _compared(model, site, image, "caricature", compare)


def attributed(
    model: HookedModel,
    site: str,
    image: Float[Tensor, "channel h w"],
    target: str | Objective,
    cosine_power: float = 1.0,
) -> Objective:
    """What in an image speaks for a target: activations weighted by their effect on it.

    The direction at each position is activation x gradient of the target where that is positive, as
    in the attributions of Olah et al. 2018 (Building Blocks).

    Args:
        model: the model.
        site: where, before the target.
        image: in 0..1.
        target: what is attributed to: a unit, or an objective.
        cosine_power: as for `direction`.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if the image does not fit the model, or no gradient leads from target to site.
    """
    aim, found = as_objective(model, target), model.site(site)
    assert isinstance(model.input, ImageInput), "checked by activations_on"
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
    units = found.activations((own * gradient).detach())[0].clamp_min(0)
    vectors = units.reshape(len(units), *found.positions_of(own))
    made = spatial_direction(model, site, vectors, cosine_power)
    return Objective(f"{found.name} attributed to {aim.text}", made.sites, made.value)
