"""A model's predictions for one example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from circuits.examples import Examples, as_examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.logits import answer_name, outputs_last


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
    model: HookedModel, example: Examples | Tensor, of: Sequence[int] | None = None, top: int = 5
) -> list[Prediction]:
    """A model's prediction for one example; for tokens, of what comes after the last.

    Args:
        model: the model, edited or not.
        example: one alone.
        of: outputs to report on; the `top` most probable ones if not given.
        top: how many.

    Raises:
        ValueError: if `example` is not one.
    """
    given = as_examples(model, example)
    if len(given) != 1:
        raise ValueError(f"example: {len(given)} examples, expected one")
    probabilities = outputs_last(model, model.logits(given.inputs))[0].softmax(-1)
    if isinstance(model.input, TokenInput):
        probabilities = probabilities[-1]
    # of a map of predictions the mean over places
    probabilities = probabilities.reshape(-1, probabilities.shape[-1]).mean(0)
    chosen = probabilities.topk(min(top, len(probabilities))).indices.tolist() if of is None else of
    return [Prediction(i, answer_name(model, i), probabilities[i].item()) for i in chosen]


def token_losses(model: HookedModel, examples: Examples | Tensor) -> Float[Tensor, "batch next"]:
    """How surprised a model is by each token but the first: -log of its probability, in nats.

    Args:
        model: of tokens, edited or not.
        examples: texts of one length, of at least two tokens.

    Raises:
        ValueError: if the model takes no tokens, or there is but one position.
    """
    if not isinstance(model.input, TokenInput):
        raise ValueError(f"model {model.name} takes images: only tokens have a next one")
    tokens = as_examples(model, examples).inputs
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens have {tokens.shape[1]} positions: expected at least 2")
    logs = outputs_last(model, model.logits(tokens))[:, :-1].log_softmax(-1)
    return -logs.gather(2, tokens[:, 1:, None].to(logs.device))[..., 0]
