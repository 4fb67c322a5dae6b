"""Filling templates with words, so that each word has each role equally often and a split can separate the words.

A behaviour's words are dealt into two pools by the seed, and an item takes all of its words from one pool. Items of
different pools have no word in common, so that the pools become the two halves of a split.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import TypeVar

from circuits.tasks.generated import Generated, check_count, left_out_lines
from circuits.tasks.items import Item
from circuits.tasks.templates.tokenizers import Reader

T = TypeVar("T")

N_POOLS = 2

PATIENCE = 1000
"""Drawing stops after this many instances in a row that were left out or had been drawn before."""


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """Put words into a template's fields.

    Returns:
        The text, and the range of characters of each field in it.

    >>> fill("The {a} and {b}", {"a": "cat", "b": "dog"})
    ('The cat and dog', {'a': (4, 7), 'b': (12, 15)})
    """
    text, spans = "", {}
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name:
            spans[name] = (len(text), len(text) + len(words[name]))
            text += words[name]
    return text, spans


def shuffled(things: Iterable[T], random: Random) -> list[T]:
    """The same things in another order."""
    things = list(things)
    random.shuffle(things)
    return things


def two_pools(things: Iterable[T], random: Random) -> tuple[list[T], list[T]]:
    """Deal things into two pools of equal size (the first pool is one larger if their number is odd)."""
    order = shuffled(things, random)
    return order[::N_POOLS], order[1::N_POOLS]


def rotate_roles(things: Sequence[T], roles: int, random: Random) -> Iterator[tuple[T, ...]]:
    """Endless draws of different things for a number of roles.

    In each round of len(things) draws, every thing has every role exactly once.

    Raises:
        ValueError: if there are fewer things than roles.
    """
    # The things stand in a circle in random order, and the roles are fixed places that rotate round it together. So a
    # word is no clue to its role, which a model or a probe could otherwise use instead of the behaviour.
    if len(things) < roles:
        raise ValueError(f"{len(things)} things for {roles} roles: expected at least as many")
    while True:
        order = shuffled(things, random)
        places = random.sample(range(len(things)), roles)
        for start in range(len(order)):
            yield tuple(order[(start + place) % len(order)] for place in places)


def by_length(
    reader: Reader, prompt: str, things: Iterable[T], word: Callable[[T], str]
) -> dict[int, list[T]]:
    """Things grouped by the number of tokens of their word after a prompt; under 0 if the word cannot be encoded."""
    found: dict[int, list[T]] = {}
    for thing in things:
        tokens = () if reader.blind else reader.after(prompt, f" {word(thing)}")
        length = 1 if reader.blind else len(tokens or ())
        found.setdefault(length, []).append(thing)
    return found


def alternate(first: Iterator[T], second: Iterator[T]) -> Iterator[T]:
    """One item of the first, one of the second, and so on: the halves of a split get equally many."""
    while True:
        yield next(first)
        yield next(second)


class LeftOut:
    """A record of what is left out while items are drawn: by reason, each word or text once, in order."""

    def __init__(self) -> None:
        self._left: dict[str, dict[str, None]] = {}

    def add(self, reason: str, words: Iterable[str]) -> None:
        """Record words or texts that are left out."""
        for word in words:
            self._left.setdefault(reason, {})[word] = None

    def keep_single_tokens(
        self, reader: Reader, prompt: str, words: Iterable[str], what: str
    ) -> tuple[str, ...]:
        """The words that are one token after a prompt; the rest is recorded as left out."""
        good, bad = reader.singles(prompt, words)
        self.add(f"{what} that are not one token", bad)
        return good

    def as_tuples(self) -> dict[str, tuple[str, ...]]:
        """Words and texts by reason."""
        return {reason: tuple(words) for reason, words in self._left.items()}

    def require(self, task: str, things: Sequence[object], least: int, what: str) -> None:
        """Raise ValueError if too few things remain to draw from."""
        if len(things) < least:
            said = "; ".join(["", *left_out_lines(self._left)])
            raise ValueError(
                f"task {task}: the tokenizer leaves {len(things)} {what}, expected at least {least}{said}"
            )


def draw(
    name: str,
    n: int,
    instances: Iterator[list[Item]],
    reader: Reader,
    left_out: LeftOut,
    *,
    about: str,
    metric: str,
    one_token: bool = True,
) -> Generated:
    """The first `n` distinct items whose template instances fit the tokenizer.

    An instance is taken or left out as a whole (only the last may be cut off), so that the items of a group balance.

    Args:
        name: the behaviour's name.
        n: number of items.
        instances: the items of one template instance after another.
        reader: how the model's tokenizer reads texts.
        left_out: what was left out so far.
        about: see `Generated`.
        metric: see `Generated`.
        one_token: whether each answer has to be a single token.

    Raises:
        ValueError: if `n` is not positive, or no item fits the tokenizer.
    """
    check_count(n)
    items: list[Item] = []
    seen: set[tuple[object, object]] = set()
    idle = 0
    while len(items) < n and idle < PATIENCE:
        made = next(instances)
        keys = [(item.clean, item.corrupted) for item in made]
        idle += 1
        if any(key in seen for key in keys):
            continue
        seen.update(keys)
        reasons = [reader.reason_unusable(item, one_token) for item in made]
        reason = next((r for r in reasons if r is not None), None)
        if reason is not None:
            left_out.add(reason, (str(item.clean) for item in made))
            continue
        items += made
        idle = 0
    left_out.require(name, items, 1, "items")
    return Generated(name, tuple(items[:n]), about, metric, n, left_out.as_tuples())
