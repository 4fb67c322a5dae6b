"""Gendered pronouns: the pronoun that agrees with a name (Mathwin et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from circuits.tasks.generated import Generated
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import (
    LeftOut,
    alternate,
    by_length,
    draw,
    fill,
    rotate_roles,
    shuffled,
    two_pools,
)
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import FEMALE_NAMES, MALE_NAMES

NAME = "pronouns"

SENTENCES = (
    "So {name} is a wonderful cook, isn't",
    "It is true that {name} is a good friend, isn't",
    "Nobody saw {name} at work today because",
    "Everybody was glad when {name} said that",
    "They waited for {name} until the evening, but",
    "As far as we know, {name} left early since",
    "In the end {name} went home, where",
    "The neighbors asked {name} for help, and",
    "Once there was a child named {name}. One day",
    "One day {name} was very happy because",
)
"""No sentence starts with a name, and all can continue with `she` or `he`."""

_PRONOUNS = (" she", " he")


def gendered_pronouns(n: int, seed: int = 0, tokenizer: Tokenizer = None) -> Generated:
    """Items whose answer is ` she` or ` he`, against the other one; the counterpart has a name of the other gender.

    Each instance occurs with both names, in one group, so that both answers are equally frequent.

    Args:
        n: number of items.
        seed: seed of everything that is drawn.
        tokenizer: a model's input or its `encode`. A woman's and a man's name of equally many tokens are paired; names
            for which there is none of the other gender are left out.

    Raises:
        ValueError: if too few names fit the tokenizer, or a pronoun is not one token.
    """
    random, reader, left_out = Random(seed), Reader(tokenizer), LeftOut()
    pronouns = left_out.keep_single_tokens(reader, "because", ("she", "he"), "pronouns")
    left_out.require(NAME, pronouns, 2, "pronouns")
    dealt = list(
        zip(*(two_pools(some, random) for some in (FEMALE_NAMES, MALE_NAMES)), strict=True)
    )
    matched = [_matched(reader, left_out, *pool) for pool in dealt]
    for pool in matched:
        left_out.require(
            NAME, pool, 1, "pairs of names of equally many tokens in one half of the names"
        )
    first, second = (
        _instances(pool, f"{NAME} {side}", random) for side, pool in enumerate(matched)
    )
    return draw(
        NAME, n, alternate(first, second), reader, left_out,
        about="The pronoun that agrees with a name.", metric="logit_difference",
    )  # fmt: skip


Names = tuple[list[str], list[str]]
"""Women's and men's names that all have the same number of tokens."""


def _matched(
    reader: Reader, left_out: LeftOut, women: Sequence[str], men: Sequence[str]
) -> list[Names]:
    """Names grouped by their number of tokens, where there are both women's and men's names."""
    both = [by_length(reader, "when", some, str) for some in (women, men)]
    for own, other in (both, reversed(both)):
        left_out.add(
            "names without one of the other gender of equally many tokens",
            (n for length, some in own.items() if not length or length not in other for n in some),
        )
    return [
        (some, both[1][length]) for length, some in both[0].items() if length and length in both[1]
    ]


def _instances(pool: Sequence[Names], group: str, random: Random) -> Iterator[list[Item]]:
    """Endless template instances, each a sentence about a woman and the same sentence about a man."""
    sentences = rotate_roles(SENTENCES, 1, random)
    k = 0
    while True:
        pairs = [
            pair
            for women, men in pool
            for pair in zip(shuffled(women, random), shuffled(men, random), strict=False)
        ]
        for pair in shuffled(pairs, random):
            (sentence,) = next(sentences)
            yield _both(sentence, pair, f"{group}.{k}")
            k += 1


def _both(sentence: str, pair: tuple[str, str], group: str) -> list[Item]:
    texts = [fill(sentence, {"name": name}) for name in pair]
    return [
        Item(
            texts[i][0], (_PRONOUNS[i],), (_PRONOUNS[1 - i],), texts[1 - i][0], group=group, fillers=pair,
            spans=texts[i][1], template=_PRONOUNS[i].strip(),
        )
        for i in (0, 1)
    ]  # fmt: skip
