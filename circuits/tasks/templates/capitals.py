"""Factual recall: the capital of a country."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from circuits.tasks.templates.words import CAPITALS

NAME = "capitals"

SENTENCES = (
    "The capital of {country} is",
    "The capital city of {country} is called",
    "As everyone knows, the capital of {country} is",
    "We flew to the capital of {country}, the city of",
)

Place = tuple[str, str]
"""A country and its capital."""


def capital_country(
    n: int, seed: int = 0, tokenizer: Tokenizer = None, *, several: bool = False
) -> Generated:
    """Items whose answer is a country's capital, against the capital of the counterpart's country.

    Each instance asks for both of its countries, in one group.

    Args:
        n: number of items.
        seed: seed of everything that is drawn.
        tokenizer: a model's input or its `encode`. Capitals of several tokens are left out, and so are countries for
            which there is no other one of equally many tokens.
        several: keep capitals of several tokens, for a task that feeds whole answers in.

    Raises:
        ValueError: if too few capitals or countries fit the tokenizer.
    """
    random, reader, left_out = Random(seed), Reader(tokenizer), LeftOut()
    places = CAPITALS
    if not several:
        good = left_out.keep_single_tokens(
            reader, "the city of", (c for _, c in CAPITALS), "capitals"
        )
        places = tuple(place for place in CAPITALS if place[1] in good)
    dealt = [_by_length(reader, left_out, pool) for pool in two_pools(places, random)]
    for pool in dealt:
        left_out.require(NAME, list(pool), 1, "pairs of countries of equally many tokens")
    first, second = (_instances(pool, f"{NAME} {side}", random) for side, pool in enumerate(dealt))
    return draw(
        NAME, n, alternate(first, second), reader, left_out,
        about="The capital of a country.", metric="log_probability_difference" if several else "logit_difference",
        one_token=not several,
    )  # fmt: skip


def _by_length(
    reader: Reader, left_out: LeftOut, places: Sequence[Place]
) -> Mapping[int, list[Place]]:
    """Countries grouped by their number of tokens, in groups of at least two."""
    found = by_length(reader, "The capital of", places, lambda place: place[0])
    alone = [length for length, some in found.items() if len(some) < 2 or not length]
    left_out.add(
        "countries without another one of equally many tokens",
        (country for length in alone for country, _ in found.pop(length)),
    )
    return found


def _instances(pool: Mapping[int, list[Place]], group: str, random: Random) -> Iterator[list[Item]]:
    """Endless template instances of one sentence with two countries; each round uses every country once."""
    sentences = rotate_roles(SENTENCES, 1, random)
    k = 0
    while True:
        pairs = [pair for some in pool.values() for pair in _pairs(some, random)]
        for pair in shuffled(pairs, random):
            (sentence,) = next(sentences)
            yield _both(sentence, pair, f"{group}.{k}")
            k += 1


def _pairs(places: list[Place], random: Random) -> list[tuple[Place, Place]]:
    """Random pairs of places; if their number is odd, one is left over."""
    order = shuffled(places, random)
    return list(zip(order[::2], order[1::2], strict=False))


def _both(sentence: str, pair: tuple[Place, Place], group: str) -> list[Item]:
    texts = [fill(sentence, {"country": country}) for country, _ in pair]
    return [
        Item(
            texts[i][0], (f" {pair[i][1]}",), (f" {pair[1 - i][1]}",), texts[1 - i][0], group=group,
            fillers=(*pair[0], *pair[1]), spans=texts[i][1], template=sentence.partition(" {")[0],
        )
        for i in (0, 1)
    ]  # fmt: skip
