"""A task of one prompt, or of one pair of prompts, as a person types them."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.examples import encoded
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.sites import logits_last
from circuits.tasks.compiling import compile_task
from circuits.tasks.items import Item, Words
from circuits.tasks.task import Task

NAME = "prompts"


def task_of_prompts(
    model: HookedModel, clean: Words, corrupted: Words = "", answer: Words = "", against: Words = ""
) -> Task:
    """A task with one example: the difference between the logits of two next tokens after a prompt.

    Args:
        model: a language model.
        clean: the prompt.
        corrupted: the prompt that it is compared with, of as many tokens; none if empty.
        answer: the token to follow `clean`; the model's own first choice if empty.
        against: the token that it is compared with; if empty, the model's first choice after `corrupted`, or its first
            one after `clean`, whichever comes first that is not the answer.

    Raises:
        ValueError: if the model takes images, a prompt cannot be encoded, the prompts differ in length or not at
            all, or the answer is also what it is compared with.
    """
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(f"model {model.name} takes images: expected a language model for prompts")
    prompts = [words for words in (clean, corrupted) if words]
    if not clean:
        raise ValueError("clean is empty: expected a text or tokens")
    ranked = [_ranked(model, spec, words) for words in prompts]
    right = answer or (ranked[0][0],)
    chosen = _tokens(spec, right)
    wrong = against or next((t,) for t in (ranked[-1][0], *ranked[0]) if (t,) != chosen)
    item = Item(clean, (right,), (wrong,), corrupted or None)
    return compile_task(model, [item], name=NAME, feeding="first")


def _ranked(model: HookedModel, spec: TokenInput, prompt: Words) -> list[int]:
    """The model's first two choices for the token after a prompt."""
    tokens: Tensor = encoded(spec, prompt)[None]
    with torch.no_grad():
        logits = logits_last(model.sites, model.logits(tokens))[0, -1, : spec.n_vocab]
    return logits.topk(2).indices.tolist()


def _tokens(spec: TokenInput, words: Words) -> tuple[int, ...]:
    return tuple(spec.encode(words)) if isinstance(words, str) else tuple(words)
