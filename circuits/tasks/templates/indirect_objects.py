"""Indirect objects: of two people who were named, who gets something from the other (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Literal, get_args

from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import LeftOut, alternate, draw, fill, rotate_roles, two_pools
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import NAMES, PLACES, THINGS

NAME = "indirect-object"

Order = Literal["ABBA", "BABA", "both"]
"""Which of the two people is named first: the one who receives (`ABBA`) or the one who gives (`BABA`)."""

Corruption = Literal["abc", "third_name", "swap", "flip", "random_names"]
"""The counterpart of a clean text that names IO and S, and then S again (S2):

`abc`: three other names (p_ABC of Wang et al.), which removes both who they are and which name is repeated.
`third_name`: S2 is a third name, so that no name is repeated.
`swap`: S2 is IO, so that the answer is the other name.
`flip`: IO and S trade places at their first mention, which changes the order but not the answer.
`random_names`: two other names in the same order, which keeps which position is repeated but not who they are.
"""

_ROLES: Mapping[Corruption, int] = {
    "abc": 5,
    "third_name": 3,
    "swap": 2,
    "flip": 2,
    "random_names": 4,
}
"""How many different names an item and its counterpart need."""

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
"""No sentence starts with a name, and all continue with the name of the person who receives the thing."""


def indirect_object(
    n: int,
    seed: int = 0,
    tokenizer: Tokenizer = None,
    *,
    templates: Order = "both",
    corruption: Corruption = "abc",
) -> Generated:
    """Items whose answer is the name of the indirect object (IO), against that of the subject (S); Wang et al. 2022.

    `When Mary and John got to the store, John gave a ring to` continues with ` Mary` rather than ` John`. With `both`
    orders each instance occurs as ABBA and as BABA, in one group. Each name has each role equally often.

    Args:
        n: number of items.
        seed: seed of everything that is drawn.
        tokenizer: a model's input or its `encode`; names of several tokens are left out.
        templates: who is named first.
        corruption: how the counterpart is made.

    Raises:
        ValueError: if too few names fit the tokenizer, or an argument has an unknown value.
    """
    check_choice("templates", templates, get_args(Order))
    check_choice("corruption", corruption, get_args(Corruption))
    random, reader, left_out = Random(seed), Reader(tokenizer), LeftOut()
    names = left_out.keep_single_tokens(reader, "gave it to", NAMES, "names")
    left_out.require(NAME, names, 2 * _ROLES[corruption], "names")
    dealt = zip(*(two_pools(words, random) for words in (names, PLACES, THINGS)), strict=True)
    orders = ("ABBA", "BABA") if templates == "both" else (templates,)
    first, second = (
        _instances(pool, f"{NAME} {side}", orders, corruption, random)
        for side, pool in enumerate(dealt)
    )
    return draw(
        NAME, n, alternate(first, second), reader, left_out,
        about="The name of the person who receives something, rather than of the one who gives it.",
        metric="logit_difference",
    )  # fmt: skip


def _instances(
    words: tuple[list[str], ...],
    group: str,
    orders: tuple[str, ...],
    corruption: Corruption,
    random: Random,
) -> Iterator[list[Item]]:
    """Endless template instances, all words of each from one pool."""
    drawn = zip(
        rotate_roles(words[0], _ROLES[corruption], random), rotate_roles(words[1], 1, random),
        rotate_roles(words[2], 1, random),
        rotate_roles(SENTENCES, 1, random), strict=True,
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
    # The names in the roles of IO, S and S2 in the counterpart, and the order of the first two.
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
    """A sentence that names the receiver and the giver in some order, and then the giver again."""
    first, second = mentions[:2] if order == "ABBA" else (mentions[1], mentions[0])
    words = {"first": first, "second": second, "giver": mentions[2], "place": place, "thing": thing}
    return fill(sentence, words)
