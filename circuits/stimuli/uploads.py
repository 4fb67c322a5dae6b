"""Uploads: images from a browser, decoded from bytes that are not trusted.

Nothing is written to disk, and a file's name is text to display, never a path.
"""

from __future__ import annotations

import re
import unicodedata
from io import BytesIO

from PIL import Image

from circuits.stimuli.images import decode

MAX_BYTES = 20 * 2**20
"""The largest file that is accepted."""

MAX_PIXELS = 50_000_000
"""The largest image that is accepted; its conversion to 8-bit RGB takes up to 1 GB."""

FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF")
"""The formats that are decoded, whatever the file's name says."""

_LONGEST = 60
"""Characters of a name that messages show."""

_ENDING = 15
"""How many of them are from the end of a longer name, where the suffix is."""


def decode_image(data: bytes, name: str = "") -> Image.Image:
    """Decode an uploaded image: turned upright, 8-bit RGB, transparency on white; of several frames, the first.

    Args:
        data: the file's bytes, which decide its format.
        name: the browser's name for it, for error messages only.

    Raises:
        ValueError: if it is empty or larger than `MAX_BYTES`, is damaged, truncated or in none of `FORMATS`, or has
            more than `MAX_PIXELS` pixels.
    """
    shown = shown_name(name)
    if not data:
        raise ValueError(f"image {shown!r} is empty: expected a file in {', '.join(FORMATS)}")
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"image {shown!r} has {len(data) / 2**20:.1f} MB: expected at most {MAX_BYTES / 2**20:g} MB"
        )
    return decode(BytesIO(data), shown, MAX_PIXELS, FORMATS)


def shown_name(name: str) -> str:
    """A file's name in a form that is safe to display: its last part, at most 60 harmless characters.

    Letters and digits of all scripts, spaces and `. - _ ( ) + , @ = …` are kept, control characters are removed, and
    all others, such as those with a meaning in HTML or Markdown, become `_`. A long name loses its middle. Applying
    it twice is the same as once.

    >>> shown_name("../../etc/passwd")
    'passwd'
    >>> shown_name("<b>cat</b>.png")
    'b_.png'
    """
    last = re.split(r"[/\\]", name)[-1]
    printable = "".join(c for c in last if unicodedata.category(c)[0] != "C")
    # Composed only now: a control character between a letter and its accent would have kept them apart.
    composed = unicodedata.normalize("NFC", printable)
    kept = "".join(map(_harmless, composed)).strip()
    if len(kept) > _LONGEST:
        kept = f"{kept[: _LONGEST - _ENDING - 1]}…{kept[-_ENDING:]}"
    return kept or "without a name"


def _harmless(character: str) -> str:
    kept = character.isalnum() or character in " .-_()+,@=…"
    return character if kept or unicodedata.category(character)[0] == "M" else "_"
