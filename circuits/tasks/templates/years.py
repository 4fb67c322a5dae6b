"""Greater-than: a year that is later than another (Hanna et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.items import Item, Words
from circuits.tasks.templates.filling import LeftOut, alternate, draw, fill, rotate_roles, two_pools
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import PERIODS

NAME = "greater-than"

Digits = Literal["auto", "two", "one"]
"""What the answer is: the last two digits of a year as one token, or its next digit where digits are tokens; `auto`
takes two digits if the tokenizer has such tokens."""

SENTENCE = "The {noun} lasted from the year {century}{year} to the year {again}"
CENTURIES = tuple(str(c) for c in range(11, 18))
YEARS = tuple(f"{y:02d}" for y in range(2, 99))
"""The years in the prompt: for each of them some years are below and some above."""

LOWEST = "01"
"""The counterpart's year: nearly all years are above it, so that it does not constrain the answer (Hanna et al.
2023)."""

_BEFORE = "lasted from the year "


def greater_than(
    n: int, seed: int = 0, tokenizer: Tokenizer = None, *, digits: Digits = "auto"
) -> Generated:
    """Items whose answers are all later years, against all earlier or equal ones.

    `The war lasted from the year 1732 to the year 17` continues with 33 to 99 rather than with 00 to 32; the
    counterpart starts in 1701. Where digits are tokens, the answer is the next digit: 4 to 9 rather than 0 to 2, the
    equal digit being in neither set. Where the tokenizer would join an answer to the century (GPT-2 writes ` 1700` as
    one token), all answers of that century are given as tokens.

    Args:
        n: number of items.
        seed: seed of everything that is drawn.
        tokenizer: a model's input or its `encode`; years that are not a century and one more token are left out.
        digits: whether the answer has two digits or one.

    Raises:
        ValueError: if the tokenizer splits years in another way, or `digits` is unknown.
    """
    check_choice("digits", digits, get_args(Digits))
    random, reader, left_out = Random(seed), Reader(tokenizer), LeftOut()
    two = None if digits == "one" else _two_digits(reader, left_out)
    one = None if two or digits == "two" else _one_digit(reader)
    centuries = two or one
    if not centuries:
        wanted = {"two": "two digits", "one": "one digit", "auto": "one or two digits"}[digits]
        raise ValueError(
            f"task {NAME}: the tokenizer has no single token for {wanted} of a year after its century, expected one "
            f"for each after '{_BEFORE}17'"
        )
    first, second = (
        _instances(pool, centuries, f"{NAME} {side}", not two, random)
        for side, pool in enumerate(two_pools(PERIODS, random))
    )
    return draw(
        NAME, n, alternate(first, second), reader, left_out,
        about="A year later than the one in the prompt.", metric="probability_difference",
    )  # fmt: skip


@dataclass(frozen=True)
class _Century:
    """A century whose years fit the tokenizer.

    Attributes:
        name: its two digits.
        years: the years that the prompt can name.
        answers: how each year or digit is written as an answer.
    """

    name: str
    years: tuple[str, ...]
    answers: Mapping[str, Words]


def _two_digits(reader: Reader, left_out: LeftOut) -> tuple[_Century, ...]:
    """Centuries after which years are single tokens; empty unless all of 00 to 99 can be answers."""
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
        left_out.add(
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
    """The token of each year after some century.

    A year that is joined to every century (as in ` 1700`) gets the token that it has alone, provided that all other
    years have the same token alone as after a century.
    """
    known: dict[str, Words] = {}
    for found in behind.values():
        known |= {y: tokens for y, tokens in found.items() if tokens and len(tokens) == 1}
    alone = {y: reader.tokens(y) for found in behind.values() for y in found}
    if known and all(alone[y] == tokens for y, tokens in known.items()):
        known |= {y: t for y, t in alone.items() if y not in known and t and len(t) == 1}
    return dict(sorted(known.items()))


def _one_digit(reader: Reader) -> tuple[_Century, ...]:
    """Centuries after which each digit is a token of its own, and so is the digit after that."""
    single, years = "0123456789", tuple(y for y in YEARS if "1" <= y[0] <= "8")
    centuries = []
    for c in CENTURIES:
        if reader.blind or all(
            reader.single(_BEFORE + c, d) and reader.single(_BEFORE + c + d, "1") for d in single
        ):
            centuries.append(_Century(c, years, {d: d for d in single}))
    return tuple(centuries)


def _two(year: str, answers: Mapping[str, Words]) -> tuple[tuple[Words, ...], ...]:
    """The later years, and the rest."""
    above = tuple(word for y, word in answers.items() if y > year)
    return above, tuple(word for y, word in answers.items() if y <= year)


def _one(year: str, answers: Mapping[str, Words]) -> tuple[tuple[Words, ...], ...]:
    """The digits above the year's decade, and those below; with an equal digit the year may be later or earlier."""
    above = tuple(word for d, word in answers.items() if d > year[0])
    return above, tuple(word for d, word in answers.items() if d < year[0])


def _instances(
    nouns: list[str], centuries: Sequence[_Century], group: str, digit: bool, random: Random
) -> Iterator[list[Item]]:
    """Endless template instances of one item each."""
    years = {c.name: rotate_roles(c.years, 1, random) for c in centuries}
    drawn = zip(rotate_roles(nouns, 1, random), rotate_roles(centuries, 1, random), strict=True)
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
