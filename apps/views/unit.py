"""A unit, and what is known of it."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from apps import cached
from apps.address import (
    choose_model,
    choose_unit,
    go_to,
    line,
    link,
    name_of,
    not_harvested,
    plain,
)
from apps.panels.effects import ablation_panel
from apps.panels.examples import examples_panel, range_panel
from apps.panels.names import names_panel
from apps.panels.pictures import picture_panel
from apps.panels.relations import relations_panel
from apps.panels.roles import roles_panel
from apps.panels.seeking import search_panel
from apps.panels.statistics import statistics_panel
from apps.panels.tokens import logits_panel, own_text_panel, pattern_panel
from apps.panels.tuning import tuning_panel
from apps.panels.weights import weights_panel
from apps.subject import Look, look_at
from circuits.models.adapter.inputs import TokenInput


def page() -> None:
    """The page of a unit: what excites it, what it is built from, what it does."""
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    unit = choose_unit(record, model)
    look = look_at(record, model, unit)
    _heading(look)
    search_panel(record, model)
    names_panel(unit, record.hash)
    best = examples = None
    of_tokens = isinstance(model.input, TokenInput)
    if look.store is None:
        if not of_tokens:
            picture_panel(model, unit, record.hash, None)
        st.info(not_harvested(record, unit.site))
    elif of_tokens:
        best = examples = st.container()
        statistics_panel(look, look.store)
    else:
        left, right = st.columns([2, 5])
        with left:
            picture_panel(model, unit, record.hash, look.examples)
        with right:
            best = st.container()
            statistics_panel(look, look.store)
        examples = st.container()
    tuning_panel(look)
    roles_panel(look)
    logits = st.container()
    weights_panel(look)
    if best is not None and examples is not None:
        # here, for they take longest the first time: what they see has to be found
        _examples(look, best, examples)
    own_text_panel(look)
    with logits:  # of a head last of all: every pair of tokens is gone through
        logits_panel(look)
    if look.store is not None and look.examples is not None:
        ablation_panel(look, look.store, look.examples)
    relations_panel(look)


def _examples(look: Look, first: DeltaGenerator, rest: DeltaGenerator) -> None:
    """The strongest examples in one place, and what else is known of examples in another."""
    if look.trouble is not None:
        first.warning(f"The examples cannot be shown: {line(look.trouble)}")
        return
    assert look.store is not None, "checked by the caller"
    assert look.examples is not None, "there is no trouble"
    with first:
        examples_panel(look, look.store, look.examples)
    best = look.store.top_examples(look.unit, 1)
    with rest:
        pattern_panel(look, look.examples, best[0].index if best else 0)
        range_panel(look, look.store, look.examples)


def _heading(look: Look) -> None:
    model, unit, label = look.model, look.unit, cached.label_of(look.record)
    site, known = model.site(unit.site), name_of(model, unit)
    st.title(plain(f"{unit}" + (f" — {known}" if known else "")))
    st.caption(
        plain(
            f"{model.name} · {site.kind} {unit.index} of {site.n_units} · weights {look.record.hash[:16]}"
        )
    )
    with st.container(horizontal=True):
        link("site", f"All of {site.name}", model=label, site=site.name)
        link("circuit", "Its circuit", model=label, unit=unit)
        link("edits", "Edit it", model=label, on=unit)
    before, after = st.sidebar.columns(2)
    before.button(
        "← previous", on_click=go_to, args=(site.unit(max(unit.index - 1, 0)),), disabled=unit.index == 0,
        shortcut="P",
    )  # fmt: skip
    last = site.n_units - 1
    after.button(
        "next →", on_click=go_to, args=(site.unit(min(unit.index + 1, last)),), disabled=unit.index == last,
        shortcut="N",
    )  # fmt: skip
