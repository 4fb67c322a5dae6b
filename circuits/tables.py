"""Results as tables: what a result says of itself, for whoever prints it. Nothing here prints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_FIRST = 3
"""How many names of each kind are shown."""


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

    >>> between(0.25, 1 / 3), between(float("nan"), 1.0), between(-0.0, 0.0)
    ('0.25 to 0.3333', 'unknown', '0 to 0')
    """
    # -0.0 + 0.0 is 0.0
    return "unknown" if low != low or high != high else f"{low + 0.0:.4g} to {high + 0.0:.4g}"


def with_interval(value: float, low: float, high: float) -> str:
    """A share with its interval, `undefined` where it divides by nothing.

    >>> with_interval(0.5, 0.25, 0.75), with_interval(float("nan"), float("nan"), float("nan"))
    ('0.500 (0.250 to 0.750)', 'undefined')
    """
    if value != value:
        return "undefined"
    known = "unknown" if low != low or high != high else f"{low:.3f} to {high:.3f}"
    return f"{value:.3f} ({known})"


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


def kinds(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by reason; what differs from name to name (quoted names, numbers) does not tell reasons apart.

    >>> kinds({"a": "image '/a' is cut off (3 bytes)", "b": "image '/b' is cut off (12 bytes)"})
    {'image is cut off (… bytes)': ['a', 'b']}
    """
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kind = re.sub(r"\b[0-9]+\b", "…", re.sub(r" *('[^']*'|\"[^\"]*\")", "", reason))
        found.setdefault(kind, []).append(name)
    return found


def by_reason(reasons: Mapping[str, str]) -> str:
    """How many names there are of each reason, most first, with the first few of them.

    >>> by_reason({"b.txt": "of another kind", "a": "hidden", "c.md": "of another kind"})
    '2 × of another kind (b.txt, c.md), 1 × hidden (a)'
    """
    parts = []
    for kind, names in sorted(kinds(reasons).items(), key=lambda one: -len(one[1])):
        more = ", …" if len(names) > _FIRST else ""
        parts.append(f"{len(names)} × {kind} ({', '.join(names[:_FIRST])}{more})")
    return ", ".join(parts)
