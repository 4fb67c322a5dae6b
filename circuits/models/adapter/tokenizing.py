"""From text to tokens, for models that come without a tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from circuits.checks import clipped, whole

Encoder = Callable[[str], list[int]]
"""Takes a text and returns its tokens, without the token that starts a sequence."""


def by_numbers(text: str) -> list[int]:
    """Read token numbers separated by white space.

    Raises:
        ValueError: if it is anything else.

    >>> by_numbers("3 1 4")
    [3, 1, 4]
    """
    found: list[int] = []
    for word in text.split():
        token = whole(word)
        if token is None:
            raise ValueError(
                f"{clipped(word)!r} is no token: this model has no vocabulary, expected whole numbers"
            )
        found.append(token)
    return found


def by_words(vocabulary: Sequence[str]) -> Encoder:
    """Make an encoder of a vocabulary's words separated by white space.

    >>> by_words(("one", "two"))("two one")
    [1, 0]
    """
    ids = {word: i for i, word in enumerate(vocabulary)}

    def encode(text: str) -> list[int]:
        unknown = next((word for word in text.split() if word not in ids), None)
        if unknown is not None:
            raise ValueError(f"text has the word {unknown!r}, which is not in the vocabulary")
        return [ids[word] for word in text.split()]

    return encode


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a tokenizer of Hugging Face."""

    def encode(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool
    ) -> list[int]:
        """The tokens of a text."""
        ...


def by_tokenizer(tokenizer: Tokenizer) -> Encoder:
    """Make an encoder of a Hugging Face tokenizer: what is written in a text is text, also `<s>` or `<|endoftext|>`.

    Tokens that no text has are given as numbers.
    """
    return partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)


def by_merges(pieces: Sequence[str], scores: Sequence[float]) -> Encoder:
    """Make a SentencePiece byte-pair encoder: of all adjacent pairs, the one with the best score is merged first.

    As the models of llama2.c were trained: a space is put before the text, and characters outside the
    vocabulary become the bytes `<0xNN>` of their UTF-8.
    """
    # Reversed, so that of a piece that occurs twice the first number counts.
    ids: Mapping[str, int] = {piece: i for i, piece in reversed(list(enumerate(pieces)))}

    def of_character(character: str) -> list[int]:
        if character in ids:
            return [ids[character]]
        return [ids[f"<0x{byte:02X}>"] for byte in character.encode()]

    def encode(text: str) -> list[int]:
        tokens = [token for c in f" {text}" for token in of_character(c)] if text else []
        while True:
            joined = [
                (scores[merged], -i, merged)
                for i, (a, b) in enumerate(itertools.pairwise(tokens))
                if (merged := ids.get(pieces[a] + pieces[b])) is not None
            ]
            if not joined:
                return tokens
            # Places are negated, so that of equal scores the leftmost pair is the largest.
            _, place, merged = max(joined)
            tokens[-place : -place + 2] = [merged]

    return encode
