"""Uploads: images that come from a browser, decoded from bytes that nobody has looked at.

Nothing is written to disk, and a file's name is text to show, never a path.
"""

from __future__ import annotations

import re
import unicodedata
from io import BytesIO

from PIL import Image

from circuits.stimuli.images import decode

MAX_BYTES = 20 * 2**20
"""The largest file that is taken."""

MAX_PIXELS = 50_000_000
"""The largest image; on its way to 8-bit RGB it takes up to 1 GB."""

FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF")
"""What is decoded, whatever the file's name says."""

_LONGEST = 60  # characters of a name that messages show
_ENDING = 15  # of them from its end, where the suffix is


def decode_image(data: bytes, name: str = "") -> Image.Image:
    """Decode an uploaded image: turned upright, 8-bit RGB, transparency on white; of several, the first.

    Args:
        data: the file's bytes; what format it has is decided by them.
        name: what the browser calls it, for error messages alone.

    Raises:
        ValueError: if it is empty or larger than `MAX_BYTES`, is damaged, cut off or in none of `FORMATS`,
            or has more than `MAX_PIXELS` pixels.
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
    """A file's name as it can be shown anywhere: its last part, at most 60 harmless characters.

    Letters and digits of all scripts, spaces and `. - _ ( ) + , @ = …` are kept, control characters removed,
    others (also those that mean something in HTML or Markdown) become `_`. A long name loses its middle.
    What is shown is its own short form: `shown_name(shown_name(name)) == shown_name(name)`.

    >>> shown_name("../../etc/passwd")
    'passwd'
    >>> shown_name("<b>cat</b>.png")
    'b_.png'
    """
    last = re.split(r"[/\\]", name)[-1]
    printable = "".join(c for c in last if unicodedata.category(c)[0] != "C")
    composed = unicodedata.normalize("NFC", printable)  # after that: control characters part marks
    kept = "".join(map(_harmless, composed)).strip()
    if len(kept) > _LONGEST:
        kept = f"{kept[: _LONGEST - _ENDING - 1]}…{kept[-_ENDING:]}"
    return kept or "without a name"


def _harmless(character: str) -> str:
    kept = character.isalnum() or character in " .-_()+,@=…"
    return character if kept or unicodedata.category(character)[0] == "M" else "_"
