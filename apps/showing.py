"""Showing figures: the one place where a figure of the library becomes a part of a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from circuits.figures import Figure


def show(figure: Figure, key: str) -> None:
    """Show a figure in the colours and fonts of the person's theme, as wide as there is room unless it has a width.

    Args:
        figure: what to show.
        key: names its element, also for CSS (`st-key-…`).
    """
    # what the library builds is checked by its tests; checking it again takes longer than building it
    spec = figure.to_dict(validate=False)
    spec.pop("config", None)  # Altair's own theme: the page has one
    st.vega_lite_chart(spec, width="content" if _has_width(spec) else "stretch", key=key)


def _has_width(spec: Mapping[str, Any]) -> bool:
    """Whether a figure says how wide it is: by a number, or by panels next to each other."""
    if "width" in spec or "concat" in spec or "hconcat" in spec:
        return True
    return any(_has_width(part) for part in spec.get("vconcat", ()))
