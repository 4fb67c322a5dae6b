"""Meaningful and extremal perturbations: masks of what must be kept, or hidden, in an image.

Fong and Vedaldi 2017, "Interpretable Explanations of Black Boxes by Meaningful Perturbation"; Fong, Patrick
and Vedaldi 2019, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.attribution.passes import Passes, Size
from circuits.autograd import recording_gradients
from circuits.checks import check_range
from circuits.examples import Examples, as_examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.saliency.gradients import blurred
from circuits.tasks.targets import Target
from circuits.units import Site, Unit

Game = Literal["preserve", "delete"]
"""`preserve` keeps the target as high as possible with only a part shown; `delete` makes it as low as possible with a
part hidden."""

Masks = Float[Tensor, "example 1 h w"]


@dataclass(frozen=True, eq=False)
class Perturbation:
    """A mask for each example, and its effect.

    Attributes:
        method: `extremal`, `meaningful`, or `extremal channels`.
        variant: whether the mask marks what is kept or what is hidden.
        masks: in 0..1, 1 where the image is kept (preserve) or hidden (delete); for channels `example unit`.
        area: the prescribed share of the image (or of the units) that is marked; NaN if there was none.
        values: the target with the mask.
        intact: the target without a mask.
        blank: the target with everything hidden.
        random: the target with the mask's values moved to random smooth patches (for channels, with random units); the
            mean of several draws.
        target: what was explained.
        site: the channels' site; `input` for images.
        model_hash: the hash of the model.
        examples: which examples, and how they were chosen.
        seed: seed of everything random.
    """

    method: str
    variant: Game
    masks: Float[Tensor, "example *rest"]
    area: float
    values: Float[Tensor, " example"]
    intact: Float[Tensor, " example"]
    blank: Float[Tensor, " example"]
    random: Float[Tensor, " example"]
    target: str
    site: str
    model_hash: str
    examples: Mapping[str, Any]
    seed: int

    def facts(self, example: int) -> dict[str, float]:
        """What the mask of an image does to the target, compared with a random mask and with nothing left."""
        return {
            "with the mask": float(self.values[example]), "random mask": float(self.random[example]),
            "all hidden": float(self.blank[example]), "area": float(self.masks[example].mean()),
        }  # fmt: skip


class Pyramid:
    """Blurs images locally as a mask says, by interpolating between levels of blur (Fong et al. 2019, section 3.4).

    Args:
        x: the images.
        levels: number of levels, the sharp image included.
        sigma: standard deviation of the strongest blur, in pixels; 20 for 224 pixels if not given.
    """

    def __init__(self, x: Tensor, levels: int = 8, sigma: float | None = None) -> None:
        sigma = max(x.shape[-2:]) * 20 / 224 if sigma is None else sigma
        # From sigma down to 0: the last level is the image itself.
        strengths = [sigma * (1 - k / (levels - 1)) for k in range(levels)]
        self.levels = torch.stack([blurred(x, s) for s in strengths], 1)

    def __call__(self, masks: Masks) -> Tensor:
        """The images, sharp where the mask is 1 and most blurred where it is 0."""
        # Linear interpolation between the two nearest levels, differentiable in the mask through `share`.
        n = self.levels.shape[1]
        # Mask value 0.5 with 8 levels is at 3.5: half of level 3 and half of level 4. `low` ends at n - 2, so that a
        # value of 1 is level n - 2 with a share of 1 and no level n is asked for.
        at = masks.clamp(0, 1) * (n - 1)
        low = at.detach().floor().clamp(0, n - 2)
        share = at - low
        index = low.long()[:, None].expand(-1, -1, self.levels.shape[2], -1, -1)
        below = self.levels.gather(1, index)[:, 0]
        above = self.levels.gather(1, index + 1)[:, 0]
        return below * (1 - share) + above * share


@recording_gradients()
def extremal(
    model: HookedModel,
    examples: Examples | Tensor,
    target: str | Unit | Target = "top",
    area: float = 0.1,
    variant: Game = "preserve",
    *,
    steps: int = 100,
    tries: int = 100,
    step: int | None = None,
    sigma: float | None = None,
    rate: float = 0.02,
    seed: int = 0,
    batch: int = 32,
    size: Size = "refuse",
    progress: Progress | None = None,
) -> Perturbation:
    """The smooth mask of a given area with the largest effect on a target (Fong et al. 2019).

    The mask is a smooth maximum of bumps on a coarse grid, and its sorted values are pulled towards those of a binary
    mask of this area (equation 4); what it hides is blurred. Gradient descent gives a soft mask, which is then improved
    as a binary mask of exactly this area by random changes, and returned as that.

    Args:
        model: an image model.
        examples: examples of a source, or a tensor as the model takes it.
        target: a class (its log-probability works better than its logit; see `Target`) or a unit anywhere.
        area: the share of the image that is kept (preserve) or hidden (delete).
        variant: `preserve` or `delete`.
        steps: optimisation steps.
        tries: random changes of each mask after that, kept if they improve the binary mask.
        step: distance between bumps in pixels; a 32nd of the image if not given (7 for 224).
        sigma: width of a bump in pixels; three steps if not given.
        rate: learning rate.
        seed: seed of the random changes and of the random masks for comparison.
        batch: images optimised together.
        size: what to do with images of another size.
        progress: called with the number of steps done and the total.

    Raises:
        KeyError: if a class is unknown.
        ValueError: if examples, target or an option do not fit.
    """
    check_range("area", area, 0.001, 0.999)
    check_range("steps", steps, 1)
    check_range("tries", tries, 0)
    check_range("step", 1 if step is None else step, 1)
    check_range("sigma", 1 if sigma is None else sigma, 0.5)
    check_range("rate", rate, 1e-6)
    _check_variant(variant)
    _check_images(model)
    goal = Passes(model, examples, target, batch=batch, size=size)
    apart = step or max(1, round(max(goal.inputs.shape[-2:]) / 32))
    search = _Search(
        area, variant, steps, apart, 3.0 * apart if sigma is None else sigma, rate, tries, seed
    )
    parts = []
    for some in goal.chunks(len(goal)):

        def note(done: int, some: range = some) -> None:
            if progress is not None:
                progress(some.start * steps + done * len(some), len(goal) * steps)

        which = torch.arange(some.start, some.stop, device=goal.inputs.device)
        parts.append(_extremal(goal, which, search, note))
    masks = torch.cat(parts)
    return _with_controls("extremal", goal, Pyramid, masks, area, variant, examples, seed)


def _check_variant(variant: str) -> None:
    if variant not in get_args(Game):
        raise ValueError(f"variant {variant!r} is not one of {', '.join(get_args(Game))}")


def _check_images(model: HookedModel) -> None:
    if not isinstance(model.input, ImageInput):
        raise ValueError(f"model {model.name} takes tokens: expected an image model")


@dataclass(frozen=True)
class _Search:
    """The options of a search for an extremal mask; see `extremal`."""

    area: float
    variant: Game
    steps: int
    step: int
    sigma: float
    rate: float
    tries: int
    seed: int


def _extremal(
    goal: Passes, which: Tensor, search: _Search, progress: Callable[[int], None]
) -> Masks:
    """Masks of some examples: gradient descent first, then random search."""
    x = goal.inputs[which]
    smooth = SmoothMasks(x.shape[-2:], search.step, search.sigma)
    pyramid = Pyramid(x)
    # The area term of the paper: the sorted values of a mask of area a shall be (1 - a) n zeros and then a n ones.
    # Unlike a penalty on the mean it also asks for 0 and 1 and nothing between.
    wanted = _sorted_reference(smooth.grid[0] * smooth.grid[1], search.area).to(x)
    keeps = search.variant == "preserve"
    sign = _target_scale(goal, which) * (-1.0 if keeps else 1.0)
    # Everything is marked at first, and the area penalty, whose weight grows 20-fold, shrinks it to what matters.
    parameters = torch.ones(len(x), 1, *smooth.grid, device=x.device, requires_grad=True)
    optimizer = torch.optim.SGD([parameters], search.rate, momentum=0.9)
    for done in range(search.steps):
        coarse = smooth.coarse(parameters)
        masks = smooth.enlarged(coarse)
        shown = pyramid(masks if keeps else 1 - masks)
        gradients = goal.gradient(shown.detach(), which)[1]
        weight = 100.0 * 20.0 ** (done / search.steps)
        missed = (coarse.flatten(1).sort(1).values - wanted).square().mean(1)
        # `gradients` are constants here, so that the derivative of their product with `shown` is the chain rule through
        # the blurring alone; the network is passed in batches by `goal`.
        loss = sign * (shown * gradients).flatten(1).sum(1) + weight * missed
        (parameters.grad,) = torch.autograd.grad(loss.sum(), parameters)
        optimizer.step()
        # Projected gradient descent: back into 0..1 after every step.
        with torch.no_grad():
            parameters.clamp_(0, 1)
        progress(done + 1)

    def cost(some: Tensor) -> Tensor:
        exact = hard(smooth(some), search.area)
        return sign * goal.value(pyramid(exact if keeps else 1 - exact), which)

    return hard(smooth(_random_search(parameters.detach(), cost, search)), search.area)


def _random_search(parameters: Tensor, cost: Callable[[Tensor], Tensor], search: _Search) -> Tensor:
    """Masks that are shifted and reshaped at random, keeping every change that improves the binary mask."""
    # Gradients exist only for soft masks, but the result is measured as a binary one: this closes the gap.
    generator = Generator().manual_seed(search.seed)
    best, n = cost(parameters), len(parameters)
    for number in range(search.tries):
        if number % 2:
            # Even tries change the form, odd ones the place, by up to three cells.
            shift = torch.randint(-3, 4, (n, 2), generator=generator).tolist()
            moved = [p.roll(s, (1, 2)) for p, s in zip(parameters, shift, strict=True)]
            tried = torch.stack(moved)
        else:
            coarse = torch.randn(n, 1, 6, 6, generator=generator).to(parameters)
            noise = F.interpolate(
                coarse, parameters.shape[-2:], mode="bilinear", align_corners=False
            )
            # 6 x 6 numbers enlarged to the grid: changes of about a sixth of the image, as single cells hardly matter
            # by themselves.
            tried = (parameters + 0.3 * noise).clamp(0, 1)
        reached = cost(tried)
        better = reached < best
        best = torch.where(better, reached, best)
        parameters = torch.where(better[:, None, None, None], tried, parameters)
    return parameters


def _target_scale(goal: Passes, which: Tensor) -> Float[Tensor, " example"]:
    """The scale that makes different targets comparable in the loss: 1 for a nat of log-probability, else 10 for the
    intact value."""
    if goal.target.quantity == "log_probability":
        return torch.ones_like(goal.values[which])
    return 10.0 / goal.values[which].abs().clamp_min(1e-6)


def _sorted_reference(n: int, area: float) -> Float[Tensor, " place"]:
    ones = round(area * n)
    return torch.cat([torch.zeros(n - ones), torch.ones(ones)])


class SmoothMasks:
    """Masks as a smooth maximum of bumps on a grid (Fong et al. 2019, equation 6).

    Args:
        size: height and width of the masks.
        step: distance between bumps in pixels.
        sigma: width of a bump in pixels.
    """

    def __init__(self, size: tuple[int, ...], step: int, sigma: float) -> None:
        self.size = tuple(size)
        self.grid = tuple(-(-n // step) for n in self.size)
        # At 2 sigma a bump is down to exp(-2 (2 - 0.5)^2) = 0.011.
        self.radius = max(1, round(2 * sigma / step))
        at = torch.arange(-self.radius, self.radius + 1) * (step / sigma)
        distance = (at[:, None].square() + at[None].square()).sqrt()
        # Flat up to half a sigma, then falling like a Gaussian.
        self.bump = torch.exp(-2 * (distance - 0.5).clamp_min(0).square()).flatten()

    def __call__(self, parameters: Float[Tensor, "example 1 y x"]) -> Masks:
        """Masks in 0..1 for parameters in 0..1."""
        return self.enlarged(self.coarse(parameters))

    def coarse(self, parameters: Float[Tensor, "example 1 y x"]) -> Float[Tensor, "example 1 y x"]:
        """The masks at the positions of the bumps."""
        # Smooth maximum over the surrounding bumps b: sum of b softmax(20 b).
        r = self.radius
        around = F.unfold(F.pad(parameters, (r, r, r, r), mode="replicate"), 2 * r + 1)
        bumps = around * self.bump.to(around)[None, :, None]
        # With a temperature of 1/20 the softmax is nearly that of the largest, and still has a gradient for the others.
        smooth = (bumps * (20 * bumps).softmax(1)).sum(1)
        return smooth.reshape(len(parameters), 1, *self.grid)

    def enlarged(self, coarse: Float[Tensor, "example 1 y x"]) -> Masks:
        """The masks at full resolution."""
        return F.interpolate(coarse, self.size, mode="bilinear", align_corners=False).clamp(0, 1)


@recording_gradients()
def meaningful(
    model: HookedModel,
    examples: Examples | Tensor,
    target: str | Unit | Target = "top",
    variant: Game = "delete",
    *,
    steps: int = 300,
    cells: int = 28,
    l1: float = 0.01,
    tv: float = 0.2,
    rate: float = 0.1,
    sigma: float | None = None,
    seed: int = 0,
    batch: int = 32,
    size: Size = "refuse",
    progress: Progress | None = None,
) -> Perturbation:
    """The smallest smooth mask whose blurred region removes a target (Fong and Vedaldi 2017, equation 5).

    Args:
        model: an image model.
        examples: examples of a source, or a tensor as the model takes it.
        target: a class or a unit anywhere; for classes the authors use the probability.
        variant: `delete`, or `preserve` for the smallest region that must be kept.
        steps: steps of Adam.
        cells: cells of the mask along each side.
        l1: weight of the mask's area.
        tv: weight of its total variation.
        rate: learning rate of Adam.
        sigma: standard deviation of the blur, in pixels; 10 for 224 pixels if not given.
        seed: seed of the jitter and of the random masks for comparison.
        batch: images optimised together.
        size: what to do with images of another size.
        progress: called with the number of steps done and the total.

    Raises:
        KeyError: if a class is unknown.
        ValueError: if examples, target or an option do not fit.
    """
    for name, value, low in (
        ("steps", steps, 1), ("cells", cells, 2), ("l1", l1, 0), ("tv", tv, 0), ("rate", rate, 1e-6)
    ):  # fmt: skip
        check_range(name, value, low)
    check_range("sigma", 1 if sigma is None else sigma, 0.05)
    _check_variant(variant)
    _check_images(model)
    goal = Passes(model, examples, target, batch=batch, size=size)
    generator = Generator().manual_seed(seed)
    found = []
    for some in goal.chunks(len(goal)):
        which = torch.arange(some.start, some.stop, device=goal.inputs.device)
        x = goal.inputs[which]
        blending = _Blend(x, sigma)
        # 10 for the intact value goes with the area penalty of `extremal`; here the intact value counts 1, beside the
        # paper's coefficients of size and roughness.
        sign = _target_scale(goal, which) / 10 * (1.0 if variant == "delete" else -1.0)
        marked = torch.full((len(x), 1, cells, cells), 0.5, device=x.device, requires_grad=True)
        optimizer = torch.optim.Adam([marked], rate)
        for done in range(steps):
            # The mask has few cells and is enlarged: it cannot be made of single pixels, to which networks respond
            # arbitrarily.
            masks = _on_pixels(marked, x)
            # Jitter against adversarial masks that exploit single pixels (Fong and Vedaldi 2017, section 4.3).
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            kept = masks.roll(shift, (2, 3))
            kept = kept if variant == "preserve" else 1 - kept
            shown = blending(kept)
            gradients = goal.gradient(shown.detach(), which)[1]
            loss = sign * (shown * gradients).flatten(1).sum(1) + l1 * marked.sum((1, 2, 3))
            # The differences of neighbouring cells to the power of beta = 3 (equation 5): hardly a price for soft
            # transitions, a high one for sharp borders.
            loss = loss + tv * sum(marked.diff(dim=d).abs().pow(3).sum((1, 2, 3)) for d in (2, 3))
            (marked.grad,) = torch.autograd.grad(loss.sum(), marked)
            optimizer.step()
            with torch.no_grad():
                marked.clamp_(0, 1)
            if progress is not None:
                progress(some.start * steps + (done + 1) * len(x), len(goal) * steps)
        found.append(_on_pixels(marked.detach(), x))

    def blend(x: Tensor) -> _Blend:
        return _Blend(x, sigma)

    return _with_controls(
        "meaningful", goal, blend, torch.cat(found), float("nan"), variant, examples, seed
    )


class _Blend:
    """Mixes images with their blurred versions as a mask says."""

    def __init__(self, x: Tensor, sigma: float | None) -> None:
        self.x = x
        self.blur = blurred(x, max(x.shape[-2:]) * 10 / 224 if sigma is None else sigma)

    def __call__(self, masks: Masks) -> Tensor:
        return masks * self.x + (1 - masks) * self.blur


def _on_pixels(marked: Tensor, x: Tensor) -> Masks:
    return F.interpolate(marked, x.shape[-2:], mode="bilinear", align_corners=False)


@recording_gradients()
def extremal_channels(
    model: HookedModel,
    examples: Examples | Tensor,
    target: str | Unit | Target,
    site: str | Site,
    area: float = 0.1,
    variant: Game = "preserve",
    *,
    steps: int = 200,
    rate: float = 0.005,
    seed: int = 0,
    batch: int = 32,
    size: Size = "refuse",
    progress: Progress | None = None,
) -> Perturbation:
    """The units of a site, of a given share, that keep or remove most of a target (Fong et al. 2019, section 4).

    Args:
        model: the model, of images or tokens.
        examples: examples of a source, or a tensor as the model takes it.
        target: the target to keep or remove.
        site: the units' site.
        area: the share of units that are marked.
        variant: whether only the marked units are kept, or only these are set to zero.
        steps: steps of gradient descent with momentum.
        rate: its learning rate.
        seed: seed of the random units for comparison.
        batch: examples in one pass.
        size: what to do with images of another size.
        progress: called with the number of examples done and the total.

    Returns:
        The result; its `masks` are `example unit`.

    Raises:
        KeyError: if a site or class is unknown.
        ValueError: if examples, target or an option do not fit, or the site is not before the target.
    """
    check_range("area", area, 1e-6, 1 - 1e-6)
    check_range("steps", steps, 1)
    check_range("rate", rate, 1e-6)
    _check_variant(variant)
    goal = Passes(model, examples, target, site, batch, size)
    place = goal.site
    assert place is not None, "channels are of a site"
    found = []
    for some in goal.chunks(len(goal)):
        which = torch.arange(some.start, some.stop, device=goal.inputs.device)
        found.append(_marked_units(goal, which, area, variant, steps, rate))
        if progress is not None:
            progress(some.stop, len(goal))
    masks = torch.cat(found)
    everyone = torch.arange(len(goal), device=goal.inputs.device)
    generator = Generator().manual_seed(seed)

    def value(marked: Tensor) -> Tensor:
        return goal.value(_with_units(goal, everyone, marked, variant), everyone)

    beside = [
        value(hard(torch.rand(masks.shape, generator=generator).to(masks), area)) for _ in range(5)
    ]
    nothing = torch.full_like(masks, 0.0 if variant == "preserve" else 1.0)
    return Perturbation(
        "extremal channels", variant, masks, area, value(hard(masks, area)), goal.values, value(nothing),
        torch.stack(beside).mean(0), str(goal.target), place.name, model.hash,
        as_examples(model, examples).describe(), seed,
    )  # fmt: skip


def _marked_units(
    goal: Passes, which: Tensor, area: float, variant: Game, steps: int, rate: float
) -> Float[Tensor, "example unit"]:
    assert goal.site is not None, "channels are of a site"
    wanted = _sorted_reference(goal.site.n_units, area).to(goal.points)
    n = goal.site.n_units
    points = goal.points[which]
    # Activation x gradient by unit; the sum of their sizes sets the scale, as the effects may cancel in the target
    # itself.
    intact = goal.site.by_unit(points * goal.gradient(points, which)[1]).flatten(2).sum(2)
    sign = 10.0 / intact.abs().sum(1).clamp_min(1e-12) * (-1.0 if variant == "preserve" else 1.0)
    marked = torch.ones(len(which), n, device=goal.points.device, requires_grad=True)
    optimizer = torch.optim.SGD([marked], rate, momentum=0.9)
    for done in range(steps):
        shown = _with_units(goal, which, marked, variant)
        gradients = goal.gradient(shown.detach(), which)[1]
        weight = 3.0 * 20.0 ** (done / steps)
        # As in `_extremal`: gradients are constants, and the derivative is the chain rule through the scaling alone.
        effect = sign * (shown * gradients).flatten(1).sum(1)
        (credit,) = torch.autograd.grad(effect.sum(), marked)
        # Among units with equal marks the more effective ones are sorted last, and are pulled towards 1.
        order = (
            marked - 1e-3 * credit / credit.abs().amax(1, keepdim=True).clamp_min(1e-12)
        ).argsort(dim=1)
        missed = (marked.gather(1, order) - wanted).square().mean(1)
        (pulled,) = torch.autograd.grad((weight * missed).sum(), marked)
        marked.grad = (
            credit + pulled
        ) * n  # independent of n: each unit's share of a mean over units is 1 / n
        optimizer.step()
        with torch.no_grad():
            marked.clamp_(0, 1)
    return marked.detach()


def _with_units(goal: Passes, which: Tensor, marked: Tensor, variant: Game) -> Tensor:
    """The site's tensor with each unit scaled by its mark (preserve), or by 1 minus its mark (delete)."""
    assert goal.site is not None, "channels are of a site"
    kept = marked if variant == "preserve" else 1 - marked
    everywhere = kept.reshape(*kept.shape, *(1,) * (goal.points.ndim - 2))
    return goal.points[which] * goal.site.from_by_unit(everywhere)


def hard(masks: Float[Tensor, "example *rest"], area: float) -> Float[Tensor, "example *rest"]:
    """Binary masks: 1 on the largest values, up to a given share of the mask, and 0 elsewhere."""
    flat = masks.flatten(1)
    # At least one: a mask of nothing has no effect to compare.
    n = max(1, round(area * flat.shape[1]))
    chosen = flat.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(flat).scatter_(1, chosen, 1.0).reshape(masks.shape)


Perturbing = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""Takes images and returns a function from masks to perturbed images, which are unchanged where the mask is 1."""


def shown_by(
    goal: Passes, masks: Masks, variant: Game = "preserve", perturbing: Perturbing = Pyramid
) -> Float[Tensor, " example"]:
    """The target's value with images kept only inside a mask (preserve) or only outside it (delete)."""
    found = []
    for chunk in goal.chunks(len(goal)):
        which = torch.arange(chunk.start, chunk.stop, device=goal.inputs.device)
        own = masks[chunk.start : chunk.stop]
        shown = perturbing(goal.inputs[which])(own if variant == "preserve" else 1 - own)
        found.append(goal.value(shown, which))
    return torch.cat(found)


def _with_controls(
    method: str,
    goal: Passes,
    perturbing: Perturbing,
    masks: Masks,
    area: float,
    variant: Game,
    examples: Examples | Tensor,
    seed: int,
) -> Perturbation:
    """The result for some masks, with random smooth masks that have the same values elsewhere as a control."""
    generator = Generator().manual_seed(seed)
    apart = max(1, round(max(masks.shape[-2:]) / 32))
    smooth = SmoothMasks(masks.shape[-2:], apart, 3.0 * apart)
    values = masks.flatten(1).sort(dim=1).values
    beside = []
    for _ in range(5):
        drawn = smooth(torch.rand(len(masks), 1, *smooth.grid, generator=generator).to(masks))
        order = drawn.flatten(1).argsort(dim=1)
        # The k-th smallest value goes where the random smooth mask has its k-th smallest: same area, same softness,
        # another place.
        elsewhere = torch.zeros_like(values).scatter_(1, order, values).reshape(masks.shape)
        beside.append(shown_by(goal, elsewhere, variant, perturbing))
    nothing = torch.full_like(masks, 0.0 if variant == "preserve" else 1.0)
    return Perturbation(
        method, variant, masks, area, shown_by(goal, masks, variant, perturbing), goal.values,
        shown_by(goal, nothing, variant, perturbing), torch.stack(beside).mean(0), str(goal.target), "input",
        goal.model.hash, as_examples(goal.model, examples).describe(), seed,
    )  # fmt: skip


MASKS: Mapping[str, Callable[..., Perturbation]] = {"extremal": extremal, "meaningful": meaningful}
"""Masks of pixels by name."""
