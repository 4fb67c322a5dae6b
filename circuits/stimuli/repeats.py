"""Sequences with repetition: a random prefix, then a random pattern again and again.

An induction head predicts the second and later rounds of the pattern. Prefix and period vary, so that attending a fixed
number of positions back does not help.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

N_VOCAB = 64
"""The number of tokens; token 0 starts every sequence and occurs nowhere else."""

N_CTX = 64
"""The length of the sequences."""

BOS = 0


@dataclass(frozen=True, eq=False)
class Repeats:
    """Sequences, with the place of their patterns.

    Attributes:
        tokens: the sequences.
        prefix: the position at which each sequence's pattern begins.
        period: the length of the pattern.
    """

    tokens: Int[Tensor, "batch position"]
    prefix: Int[Tensor, " batch"]
    period: Int[Tensor, " batch"]

    @property
    def copied(self) -> Bool[Tensor, "batch position"]:
        """Which tokens can be predicted by copying: those from the second token of the pattern's second round on.

        The first token of the second round cannot: nothing shows that the first round is over.
        """
        at = torch.arange(self.tokens.shape[1])[None]
        return at > (self.prefix + self.period)[:, None]


def draw_patterns(
    n: int,
    generator: Generator,
    length: int = N_CTX,
    n_vocab: int = N_VOCAB,
    periods: tuple[int, int] = (6, 24),
) -> Repeats:
    """Draw `n` sequences.

    Args:
        n: the number of sequences.
        generator: the source of all randomness.
        length: the length of each sequence, including the starting token.
        n_vocab: the number of tokens to draw from.
        periods: the lengths of the shortest and the longest pattern.

    Raises:
        ValueError: if a pattern and its repeat do not fit.
    """
    low, high = periods
    if not 1 <= low <= high or length < high + low + 2:
        raise ValueError(f"periods {periods} do not fit sequences of {length} tokens")
    noise = torch.randint(1, n_vocab, (n, length), generator=generator)
    period = torch.randint(low, high + 1, (n, 1), generator=generator)
    prefix = torch.randint(1, 1 + length - high - low, (n, 1), generator=generator)
    at = torch.arange(length)[None]
    # Each position of the pattern copies from its first round; the prefix copies itself.
    source = torch.where(at >= prefix, prefix + (at - prefix) % period, at)
    tokens = noise.gather(1, source)
    tokens[:, 0] = BOS
    return Repeats(tokens, prefix[:, 0], period[:, 0])


def draw_repeats(
    n: int,
    generator: Generator,
    length: int = N_CTX,
    n_vocab: int = N_VOCAB,
    periods: tuple[int, int] = (6, 24),
) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
    """Draw `n` sequences as `draw_patterns` does; return them, and which tokens can be predicted by copying."""
    drawn = draw_patterns(n, generator, length, n_vocab, periods)
    return drawn.tokens, drawn.copied
