"""Sampling: texts are continued token by token, each from its own end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.padding import Mask, Tokens, last_positions
from circuits.tensors import at_least_single

Texts = Sequence[Sequence[int]]

Pad = Callable[[Texts], tuple[Tokens, Mask]]
"""Pads texts of different lengths into one batch; returns its tokens and its mask."""

Forward = Callable[[Tokens, Mask], Tensor]
"""Maps such a batch to logits, with the vocabulary on the last axis."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        n_tokens: how many to add to each text at most.
        temperature: what logits are divided by before a token is drawn; 0 takes the most likely one.
        seed: of the first text's draws; each further text has the next seed, so that draws do not depend on the
            other texts.
        stop: tokens that end a text; the one that ended it is kept.
    """

    n_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: Collection[int] = ()

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise ValueError(f"n_tokens {self.n_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature {self.temperature} must be a finite number of at least 0"
            )

    def check(self, rows: Texts, spec: TokenInput) -> None:
        """Raise ValueError if a model with this input cannot continue the texts so far, or has no such stop token."""
        length, text = max((len(row), i) for i, row in enumerate(rows))
        if length + self.n_tokens > spec.n_ctx:
            raise ValueError(
                f"n_tokens {self.n_tokens} after the {length} of text {text} would pass the model's context of "
                f"{spec.n_ctx}: expected at most {spec.n_ctx - length}"
            )
        foreign = [token for token in self.stop if not 0 <= token < spec.n_vocab]
        if foreign:
            raise ValueError(f"stop {foreign[0]} is not a token: expected 0 to {spec.n_vocab - 1}")


def continue_texts(
    forward: Forward, pad: Pad, rows: Texts, sampling: Sampling, spec: TokenInput
) -> list[list[int]]:
    """Continue texts; every forward pass runs the whole texts.

    Raises:
        ValueError: if the model does not return logits at each position, or returns NaN.

    Returns:
        Each text with the tokens that were drawn after it.
    """
    seeds = range(sampling.seed, sampling.seed + len(rows))
    generators = [Generator().manual_seed(seed) for seed in seeds]
    made = [list(row) for row in rows]
    ends: list[int | None] = [None] * len(rows)
    for _ in range(sampling.n_tokens):
        # Unembeddings are often padded to more columns than there are tokens. Float64 on the CPU: the draw with a
        # seed does not depend on the device.
        logits = _next_logits(forward, *pad(made))[:, : spec.n_vocab].double().cpu()
        if logits.isnan().any():
            raise ValueError("logits after a text are NaN: no token can be drawn")
        for i, row in enumerate(made):
            # A text that has ended still grows, unseen by the caller: an edit gets the same batch of texts at every
            # pass, so that what it does to one text does not depend on when another ends.
            row.append(_sample(logits[i], sampling.temperature, generators[i]))
            if ends[i] is None and row[-1] in sampling.stop:
                ends[i] = len(row)
        if None not in ends:
            break
    return [row[:end] for row, end in zip(made, ends, strict=True)]


def _next_logits(forward: Forward, tokens: Tokens, mask: Mask) -> Float[Tensor, "text token"]:
    """The logits for the token after each text."""
    logits = forward(tokens, mask)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"the model returns a tensor of shape {tuple(logits.shape)} for {tuple(tokens.shape)} tokens: "
            "expected logits at each position"
        )
    return logits[torch.arange(len(tokens)), last_positions(mask)]


def _sample(logits: Float[Tensor, " token"], temperature: float, generator: Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (at_least_single(logits) / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
