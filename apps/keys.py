"""Keys that bring the cursor into a field; those of buttons are Streamlit's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from streamlit.components import v2


@cache
def _component() -> Any:
    script = Path(__file__).parent / "canvas" / "keys.js"
    return v2.component("circuits_keys", js=script.read_text(), isolate_styles=False)


def keys(fields: Mapping[str, str]) -> None:
    """Let keys of the keyboard lead to fields, unless something is being typed.

    Args:
        fields: the `key` of a text field by the key that leads to it.
    """
    _component()(key="keys", data={"fields": dict(fields)})
