"""Writing figures as PNG and SVG."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Literal

from circuits.figures.charts import Figure
from circuits.files import replacing

Format = Literal["png", "svg"]

_PRINT = {
    "background": "white",
    "padding": 8,
    "axis": {"labelFontSize": 9, "titleFontSize": 10, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 9, "titleFontSize": 9, "titleFontWeight": "normal"},
    "view": {"continuousWidth": 420, "continuousHeight": 220},
}
"""How figures look on paper; the app has its own theme."""

_DOTS = 150  # an inch

_TAG = re.compile(r"<[^>]*>")
_REFERENCE = re.compile(r"""( id="| [a-z-]+="url\(#)(clip|gradient_)([0-9]+)""")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the path's ending.

    Raises:
        ValueError: if it ends in something else.
    """
    path = Path(path)
    check_figure_path(path)
    kind: Any = path.suffix[1:].lower()
    with replacing(path) as temporary:
        temporary.write_bytes(figure_bytes(figure, kind))


def figure_bytes(figure: Figure, kind: Format) -> bytes:
    """What a file of the figure holds."""
    printed = figure.configure(**_PRINT)  # a copy
    if kind == "png":
        held = io.BytesIO()
        printed.save(held, format="png", ppi=_DOTS)
        return held.getvalue()
    text = io.StringIO()
    printed.save(text, format="svg")
    return _renumbered(text.getvalue()).encode()


def _renumbered(svg: str) -> str:
    """An SVG whose clips and gradients are counted from 0: Vega goes on counting where its last figure ended.

    >>> _renumbered('<g fill="url(#gradient_7)"><a id="gradient_7"/><a id="clip3"/></g>url(#clip3)')
    '<g fill="url(#gradient_0)"><a id="gradient_0"/><a id="clip0"/></g>url(#clip3)'
    """
    numbers: dict[str, dict[str, int]] = {"clip": {}, "gradient_": {}}

    def renumbered(found: re.Match[str]) -> str:
        before, kind, number = found.groups()
        known = numbers[kind]
        return f"{before}{kind}{known.setdefault(number, len(known))}"

    # In tags only, since between them is text, where somebody's names stand.
    return _TAG.sub(lambda tag: _REFERENCE.sub(renumbered, tag[0]), svg)


def check_figure_path(path: Path) -> None:
    """Raise ValueError if a figure cannot be written under this name."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"figure {str(path)!r} must end in .png or .svg")
    if path.is_dir():
        raise ValueError(f"figure {str(path)!r} is a folder: expected a file")
