"""Layer-wise relevance propagation, with concept masks and an account of where all relevance goes.

Bach et al. 2015; concept relevance propagation: Achtibat et al. 2023. The rules are in
`circuits.attribution.propagation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import get_args

import torch
from torch import Tensor

from circuits.attribution.passes import (
    INPUT,
    Size,
    check_batch,
    no_gradient_error,
    sized,
)
from circuits.attribution.propagation import Propagation, RelevanceRule, UnclearBatchError
from circuits.attribution.results import Attribution, input_site
from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.models.adapter.finiteness import check_finite
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.tasks.targets import Aim, Target, as_target, check_indices
from circuits.tensors import at_least_single
from circuits.units import Site, Unit


@recording_gradients()
def relevance(
    model: HookedModel,
    examples: Examples | Tensor,
    target: str | Unit | Target,
    site: str | Site = INPUT,
    *,
    rule: RelevanceRule = "epsilon",
    gamma: float = 0.25,
    through: Iterable[str | Unit] = (),
    batch: int = 32,
    size: Size = "refuse",
    progress: Progress | None = None,
) -> Attribution:
    """The relevance of a site's elements, or of the input's, for a target.

    Args:
        model: the model.
        examples: examples of a source, or a tensor as the model takes it.
        target: the target: a class, a token's logit, or a unit anywhere.
        site: the site; `input` for the pixels.
        rule: `gradient` is activation x gradient; `epsilon`, `gamma` and `z_plus` are those of Montavon et al. 2019,
            for convolutions and fully connected layers (epsilon is only used where a sum is zero).
        gamma: how much the rule `gamma` strengthens positive weights.
        through: only relevance that flows through these units counts (concept relevance): any unit of a site, and each
            of several sites in sequence.
        batch: examples in one pass.
        size: what to do with images of another size.
        progress: called with the number of examples done and the total.

    Returns:
        The relevance. Its `parts` are the rest of the target's value: `biases` after the site, with all other
        parameters that enter as they are (class tokens, position embeddings), and `elsewhere`, what reaches the target
        from the input without passing the site. Its `residual` is what then is missing: rounding,
        and with the rule `gradient` what operations that are not piecewise linear leave. With `through` there is none.

    Raises:
        KeyError: if a site or class is unknown.
        ValueError: if examples or target do not fit, an option is out of range, or no gradient leads to the site.
    """
    goal = as_target(model, target)
    place = None if site == INPUT else model.site(site)
    _check_options(model, goal, place, rule, gamma)
    check_batch(batch)
    masks = _masks(model, through, place, goal)
    given = as_examples(model, examples)
    inputs = sized(model, given, size)
    found: list[_Relevance] = []
    check_indices(goal, len(inputs))
    for start in range(0, len(inputs), batch):
        x = inputs[start : start + batch]
        own = goal.of_examples(range(start, start + len(x)))
        found += _batch_relevance(model, x, own, place, rule, gamma, masks)
        if progress is not None:
            progress(sum(len(f.aim.indices) for f in found), len(inputs))
    total, values = torch.cat([f.total for f in found]), torch.cat([f.values for f in found])
    parts = {k: torch.cat([f.parts[k] for f in found]) for k in found[0].parts}
    check_finite(model, total, inputs)
    explained = values.flatten(1).sum(1) + sum(parts.values())
    if place is None:
        assert isinstance(model.input, ImageInput), "checked above"
        place = input_site(model.input)
    settings = {"rule": rule, "gamma": gamma} if rule == "gamma" else {"rule": rule}
    if masks:
        settings["through"] = ", ".join(f"{s}:{','.join(map(str, u))}" for s, u in masks.items())
    return Attribution(
        "relevance", place.name, place.axes, place.unit_axis, values, str(goal),
        tuple(name for f in found for name in f.aim.names()), total,
        None if masks else total - explained, {} if masks else parts, "zero", settings, model.name,
        model.hash, given.describe(), 0,
    )  # fmt: skip


def _batch_relevance(
    model: HookedModel,
    x: Tensor,
    goal: Target,
    place: Site | None,
    rule: RelevanceRule,
    gamma: float,
    masks: Mapping[str, tuple[int, ...]],
) -> list[_Relevance]:
    """All examples in one pass, or one by one if some tensor of the model does not have them along its first axis."""
    # Such a tensor raises an error if its first axis has another length. If that happens to be as long as the batch,
    # relevance is credited to the wrong example, and the sums do not add up.
    try:
        found = _relevance(model, x, goal, place, rule, gamma, masks)
        missed = found.total - found.values.flatten(1).sum(1) - sum(found.parts.values())
        if len(x) == 1 or masks or bool((missed.abs() <= 1e-3 * found.total.abs() + 1e-4).all()):
            return [found]
    except UnclearBatchError:
        pass
    return [
        _relevance(
            model, x[i : i + 1], goal.of_examples(range(i, i + 1)), place, rule, gamma, masks
        )
        for i in range(len(x))
    ]


class _Relevance:
    """The relevance of a batch: values at the site, the target's values, other parts, and the resolved target."""

    def __init__(self, values: Tensor, total: Tensor, parts: dict[str, Tensor], aim: Aim) -> None:
        self.values, self.total, self.parts, self.aim = values, total, parts, aim


def _check_options(
    model: HookedModel, goal: Target, place: Site | None, rule: str, gamma: float
) -> None:
    """Raise ValueError if an option of `relevance` does not fit."""
    if rule not in get_args(RelevanceRule):
        raise ValueError(f"rule {rule!r} is not one of {', '.join(get_args(RelevanceRule))}")
    if not 0 <= gamma < 1e6:
        raise ValueError(f"gamma {gamma} must be 0 or more")
    if place is None and not isinstance(model.input, ImageInput):
        raise ValueError(
            f"model {model.name} takes tokens: expected a site, for example {model.sites[0].name}"
        )
    if goal.quantity != "activation":
        raise ValueError(
            f"target {goal}: relevance explains the activation itself, not its {goal.quantity.replace('_', ' ')}"
        )


def _masks(
    model: HookedModel, through: Iterable[str | Unit], place: Site | None, goal: Target
) -> dict[str, tuple[int, ...]]:
    """The units that relevance has to flow through, by site; raises ValueError if a site is not in between."""
    chosen: dict[str, list[int]] = {}
    for unit in map(model.unit, through):
        chosen.setdefault(unit.site, []).append(unit.index)
    order = [s.name for s in model.sites]
    first = -1 if place is None else order.index(place.name)
    for name in chosen:
        if not first <= order.index(name) < order.index(goal.site):
            start = INPUT if place is None else place.name
            raise ValueError(f"through {name!r}: expected a site between {start} and {goal.site}")
    return {site: tuple(units) for site, units in chosen.items()}


def _relevance(
    model: HookedModel,
    x: Tensor,
    goal: Target,
    place: Site | None,
    rule: RelevanceRule,
    gamma: float,
    masks: Mapping[str, tuple[int, ...]],
) -> _Relevance:
    end = model.site(goal.site)
    x = model.fitted(x)
    pixels = x.clone().requires_grad_(True) if x.is_floating_point() else None
    leaves: list[Tensor] = []

    def begin(value: Tensor) -> Tensor:
        leaves.append(value.detach().requires_grad_(True))
        return (
            leaves[0] * 1
        )  # a copy, since later operations may work in place, which autograd forbids on a leaf

    edits: dict[str, Callable[[Tensor], Tensor]] = {
        name: _gradient_through(model.site(name), units) for name, units in masks.items()
    }
    if place is not None:
        after = edits.get(place.name)
        edits[place.name] = begin if after is None else lambda value: after(begin(value))
    before = model.before_ceiling(end)
    intact = model.run(x, read=[before, end], until=end, reference=True)
    plain = intact[end]
    propagation = Propagation(rule, len(x), plain, gamma, tokens=pixels is None)
    with propagation:
        own = x if pixels is None else pixels
        # `reference` runs torch's own local response normalisation, which the propagation can replace by its rule; a
        # compiled one it could not see.
        made = model.run(own, read=[end], until=end, edits=edits, grad=True, reference=True)[end]
    aim = Aim.at(end, goal, plain, before=intact[before])
    total = aim.value(made, torch.arange(len(x), device=model.device))
    start = leaves[0] if leaves else pixels if place is None else None
    if start is None or not total.requires_grad:
        raise no_gradient_error(goal, place)
    asked = {"biases": propagation.biases, "elsewhere": propagation.embedded}
    extra = [pixels] if pixels is not None and place is not None else []
    gradients = torch.autograd.grad(
        total.sum(), [start, *asked.values(), *extra], allow_unused=True
    )
    if gradients[0] is None:
        raise no_gradient_error(goal, place)
    parts = {
        name: torch.zeros_like(total) if g is None else g
        for name, g in zip(asked, gradients[1:3], strict=True)
    }
    if extra and gradients[3] is not None:
        parts["elsewhere"] = (at_least_single(x) * gradients[3]).flatten(1).sum(1)
    values = (at_least_single(start) * at_least_single(gradients[0])).detach()
    # The reported value is the unchanged model's: if a replacement changed it, the residual would show that.
    kept = aim.value(plain, torch.arange(len(x), device=model.device))
    return _Relevance(values, kept, {k: v.detach() for k, v in parts.items()}, aim)


def _gradient_through(site: Site, units: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A change that keeps a tensor's value, but lets gradients through some units only."""
    keep = torch.zeros(site.n_units)
    keep[list(units)] = 1

    def change(value: Tensor) -> Tensor:
        mask = site.spread(keep.to(value))
        return value * mask + (value * (1 - mask)).detach()

    return change
