"""Searching for units by what is known of them."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import link, named
from apps.keys import keys
from circuits.concepts import names_of
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Unit
from circuits.workspace import ModelRecord

FOUND = 12
"""Units that a search lists, at most."""


def search_panel(record: ModelRecord, model: HookedModel) -> None:
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
    names = cached.output_names(model)
    outputs = {s.name: names for s in model.sites if s.kind == "logit"}
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
