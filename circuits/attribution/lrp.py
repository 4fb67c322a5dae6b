"""Layer-wise relevance, with concept masks, conserved and accounted for.

Bach et al. 2015; concept relevance propagation: Achtibat et al. 2023. The replacements behind it are in
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
    not_behind,
    sized,
)
from circuits.attribution.propagation import Propagation, RelevanceRule, UnclearBatchError
from circuits.attribution.results import Attribution, input_site
from circuits.examples import Examples, as_examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.tasks.targets import Aim, Target, as_target, check_indices
from circuits.units import Site, Unit


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
        examples: as a source has them, or as the model takes them.
        target: what it is relevance for: a class, a token's logit, a unit anywhere.
        site: where; `input` for the pixels.
        rule: `gradient` is activation x gradient; `epsilon`, `gamma` and `z_plus` as in Montavon et al.
            2019, for convolutions and fully connected layers alike (epsilon is 0 but for zero sums).
        gamma: how much the rule `gamma` strengthens positive weights.
        through: only what flows through these units counts (concept relevance): units of one site are
            taken together, of several sites in a row.
        batch: examples in one pass.
        size: what becomes of images of another size.
        progress: called with examples done and all.

    Returns:
        `parts` has what else the target's value is made of: `biases` between, and `elsewhere`, what comes
        from the input past the site. `residual` is what is missing: rounding, and with the rule `gradient`
        what operations that are not piecewise linear leave. With `through` no sum is promised.

    Raises:
        KeyError: if a site or class is unknown.
        ValueError: if examples or target do not fit, an option is out of range, or no gradient leads there.
    """
    if rule not in get_args(RelevanceRule):
        raise ValueError(f"rule {rule!r} is not one of {', '.join(get_args(RelevanceRule))}")
    if not 0 <= gamma < 1e6:
        raise ValueError(f"gamma {gamma} must be 0 or more")
    goal = as_target(model, target)
    place = None if site == INPUT else model.site(site)
    if place is None and not isinstance(model.input, ImageInput):
        raise ValueError(
            f"model {model.name} takes tokens: give a site, e.g. {model.sites[0].name}"
        )
    if goal.quantity != "activation":
        raise ValueError(
            f"target {goal}: relevance explains the number itself, not its {goal.quantity.replace('_', ' ')}"
        )
    check_batch(batch)
    masks = _masks(model, through)
    order = [s.name for s in model.sites]
    for name in masks:
        first = -1 if place is None else order.index(place.name)
        if not first <= order.index(name) < order.index(goal.site):
            start = INPUT if place is None else place.name
            raise ValueError(f"through {name!r}: expected a site between {start} and {goal.site}")
    given = as_examples(model, examples)
    inputs = sized(model, given, size)
    found: list[_Found] = []
    check_indices(goal, len(inputs))
    for start in range(0, len(inputs), batch):
        x = inputs[start : start + batch]
        own = goal.of_examples(range(start, start + len(x)))
        found += _of_batch(model, x, own, place, rule, gamma, masks)
        if progress is not None:
            progress(sum(len(f.aim.indices) for f in found), len(inputs))
    total, values = torch.cat([f.total for f in found]), torch.cat([f.values for f in found])
    parts = {k: torch.cat([f.parts[k] for f in found]) for k in found[0].parts}
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


def _of_batch(
    model: HookedModel,
    x: Tensor,
    goal: Target,
    place: Site | None,
    rule: RelevanceRule,
    gamma: float,
    masks: Mapping[str, tuple[int, ...]],
) -> list[_Found]:
    """All examples in one pass, or one by one where a model has them not in front of every tensor."""
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


class _Found:
    """Relevance of a batch."""

    def __init__(self, values: Tensor, total: Tensor, parts: dict[str, Tensor], aim: Aim) -> None:
        self.values, self.total, self.parts, self.aim = values, total, parts, aim


def _masks(model: HookedModel, through: Iterable[str | Unit]) -> dict[str, tuple[int, ...]]:
    chosen: dict[str, list[int]] = {}
    for unit in map(model.unit, through):
        chosen.setdefault(unit.site, []).append(unit.index)
    return {site: tuple(units) for site, units in chosen.items()}


def _relevance(
    model: HookedModel,
    x: Tensor,
    goal: Target,
    place: Site | None,
    rule: RelevanceRule,
    gamma: float,
    masks: Mapping[str, tuple[int, ...]],
) -> _Found:
    end = model.site(goal.site)
    x = model.fitted(x)
    pixels = x.clone().requires_grad_(True) if x.is_floating_point() else None
    leaves: list[Tensor] = []

    def begin(value: Tensor) -> Tensor:
        leaves.append(value.detach().requires_grad_(True))
        return leaves[0] * 1  # what follows may work in place

    edits: dict[str, Callable[[Tensor], Tensor]] = {
        name: _only(model.site(name), units) for name, units in masks.items()
    }
    if place is not None:
        after = edits.get(place.name)
        edits[place.name] = begin if after is None else lambda value: after(begin(value))
    plain = model.run(x, read=[end], until=end, reference=True)[end]
    propagation = Propagation(rule, len(x), plain, gamma)
    with propagation:
        own = x if pixels is None else pixels
        # the propagation replaces the normalisation by rules of its own
        made = model.run(own, read=[end], until=end, edits=edits, grad=True, reference=True)[end]
    aim = Aim.at(end, goal, plain)
    total = aim.value(made, torch.arange(len(x), device=model.device))
    start = leaves[0] if leaves else pixels if place is None else None
    if start is None or not total.requires_grad:
        raise not_behind(goal, place)
    asked = {"biases": propagation.biases, "elsewhere": propagation.embedded}
    extra = [pixels] if pixels is not None and place is not None else []
    gradients = torch.autograd.grad(
        total.sum(), [start, *asked.values(), *extra], allow_unused=True
    )
    if gradients[0] is None:
        raise not_behind(goal, place)
    parts = {
        name: torch.zeros_like(total) if g is None else g
        for name, g in zip(asked, gradients[1:3], strict=True)
    }
    if extra and gradients[3] is not None:
        parts["elsewhere"] = (x * gradients[3]).flatten(1).sum(1)
    values = (start * gradients[0]).detach()
    # the value is that of the model as it is: what the replacements change would show
    kept = aim.value(plain, torch.arange(len(x), device=model.device))
    return _Found(values, kept, {k: v.detach() for k, v in parts.items()}, aim)


def _only(site: Site, units: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A change that keeps a tensor, and of its gradient the units' part."""
    keep = torch.zeros(site.n_units)
    keep[list(units)] = 1

    def change(value: Tensor) -> Tensor:
        mask = site.spread(keep.to(value))
        return value * mask + (value * (1 - mask)).detach()

    return change
