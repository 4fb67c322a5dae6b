"""Recall of a fact: the capital of a country."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from circuits.tasks.generated import Generated
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import (
    Account,
    by_length,
    draw,
    fill,
    pools,
    shuffled,
    taking_turns,
    turns,
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
    """Items whose answer is a country's capital, against that of the country which the counterpart names.

    Both countries of a template instance are asked for, under one group.

    Args:
        n: how many items.
        seed: of all that is drawn.
        tokenizer: a model's input or its `encode`; capitals that it splits are left out, and countries without
            another of as many tokens.
        several: keep capitals of several tokens, for a task that feeds answers in whole.

    Raises:
        ValueError: if the tokenizer takes too few capitals or countries.
    """
    random, reader, account = Random(seed), Reader(tokenizer), Account()
    places = CAPITALS
    if not several:
        good = account.usable(reader, "the city of", (c for _, c in CAPITALS), "capitals")
        places = tuple(place for place in CAPITALS if place[1] in good)
    dealt = [_by_length(reader, account, pool) for pool in pools(places, random)]
    for pool in dealt:
        account.need(NAME, list(pool), 1, "pairs of countries of equally many tokens")
    first, second = (_instances(pool, f"{NAME} {side}", random) for side, pool in enumerate(dealt))
    return draw(
        NAME, n, taking_turns(first, second), reader, account,
        about="The capital of a country.", metric="log_probability_difference" if several else "logit_difference",
        one_token=not several,
    )  # fmt: skip


def _by_length(
    reader: Reader, account: Account, places: Sequence[Place]
) -> Mapping[int, list[Place]]:
    """Countries by their number of tokens, where there are at least two."""
    found = by_length(reader, "The capital of", places, lambda place: place[0])
    alone = [length for length, some in found.items() if len(some) < 2 or not length]
    account.leave(
        "countries without another of as many tokens",
        (country for length in alone for country, _ in found.pop(length)),
    )
    return found


def _instances(pool: Mapping[int, list[Place]], group: str, random: Random) -> Iterator[list[Item]]:
    """Two countries in one sentence, one template instance after another; each country once a round."""
    sentences = turns(SENTENCES, 1, random)
    k = 0
    while True:
        pairs = [pair for some in pool.values() for pair in _pairs(some, random)]
        for pair in shuffled(pairs, random):
            (sentence,) = next(sentences)
            yield _both(sentence, pair, f"{group}.{k}")
            k += 1


def _pairs(places: list[Place], random: Random) -> list[tuple[Place, Place]]:
    """Places two by two, in an order of their own each round; of an odd number one sits out."""
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
