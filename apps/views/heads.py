"""All heads of a language model, by what they attend to."""

from __future__ import annotations

import streamlit as st

from apps.address import choose_model
from apps.panels.roles import all_roles_panel
from circuits.models.adapter.inputs import TokenInput


def page() -> None:
    """The page of heads."""
    st.title("Heads")
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    if not isinstance(model.input, TokenInput):
        st.info("This model takes images: heads are scored by what they attend to among tokens.")
        return
    all_roles_panel(record, model)
