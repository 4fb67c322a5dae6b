"""The app: browse and edit circuits. Start it with `circuits app`."""

from __future__ import annotations

from importlib import import_module

import streamlit as st

from apps.preparing import ALONE

with ALONE:
    from apps import editing, tab_storage
    from apps.address import AGAIN, TITLES, guarded

    VIEWS = {name: import_module(f"apps.views.{name}") for name in TITLES}


_STYLE = """<style>
[data-testid="stMainBlockContainer"] { padding: 3.2rem 2.2rem 4rem; }
[data-testid="stCaptionContainer"] { color: inherit; opacity: .8; }
[data-testid$="Active"] p, [kind$="Active"] p { color: light-dark(#8f1420, #ffb0b7) !important; }
[data-testid="stSliderThumbValue"] { color: inherit; }
[data-testid="stCaptionContainer"] * { color: inherit; opacity: 1; }
</style>"""
"""Less margin than Streamlit leaves, and captions with the contrast that small text needs (WCAG 2, 4.5 to 1)."""


def main() -> None:
    """The app's pages, by their path in the URL."""
    st.set_page_config("circuits", page_icon="🔬", layout="wide")
    pages = [
        st.Page(guarded(view.page), title=TITLES[name], url_path=name, default=name == "home")
        for name, view in VIEWS.items()
    ]
    page = st.navigation(pages, expanded=True)
    with (
        st.sidebar
    ):  # before the page: a change is kept at once, and what was kept comes back first
        tab_storage.keep(editing.kept(), recalls=True)
    st.html(_STYLE)
    page.run()
    st.session_state.pop(AGAIN, None)


main()
