"""What of a Markdown text is more than text and code."""

from __future__ import annotations

import re

LATER = re.compile(r"https?://|www\.|\S@\S|:[\w+-]+:|:material", re.IGNORECASE)
"""What Streamlit makes something of in a text after Markdown is read, whatever was escaped there."""

_CODE = re.compile(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_ESCAPED = re.compile(r"\\([^A-Za-z0-9\s])")


def live(written: str) -> list[str]:
    """The parts of a Markdown text that become something else than what they are."""
    rest = _CODE.sub("", written)
    found = LATER.findall(_ESCAPED.sub(r"\1", rest))
    return found + re.findall(r"!\[|[`*\[\]<>$~]|\b_|_\b|:[a-z-]+\[", _ESCAPED.sub("", rest))
