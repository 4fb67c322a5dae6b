"""Showing figures: the one place where a figure of the library becomes a part of a page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from PIL import Image

from circuits.figures import Figure

_SMALL = 128 * 128
"""Pictures of fewer pixels are kept to the bit."""

_STYLE = "<style>.stVegaLiteChart {max-width: 100%; overflow-x: auto}</style>"
"""A figure that is wider than the page can be scrolled, and the page stays as wide as it is."""


def spec_of(figure: Figure) -> dict[str, Any]:
    """A figure as Vega-Lite has it, to be kept where building it takes long."""
    # what the library builds is checked by its tests; checking it again takes longer than building it
    return figure.to_dict(validate=False)


def show(figure: Figure | Mapping[str, Any], key: str) -> None:
    """Show a figure in the colours and fonts of the person's theme, as wide as there is room unless it has a width.

    Args:
        figure: what to show, or its `spec_of`.
        key: names the container around it, also for CSS (`st-key-…`).
    """
    spec = _themed(figure)
    fixed = _has_width(spec)
    if fixed:
        spec["autosize"] = {
            "type": "pad"
        }  # widths are those of the panels, without axes and legends
    with st.container(key=key):
        st.html(_STYLE)
        st.vega_lite_chart(spec, width="content" if fixed else "stretch", key=f"{key}-chart")


def picked_cell(figure: Figure, key: str) -> tuple[int, int] | None:
    """Show a matrix of cells (`figures.charts.cells`), and return the row and column that the person has clicked."""
    spec = _themed(figure)
    spec["params"] = [{"name": "cell", "select": {"type": "point", "fields": ["i", "j"]}}]
    spec["autosize"] = {"type": "pad"}
    with st.container(key=key):
        st.html(_STYLE)
        event = st.vega_lite_chart(
            spec, width="content", key=f"{key}-chart", on_select="rerun", selection_mode="cell"
        )
    found = event["selection"].get("cell") or []
    return (int(found[0]["i"]), int(found[0]["j"])) if found else None


def show_picture(
    image: Image.Image | np.ndarray | Path | str,
    about: str,
    width: int | None = None,
    place: Any = st,
) -> None:
    """Show a picture, with what it is for those who do not see it (Streamlit's own has no alternative text).

    Args:
        image: a picture; bytes or numbers in 0..1, y x x x channel; a file; or a data URI.
        about: what it shows, in words.
        width: in pixels; as wide as there is room if None.
        place: the container.
    """
    wide = "100%" if width is None else f"{width:d}px"
    alt = html.escape(" ".join(about.split()), quote=True)
    place.html(
        f"<img src='{_source(image)}' alt='{alt}' style='width: {wide}; max-width: 100%; display: block'>"
    )


def _source(image: Image.Image | np.ndarray | Path | str) -> str:
    """A picture as a data URI."""
    if isinstance(image, str):
        return image
    if isinstance(image, Path):
        kind = {".jpg": "jpeg"}.get(image.suffix.lower(), image.suffix.lower().removeprefix("."))
        return f"data:image/{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"
    if isinstance(image, np.ndarray):
        numbers = (
            image if image.dtype == np.uint8 else (255 * image.clip(0, 1)).round().astype(np.uint8)
        )
        image = Image.fromarray(numbers)
    held = io.BytesIO()
    image.convert("RGB").save(
        held, "WEBP", lossless=image.width * image.height < _SMALL, quality=90
    )
    return f"data:image/webp;base64,{base64.b64encode(held.getvalue()).decode()}"


def _themed(figure: Figure | Mapping[str, Any]) -> dict[str, Any]:
    """A figure as Vega-Lite has it, without Altair's own theme: the page has one."""
    spec = dict(figure) if isinstance(figure, Mapping) else spec_of(figure)
    spec.pop("config", None)
    return spec


def _has_width(spec: Mapping[str, Any]) -> bool:
    """Whether a figure says how wide it is: by a number, or by panels next to each other."""
    if "width" in spec or "concat" in spec or "hconcat" in spec:
        return True
    return any(_has_width(part) for part in spec.get("vconcat", ()))
