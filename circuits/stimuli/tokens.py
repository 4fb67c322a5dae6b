"""Changes of token sequences: positions swapped, a prefix added, the sequence repeated."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Generator, Tensor

Tokens = Int[Tensor, "batch position"]


def swapped(tokens: Tokens, first: int, second: int) -> Tokens:
    """Swap two positions of each sequence.

    Raises:
        ValueError: if a position is outside.

    >>> swapped(torch.tensor([[1, 2, 3]]), 0, 2).tolist()
    [[3, 2, 1]]
    """
    for position in (first, second):
        if not 0 <= position < tokens.shape[1]:
            raise ValueError(f"position {position} must be from 0 to {tokens.shape[1] - 1}")
    made = tokens.clone()
    made[:, first], made[:, second] = tokens[:, second], tokens[:, first]
    return made


def prefixed(
    tokens: Tokens, n: int, n_vocab: int, generator: Generator, bos: int | None = None
) -> Int[Tensor, "batch longer"]:
    """Put `n` random tokens before each sequence, but after its first token if that is `bos`.

    Raises:
        ValueError: if `n` is negative or there is no token to draw.
    """
    if n < 0 or n_vocab < (2 if bos is not None else 1):
        raise ValueError(f"n {n} must be 0 or more, and n_vocab {n_vocab} leave something to draw")
    drawn = torch.randint(n_vocab, (len(tokens), n), generator=generator)
    if bos is not None:
        drawn = torch.where(drawn == bos, (drawn + 1) % n_vocab, drawn)
        if bool((tokens[:, 0] == bos).all()):
            return torch.cat([tokens[:, :1], drawn, tokens[:, 1:]], 1)
    return torch.cat([drawn, tokens], 1)


def repeated(tokens: Tokens, times: int, bos: int | None = None) -> Int[Tensor, "batch longer"]:
    """Repeat each sequence, with `bos` before the first round only.

    Raises:
        ValueError: if `times` is not positive.

    >>> repeated(torch.tensor([[0, 5, 6]]), 2, bos=0).tolist()
    [[0, 5, 6, 5, 6]]
    """
    if times < 1:
        raise ValueError(f"times {times} must be at least 1")
    if bos is not None and bool((tokens[:, 0] == bos).all()):
        return torch.cat([tokens[:, :1], tokens[:, 1:].repeat(1, times)], 1)
    return tokens.repeat(1, times)
