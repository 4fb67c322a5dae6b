"""What a generator of items returns: the items, and what it left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from circuits.checks import clipped
from circuits.tasks.items import Item

_SHOWN = 3


@dataclass(frozen=True)
class Generated:
    """Items of one behaviour, drawn by a seed.

    Attributes:
        name: the behaviour's name.
        items: the items that were drawn.
        about: one sentence on what a model does that shows the behaviour.
        metric: the name of the metric that the behaviour is usually measured by.
        asked: how many items were asked for; there are fewer items if no more distinct ones could be drawn.
        left_out: the words and texts that were left out, by reason.
    """

    name: str
    items: tuple[Item, ...]
    about: str
    metric: str
    asked: int = 0
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def left_out_text(self) -> str:
        """What was left out, as one line; empty if nothing was.

        >>> Generated("a", (), "", "", 0, {"names that are not one token": ("Kyle", "Tiffany")}).left_out_text()
        "2 names that are not one token ('Kyle', 'Tiffany')"
        """
        missing = self.asked - len(self.items)
        short = [f"{missing} of {self.asked} items, as no more can be drawn"] if missing > 0 else []
        return "; ".join([*short, *left_out_lines(self.left_out)])


def left_out_lines(left_out: Mapping[str, Iterable[str]]) -> list[str]:
    """What was left out, one line for each reason."""
    counted = {reason: list(words) for reason, words in left_out.items()}
    return [f"{len(words)} {reason} ({shown(words)})" for reason, words in counted.items()]


def shown(words: Iterable[str]) -> str:
    """The first few words of a list, as an error message shows them.

    >>> shown(["a", "b", "c", "d"])
    "'a', 'b', 'c', …"
    """
    words = list(words)
    return ", ".join(
        [*(repr(clipped(w)) for w in words[:_SHOWN]), *(["…"] if len(words) > _SHOWN else [])]
    )


def check_choice(argument: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError unless an argument has one of its known values."""
    if value not in known:
        raise ValueError(f"{argument} {value!r}: expected one of {', '.join(known)}")


def check_count(n: int) -> None:
    """Raise ValueError unless the number of items asked for is at least 1."""
    if n < 1:
        raise ValueError(f"n {n} must be at least 1")
