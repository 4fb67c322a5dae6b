"""Results as tables: what a result says of itself, for whoever prints it. Nothing here prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows under column heads.

    Attributes:
        columns: the heads.
        rows: as many values each as there are columns; numbers stay numbers.
        title: what stands above; empty for none.
        note: what stands below, e.g. what a column means; empty for none.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    note: str = ""


def between(low: float, high: float) -> str:
    """An interval in words, `unknown` where an end is NaN.

    >>> between(0.25, 1 / 3), between(float("nan"), 1.0)
    ('0.25 to 0.3333', 'unknown')
    """
    return "unknown" if low != low or high != high else f"{low:.4g} to {high:.4g}"


def spread(values: Sequence[float]) -> str:
    """The smallest and the largest value of a null, `none` if there is none.

    >>> spread((0.5, 0.1, 0.2)), spread(())
    ('0.1 to 0.5', 'none')
    """
    return between(min(values), max(values)) if values else "none"


def visible(token: str) -> str:
    """A token on one line, with its line ends marked.

    >>> visible(" a\\n")
    ' a↵'
    """
    return token.replace("\n", "↵")
