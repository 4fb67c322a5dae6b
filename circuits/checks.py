"""Checks of what people give: numbers in their range, numbers in a text, and texts of any kind in messages.

It is in the lowest layer, so that the library, the command line and the app refuse the same things in the same words.
"""

from __future__ import annotations

import math
import re
import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})([eE][+-]?\d{1,3})?", re.ASCII)


def clipped(text: str, most: int = 60) -> str:
    """A text cut to a number of characters, with an ellipsis where it was cut.

    >>> clipped("a long text", 7)
    'a long…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def seen(text: str, keep: str = "") -> str:
    """A text in which a mark stands for what is not seen: what steers a terminal, and what turns the text around it.

    Args:
        text: what a file or a person says.
        keep: the characters of that kind that are left, such as line ends.

    >>> seen("a\\x1b[2Jb\\n"), seen("a\\n", keep="\\n")
    ('a�[2Jb�', 'a\\n')
    """
    if text.isprintable():
        return text
    return "".join("�" if unicodedata.category(c) in _HIDDEN and c not in keep else c for c in text)


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError if an argument is not a finite number from `low` to `high`."""
    if said := outside(value, low, high):
        raise ValueError(f"{name} {said}")


def outside(value: float, low: float, high: float = math.inf) -> str:
    """What is wrong with a number that is not finite or not from `low` to `high`; empty if nothing is.

    >>> outside(0, 1), outside(float("nan"), 0, 0.5), outside(float("inf"), 0), outside(2, 1)
    ('0 must be 1 or more', 'nan must be 0 to 0.5', 'inf must be finite, 0 or more', '')
    """
    if low <= value <= high and abs(value) != math.inf:
        return ""
    finite = "finite, " if high == math.inf == value else ""
    top = "or more" if high == math.inf else f"to {_said(high)}"
    return f"{clipped(str(value))} must be {finite}{_said(low)} {top}"


def _said(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def whole(text: str) -> int | None:
    """The whole number that a text is in decimal digits; None if it is anything else.

    Python's `int` takes more: underscores, the digits of every script, plus signs and white space.

    >>> whole("-10"), whole("1_0"), whole("+1"), whole("٣"), whole(" 1")
    (-10, None, None, None, None)
    """
    return int(text) if _WHOLE.fullmatch(text) else None


def number(text: str) -> float | None:
    """The finite number that a text is in decimal digits; None if it is anything else.

    >>> number("-1.5e3"), number("+2"), number("1_0"), number("nan"), number("1e999"), number("٣")
    (-1500.0, 2.0, None, None, None, None)
    """
    found = float(text) if _NUMBER.fullmatch(text) else math.nan
    return found if math.isfinite(found) else None
