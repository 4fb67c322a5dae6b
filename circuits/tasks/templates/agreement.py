"""Agreement of a verb with its subject, with another noun between the two (Linzen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal, get_args

from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import (
    Account,
    draw,
    fill,
    pools,
    taking_turns,
    turns,
)
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import BEING, LIKING, OBJECTS, PEOPLE

NAME = "agreement"

Structure = Literal["simple", "prepositional", "relative", "all"]
"""What stands between subject and verb: nothing, a place that the subject is near, or a clause about it."""

SENTENCES = {
    "simple": ("Everyone knows that the {subject}", "It seems that the {subject}", "Today the {subject}"),
    "prepositional": (
        "The {subject} near the {other}", "The {subject} behind the {other}", "The {subject} beside the {other}",
        "The {subject} in front of the {other}", "The {subject} with the {other}",
    ),
    "relative": ("The {subject} that the {person} {verb}", "The {subject} whom the {person} {verb}"),
}  # fmt: skip

Pair = tuple[str, str]
"""A word of one, and the same word of several."""


def subject_verb_agreement(
    n: int, seed: int = 0, tokenizer: Tokenizer = None, *, structure: Structure = "all"
) -> Generated:
    """Items whose answers are the verbs that go with the subject's number, against those of the other number.

    `The author near the tables` goes on with ` is`, ` was` or ` has` rather than ` are`, ` were` or ` have`; the
    counterpart has the subject in the other number and the rest as it is. Each template instance is there with its
    subject in both numbers, under one group; the noun between is in either number equally often.

    Args:
        n: how many items.
        seed: of all that is drawn.
        tokenizer: a model's input or its `encode`; nouns and verbs whose two forms differ in their number of tokens
            are left out.
        structure: what stands between subject and verb.

    Raises:
        ValueError: if the tokenizer takes too few words, or `structure` is none of its values.
    """
    check_choice("structure", structure, get_args(Structure))
    random, reader, account = Random(seed), Reader(tokenizer), Account()
    people, objects = _even(reader, account, PEOPLE), _even(reader, account, OBJECTS)
    verbs = tuple(pair for pair in BEING if all(reader.single("it", verb) for verb in pair))
    account.leave("verbs that are not one token", ("/".join(p) for p in BEING if p not in verbs))
    account.need(NAME, people, 4, "nouns for people")
    account.need(NAME, objects, 2, "nouns for things")
    account.need(NAME, verbs, 1, "pairs of verbs")
    kinds = [structure] if structure != "all" else list(SENTENCES)
    dealt = zip(pools(people, random), pools(objects, random), strict=True)
    first, second = (
        _instances(*pool, verbs, kinds, f"{NAME} {side}", random) for side, pool in enumerate(dealt)
    )
    return draw(
        NAME, n, taking_turns(first, second), reader, account,
        about="A verb in the number of its subject.", metric="probability_difference",
    )  # fmt: skip


def _even(reader: Reader, account: Account, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Nouns whose two forms have equally many tokens."""
    good = tuple(
        pair
        for pair in pairs
        if reader.blind or len({len(reader.after("The", f" {word}") or ()) for word in pair}) == 1
    )
    account.leave(
        "nouns whose two forms differ in their number of tokens",
        ("/".join(pair) for pair in pairs if pair not in good),
    )
    return good


def _instances(
    people: list[Pair],
    objects: list[Pair],
    verbs: tuple[Pair, ...],
    kinds: list[str],
    group: str,
    random: Random,
) -> Iterator[list[Item]]:
    """Both numbers of a subject, one template instance after another."""
    sentences = [(kind, sentence) for kind in kinds for sentence in SENTENCES[kind]]
    drawn = zip(
        turns(people, 2, random), turns(objects, 1, random), turns(LIKING, 1, random), turns(sentences, 1, random),
        turns((0, 1), 1, random), strict=True,
    )  # fmt: skip
    for k, ((subject, person), (thing,), (liking,), ((kind, sentence),), (other,)) in enumerate(
        drawn
    ):
        between = {"other": thing[other], "person": person[other], "verb": liking[other]}
        used = [
            subject,
            *([thing] if "{other}" in sentence else []),
            *([person] if "{person}" in sentence else []),
        ]
        texts = [fill(sentence, {**between, "subject": word}) for word in subject]
        yield [
            Item(
                texts[number][0],
                tuple(pair[number] for pair in verbs),
                tuple(pair[1 - number] for pair in verbs),
                texts[1 - number][0],
                group=f"{group}.{k}",
                fillers=tuple(pair[0] for pair in used),
                spans=texts[number][1],
                template=kind,
            )
            for number in (0, 1)
        ]
