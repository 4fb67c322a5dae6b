"""Where a person begins: the workspace, its models, and a short way through."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import TROUBLE, code, line, link, plain
from apps.panels.sheets import strip_panel
from circuits.concepts import names_of
from circuits.database import Database
from circuits.families import saved_families
from circuits.graph.saved import saved_circuits
from circuits.harvesting import unusable_stores
from circuits.models.zoo.loading import MODELS
from circuits.workspace import ModelRecord

CURVE = ("curve", 30)
"""The unit that a newcomer sees first: a curve that bulges to the upper left, written by hand."""

FIRST = ("efficientnet-lite0", "cleanroom")
"""The models that are listed before all others: a real network, and the one that the tour is about."""


def page() -> None:
    """The first page."""
    st.title("circuits")
    st.caption(
        "Understand the units, then the weights between them; then edit the circuit and see whether the story holds."
    )
    place = cached.workspace()
    records = sorted(place.models(), key=lambda r: (*(r.spec != first for first in FIRST), r.spec))
    if not records:
        st.info(
            f"The workspace {code(str(place.root))} is empty. Build it with `circuits demo`, or harvest a model: "
            "`circuits harvest MODEL --data DATA --sites SITES`."
        )
        link("jobs", "Build the demo's workspace here", do="demo")
        return
    if by_hand := next((r for r in records if r.spec == "cleanroom"), None):
        _path(cached.label_of(by_hand))
    st.subheader("Models in this workspace")
    st.caption(plain(str(place.root)))
    for record in records:
        try:
            _model(record, place.database)
        except TROUBLE as error:  # of one model: the others are shown
            st.error(line(error))
    for trouble in place.damaged_models():
        st.caption(f"⚠ {plain(trouble)}")
    here = {r.spec for r in records}
    missing = [m.name for m in MODELS.values() if m.builtin and m.name not in here]
    if missing:
        st.caption(
            f"Also built in: {plain(', '.join(missing))}; `circuits models` lists all. Harvest one to see it here: "
            f"{code(f'circuits harvest {missing[0]} --data DATA --sites SITES')}."
        )


def _path(label: str) -> None:
    """Two minutes through the network whose every unit's meaning is known."""
    site, index = CURVE
    unit = f"{site}:{index}"
    with st.container(border=True):
        st.subheader("New here? Two minutes")
        st.markdown(
            "`cleanroom` is a curve detector whose weights were written by hand, so you can check what you see.\n\n"
            "1. Look at one of its units: what excites it, how it is tuned, what it is built from.\n"
            "2. See the circuit that builds it: lines along the curve excite it, lines across inhibit it.\n"
            "3. Take its negative weights away: an echo appears on the other side. Undo: it is gone."
        )
        with st.container(horizontal=True):
            link("unit", "1. A curve unit", model=label, site=site, unit=index)
            link("circuit", "2. Its circuit", model=label, unit=unit)
            link("edits", "3. Edit it", model=label, on=unit)
            link("case", "The whole case, live")


def _model(record: ModelRecord, database: Database) -> None:
    label = cached.label_of(record)
    with st.container(border=True):
        st.markdown(f"**{plain(label)}** · weights {code(record.hash[:16])}")
        stores = cached.stores_of(record)
        sites = [site for s in stores for site in s.provenance.sites]
        same = {site.before for site in sites}  # the same units, before a ceiling
        strip_panel(record, list(dict.fromkeys(s.name for s in sites)), same)
        rows = [
            {
                "data": s.provenance.data, "examples": len(s.provenance.examples), "sites": len(s.provenance.sites),
                "units": sum(site.n_units for site in s.provenance.sites), "skipped": len(s.skipped),
            }
            for s in stores
        ]  # fmt: skip
        if rows:
            st.dataframe(rows, hide_index=True, width="content")
        else:
            harvest = f"circuits harvest {record.arguments} --data DATA --sites SITES"
            st.caption(f"No activations yet: {code(harvest)}.")
        for trouble in unusable_stores(cached.workspace(), record.hash):
            st.caption(f"⚠ {plain(trouble)}")
        made = [face for face in cached.faces(record).values() if face.kind == "visualization"]
        kept = {
            "pictures": len(made), "families": len(saved_families(database, record.hash)),
            "circuits": len(saved_circuits(database, record.hash)), "named units": len(names_of(database, record.hash)),
        }  # fmt: skip
        st.caption(", ".join(f"{plain(what)}: {n:d}" for what, n in kept.items()))
        _links(record, label, [site.name for s in stores for site in s.provenance.sites])


def _links(record: ModelRecord, label: str, sites: list[str]) -> None:
    with st.container(horizontal=True):
        site = {"site": sites[-1]} if sites else {}
        link("unit", "Units", model=label, **site)
        link("site", "Sheet", model=label, **site)
        link("circuit", "Circuit", model=label)
        link("heads", "Heads", model=label)
        link("find", "Find circuits", model=label)
        link("claims", "Claims", model=label)
        link("edits", "Edits", model=label)
        link("yours", "Your own input", model=label, **site)
        if (name := record.spec.partition("+sae/")[2]) in cached.autoencoders():
            link("concepts", "Concepts", sae=name)
        link("jobs", "Harvest more", model=label, do="harvest")
