"""One line of a task: an input, its counterpart, and what the model should answer, as people write it.

Items are plain data: text or tokens, before any model has seen them. `circuits.tasks.task` turns them into what a
particular model takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Words = str | tuple[int, ...]
"""A text, or its tokens where a model has no tokenizer."""


@dataclass(frozen=True)
class Item:
    """One example of a behaviour, and the example it is compared with.

    Attributes:
        clean: the input on which the model shows the behaviour.
        answers: what it should say; several are a set, any of which counts.
        against: what the answers are compared with (for a logit difference, say); a set likewise.
        corrupted: the counterpart, which differs from `clean` in what the behaviour depends on.
        labels: in place of answers: the one token that is right at each counted position, in the order of `positions`.
        positions: where the answer is read: `last`, `all`, the name of one of `spans` (its last token), or positions
            counted in tokens from the first token of the input (a beginning-of-text token included); negative from
            the end.
        group: the template instance that the item belongs to; items of one group stay in one half of a split.
        fillers: names and objects that fill the template; a split gives each filler to one half.
        spans: named stretches of `clean`, from a start to a stop that is left out: of characters where `clean` is
            text, of tokens where it is tokens.
        template: the name of the template, such as `ABBA`.
    """

    clean: Words
    answers: tuple[Words, ...] = ()
    against: tuple[Words, ...] = ()
    corrupted: Words | None = None
    labels: tuple[int, ...] | None = None
    positions: str | tuple[int, ...] = "last"
    group: str = ""
    fillers: tuple[str, ...] = ()
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    template: str = ""

    def __post_init__(self) -> None:
        if not self.clean:
            raise ValueError("clean is empty: expected a text or tokens")
        if self.corrupted is not None and not self.corrupted:
            raise ValueError(
                f"corrupted is empty: expected the counterpart of {clipped(repr(self.clean))}"
            )
        for name, words in (("answers", self.answers), ("against", self.against)):
            if any(not word for word in words):
                raise ValueError(
                    f"{name} of {clipped(repr(self.clean))} hold an empty text: expected at least one token"
                )
        if isinstance(self.positions, str) and self.positions not in ("last", "all", *self.spans):
            valid = ", ".join(["last", "all", *self.spans])
            raise ValueError(
                f"positions {clipped(self.positions)!r}: expected {valid}, or whole numbers"
            )
        if not self.positions:
            raise ValueError(
                f"positions of {clipped(repr(self.clean))} count nothing: expected at least one"
            )
        self._check_labels()

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if self.answers:
            raise ValueError(
                f"labels and answers of {clipped(repr(self.clean))}: expected one of the two"
            )
        n, counted = len(self.labels), 1 if isinstance(self.positions, str) else len(self.positions)
        if self.positions != "all" and n != counted:
            raise ValueError(
                f"labels of {clipped(repr(self.clean))}: {n} for {counted} counted positions, expected one each"
            )


def clipped(text: str, most: int = 60) -> str:
    """A text cut off after a number of characters.

    >>> clipped("a long text", 7)
    'a long…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"
