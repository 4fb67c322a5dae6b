"""One line of a task as people write it: an input, its counterpart, and what the model should answer.

Items are plain data, text or tokens, independent of any model. `circuits.tasks.compiling` turns them into a task for a
particular model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from circuits.checks import clipped

Words = str | tuple[int, ...]
"""A text, or its tokens where a model has no tokenizer."""


@dataclass(frozen=True)
class Item:
    """One example of a behaviour, and the example it is compared with.

    Attributes:
        clean: the input on which the model shows the behaviour.
        answers: what the model should say; any of several answers counts as right.
        against: the wrong answers that they are compared with (in a logit difference, for example).
        corrupted: the counterpart, which differs from `clean` in what the behaviour depends on.
        labels: used instead of answers: the one right token at each counted position, in the order of `positions`.
        positions: where the answer is read: `last`, `all`, the name of one of `spans` (its last token is meant), or
            token positions counted from the first token of the input (a beginning-of-text token included); negative
            positions count from the end.
        group: the template instance that the item belongs to; items of one group stay in one half of a split.
        fillers: the names and objects that fill the template; a split gives each filler to one half only.
        spans: named parts of `clean`, each from a start to an exclusive stop: in characters if `clean` is text, in
            tokens if it is tokens.
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
                    f"{name} of {clipped(repr(self.clean))} contain an empty text: expected at least one token in each"
                )
        if isinstance(self.positions, str) and self.positions not in ("last", "all", *self.spans):
            valid = ", ".join(["last", "all", *self.spans])
            raise ValueError(
                f"positions {clipped(self.positions)!r}: expected {valid}, or whole numbers"
            )
        if not self.positions:
            raise ValueError(
                f"positions of {clipped(repr(self.clean))} are empty: expected at least one"
            )
        self._check_labels()

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if self.answers:
            raise ValueError(
                f"labels and answers of {clipped(repr(self.clean))} are both given: expected one of the two"
            )
        n, counted = len(self.labels), 1 if isinstance(self.positions, str) else len(self.positions)
        # How many positions "all" means is known only once the text is in tokens; the task checks it then.
        if self.positions != "all" and n != counted:
            raise ValueError(
                f"labels of {clipped(repr(self.clean))}: there are {n} for {counted} counted positions, expected one "
                "each"
            )
