"""How tokens are read by people: characters instead of the bytes that some vocabularies are written in.

Vocabularies in the manner of GPT-2 (byte-level BPE; Radford et al. 2019) write each byte of UTF-8 as one printable
character, so that `’` looks like `âĢĻ`. A token may hold a part of a character only.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import lru_cache

PART = "▯"
"""Stands for a token that holds a part of a character, where a later token completes it."""

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_MOST = 0.75
"""The share of the stand-ins for bytes that a vocabulary in bytes has at least; some bytes occur in no text."""


@lru_cache(maxsize=1)
def _bytes() -> Mapping[str, int]:
    """The character that stands for each byte, after GPT-2; blanks and line ends may be written as themselves.

    Bytes that are printable in Latin-1 stand for themselves, all others are the characters from U+0100 on.
    """
    others = [b for b in range(256) if b not in _PRINTABLE]
    found = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(others)}
    return found | {" ": 0x20, "\n": 0x0A}


@lru_cache(maxsize=8)
def in_bytes(vocabulary: tuple[str, ...]) -> bool:
    """Whether a vocabulary is written in bytes: it has a token for nearly every byte, and no other characters.

    >>> in_bytes(("a", "b", "é"))
    False
    """
    single = {word for word in vocabulary if len(word) == 1}
    known = _bytes()
    return single <= known.keys() and len(single) >= _MOST * 256


def word_of(vocabulary: tuple[str, ...], token: int) -> str:
    """A token by itself; bytes that are no whole characters as `⟨E2⟩`. Without a vocabulary its number."""
    if not vocabulary:
        return str(token)
    raw = _raw(vocabulary[token]) if in_bytes(vocabulary) else None
    return vocabulary[token] if raw is None else _decoded(raw)


def words_of(vocabulary: tuple[str, ...], tokens: Sequence[int]) -> list[str]:
    """The tokens of a text: a character that is spread over several is at the last of them, `▯` at the others."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    if not in_bytes(vocabulary):
        return [vocabulary[t] if vocabulary else str(t) for t in tokens]
    found: list[str] = []
    for token in tokens:
        raw = _raw(vocabulary[token])
        if raw is None:
            decoder.reset()
            found.append(vocabulary[token])
        else:
            found.append(decoder.decode(raw) or PART)
    return found


def marked(word: str) -> str:
    """A token with its blanks, tabs and line ends marked, as a table or an axis shows it.

    >>> marked(" a\\n"), marked("")
    ('·a↵', '∅')
    """
    return word.translate({ord(" "): "·", ord("\n"): "↵", ord("\t"): "⇥", ord("\r"): "␍"}) or "∅"


def _raw(word: str) -> bytes | None:
    """The bytes that a word stands for; None if it is not written in bytes, as `<|im_start|>` need not be."""
    known = _bytes()
    return bytes(known[c] for c in word) if all(c in known for c in word) else None


def _decoded(raw: bytes) -> str:
    """Characters, and where there are none the bytes."""
    text = raw.decode(errors="surrogateescape")
    return "".join(f"⟨{ord(c) - 0xDC00:02X}⟩" if "\udc80" <= c <= "\udcff" else c for c in text)
