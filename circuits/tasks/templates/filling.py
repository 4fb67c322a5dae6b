"""Filling templates with words, so that each word has each role as often and a split can part the words.

A behaviour's words are dealt into two pools by the seed, and an item takes all of its words from one pool. Items of
different pools have no word in common: the halves of a split are the pools.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import TypeVar

from circuits.tasks.generated import Generated, accounts, check_count
from circuits.tasks.items import Item
from circuits.tasks.templates.tokenizers import Reader

T = TypeVar("T")

N_POOLS = 2

PATIENCE = 1000
"""So many instances in a row that are left out or were there before end the drawing."""


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """Put words into a template's fields.

    Returns:
        The text, and the stretch of characters that each field has in it.

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


def pools(things: Iterable[T], random: Random) -> tuple[list[T], list[T]]:
    """Deal things into two pools of equal size (the first has one more of an odd number)."""
    order = shuffled(things, random)
    return order[::N_POOLS], order[1::N_POOLS]


def turns(things: Sequence[T], roles: int, random: Random) -> Iterator[tuple[T, ...]]:
    """Different things for a number of roles, over and over, without end.

    In each round of as many draws as there are things, each thing has each role exactly once: the things stand in a
    circle, and roles are places that go round it together.

    Raises:
        ValueError: if there are fewer things than roles.
    """
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
    """Things by the number of tokens that their word has behind a prompt; under 0 those that cannot be encoded."""
    found: dict[int, list[T]] = {}
    for thing in things:
        tokens = () if reader.blind else reader.after(prompt, f" {word(thing)}")
        length = 1 if reader.blind else len(tokens or ())
        found.setdefault(length, []).append(thing)
    return found


def taking_turns(first: Iterator[T], second: Iterator[T]) -> Iterator[T]:
    """One of the first, one of the second, and so on."""
    while True:
        yield next(first)
        yield next(second)


class Account:
    """What is left out while items are drawn: by reason, each word or text once, in order."""

    def __init__(self) -> None:
        self._left: dict[str, dict[str, None]] = {}

    def leave(self, reason: str, words: Iterable[str]) -> None:
        """Note words or texts that are left out."""
        for word in words:
            self._left.setdefault(reason, {})[word] = None

    def usable(
        self, reader: Reader, prompt: str, words: Iterable[str], what: str
    ) -> tuple[str, ...]:
        """The words that are one token behind a prompt; the others are noted as `what` that are not."""
        good, bad = reader.singles(prompt, words)
        self.leave(f"{what} that are not one token", bad)
        return good

    def as_tuples(self) -> dict[str, tuple[str, ...]]:
        """Words and texts by reason."""
        return {reason: tuple(words) for reason, words in self._left.items()}

    def need(self, task: str, things: Sequence[object], least: int, what: str) -> None:
        """Raise ValueError if too few things are left to draw from."""
        if len(things) < least:
            said = "; ".join(["", *accounts(self._left)])
            raise ValueError(
                f"{task}: the tokenizer takes {len(things)} {what}, expected at least {least}{said}"
            )


def draw(
    name: str,
    n: int,
    instances: Iterator[list[Item]],
    reader: Reader,
    account: Account,
    *,
    about: str,
    metric: str,
    one_token: bool = True,
) -> Generated:
    """The first `n` different items of template instances that the tokenizer takes.

    An instance is taken whole or left out whole (the last may be cut off), so that the items of a group balance.

    Args:
        name: of the behaviour.
        n: how many items.
        instances: the items of one template instance after another.
        reader: of the model's tokenizer.
        account: of what was left out so far.
        about: see `Generated`.
        metric: see `Generated`.
        one_token: whether each answer has to be a single token.

    Raises:
        ValueError: if `n` is not positive, or no item can be taken.
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
        reasons = [reader.misfit(item, one_token) for item in made]
        reason = next((r for r in reasons if r is not None), None)
        if reason is not None:
            account.leave(reason, (str(item.clean) for item in made))
            continue
        items += made
        idle = 0
    account.need(name, items, 1, "items")
    return Generated(name, tuple(items[:n]), about, metric, n, account.as_tuples())
