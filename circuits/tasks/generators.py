"""Behaviours of models that take tokens rather than text: copying, modular addition, balanced brackets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from circuits.stimuli.repeats import N_CTX, N_VOCAB, Repeats, draw_patterns
from circuits.tasks.generated import Generated, check_choice, check_count
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import LeftOut, draw, shuffled
from circuits.tasks.templates.tokenizers import Reader

Tokens = tuple[int, ...]

# --- copying -----------------------------------------------------------------------------------

Repeated = Literal["other", "first_round", "rolled"]
"""The counterpart of a sequence that repeats a pattern. `other`: an independent sequence. `first_round`: the same
sequence with other tokens in the pattern's first occurrence, so that there is nothing to copy in the second. `rolled`:
its tokens shifted by one position, the last one moving to just after the starting token."""


def repeats(
    n: int,
    seed: int = 0,
    *,
    corruption: Repeated = "other",
    length: int = N_CTX,
    n_vocab: int = N_VOCAB,
    periods: tuple[int, int] = (6, 24),
) -> Generated:
    """Sequences that repeat a random pattern, like those that `induction` is trained on.

    The positions whose next token can be predicted by copying are counted; that token is the label.

    Args:
        n: number of items.
        seed: seed of everything that is drawn.
        corruption: how the counterpart is made.
        length: length of each sequence in tokens, including the starting token.
        n_vocab: number of tokens to draw from; token 0 starts each sequence.
        periods: lengths of the shortest and the longest pattern.

    Raises:
        ValueError: if a pattern and its repeat do not fit, or `corruption` is unknown.
    """
    check_choice("corruption", corruption, get_args(Repeated))
    check_count(n)
    if n_vocab < 3:
        raise ValueError(f"n_vocab {n_vocab} must be at least 3: the starting token and two others")
    generator = Generator().manual_seed(seed)
    drawn = draw_patterns(n, generator, length, n_vocab, periods)
    others = _repeated_otherwise(drawn, corruption, generator, n_vocab, periods)
    items = []
    for i, (row, copied) in enumerate(zip(drawn.tokens.tolist(), drawn.copied, strict=True)):
        # Token t is predicted at position t - 1.
        known = copied.nonzero()[:, 0].tolist()
        items.append(
            Item(
                tuple(row), corrupted=tuple(others[i].tolist()), labels=tuple(row[t] for t in known),
                positions=tuple(t - 1 for t in known), group=f"sequence {i}", template="repeats",
            )
        )  # fmt: skip
    about = "Each token of a repeated pattern, copied from its previous occurrence."
    return Generated("repeats", tuple(items), about, "cross_entropy", n)


def _repeated_otherwise(
    drawn: Repeats,
    corruption: Repeated,
    generator: Generator,
    n_vocab: int,
    periods: tuple[int, int],
) -> Tensor:
    """The counterparts of repeating sequences; see `Repeated`."""
    tokens = drawn.tokens
    if corruption == "other":
        return draw_patterns(len(tokens), generator, tokens.shape[1], n_vocab, periods).tokens
    if corruption == "rolled":
        return torch.cat([tokens[:, :1], tokens[:, 1:].roll(1, 1)], 1)
    at = torch.arange(tokens.shape[1])[None]
    first = (at >= drawn.prefix[:, None]) & (at < (drawn.prefix + drawn.period)[:, None])
    step = torch.randint(1, n_vocab - 1, tokens.shape, generator=generator)
    # Tokens 1 to n_vocab - 1 as residues modulo n_vocab - 1: a step of 1 to n_vocab - 2 always gives another token,
    # and never the starting token 0.
    other = 1 + (tokens - 1 + step) % (n_vocab - 1)
    return torch.where(first, other, tokens)


# --- addition ----------------------------------------------------------------------------------

Added = Literal["first", "second", "both"]
"""Which of the two numbers the counterpart replaces; its sum always differs."""


def addition(n: int, seed: int = 0, *, corruption: Added = "both", p: int = 113) -> Generated:
    """Sums mod p: `a b =`, with the answer read at `=`, which is token p.

    Args:
        n: number of items, each with a different pair of numbers; at most p squared.
        seed: seed of everything that is drawn.
        corruption: which of the numbers the counterpart replaces.
        p: the modulus, at least 3.

    Raises:
        ValueError: if `n` is larger than the number of pairs, or `corruption` is unknown.
    """
    check_choice("corruption", corruption, get_args(Added))
    check_count(n)
    if p < 3 or n > p * p:
        raise ValueError(f"p {p} and n {n}: expected p of at least 3, and n of at most p squared")
    random = Random(seed)
    items = []
    for k, pair in enumerate(shuffled(range(p * p), random)[:n]):
        a, b = divmod(pair, p)
        # The sum changes by `step`, which is not 0 modulo p. Where both numbers move, by `share` and `step - share`,
        # neither of the two is 0: each number really is replaced.
        step = random.randrange(1, p)
        share = random.choice([s for s in range(1, p) if s != step])
        moves = {"first": (step, 0), "second": (0, step), "both": (share, step - share)}[corruption]
        moved = ((a + moves[0]) % p, (b + moves[1]) % p)
        # Addition commutes, and a counterpart may be another item's clean input: a + b, b + a and the counterpart's
        # sum are fillers, so that a split keeps them in one half.
        sums = tuple(f"{min(two)} + {max(two)}" for two in ((a, b), moved))
        items.append(
            Item(
                (a, b, p), (((a + b) % p,),), corrupted=(*moved, p), group=f"pair {k}", fillers=sums,
                template="addition",
            )
        )  # fmt: skip
    about = f"The sum of two numbers mod {p}, at the equals sign."
    return Generated("addition", tuple(items), about, "cross_entropy", n)


# --- brackets ----------------------------------------------------------------------------------

Bracketed = Literal["flip", "order"]
"""How a balanced sequence becomes unbalanced: one bracket is reversed (`flip`), or an opening and a closing bracket are
swapped (`order`), so that counting brackets is not enough to notice it."""


@dataclass(frozen=True)
class BracketTokens:
    """The tokens of the bracket task.

    Attributes:
        start: the token before each sequence.
        opening: an opening bracket.
        closing: a closing bracket.
        end: the token after each sequence, where the answer is read.
        balanced: the answer if every bracket is closed, none before it is opened.
        unbalanced: the answer otherwise.
    """

    start: int = 0
    opening: int = 1
    closing: int = 2
    end: int = 3
    balanced: int = 4
    unbalanced: int = 5


def brackets(
    n: int,
    seed: int = 0,
    *,
    corruption: Bracketed = "flip",
    pairs: int = 8,
    tokens: BracketTokens | None = None,
) -> Generated:
    """Balanced and unbalanced sequences of brackets; the counterpart has the opposite answer.

    Each instance occurs in both forms, in one group. Balanced sequences are drawn uniformly.

    Args:
        n: number of items.
        seed: seed of everything that is drawn.
        corruption: how the balanced and the unbalanced form differ.
        pairs: number of bracket pairs in each sequence.
        tokens: the tokens that brackets and answers are written with.

    Raises:
        ValueError: if `pairs` is below 1, or `corruption` is unknown.
    """
    check_choice("corruption", corruption, get_args(Bracketed))
    if pairs < 1:
        raise ValueError(f"pairs {pairs} must be at least 1")
    written = tokens or BracketTokens()
    return draw(
        "brackets", n, _bracketed(corruption, pairs, written, Random(seed)), Reader(None), LeftOut(),
        about="Whether every bracket is closed, and none before it is opened.", metric="logit_difference",
    )  # fmt: skip


def _bracketed(
    corruption: Bracketed, pairs: int, tokens: BracketTokens, random: Random
) -> Iterator[list[Item]]:
    """Endless template instances, each a balanced sequence and an unbalanced one."""
    k = 0
    while True:
        good = balanced_sequence(pairs, random)
        bad = _flipped(good, random) if corruption == "flip" else _exchanged(good, random)
        texts = [_written(steps, tokens) for steps in (good, bad)]
        answers = ((tokens.balanced,), (tokens.unbalanced,))
        yield [
            Item(
                texts[i], (answers[i],), (answers[1 - i],), texts[1 - i], group=f"brackets {k}",
                template=("balanced", "unbalanced")[i],
            )
            for i in (0, 1)
        ]  # fmt: skip
        k += 1


def balanced_sequence(pairs: int, random: Random) -> list[int]:
    """A balanced sequence of brackets, +1 for an opening and -1 for a closing one, drawn uniformly."""
    # Cycle lemma (Dvoretzky and Motzkin 1947): of the rotations of a cycle of pairs + 1 openings and pairs closings,
    # exactly one has only positive partial sums. It starts just after the last minimum of the partial sums, and what
    # follows its first bracket is balanced. Each balanced sequence comes from equally many shuffles.
    cycle = [1] * (pairs + 1) + [-1] * pairs
    random.shuffle(cycle)
    height, lowest, start = 0, 0, 0
    for i, step in enumerate(cycle):
        height += step
        if height <= lowest:
            lowest, start = height, i + 1
    return (cycle[start:] + cycle[:start])[1:]


def _flipped(steps: list[int], random: Random) -> list[int]:
    """The sequence with one random bracket reversed; it then has unequal numbers of both."""
    at = random.randrange(len(steps))
    return [-step if i == at else step for i, step in enumerate(steps)]


def _exchanged(steps: list[int], random: Random) -> list[int]:
    """The sequence with an opening and a later closing bracket swapped, so that one is closed before it is opened."""
    # A swap with a > b puts the closing bracket first; only swaps that take the height below 0 unbalance the sequence.
    choices = [
        (i, j)
        for i, a in enumerate(steps)
        for j, b in enumerate(steps[i + 1 :], i + 1)
        if a > b and min(_heights([*steps[:i], b, *steps[i + 1 : j], a])) < 0
    ]
    i, j = random.choice(choices)
    made = list(steps)
    made[i], made[j] = steps[j], steps[i]
    return made


def _heights(steps: list[int]) -> list[int]:
    """The number of open brackets after each step."""
    return [sum(steps[: i + 1]) for i in range(len(steps))]


def _written(steps: list[int], tokens: BracketTokens) -> Tokens:
    inside = (tokens.opening if step > 0 else tokens.closing for step in steps)
    return (tokens.start, *inside, tokens.end)


GENERATORS: Mapping[str, Callable[..., Generated]] = {
    "repeats": repeats,
    "addition": addition,
    "brackets": brackets,
}
"""Generators of token items by the behaviour's name; each takes the number of items and a seed."""
