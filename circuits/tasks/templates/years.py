"""Greater-than: a year that comes after another (Hanna et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.items import Item, Words
from circuits.tasks.templates.filling import Account, draw, fill, pools, taking_turns, turns
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import PERIODS

NAME = "greater-than"

Digits = Literal["auto", "two", "one"]
"""What the answer is: the two digits of a year in one token, or its next digit where digits are tokens; `auto` takes
two where the tokenizer has them."""

SENTENCE = "The {noun} lasted from the year {century}{year} to the year {again}"
CENTURIES = tuple(str(c) for c in range(11, 18))
YEARS = tuple(f"{y:02d}" for y in range(2, 99))
"""So that some year is below and some above."""

LOWEST = "01"
"""The counterpart's year: nearly every year is above it."""

_BEFORE = "lasted from the year "


def greater_than(
    n: int, seed: int = 0, tokenizer: Tokenizer = None, *, digits: Digits = "auto"
) -> Generated:
    """Items whose answers are all years above one, against all others.

    `The war lasted from the year 1732 to the year 17` goes on with 33 to 99 rather than with 00 to 32; the counterpart
    starts in 1701. Where digits are tokens, the next digit is asked for: 4 to 9 rather than 0 to 2; the equal digit is
    in neither set. Where the tokenizer would join an answer to the century (GPT-2 writes ` 1700` as one token), all
    answers of that century are given as tokens.

    Args:
        n: how many items.
        seed: of all that is drawn.
        tokenizer: a model's input or its `encode`; years that are not a century and one token are left out.
        digits: what is asked for.

    Raises:
        ValueError: if the tokenizer writes years in another way, or `digits` is none of its values.
    """
    check_choice("digits", digits, get_args(Digits))
    random, reader, account = Random(seed), Reader(tokenizer), Account()
    two = None if digits == "one" else _two_digits(reader, account)
    one = None if two or digits == "two" else _one_digit(reader)
    centuries = two or one
    if not centuries:
        wanted = {"two": "two digits", "one": "one digit", "auto": "one or two digits"}[digits]
        raise ValueError(
            f"{NAME}: the tokenizer has no token for {wanted} of a year behind its century "
            f"(expected {_BEFORE}17 to be followed by them)"
        )
    first, second = (
        _instances(pool, centuries, f"{NAME} {side}", not two, random)
        for side, pool in enumerate(pools(PERIODS, random))
    )
    return draw(
        NAME, n, taking_turns(first, second), reader, account,
        about="A year above the one that was named.", metric="probability_difference",
    )  # fmt: skip


@dataclass(frozen=True)
class _Century:
    """A century that the tokenizer takes.

    Attributes:
        name: its two digits.
        years: those that can be named.
        answers: of each year or digit, how it is written as an answer.
    """

    name: str
    years: tuple[str, ...]
    answers: Mapping[str, Words]


def _two_digits(reader: Reader, account: Account) -> tuple[_Century, ...]:
    """Centuries with years of a token of their own, for years that can all be answers."""
    every = [f"{y:02d}" for y in range(100)]
    if reader.blind:
        return tuple(_Century(c, YEARS, {y: y for y in every}) for c in CENTURIES)
    behind = {c: {y: reader.after(_BEFORE + c, y) for y in every} for c in CENTURIES}
    known = _as_tokens(reader, behind)
    if len(known) < len(every):
        return ()
    centuries = []
    for c, found in behind.items():
        good = tuple(y for y in YEARS if found[y] == known[y])
        account.leave(
            "years that are not a century and one token",
            [c + y for y in YEARS if y not in good],
        )
        joined = any(found[y] != known[y] for y in every)
        if good and found[LOWEST] == known[LOWEST]:
            centuries.append(_Century(c, good, known if joined else {y: y for y in every}))
    return tuple(centuries)


def _as_tokens(
    reader: Reader, behind: Mapping[str, Mapping[str, tuple[int, ...] | None]]
) -> Mapping[str, Words]:
    """The token of each year behind some century.

    One that is joined to every century (as ` 1700` is) has the token that it has alone, if that is so of the others.
    """
    known: dict[str, Words] = {}
    for found in behind.values():
        known |= {y: tokens for y, tokens in found.items() if tokens and len(tokens) == 1}
    alone = {y: reader.tokens(y) for found in behind.values() for y in found}
    if known and all(alone[y] == tokens for y, tokens in known.items()):
        known |= {y: t for y, t in alone.items() if y not in known and t and len(t) == 1}
    return dict(sorted(known.items()))


def _one_digit(reader: Reader) -> tuple[_Century, ...]:
    """Centuries behind which each digit is a token, and so is the one behind that."""
    single, years = "0123456789", tuple(y for y in YEARS if "1" <= y[0] <= "8")
    centuries = []
    for c in CENTURIES:
        if reader.blind or all(
            reader.single(_BEFORE + c, d) and reader.single(_BEFORE + c + d, "1") for d in single
        ):
            centuries.append(_Century(c, years, {d: d for d in single}))
    return tuple(centuries)


def _two(year: str, answers: Mapping[str, Words]) -> tuple[tuple[Words, ...], ...]:
    """Years above, and the others."""
    above = tuple(word for y, word in answers.items() if y > year)
    return above, tuple(word for y, word in answers.items() if y <= year)


def _one(year: str, answers: Mapping[str, Words]) -> tuple[tuple[Words, ...], ...]:
    """Digits above the decade's and below it."""
    above = tuple(word for d, word in answers.items() if d > year[0])
    return above, tuple(word for d, word in answers.items() if d < year[0])


def _instances(
    nouns: list[str], centuries: Sequence[_Century], group: str, digit: bool, random: Random
) -> Iterator[list[Item]]:
    """One item after another, each a template instance of its own."""
    years = {c.name: turns(c.years, 1, random) for c in centuries}
    drawn = zip(turns(nouns, 1, random), turns(centuries, 1, random), strict=True)
    for k, ((noun,), (century,)) in enumerate(drawn):
        (year,) = next(years[century.name])
        words = {"noun": noun, "century": century.name, "again": century.name}
        clean, spans = fill(SENTENCE, {**words, "year": year})
        corrupted, _ = fill(SENTENCE, {**words, "year": LOWEST})
        answers, against = (_one if digit else _two)(year, century.answers)
        yield [
            Item(
                clean, answers, against, corrupted, group=f"{group}.{k}", fillers=(noun,),
                spans={name: spans[name] for name in ("noun", "century", "year")},
                template="next digit" if digit else "two digits",
            )
        ]  # fmt: skip
