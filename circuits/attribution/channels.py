"""Attribution to the units of a site.

Activation x gradient and integrated gradients at a site (Olah et al. 2018, "The Building Blocks of Interpretability";
Sundararajan et al. 2017), ablation, and relevance. With every method a sample of units is also ablated, and the result
says how well the two rankings agree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from circuits.attribution.integrating import integrate
from circuits.attribution.lrp import relevance
from circuits.attribution.passes import (
    Passes,
    Size,
    check_batch,
    own_gradients,
    sized,
)
from circuits.attribution.propagation import RelevanceRule
from circuits.attribution.results import AblationCheck, Attribution
from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.experiments.running import run
from circuits.experiments.variants import Variant
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.tasks.metrics import UnitActivation
from circuits.tasks.targets import Target, as_target, check_indices
from circuits.tasks.task import Question, Task
from circuits.units import Site, Unit

ChannelMethod = Literal["activation_x_gradient", "integrated_gradients", "ablation", "relevance"]
_CHECKED = 4
"""On how many examples units are ablated for the check."""

_RESOLUTION, _COARSE_RESOLUTION = 100, 4
"""Shares and losses below this many floating-point spacings at the target's value are rounding errors and count as 0.
There are fewer in half precision, in which torch rounds what an operation returns, but not the sums inside it."""

Baseline = Literal["zero", "mean"]
"""The baseline activation of a unit: zero, or its mean over these examples and positions."""


@recording_gradients()
def attribute(
    model: HookedModel,
    examples: Examples | Tensor,
    target: str | Unit | Target,
    site: str | Site,
    method: ChannelMethod = "activation_x_gradient",
    *,
    baseline: Baseline | Tensor = "zero",
    steps: int = 50,
    tolerance: float | None = 0.01,
    rule: RelevanceRule = "epsilon",
    check: int = 16,
    seed: int = 0,
    batch: int = 32,
    size: Size = "refuse",
    progress: Progress | None = None,
) -> Attribution:
    """Attribute a target's value to the elements of a site's tensor.

    Args:
        model: the model.
        examples: examples of a source, or a tensor as the model takes it.
        target: a class, a token's logit or a unit after the site; see `parse_target`.
        site: the site.
        method: `activation_x_gradient` (captum's LayerGradientXActivation), `integrated_gradients` over the activation,
            from the baseline (LayerIntegratedGradients, Gauss-Legendre), `ablation` (the target's loss when a unit is
            set to the baseline everywhere: one number for each unit), or `relevance` (see `relevance`).
        baseline: for integrated gradients and ablation; a tensor has the site's shape for one example.
        steps: steps of integrated gradients.
        tolerance: steps are doubled (at most four times) until the values sum to the explained difference within this
            share of it; None never doubles them.
        rule: rule of relevance.
        check: how many units to ablate on up to four examples as a check; 0 for none.
        seed: seed of the check.
        batch: versions of an example in one pass, which bounds memory.
        size: what to do with images of another size.
        progress: called with the number of examples done and the total.

    Returns:
        The attribution; its `residual` is what the values lack to the target's value (relevance), or to its difference
        from the baseline's value (integrated gradients).

    Raises:
        KeyError: if a site or class is unknown.
        ValueError: if examples, target or an option do not fit, or the site is not before the target.
    """
    _check_options(method, baseline, tolerance, steps, check)
    check_batch(batch)
    goal, place = as_target(model, target), model.site(site)
    given = as_examples(model, examples)
    inputs = sized(model, given, size)
    check_indices(goal, len(inputs))
    if method == "relevance":
        made = relevance(
            model, inputs, goal, place, rule=rule, batch=batch, size="keep", progress=progress
        )
    elif method == "activation_x_gradient":
        found = own_gradients(model, inputs, goal, place, batch)
        values = found.points * found.gradients
        made = _attribution(model, method, place, values, str(goal), found.names, found.values)
    else:
        passes = Passes(model, inputs, goal, place, batch, size="keep")
        made = _from_baseline(passes, method, baseline, steps, tolerance, progress)
    by_gradient = method in ("activation_x_gradient", "integrated_gradients")
    ceiling = goal.ceiling(model) if by_gradient else None
    made = replace(made, seed=seed, examples=given.describe(), ceiling=ceiling)
    if not check:
        return made
    few = inputs[:_CHECKED]
    passes = Passes(model, few, goal.of_examples(range(len(few))), place, batch, size="keep")
    base = baseline_of(passes, baseline)[1] if method == "ablation" else None
    checked = check_by_ablation(passes, made.units(), check, seed, base)
    return replace(made, check=checked)


def _check_options(
    method: str, baseline: Baseline | Tensor, tolerance: float | None, steps: int, check: int
) -> None:
    """Raise ValueError if an option of `attribute` is out of range."""
    if method not in get_args(ChannelMethod):
        raise ValueError(f"method {method!r} is not one of {', '.join(get_args(ChannelMethod))}")
    if not isinstance(baseline, Tensor) and baseline not in get_args(Baseline):
        raise ValueError(f"baseline {baseline!r} is not one of {', '.join(get_args(Baseline))}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance} must be 0 or more")
    for name, value, least in (("steps", steps, 1), ("check", check, 0)):
        if value < least:
            raise ValueError(f"{name} {value} must be at least {least}")


def _attribution(
    model: HookedModel,
    method: str,
    place: Site,
    values: Tensor,
    target: str,
    aims: tuple[str, ...],
    target_values: Tensor,
    baseline: str = "zero",
) -> Attribution:
    axes, unit_axis = place.axes, place.unit_axis
    if (
        values.ndim == 2 and len(axes) > 2
    ):  # ablation gives one number for each unit, without positions
        axes, unit_axis = ("batch", axes[unit_axis]), 1
    return Attribution(
        method, place.name, axes, unit_axis, values.detach(), target, aims, target_values, None, {},
        baseline, {}, model.name, model.hash, {}, 0,
    )  # fmt: skip


def _from_baseline(
    passes: Passes,
    method: ChannelMethod,
    baseline: Baseline | Tensor,
    steps: int,
    tolerance: float | None,
    progress: Progress | None,
) -> Attribution:
    place = passes.site
    assert place is not None, "channels are of a site"
    named, base = baseline_of(passes, baseline)
    residual, settings = None, {}
    if method == "integrated_gradients":
        values, residual, used = integrate(passes, base, steps, tolerance, progress)
        settings = {"steps": used, "tolerance": tolerance}
    else:
        values = _all_losses(passes, base, progress)
    made = _attribution(
        passes.model, method, place, values, str(passes.target), tuple(passes.aim.names()), passes.values,
        named,
    )  # fmt: skip
    return replace(made, residual=residual, settings=settings)


def baseline_of(passes: Passes, baseline: Baseline | Tensor) -> tuple[str, Tensor]:
    """A baseline's name, and its tensor for each example.

    Raises:
        ValueError: if the tensor has another shape, or the name is unknown.
    """
    points = passes.points
    if isinstance(baseline, Tensor):
        if baseline.shape != points.shape[1:] and baseline.shape != points.shape:
            raise ValueError(
                f"baseline of shape {tuple(baseline.shape)}: expected {tuple(points.shape[1:])}"
            )
        return "given", baseline.to(points).expand_as(points)
    if baseline == "zero":
        return "zero", torch.zeros_like(points)
    if baseline != "mean":
        raise ValueError(f"baseline {baseline!r} is not one of {', '.join(get_args(Baseline))}")
    site = passes.site
    assert site is not None, "the mean is of a site"
    over = [a for a in range(points.ndim) if a not in (site.unit_axis, site.inner_axis)]
    return "mean", points.mean(over, keepdim=True).expand_as(points)


def losses(passes: Passes, example: int, base: Tensor, units: list[int]) -> Float[Tensor, " unit"]:
    """The target's loss on one example when each unit alone is set to the baseline."""
    model, site, own = passes.model, passes.site, slice(example, example + 1)
    assert site is not None, "units are of a site"
    shown = Examples.given(model, passes.inputs[own])
    aim = UnitActivation.named(model, passes.target.of_examples(range(own.start, own.stop)))
    at = None if isinstance(model.input, ImageInput) else (passes.inputs.shape[1] - 1,)
    outcomes = run(
        model, [_unit_at_baseline(site, unit, base[own]) for unit in units],
        Task(aim.name, shown, (Question(at),), aim), measures=[aim],
    )  # fmt: skip
    intact, *changed = outcomes.values[aim.name][:, 0].tolist()
    return torch.tensor([intact - value for value in changed], dtype=torch.float64).to(
        passes.values
    )


def _unit_at_baseline(site: Site, unit: int, base: Float[Tensor, "1 *rest"]) -> Variant:
    def change(value: Tensor) -> Tensor:
        made = value.clone()
        site.by_unit(made)[:, unit] = site.by_unit(base.to(value))[:, unit]
        return made

    return Variant(f"without {unit}", live=lambda _: {site.name: change}, sites=(site.name,))


def _all_losses(
    passes: Passes, base: Tensor, progress: Progress | None
) -> Float[Tensor, "example unit"]:
    assert passes.site is not None, "units are of a site"
    units = list(range(passes.site.n_units))
    found = []
    for example in range(len(passes)):
        found.append(losses(passes, example, base, units))
        if progress is not None:
            progress(example + 1, len(passes))
    return torch.stack(found)


def check_by_ablation(
    passes: Passes,
    units: Float[Tensor, "example unit"],
    n: int = 16,
    seed: int = 0,
    base: Tensor | None = None,
) -> AblationCheck:
    """How well units' shares rank them as ablating each unit does, on up to four examples.

    Shares and losses that are only rounding errors count as ties.

    Args:
        passes: passes from the units' site.
        units: the share of each unit.
        n: how many units to ablate: one half the most active ones, the other half drawn at random.
        seed: seed of the draw.
        base: what a unit is set to, for each example; zero if not given.
    """
    site = passes.site
    assert site is not None, "units are of a site"
    generator = np.random.default_rng(seed)
    if base is None:
        base = torch.zeros_like(passes.points[:_CHECKED])
    pairs = []
    for example in range(min(_CHECKED, len(passes))):
        active = site.activations(passes.points[example : example + 1])[0].abs().sum(1)
        order = active.argsort(descending=True, stable=True).tolist()
        chosen = order[: -(-n // 2)]
        rest = order[len(chosen) :]
        drawn = generator.choice(len(rest), min(n - len(chosen), len(rest)), replace=False)
        chosen += [rest[i] for i in sorted(drawn.tolist())]
        lost = losses(passes, example, base, chosen)
        size = float(passes.values[example].abs().max())
        rounding = resolution(passes.model.dtype or lost.dtype) * size
        pairs.append(tuple(_rounding_to_zero(x, rounding) for x in (units[example, chosen], lost)))
    found = [spearman(a, b) for a, b in pairs]
    # The null: correlations after shuffling the shares among units, averaged over examples like the measured ones.
    chance = [
        float(np.mean([spearman(generator.permutation(a), b) for a, b in pairs]))
        for _ in range(200)
    ]
    return AblationCheck(
        float(np.mean(found)),
        tuple(found),
        float(np.quantile(chance, 0.95)),
        min(n, site.n_units),
        seed,
    )


def resolution(dtype: torch.dtype) -> float:
    """The share of a number below which differences that a model of some type computes are rounding errors.

    >>> resolution(torch.bfloat16)  # 4 spacings of 2^-7
    0.03125
    """
    kind = torch.finfo(dtype)
    return (_RESOLUTION if kind.bits >= 32 else _COARSE_RESOLUTION) * kind.eps


def _rounding_to_zero(values: Float[Tensor, " unit"], rounding: float) -> np.ndarray:
    """Values with rounding errors set to 0; in a ranking these would otherwise be in random order."""
    found = values.double().cpu().numpy()
    return np.where(np.abs(found) <= rounding, 0.0, found)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two lists; 0 if one of them is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 15.0]))
    0.5
    """
    ranks = [rankdata(x) - (len(x) + 1) / 2 for x in (a, b)]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum() / size) if size else 0.0
