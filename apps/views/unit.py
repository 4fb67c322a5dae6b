"""A unit, and what is known of it."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import choose_model, choose_unit, go_to, line, link, named, not_harvested, plain
from apps.keys import keys
from apps.panels.effects import ablation_panel
from apps.panels.examples import examples_panel, range_panel
from apps.panels.names import names_panel
from apps.panels.pictures import picture_panel
from apps.panels.relations import relations_panel
from apps.panels.statistics import statistics_panel
from apps.panels.tokens import logits_panel, pattern_panel
from apps.panels.tuning import tuning_panel
from apps.panels.weights import weights_panel
from apps.subject import Look, look_at
from circuits.concepts import names_of
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Unit
from circuits.workspace import ModelRecord

FOUND = 12
"""Units that a search lists, at most."""


def page() -> None:
    """The page of a unit: what excites it, what it is built from, what it does."""
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    unit = choose_unit(record, model)
    look = look_at(record, model, unit)
    _heading(look)
    _search(record, model)
    names_panel(unit, record.hash)
    examples = None
    if look.store is None:
        picture_panel(model, unit, record.hash, None)
        st.info(not_harvested(record, unit.site))
    else:
        left, right = st.columns([1, 2])
        with left:
            picture_panel(model, unit, record.hash, look.examples)
        with right:
            statistics_panel(look, look.store)
        examples = st.container()
    tuning_panel(look)
    weights_panel(look)
    logits_panel(look)
    if examples is not None:
        with examples:  # here, for they take longest the first time: what they see has to be found
            _examples(look)
    if look.store is not None and look.examples is not None:
        ablation_panel(look, look.store, look.examples)
    relations_panel(look)


def _examples(look: Look) -> None:
    if look.trouble is not None:
        st.warning(f"The examples cannot be shown: {line(look.trouble)}")
        return
    assert look.store is not None, "checked by the caller"
    assert look.examples is not None, "there is no trouble"
    examples_panel(look, look.store, look.examples)
    best = look.store.top_examples(look.unit, 1)
    pattern_panel(look, look.examples, best[0].index if best else 0)
    range_panel(look, look.store, look.examples)


def _heading(look: Look) -> None:
    model, unit, label = look.model, look.unit, cached.label_of(look.record)
    site, known = model.site(unit.site), model.unit_names.get(unit.site)
    st.title(plain(f"{unit}" + (f" — {known[unit.index]}" if known else "")))
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


def _search(record: ModelRecord, model: HookedModel) -> None:
    """Units by name, class, label or address."""
    words = st.sidebar.text_input(
        "Search units  `/`", key="search", placeholder="curve 45, line:3 …", max_chars=80
    )
    keys({"/": "search"})
    if not words.strip():
        return
    given = {
        str(u): r.body["text"]
        for u, r in names_of(cached.workspace().database, record.hash).items()
    }
    outputs = {s.name: model.classes for s in model.sites if s.kind == "logit"}
    known = {
        str(Unit(site, i)): name
        for site, names in (outputs | dict(model.unit_names)).items()
        for i, name in enumerate(names)
    }
    wanted = words.lower().split()
    found = [
        address
        for address in dict.fromkeys([*_address(model, words.strip()), *given, *known])
        if all(
            w in f"{address} {given.get(address, '')} {known.get(address, '')}".lower()
            for w in wanted
        )
    ]
    with st.sidebar:
        for address in found[:FOUND]:
            unit = Unit.parse(address)
            name = f"{address} · {given[address]}" if address in given else named(model, unit)
            link("unit", name, model=cached.label_of(record), site=unit.site, unit=unit.index)
        st.caption(f"{len(found)} found" + (f", {FOUND} shown" if len(found) > FOUND else ""))


def _address(model: HookedModel, text: str) -> list[str]:
    try:
        return [str(model.unit(text))]
    except (KeyError, ValueError):
        return []
