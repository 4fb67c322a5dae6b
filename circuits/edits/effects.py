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
        data: what it was measured on.
        n_examples: on how many.
        seed: of the random units.
        restored: whether the output after the edit was undone is the same to the bit.
    """

    recipe: Recipe
    effect: Effect
    random: tuple[Effect, ...]
    model: str
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
    probabilities = model.logits(inputs)[0].softmax(-1)
    if isinstance(model.input, TokenInput):
        probabilities = probabilities[-1]
    chosen = probabilities.topk(min(top, len(probabilities))).indices.tolist() if of is None else of
    return [Prediction(i, _output_name(model, i), probabilities[i].item()) for i in chosen]


def _output_name(model: HookedModel, index: int) -> str:
    if isinstance(model.input, TokenInput):
        return model.input.word(index)
    return model.classes[index] if model.classes else f"output {index}"


def measure(
    model: HookedModel,
    recipe: Recipe,
    inputs: Tensor,
    data: str = "",
    n_random: int = 5,
    seed: int = 0,
    batch: int = 32,
) -> EditReport:
    """Measure what a recipe does to the output, and what random twins of it do.

    Args:
        model: the model.
        recipe: the edits.
        inputs: as the model takes them.
        data: where they come from, for the report.
        n_random: how many random twins: each edit moved to another unit of its site.
        seed: of the choice of units.
        batch: examples in one forward pass.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if a unit does not exist or the recipe is for other weights.
    """
    generator = Generator().manual_seed(seed)
    intact = _logits(model, inputs, batch)
    twins = [_twin(model, recipe.edits, generator) for _ in range(n_random)]
    effects = []
    for edits in (recipe, *(Recipe(t) for t in twins)):
        with edited(model, edits):
            effects.append(compare(intact, _logits(model, inputs, batch)))
    restored = torch.equal(intact, _logits(model, inputs, batch))
    return EditReport(
        recipe, effects[0], tuple(effects[1:]), model.name, data, len(inputs), seed, restored
    )


def compare(
    intact: Float[Tensor, "*examples output"], changed: Float[Tensor, "*examples output"]
) -> Effect:
    """How far changed logits are from the intact ones."""
    p, q = intact.double().log_softmax(-1), changed.double().log_softmax(-1)
    return Effect(
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        top1_changed=(intact.argmax(-1) != changed.argmax(-1)).float().mean().item(),
        logit_change=(intact - changed).abs().mean().item(),
    )


def _logits(model: HookedModel, inputs: Tensor, batch: int) -> Tensor:
    return torch.cat([model.logits(chunk) for chunk in inputs.split(batch)])


def _twin(model: HookedModel, edits: Sequence[Edit], generator: Generator) -> tuple[Edit, ...]:
    """The edits moved to random units of their sites that the recipe does not touch."""
    moved = []
    taken = {model.unit(e.target) for e in edits}
    for edit in edits:
        site = model.site(edit.target.site)
        free = [u for u in map(site.unit, range(site.n_units)) if u not in taken]
        if not free:
            raise ValueError(f"every unit of site {site.name} is edited: no random twin is left")
        pick: Unit = free[int(torch.randint(len(free), (1,), generator=generator))]
        taken.add(pick)
        moved.append(edit.moved(pick))
    return tuple(moved)
