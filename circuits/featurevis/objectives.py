"""Objectives of feature visualization, which can be added and multiplied.

An objective gives one number for each image; higher is better. It is made for a model, so that a unit or site that the
model does not have is an error at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.checks import whole
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks.targets import output_index, output_unit
from circuits.units import Direction, Site, Unit


@dataclass(frozen=True, eq=False)
class Response:
    """A model's activations on a batch of inputs.

    Attributes:
        inputs: images in 0..1 before any random transformation, or embeddings.
        activations: the tensor of each site, by name.
    """

    inputs: Float[Tensor, "batch *rest"]
    activations: Mapping[str, Tensor]

    def part(self, start: int, stop: int) -> Response:
        """The response to some of the inputs."""
        cut = {name: value[start:stop] for name, value in self.activations.items()}
        return Response(self.inputs[start:stop], cut)


Value = Callable[[Response], Float[Tensor, " batch"]]


@dataclass(frozen=True, eq=False)
class Objective:
    """A number for each image of a batch, which is to be maximised.

    `+`, `-`, `*` and `/` combine objectives with each other and with numbers; `sum` works too.

    Attributes:
        text: the objective in words, for people and metadata.
        sites: the sites whose tensors it needs.
        value: computes the numbers.
    """

    text: str
    sites: tuple[str, ...]
    value: Value

    def _with(
        self, other: Objective | float, sign: str, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Objective:
        if not isinstance(other, Objective):
            number = float(other)
            own = self.value
            return Objective(
                f"({self.text} {sign} {number:g})",
                self.sites,
                lambda r: combine(own(r), torch.as_tensor(number)),
            )
        a, b = self.value, other.value
        # A dictionary keeps the order, which a set of strings changes from process to process.
        sites = tuple(dict.fromkeys((*self.sites, *other.sites)))
        return Objective(f"({self.text} {sign} {other.text})", sites, lambda r: combine(a(r), b(r)))

    def __add__(self, other: Objective | float) -> Objective:
        return self._with(other, "+", torch.add)

    def __radd__(self, other: Objective | float) -> Objective:
        return self if other == 0 else self + other  # `sum` starts at 0

    def __sub__(self, other: Objective | float) -> Objective:
        return self._with(other, "-", torch.sub)

    def __rsub__(self, other: float) -> Objective:
        return -self + other

    def __mul__(self, other: Objective | float) -> Objective:
        return self._with(other, "*", torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: Objective | float) -> Objective:
        return self._with(other, "/", torch.div)

    def __neg__(self) -> Objective:
        value = self.value
        return Objective(f"-{self.text}", self.sites, lambda r: -value(r))


def mean(objectives: Sequence[Objective]) -> Objective:
    """The mean of several objectives.

    Raises:
        ValueError: if there are none.
    """
    if not objectives:
        raise ValueError("objectives are empty: expected at least one")
    return reduce(lambda a, b: a + b, objectives) / len(objectives)


def side_by_side(parts: Sequence[tuple[Objective, int]]) -> Objective:
    """An objective for each part of a batch: the first for the first n images, and so on."""
    sites = tuple(dict.fromkeys(name for objective, _ in parts for name in objective.sites))

    def value(response: Response) -> Tensor:
        found, start = [], 0
        for objective, n in parts:
            found.append(objective.value(response.part(start, start + n)))
            start += n
        return torch.cat(found)

    return Objective(" | ".join(o.text for o, _ in parts), sites, value)


# --- units and directions ------------------------------------------------------------------------


def _unit_values(site: Site, value: Tensor, index: int) -> Float[Tensor, "batch *position"]:
    """One unit's activations; a head's activation is the norm of its output."""
    own = site.by_unit(value)[:, index]
    # A head's vector has no preferred axis, hence its length.
    return own if site.inner_axis is None else own.norm(dim=-1)


def _mean_over_positions(values: Float[Tensor, "batch *position"]) -> Float[Tensor, " batch"]:
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def channel(model: HookedModel, unit: str | Unit) -> Objective:
    """A unit's mean activation over positions; at a site with a ceiling (after ReLU6), that before the ceiling.

    Above the ceiling there is no gradient, and everything counts the same.

    Raises:
        KeyError: if its site is unknown.
        ValueError: if the site has no such unit.
    """
    found = model.unit(unit)
    site = model.before_ceiling(found.site)
    return Objective(
        str(found),
        (site.name,),
        lambda r: _mean_over_positions(_unit_values(site, r.activations[site.name], found.index)),
    )


def _at(
    site: Site, values: Float[Tensor, "batch *position"], position: Sequence[int] | None
) -> Tensor:
    """The values at a position, or at the middle if none is given.

    Raises:
        ValueError: if there is no such position.
    """
    for axis, length in enumerate(values.shape[1:]):
        i = length // 2 if position is None else position[axis]
        if not 0 <= i < length:
            raise ValueError(
                f"position {tuple(position or ())} is outside the map of {site.name}, "
                f"{' x '.join(map(str, values.shape[1:]))} on this image"
            )
        values = values.narrow(axis + 1, i, 1)
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _check_position(site: Site, position: Sequence[int] | None) -> None:
    if position is not None and len(position) != len(site.position_axes):
        raise ValueError(
            f"position {tuple(position)} does not fit {site.name}: expected "
            f"({', '.join(site.position_axes)})"
        )


def neuron(
    model: HookedModel, unit: str | Unit, position: Sequence[int] | None = None
) -> Objective:
    """A unit's activation at one position (y, x), before a ceiling if its site has one; the middle if none is given.

    Raises:
        KeyError: if its site is unknown.
        ValueError: if the site has no such unit, or the position does not fit it.
    """
    found = model.unit(unit)
    site = model.before_ceiling(found.site)
    _check_position(site, position)
    where = "" if position is None else f" at {tuple(position)}"
    return Objective(
        f"neuron {found}{where}",
        (site.name,),
        lambda r: _at(site, _unit_values(site, r.activations[site.name], found.index), position),
    )


def logit(model: HookedModel, target: int | str) -> Objective:
    """The model's output for a class, by number, by name or as `class:NAME`.

    Raises:
        KeyError: if there is no class of that name.
        ValueError: if the number is out of range or the model has no site of logits.
    """
    sites = [site for site in model.sites if site.kind == "logit"]
    if not sites:
        raise ValueError(
            f"model {model.name} has no site of logits: name a unit SITE:INDEX instead"
        )
    if isinstance(target, str):
        unit = None if target in model.classes else output_unit(model, target)
        target = unit.index if unit else output_index(model, f"class:{target}")
    return channel(model, sites[-1].unit(target))


def _dot_times_cosine(
    site: Site, value: Tensor, vector: Tensor, power: float
) -> Float[Tensor, "batch position"]:
    """The dot product with a vector (unit, or unit x position) at each position, times a power of the cosine."""
    # The cosine counts as 0.1 at least, as in lucid: at a negative or zero cosine its power would have no useful
    # gradient, and an image that starts there would never move.
    units = site.activations(value)
    wanted = vector.to(units)
    # One vector for all positions, or one of its own for each.
    dot = torch.einsum("bup,up->bp" if wanted.ndim > 1 else "bup,u->bp", units, wanted)
    if power == 0:
        return dot
    # At a silent position both are 0; 1e-6 makes the cosine 0 there rather than NaN.
    norms = units.norm(dim=1) * wanted.norm(dim=0)
    return dot * (dot / norms.clamp_min(1e-6)).clamp_min(0.1) ** power


def _check_power(power: float) -> None:
    if not 0 <= power < 100:
        raise ValueError(f"cosine_power {power} must be 0 or more (and below 100)")


def _site_and_vector(
    model: HookedModel, direction: str | Direction
) -> tuple[Site, Float[Tensor, " unit"]]:
    if isinstance(direction, str):
        # The site is needed to know how long the vector is, before the text can be parsed: in
        # `0.5*mixed3b:379+mixed3b:385` the piece after the last `*` and before its first `:` is a site's name, and all
        # parts have the same one.
        name = direction.replace(" ", "").split("*")[-1].split(":")[0].lstrip("+-")
        direction = Direction.parse(direction, model.site(name).n_units)
    site = model.site(direction.site)
    if len(direction.vector) != site.n_units:
        raise ValueError(
            f"direction in {site.name} has {len(direction.vector)} weights: expected {site.n_units}"
        )
    return site, direction.vector


def _without_ceiling(model: HookedModel, site: Site) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The site to read, and what makes its tensor what the given site would hold if it had no ceiling."""
    read = model.before_ceiling(site)
    return read.name, (lambda tensor: tensor) if read == site else site.without_ceiling


def direction(
    model: HookedModel,
    direction: str | Direction,
    cosine_power: float = 0.0,
    position: Sequence[int] | None = None,
) -> Objective:
    """A direction's dot product times a power of the cosine, averaged over positions (or at one position).

    `dot * max(0.1, cosine)^power` as in lucid. With a power above 0 the picture shows the direction itself rather than
    anything that makes activations large.

    Raises:
        KeyError: if its site is unknown.
        ValueError: if it does not fit the site, or the power or position is not valid.
    """
    _check_power(cosine_power)
    site, vector = _site_and_vector(model, direction)
    _check_position(site, position)
    read, seen = _without_ceiling(model, site)

    def value(r: Response) -> Tensor:
        found = _dot_times_cosine(site, seen(r.activations[read]), vector, cosine_power)
        if position is None:
            return found.mean(1)
        shape = site.positions_of(r.activations[read])
        return _at(site, found.unflatten(1, shape), position)

    power = f" cosine^{cosine_power:g}" if cosine_power else ""
    return Objective(f"direction in {site.name}{power}", (read,), value)


def spatial_direction(
    model: HookedModel,
    site: str,
    vectors: Float[Tensor, "unit *position"],
    cosine_power: float = 0.0,
) -> Objective:
    """The dot product with a different direction at each position, averaged over positions.

    Args:
        model: the model.
        site: the site.
        vectors: unit x position, for the map that the image gives.
        cosine_power: as in `direction`.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the vectors do not fit it, or the power is not valid.
    """
    found = model.site(site)
    _check_power(cosine_power)
    if vectors.shape[0] != found.n_units or vectors.ndim != 1 + len(found.position_axes):
        raise ValueError(
            f"vectors of shape {tuple(vectors.shape)} do not fit {found.name}: expected "
            f"({found.n_units}, {', '.join(found.position_axes)})"
        )
    flat = vectors.detach().flatten(1)
    read, seen = _without_ceiling(model, found)

    def value(r: Response) -> Tensor:
        tensor = seen(r.activations[read])
        shape = found.positions_of(tensor)
        if shape != tuple(vectors.shape[1:]):
            raise ValueError(
                f"vectors have positions {tuple(vectors.shape[1:])}: expected {shape}, those of the image"
            )
        return _dot_times_cosine(found, tensor, flat, cosine_power).mean(1)

    return Objective(f"spatial direction in {found.name}", (read,), value)


def deepdream(model: HookedModel, site: str) -> Objective:
    """The mean square of a site's activations, which amplifies whatever is there (Mordvintsev et al. 2015).

    At a site with a ceiling (after ReLU6), it is that of activations without the ceiling.

    Raises:
        KeyError: if the site is unknown.
    """
    found = model.site(site)
    read, seen = _without_ceiling(model, found)
    return Objective(
        f"deepdream {found.name}",
        (read,),
        lambda r: seen(r.activations[read]).flatten(1).square().mean(1),
    )


def interpolation(model: HookedModel, first: str | Unit, last: str | Unit) -> Objective:
    """An interpolation between two units over the images of a batch: the first image shows one, the last the other.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if a site has no such unit.
    """
    a, b = channel(model, first), channel(model, last)

    def value(r: Response) -> Tensor:
        share = torch.linspace(0, 1, len(r.inputs)).to(r.inputs)
        return (1 - share) * a.value(r) + share * b.value(r)

    return Objective(f"interpolation {a.text} to {b.text}", (*a.sites, *b.sites), value)


def as_objective(model: HookedModel, target: str | Unit | Direction | Objective) -> Objective:
    """The objective of a target: a channel of a unit or class (`class:NAME`), a direction, a site's deepdream.

    An objective is returned unchanged.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if it is none of these, or does not fit the model.
    """
    if isinstance(target, Objective):
        return target
    if isinstance(target, Direction):
        return direction(model, target)
    if isinstance(target, Unit):
        return channel(model, target)
    if unit := output_unit(model, target):
        return channel(model, unit)
    if ":" not in target:
        return deepdream(model, target)
    return direction(model, target) if set(target) & set("+* ") else channel(model, target)


# --- regularisers --------------------------------------------------------------------------------


def _of_inputs(text: str, value: Callable[[Tensor], Tensor]) -> Objective:
    return Objective(text, (), lambda r: value(r.inputs))


def total_variation() -> Objective:
    """Mean absolute difference of neighbouring pixels; to be subtracted."""

    def value(images: Tensor) -> Tensor:
        down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(1)
        across = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)
        return down + across

    return _of_inputs("total variation", value)


def l1(constant: float = 0.5) -> Objective:
    """Mean absolute difference of pixels from a constant; to be subtracted."""
    return _of_inputs("L1", lambda images: (images - constant).abs().flatten(1).mean(1))


def l2(constant: float = 0.5) -> Objective:
    """Root mean square difference of pixels from a constant; to be subtracted."""
    # 1e-12, as the square root has no finite derivative at 0.
    return _of_inputs(
        "L2", lambda images: ((images - constant).square().flatten(1).mean(1) + 1e-12).sqrt()
    )


def diversity(model: HookedModel, site: str) -> Objective:
    """How similar an image's style is to that of the other images of its batch, -1 to 1; to be subtracted.

    The mean cosine between the Gram matrices of the site's units over positions (Olah et al. 2017; like lucid's
    `diversity`, it is to be subtracted). 0 for a single image.

    Raises:
        KeyError: if the site is unknown.
    """
    found = model.site(site)

    def value(r: Response) -> Tensor:
        units = found.activations(r.activations[found.name])
        # The Gram matrix of units over positions is what Gatys et al. 2015 call style: which units are active together,
        # wherever. Images that show the same thing at another place count as alike, those with other content do not.
        gram = torch.einsum("bup,bvp->buv", units, units).flatten(1)
        gram = F.normalize(gram, dim=1, eps=1e-8)
        alike = gram @ gram.T
        # An image alone has no others; 0 / 1 instead of 0 / 0.
        others = max(1, len(alike) - 1)
        return (alike.sum(1) - alike.diagonal()) / others

    return Objective(f"diversity {found.name}", (found.name,), value)


def alignment(model: HookedModel, site: str, reach: float = 2.0) -> Objective:
    """How different an image's activations are from those of its neighbours in the batch; to be subtracted.

    The mean squared difference, weighted by `reach` ** -distance in the batch, so that a series of pictures (an
    interpolation, for example) lines up (lucid: `alignment`).

    Raises:
        KeyError: if the site is unknown.
        ValueError: if `reach` is not above 1.
    """
    if not reach > 1:
        raise ValueError(f"reach {reach} must be above 1")
    found = model.site(site)

    def value(r: Response) -> Tensor:
        flat = r.activations[found.name].flatten(1)
        squares = (flat[:, None] - flat[None]).square().mean(2)
        # Neighbours in the batch weigh reach^-1, the ones after reach^-2: with a reach of 2 half, a quarter, …
        at = torch.arange(len(flat))
        distance = (at[:, None] - at[None]).abs().to(flat)
        weight = torch.where(distance > 0, reach**-distance, torch.zeros_like(distance))
        return (weight * squares).sum(1)

    return Objective(f"alignment {found.name}", (found.name,), value)


# --- by name ---------------------------------------------------------------------------------------

Kind = Literal["channel", "neuron", "cosine", "deepdream", "logit"]


def of_kind(model: HookedModel, target: str, kind: Kind) -> str | Objective:
    """What a kind of objective makes large of a target; as `channel` units and the like stay what they are.

    Raises:
        KeyError, ValueError: if the target does not exist, or is of another kind.
    """
    if kind == "logit":
        index = whole(target)
        return logit(model, target if index is None else index)
    target = str(output_unit(model, target) or target)
    if kind == "neuron":
        return neuron(model, target)
    if kind == "cosine":
        return direction(model, target, cosine_power=1.0)
    if kind == "deepdream":
        return deepdream(model, target)
    as_objective(model, target)
    return target
