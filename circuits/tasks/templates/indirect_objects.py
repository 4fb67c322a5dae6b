"""Indirect objects: of two people who were named, who gets something from the other (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Literal, get_args

from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import Account, draw, fill, pools, taking_turns, turns
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import NAMES, PLACES, THINGS

NAME = "indirect-object"

Order = Literal["ABBA", "BABA", "both"]
"""Which of the two people is named first: the one who gets something (`ABBA`) or the one who gives (`BABA`)."""

Corruption = Literal["abc", "third_name", "swap", "flip", "random_names"]
"""The counterpart, where the clean text has IO and S, and S again:

`abc`: three other names (p_ABC of Wang et al.): neither who they are nor who was named twice is left.
`third_name`: S is somebody else the second time: nobody was named twice.
`swap`: IO stands in place of S the second time, so that the answer is the other one.
`flip`: IO and S change places the first time: the order changes, the answer does not.
`random_names`: two other names in the same order: who was named twice stays, who they are does not.
"""

_ROLES: Mapping[Corruption, int] = {
    "abc": 5,
    "third_name": 3,
    "swap": 2,
    "flip": 2,
    "random_names": 4,
}
"""How many different names an item has, with its counterpart."""

SENTENCES = (
    "When {first} and {second} got to the {place}, {giver} gave a {thing} to",
    "After {first} and {second} met at the {place}, {giver} handed a {thing} to",
    "While {first} and {second} were waiting at the {place}, {giver} offered a {thing} to",
    "On Monday {first} and {second} walked to the {place}, and {giver} gave a {thing} to",
    "Last night {first} and {second} stayed late at the {place}, and {giver} lent a {thing} to",
    "As soon as {first} and {second} came back from the {place}, {giver} showed a {thing} to",
    "Just before {first} and {second} left the {place}, {giver} passed a {thing} to",
    "Because {first} and {second} had worked all day at the {place}, {giver} brought a {thing} to",
    "Then {first} and {second} had a long talk at the {place}, and {giver} promised a {thing} to",
    "Once {first} and {second} were alone at the {place}, {giver} sold a {thing} to",
    "In the afternoon {first} and {second} sat down at the {place}. Later {giver} mailed a {thing} to",
    "This morning {first} and {second} had an argument at the {place}. In the end {giver} returned a {thing} to",
    "Although {first} and {second} were strangers at the {place}, {giver} sent a {thing} to",
    "One day {first} and {second} found a {thing} at the {place}, and {giver} gave it to",
    "Yesterday {first} and {second} bought a {thing} near the {place}, and {giver} handed it to",
    "Since {first} and {second} were the last ones at the {place}, {giver} threw a {thing} to",
)
"""None starts with a name, and all go on with the name of who gets the thing."""


def indirect_object(
    n: int,
    seed: int = 0,
    tokenizer: Tokenizer = None,
    *,
    templates: Order = "both",
    corruption: Corruption = "abc",
) -> Generated:
    """Items whose answer is the name of the indirect object (IO), against that of the subject (S).

    `When Mary and John got to the store, John gave a ring to` goes on with ` Mary` rather than ` John`. With `both`
    orders each template instance is there as ABBA and as BABA, under one group. Each name has each role equally often.

    Args:
        n: how many items.
        seed: of all that is drawn.
        tokenizer: a model's input or its `encode`; names that it splits are left out.
        templates: who is named first.
        corruption: the counterpart.

    Raises:
        ValueError: if the tokenizer takes too few names, or an argument is none of its values.
    """
    check_choice("templates", templates, get_args(Order))
    check_choice("corruption", corruption, get_args(Corruption))
    random, reader, account = Random(seed), Reader(tokenizer), Account()
    names = account.usable(reader, "gave it to", NAMES, "names")
    account.need(NAME, names, 2 * _ROLES[corruption], "names")
    dealt = zip(*(pools(words, random) for words in (names, PLACES, THINGS)), strict=True)
    orders = ("ABBA", "BABA") if templates == "both" else (templates,)
    first, second = (
        _instances(pool, f"{NAME} {side}", orders, corruption, random)
        for side, pool in enumerate(dealt)
    )
    return draw(
        NAME, n, taking_turns(first, second), reader, account,
        about="The name of who gets something, rather than of who gives it.", metric="logit_difference",
    )  # fmt: skip


def _instances(
    words: tuple[list[str], ...],
    group: str,
    orders: tuple[str, ...],
    corruption: Corruption,
    random: Random,
) -> Iterator[list[Item]]:
    """The items of one template instance after another, all words from one pool."""
    drawn = zip(
        turns(words[0], _ROLES[corruption], random), turns(words[1], 1, random), turns(words[2], 1, random),
        turns(SENTENCES, 1, random), strict=True,
    )  # fmt: skip
    for k, (names, (place,), (thing,), (sentence,)) in enumerate(drawn):
        yield [
            _item(sentence, order, corruption, names, place, thing, f"{group}.{k}")
            for order in orders
        ]


def _item(
    sentence: str,
    order: str,
    corruption: Corruption,
    names: tuple[str, ...],
    place: str,
    thing: str,
    group: str,
) -> Item:
    io, s, *others = names
    flipped = "BABA" if order == "ABBA" else "ABBA"
    mentions, other_order = {
        "abc": (tuple(others), order),
        "third_name": ((io, s, *others), order),
        "swap": ((io, s, io), order),
        "flip": ((io, s, s), flipped),
        "random_names": ((*others, *others[1:]), order),
    }[corruption]
    clean, spans = _text(sentence, order, (io, s, s), place, thing)
    corrupted, _ = _text(sentence, other_order, mentions, place, thing)
    where = ("io", "s1") if order == "ABBA" else ("s1", "io")
    return Item(
        clean, (f" {io}",), (f" {s}",), corrupted, group=group, fillers=(*names, place, thing), template=order,
        spans={
            where[0]: spans["first"], where[1]: spans["second"], "s2": spans["giver"],
            "place": spans["place"], "thing": spans["thing"],
        },
    )  # fmt: skip


def _text(
    sentence: str, order: str, mentions: tuple[str, ...], place: str, thing: str
) -> tuple[str, dict[str, tuple[int, int]]]:
    """A sentence about who gets something and who gives it, who is named again."""
    first, second = mentions[:2] if order == "ABBA" else (mentions[1], mentions[0])
    words = {"first": first, "second": second, "giver": mentions[2], "place": place, "thing": thing}
    return fill(sentence, words)
