"""The app: pick a model, a site and a unit, and look at it (layer 7). Start it with `circuits app`."""

from __future__ import annotations

import streamlit as st

from apps import concepts, examples, names, panels, pictures, session
from circuits.models.adapter import HookedModel
from circuits.store import ActivationStore
from circuits.units import Unit
from circuits.workspace import ModelRecord

# what loading and reading raise for things a person can mend; anything else is a bug and shows as one
TROUBLE = (ValueError, KeyError, OSError, ImportError)


def main() -> None:
    """The app: its pages."""
    st.set_page_config("circuits", page_icon="🔬", layout="wide")
    pages = [
        st.Page(units_page, title="Units", default=True),
        st.Page(concepts.concepts_page, title="Concepts", url_path="concepts"),
    ]
    st.navigation(pages).run()


def units_page() -> None:
    """A unit, and what is known of it."""
    records = session.workspace().models()
    if not records:
        st.title("circuits")
        st.info(
            f"The workspace {str(session.workspace().root)!r} is empty. Build it with "
            "`circuits demo`, or harvest a model: `circuits harvest MODEL --data DATA --sites SITES`."
        )
        return
    by_label = {session.label_of(r): r for r in _newcomers_first(records)}
    record = by_label[session.choose("Model", list(by_label), "model")]
    try:
        _show_model(record)
    except TROUBLE as error:
        st.error(_line(error))


def _newcomers_first(records: list[ModelRecord]) -> list[ModelRecord]:
    return sorted(records, key=lambda r: (r.spec != "cleanroom", r.spec))


def _show_model(record: ModelRecord) -> None:
    model = session.model_of(record)
    stores = session.stores_of(record)
    harvested = dict.fromkeys(name for store in stores for name in store.sites)
    site = session.choose(
        "Site", list(harvested | dict.fromkeys(s.name for s in model.sites)), "site"
    )
    index = session.choose("Unit", [str(i) for i in range(model.site(site).n_units)], "unit")
    unit = Unit(site, int(index))
    having = {s.provenance.data: s for s in stores if site in s.sites}
    _heading(model, unit, record.hash)
    names.names_panel(unit, record.hash)
    if not having:
        pictures.picture_panel(model, unit, record.hash, None)
        st.info(
            f"No activations of {site} yet: "
            f"`circuits harvest {record.spec} --data DATA --sites {site}`"
        )
        panels.weights_panel(model, unit, record.hash)
        return
    store = having[session.choose("Data", list(having), "data")]
    _show_unit(model, store, unit, record.hash)


def _heading(model: HookedModel, unit: Unit, model_hash: str) -> None:
    site, known = model.site(unit.site), model.unit_names.get(unit.site)
    st.title(f"{unit}" + (f" — {known[unit.index]}" if known else ""))
    st.caption(
        f"{model.name} · {site.kind} {unit.index} of {site.n_units} · weights {model_hash[:16]}"
    )
    before, after = st.sidebar.columns(2)
    if unit.index > 0:
        before.button("← previous", on_click=session.go_to, args=(site.unit(unit.index - 1),))
    if unit.index < site.n_units - 1:
        after.button("next →", on_click=session.go_to, args=(site.unit(unit.index + 1),))


def _show_unit(model: HookedModel, store: ActivationStore, unit: Unit, model_hash: str) -> None:
    inputs, trouble = None, ""
    try:
        inputs = session.inputs_of(model, store)
    except TROUBLE as error:
        trouble = _line(error)
    left, right = st.columns([1, 2])
    with left:
        pictures.picture_panel(model, unit, model_hash, inputs)
    with right:
        panels.statistics_panel(store, unit)
    if inputs is None:
        st.warning(f"The examples cannot be shown: {trouble}")
        panels.weights_panel(model, unit, model_hash)
        return
    examples.examples_panel(model, store, unit, inputs, model_hash)
    examples.range_panel(model, store, unit, inputs, model_hash)
    panels.weights_panel(model, unit, model_hash)
    panels.ablation_panel(model, store, unit, inputs, model_hash)


def _line(error: Exception) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


main()
