"""Texts, or sequences of tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class TextSource:
    """A sequence of texts or token sequences.

    Attributes:
        spec: its name.
        names: the name of each text.
        hash: the SHA-256 of its content, in hexadecimal.
        texts: the texts, or their tokens; a text for a model without a tokenizer holds words or numbers separated by
            spaces.
    """

    spec: str
    names: tuple[str, ...]
    hash: str
    texts: tuple[str | tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.names)
