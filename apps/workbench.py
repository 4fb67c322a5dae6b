"""The app: browse and edit circuits (layer 7). Start it with `circuits app`."""

from __future__ import annotations

import streamlit as st

from apps.choosing import TITLES, guarded
from apps.views import case, circuit, compare, concepts, edits, home, jobs, site, unit, yours

# the pages, by their path in the URL (not as a string: Streamlit would show it)
VIEWS = {
    "home": home.page, "unit": unit.page, "site": site.page, "compare": compare.page, "circuit": circuit.page,
    "edits": edits.page, "yours": yours.page, "concepts": concepts.page, "case": case.page, "jobs": jobs.page,
}  # fmt: skip


def main() -> None:
    """The app's pages."""
    st.set_page_config("circuits", page_icon="🔬", layout="wide")
    pages = [
        st.Page(guarded(view), title=TITLES[name], url_path=name, default=name == "home")
        for name, view in VIEWS.items()
    ]
    st.navigation(pages).run()


main()
