"""All units of a site: as a sheet, as a table, as a map."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from apps import cached
from apps.address import (
    choose,
    choose_model,
    choose_site,
    link,
    names_at,
    not_harvested,
    open_page,
    plain,
)
from apps.panels.bases import basis_panel
from apps.panels.maps import map_panel
from apps.panels.sheets import sheet_panel
from circuits.concepts import names_of
from circuits.families import saved_families
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.store import ActivationStore
from circuits.units import Site, Unit
from circuits.workspace import ModelRecord

WAYS = ("sheet", "table", "map")


def page() -> None:
    """The page of a site."""
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    site = model.site(choose_site(record, model))
    stores = {s.provenance.data: s for s in cached.stores_of(record) if site.name in s.sites}
    store = stores[choose("Data", list(stores), "data")] if stores else None
    st.title(plain(site.name))
    about = f"{model.name} · {site.n_units} units ({site.kind}) · weights {record.hash[:16]}"
    st.caption(plain(about))
    table = _filtered(record, _table(record, model, site, store), site)
    faceless = isinstance(model.input, TokenInput) and site.unit(0) not in cached.faces(record)
    way = choose("Show as", WAYS[faceless:], "as")
    if way == "table":
        _as_table(record, site, table)
    elif way == "map":
        picked = map_panel(record, model, site, store, table)
        if picked is not None:
            _open(record, picked)
    else:
        picked = sheet_panel(record, model, site, table)
        if picked is not None:
            _open(record, picked)
    link(
        "compare",
        "Compare two units",
        model=cached.label_of(record),
        unit=site.unit(0),
        other=site.unit(1),
    )
    if store is None:
        st.info(not_harvested(record, site.name))
    elif site.inner_axis is None and site.n_units > 1:
        basis_panel(model, site, store)


def _table(
    record: ModelRecord, model: HookedModel, site: Site, store: ActivationStore | None
) -> pd.DataFrame:
    units = [site.unit(i) for i in range(site.n_units)]
    table = pd.DataFrame({"unit": range(len(units))})
    if store:
        table = cached.site_table(store, site.name).copy()
    given = {
        u: r.body["text"] for u, r in names_of(cached.workspace().database, record.hash).items()
    }
    known = names_at(model, site) or [""] * len(units)
    table["name"] = [given.get(str(u), name) for u, name in zip(units, known, strict=True)]
    member: dict[Unit, str] = {}
    for family in saved_families(cached.workspace().database, record.hash):
        member |= {
            u: f"{member[u]}, {family.name}" if u in member else family.name for u in family.units
        }
    table["family"] = [member.get(u, "") for u in units]
    return table


def _filtered(record: ModelRecord, table: pd.DataFrame, site: Site) -> pd.DataFrame:
    """The units that the person wants to see, in the order that they want."""
    left, right = st.columns(2)
    words = (
        left.text_input("Name, label or family contains", key="site-filter", max_chars=80)
        .lower()
        .split()
    )
    numbers = [c for c in table.columns if c not in ("name", "family", "largest example")]
    order = right.selectbox("Sort by", numbers, key="site-sort")
    downward = st.toggle("Largest first", value=order != "unit", key="site-down")
    text = (table["name"] + " " + table["family"]).str.lower()
    keep = pd.Series(True, index=table.index)
    for word in words:
        keep &= text.str.contains(word, regex=False)
    found = table.loc[keep].sort_values(str(order), ascending=not downward, kind="stable")
    st.caption(f"{len(found):,} of {len(table):,} units")
    return found


def _as_table(record: ModelRecord, site: Site, table: pd.DataFrame) -> None:
    shown = table.drop(columns=[c for c in ("name", "family") if not "".join(table[c])])
    chosen = st.dataframe(
        shown, hide_index=True, on_select="rerun", selection_mode="single-row", key="site-table"
    )
    if rows := chosen["selection"]["rows"]:
        _open(record, site.unit(int(table.iloc[rows[0]]["unit"])))


def _open(record: ModelRecord, unit: Unit) -> None:
    open_page("unit", model=cached.label_of(record), site=unit.site, unit=unit.index)
