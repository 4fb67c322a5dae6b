"""Subject-verb agreement in number, with another noun between subject and verb (Linzen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal, get_args

from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import (
    LeftOut,
    alternate,
    draw,
    fill,
    rotate_roles,
    two_pools,
)
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import BEING, LIKING, OBJECTS, PEOPLE

NAME = "agreement"

Structure = Literal["simple", "prepositional", "relative", "all"]
"""What stands between subject and verb: nothing, a prepositional phrase, or a relative clause."""

SENTENCES = {
    "simple": ("Everyone knows that the {subject}", "It seems that the {subject}", "Today the {subject}"),
    "prepositional": (
        "The {subject} near the {other}", "The {subject} behind the {other}", "The {subject} beside the {other}",
        "The {subject} in front of the {other}", "The {subject} with the {other}",
    ),
    "relative": ("The {subject} that the {person} {verb}", "The {subject} whom the {person} {verb}"),
}  # fmt: skip

Pair = tuple[str, str]
"""A word's singular and plural form."""


def subject_verb_agreement(
    n: int, seed: int = 0, tokenizer: Tokenizer = None, *, structure: Structure = "all"
) -> Generated:
    """Items whose answers are verbs that agree with the subject, against those of the other number.

    `The author near the tables` continues with ` is`, ` was` or ` has` rather than ` are`, ` were` or ` have`. The
    counterpart has the subject in the other number and is otherwise the same. Each instance occurs with its subject in
    both numbers, in one group; the noun in between is singular and plural equally often.

    Args:
        n: number of items.
        seed: seed of everything that is drawn.
        tokenizer: a model's input or its `encode`. Nouns whose two forms differ in their number of tokens, and verbs
            that are not one token, are left out.
        structure: what stands between subject and verb.

    Raises:
        ValueError: if too few words fit the tokenizer, or `structure` is unknown.
    """
    check_choice("structure", structure, get_args(Structure))
    random, reader, left_out = Random(seed), Reader(tokenizer), LeftOut()
    people, objects = (
        _evenly_tokenized(reader, left_out, PEOPLE),
        _evenly_tokenized(reader, left_out, OBJECTS),
    )
    verbs = tuple(pair for pair in BEING if all(reader.single("it", verb) for verb in pair))
    left_out.add("verbs that are not one token", ("/".join(p) for p in BEING if p not in verbs))
    left_out.require(NAME, people, 4, "nouns for people")
    left_out.require(NAME, objects, 2, "nouns for things")
    left_out.require(NAME, verbs, 1, "pairs of verbs")
    kinds = [structure] if structure != "all" else list(SENTENCES)
    dealt = zip(two_pools(people, random), two_pools(objects, random), strict=True)
    first, second = (
        _instances(*pool, verbs, kinds, f"{NAME} {side}", random) for side, pool in enumerate(dealt)
    )
    return draw(
        NAME, n, alternate(first, second), reader, left_out,
        about="A verb that agrees with its subject in number.", metric="probability_difference",
    )  # fmt: skip


def _evenly_tokenized(reader: Reader, left_out: LeftOut, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Nouns whose two forms have equally many tokens, so that a text and its counterpart have equal lengths."""
    good = tuple(
        pair
        for pair in pairs
        if reader.blind or len({len(reader.after("The", f" {word}") or ()) for word in pair}) == 1
    )
    left_out.add(
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
    """Endless template instances, each with its subject in both numbers."""
    sentences = [(kind, sentence) for kind in kinds for sentence in SENTENCES[kind]]
    drawn = zip(
        rotate_roles(people, 2, random), rotate_roles(objects, 1, random), rotate_roles(LIKING, 1, random),
        rotate_roles(sentences, 1, random),
        rotate_roles((0, 1), 1, random), strict=True,
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
