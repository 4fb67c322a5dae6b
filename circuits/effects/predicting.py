"""A model's predictions for one example (layer 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.inputs import TokenInput


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
