"""Finding the circuit of a task: edges scored on one half of its examples, evaluated on the other."""

from __future__ import annotations

import streamlit as st

from apps.address import choose_model
from apps.panels.discoveries import (
    alternatives_panel,
    edges_panel,
    evaluation_panel,
    keep_panel,
    trust_panel,
)
from apps.panels.searches import discovery_panel, same_panel, search_panel


def page() -> None:
    """The page on which circuits are found."""
    st.title("Find circuits")
    st.caption(
        "Which edges between a model's parts carry a behaviour? Without the others, how much of it is left?"
    )
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    task, how = search_panel(model)
    found = discovery_panel(model, task, how)
    if found is not None:
        trust_panel(found)
        evaluation_panel(found.evaluation)
        alternatives_panel(found)
        edges_panel(found)
        keep_panel(record, model, task, how, found)
    same_panel(record, st.query_params["task"], int(st.query_params["n"]), how)
