"""Continuing texts token by token, each from its own end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.padding import Mask, Tokens, last_positions

Texts = Sequence[Sequence[int]]

Pad = Callable[[Texts], tuple[Tokens, Mask]]
"""Makes a batch of texts of different lengths, and says where its real tokens are."""

Forward = Callable[[Tokens, Mask], Tensor]
"""From such a batch to logits, the axis of tokens last."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        n_tokens: how many to add to each text at most.
        temperature: what logits are divided by before one is drawn; 0 takes the most likely.
        seed: of the first text's draws; the next one's is one more, so that draws do not depend on a text's company.
        stop: tokens that end a text; the one that did is kept.
    """

    n_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: Collection[int] = ()

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise ValueError(f"n_tokens {self.n_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be a number from 0 up")

    def check(self, rows: Texts, spec: TokenInput) -> None:
        """Raise ValueError if a model of such an input cannot continue the texts like this."""
        length, text = max((len(row), i) for i, row in enumerate(rows))
        if length + self.n_tokens > spec.n_ctx:
            raise ValueError(
                f"n_tokens {self.n_tokens} after the {length} of text {text} would pass the model's context of "
                f"{spec.n_ctx}: expected at most {spec.n_ctx - length}"
            )
        foreign = [token for token in self.stop if not 0 <= token < spec.n_vocab]
        if foreign:
            raise ValueError(f"stop {foreign[0]} is no token: expected 0 to {spec.n_vocab - 1}")


def continued(
    forward: Forward, pad: Pad, rows: Texts, sampling: Sampling, spec: TokenInput
) -> list[list[int]]:
    """Texts with the tokens that were drawn after them; every pass runs the whole texts.

    Raises:
        ValueError: if the model puts out something else than logits at each position, or what is not a number.
    """
    seeds = range(sampling.seed, sampling.seed + len(rows))
    generators = [Generator().manual_seed(seed) for seed in seeds]
    made = [list(row) for row in rows]
    ends: list[int | None] = [None] * len(rows)
    for _ in range(sampling.n_tokens):
        logits = _following(forward, *pad(made))[:, : spec.n_vocab].double().cpu()
        if logits.isnan().any():
            raise ValueError("logits after a text are not numbers: no token can be drawn")
        for i, row in enumerate(made):
            # a text that has ended goes on growing, unseen: an edit is given the same texts at every pass
            row.append(_drawn(logits[i], sampling.temperature, generators[i]))
            if ends[i] is None and row[-1] in sampling.stop:
                ends[i] = len(row)
        if None not in ends:
            break
    return [row[:end] for row, end in zip(made, ends, strict=True)]


def _following(forward: Forward, tokens: Tokens, mask: Mask) -> Float[Tensor, "text token"]:
    """Logits of the token that comes after each text."""
    logits = forward(tokens, mask)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"the model puts out a tensor of shape {tuple(logits.shape)} for {tuple(tokens.shape)} tokens: "
            "expected logits at each position"
        )
    return logits[torch.arange(len(tokens)), last_positions(mask)]


def _drawn(logits: Float[Tensor, " token"], temperature: float, generator: Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
