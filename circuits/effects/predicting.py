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
from circuits.stimuli.spelling import word_of


@dataclass(frozen=True)
class Prediction:
    """One of a model's predictions.

    Attributes:
        index: the output's index.
        name: the class's or token's name.
        probability: its probability, in 0..1.
    """

    index: int
    name: str
    probability: float


def predictions(
    model: HookedModel, example: Examples | Tensor, of: Sequence[int] | None = None, top: int = 5
) -> list[Prediction]:
    """A model's predictions for one example; for tokens, of the token that comes next.

    Args:
        model: the model, edited or not.
        example: a single example.
        of: the outputs to report on; the `top` most probable ones if not given.
        top: how many to report.

    Raises:
        ValueError: if there is not exactly one example.
    """
    given = as_examples(model, example)
    if len(given) != 1:
        raise ValueError(f"example: {len(given)} examples, expected one")
    probabilities = outputs_last(model, model.logits(given.inputs))[0].softmax(-1)
    if isinstance(model.input, TokenInput):
        probabilities = probabilities[-1]
    # A model with a map of predictions (segmentation) is summarised by the mean over positions.
    probabilities = probabilities.reshape(-1, probabilities.shape[-1]).mean(0)
    chosen = probabilities.topk(min(top, len(probabilities))).indices.tolist() if of is None else of
    return [Prediction(i, _named(model, i), probabilities[i].item()) for i in chosen]


def _named(model: HookedModel, index: int) -> str:
    if isinstance(model.input, TokenInput):
        return word_of(model.input.vocabulary, index)
    return answer_name(model, index)


def token_losses(model: HookedModel, examples: Examples | Tensor) -> Float[Tensor, "batch next"]:
    """The loss of a model on each token but the first: minus the log of its probability, in nats.

    Args:
        model: a token model, edited or not.
        examples: texts of equal length, of at least two tokens.

    Raises:
        ValueError: if the model takes images, or the texts have only one token.
    """
    if not isinstance(model.input, TokenInput):
        raise ValueError(f"model {model.name} takes images: expected a token model")
    tokens = as_examples(model, examples).inputs
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens have {tokens.shape[1]} positions: expected at least 2")
    # The logits at position i predict token i + 1: the last position predicts what is not there, the first token is
    # predicted by none.
    logs = outputs_last(model, model.logits(tokens))[:, :-1].log_softmax(-1)
    return -logs.gather(2, tokens[:, 1:, None].to(logs.device))[..., 0]
