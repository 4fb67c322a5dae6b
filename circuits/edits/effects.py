"""What an edit does to a model's output, beside the same edit of random units (layer 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.edits.operators import Edit
from circuits.edits.recipes import Recipe, edited
from circuits.models.adapter import HookedModel
from circuits.models.inputs import TokenInput
from circuits.units import Unit


@dataclass(frozen=True)
class Effect:
    """How the output changed, averaged over examples (and positions of tokens).

    Attributes:
        kl: Kullback-Leibler divergence of the edited from the intact prediction, in nats.
        top1_changed: share of predictions whose first choice changed.
        logit_change: mean absolute change of a logit.
    """

    kl: float
    top1_changed: float
    logit_change: float


@dataclass(frozen=True)
class EditReport:
    """An edit's measured effect and its baseline.

    Attributes:
        recipe: what was done.
        effect: of it.
        random: of the same operators on random other units of the same sites, one an attempt.
        model: the model's name.
        model_hash: of its weights.
        data: what it was measured on.
        n_examples: on how many.
        seed: of the random units.
        restored: whether the output after the edit was undone is the same to the bit.
    """

    recipe: Recipe
    effect: Effect
    random: tuple[Effect, ...]
    model: str
    model_hash: str
    data: str
    n_examples: int
    seed: int
    restored: bool

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return {**asdict(self), "recipe": self.recipe.to_dict()}


@dataclass(frozen=True)
class Prediction:
    """One of a model's predictions.

    Attributes:
        index: of the output.
        name: of the class or token.
        probability: in 0..1.
    """

    index: int
    name: str
    probability: float


def predictions(
    model: HookedModel, inputs: Tensor, of: Sequence[int] | None = None, top: int = 5
) -> list[Prediction]:
    """A model's prediction for one example; for tokens, of what comes after the last.

    Args:
        model: the model, edited or not.
        inputs: a batch of one.
        of: outputs to report on; the `top` most probable ones if not given.
        top: how many.

    Raises:
        ValueError: if `inputs` is not a batch of one.
    """
    if len(inputs) != 1:
        raise ValueError(f"inputs hold {len(inputs)} examples: expected one")
    logits = outputs_last(model, model.logits(inputs))[0]
    if isinstance(model.input, TokenInput):
        logits = logits[-1]
    # of a map of predictions the mean over places
    probabilities = logits.softmax(-1).reshape(-1, logits.shape[-1]).mean(0)
    chosen = probabilities.topk(min(top, len(probabilities))).indices.tolist() if of is None else of
    return [Prediction(i, _output_name(model, i), probabilities[i].item()) for i in chosen]


def outputs_last(model: HookedModel, logits: Tensor) -> Tensor:
    """Logits with the axis of classes or tokens last, whatever their layout."""
    site = next((s for s in reversed(model.sites) if s.kind == "logit"), None)
    return logits if site is None else logits.movedim(site.unit_axis, -1)


def _output_name(model: HookedModel, index: int) -> str:
    if isinstance(model.input, TokenInput):
        return model.input.word(index)
    return model.classes[index] if model.classes else f"output {index}"


def measure(
    model: HookedModel,
    recipe: Recipe,
    inputs: Tensor | Sequence[Tensor],
    data: str = "",
    n_random: int = 5,
    seed: int = 0,
    batch: int = 32,
) -> EditReport:
    """Measure what a recipe does to the output, and what random twins of it do.

    Args:
        model: the model.
        recipe: the edits.
        inputs: as the model takes them: one tensor, or several batches.
        data: where they come from, for the report.
        n_random: how many random twins: each unit that is edited swapped for another of its site;
            none where a site has too few other units.
        seed: of the choice of units.
        batch: examples in one forward pass, of a single tensor.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if a unit does not exist or the recipe is for other weights.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must be from 0 to 2^63 - 1")
    generator = Generator().manual_seed(seed)
    twins = [_twin(model, recipe.edits, generator) for _ in range(n_random)]
    variants = [recipe, *(Recipe(t) for t in twins if t)]
    totals = [_Total() for _ in variants]
    restored, n = True, 0
    for x in inputs.split(batch) if isinstance(inputs, Tensor) else inputs:
        intact = model.logits(x)
        for variant, total in zip(variants, totals, strict=True):
            with edited(model, variant):
                changed = model.logits(x)
            total.add(outputs_last(model, intact), outputs_last(model, changed))
        restored = restored and torch.equal(intact, model.logits(x))
        n += len(x)
    effect, *others = (total.effect() for total in totals)
    return EditReport(
        recipe, effect, tuple(others), model.name, model.hash, data, n, seed, restored
    )


def compare(
    intact: Float[Tensor, "*examples output"], changed: Float[Tensor, "*examples output"]
) -> Effect:
    """How far changed logits are from the intact ones."""
    total = _Total()
    total.add(intact, changed)
    return total.effect()


class _Total:
    """Sums over predictions, so that no more than a batch of logits is kept."""

    def __init__(self) -> None:
        self.n = 0
        self.kl = self.top1 = self.change = 0.0

    def add(self, intact: Tensor, changed: Tensor) -> None:
        """Count the predictions of one batch."""
        p, q = intact.double().log_softmax(-1), changed.double().log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1)
        self.n += divergence.numel()
        self.kl += divergence.sum().item()
        self.top1 += (intact.argmax(-1) != changed.argmax(-1)).sum().item()
        self.change += (intact - changed).abs().double().mean(-1).sum().item()

    def effect(self) -> Effect:
        """The means so far."""
        return Effect(self.kl / self.n, self.top1 / self.n, self.change / self.n)


def _twin(model: HookedModel, edits: Sequence[Edit], generator: Generator) -> tuple[Edit, ...]:
    """The edits with each unit swapped for a random one of its site; none if there are too few."""
    own = {model.unit(edit.target) for edit in edits}
    swapped: dict[Unit, Unit] = {}
    for unit in sorted(own):
        site = model.site(unit.site)
        taken = own | set(swapped.values())
        free = [u for u in map(site.unit, range(site.n_units)) if u not in taken]
        if not free:
            return ()
        swapped[unit] = free[int(torch.randint(len(free), (1,), generator=generator))]
    return tuple(edit.moved(swapped[model.unit(edit.target)]) for edit in edits)
