"""A model's answers: the logits that decide about each example."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.sites import logits_last
from circuits.tensors import at_least_single


def outputs_last(model: HookedModel, logits: Tensor) -> Tensor:
    """Logits with the axis of classes or tokens last, whatever the model's layout, in float32 at least."""
    return at_least_single(logits_last(model.sites, logits))


def answers(model: HookedModel, logits: Tensor) -> Float[Tensor, "example output"]:
    """The logits that answer each example: of a text, those after the last token; of an image, its logits, averaged
    over positions if the model returns a map.
    """
    last = outputs_last(model, logits)
    if isinstance(model.input, TokenInput):
        return last[:, -1]
    return last.flatten(1, -2).mean(1) if last.ndim > 2 else last


def check_answer(model: HookedModel, target: int) -> None:
    """Raise ValueError if a model has no output of that number."""
    site = next((s for s in reversed(model.sites) if s.kind == "logit"), model.sites[-1])
    if not 0 <= target < site.n_units:
        raise ValueError(f"target {target} must be from 0 to {site.n_units - 1}")


def answer_name(model: HookedModel, index: int) -> str:
    """The name of an output: its token, its class, or `output N`."""
    if isinstance(model.input, TokenInput):
        return model.input.word(index)
    return model.classes[index] if model.classes else f"output {index}"
