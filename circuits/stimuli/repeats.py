"""Sequences that repeat: a random prefix, then a random pattern over and over.

An induction head predicts the pattern's second and later rounds. Prefix and period both vary, so that
looking back a fixed number of places does not help.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

N_VOCAB = 64
"""Tokens, of which 0 starts every sequence and stands nowhere else."""

N_CTX = 64
"""Length of the sequences."""

BOS = 0


@dataclass(frozen=True, eq=False)
class Repeats:
    """Sequences, and where their pattern is.

    Attributes:
        tokens: the sequences.
        prefix: where each one's pattern starts.
        period: how long its pattern is.
    """

    tokens: Int[Tensor, "batch position"]
    prefix: Int[Tensor, " batch"]
    period: Int[Tensor, " batch"]

    @property
    def copied(self) -> Bool[Tensor, "batch position"]:
        """Which tokens can be predicted by copying: from the second token of the pattern's second round on.

        That the first round is over, nothing tells.
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
        n: how many.
        generator: all randomness comes from it.
        length: of each sequence, with the starting token.
        n_vocab: tokens to draw from.
        periods: shortest and longest pattern.

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
