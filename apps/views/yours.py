"""A person's own picture or text: what fires, and why the model says what it says."""

from __future__ import annotations

import numpy as np
import streamlit as st

from apps import cached
from apps.address import choose_model, choose_site, link, named, plain, python
from apps.inputs import choose_input, code_of, show_input
from apps.panels.credit import credit_panel
from apps.showing import show, show_picture
from circuits.edits.recipes import Recipe
from circuits.examples import Examples
from circuits.figures import map_picture, predictions_figure
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Unit
from circuits.workspace import ModelRecord

LISTED = 12


def page() -> None:
    """The page of one input."""
    st.title("Your own input")
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    site = choose_site(record, model)
    one = choose_input(record, model)
    if one is None:
        return
    left, right = st.columns([1, 2])
    with left:
        show_input(one)
    with right:
        found = cached.predictions_of(model, Recipe((), record.hash), one)
        show(predictions_figure({"intact": found}), "own-predictions")
    _units(record, model, one, site)
    credit_panel(record, model, one, site)


def _units(record: ModelRecord, model: HookedModel, one: Examples, site: str) -> None:
    """The units of the site that are most active."""
    st.subheader(f"Most active at {plain(site)}")
    place = model.site(site)
    value = cached.recorded(model, Recipe((), record.hash), one, site)
    strengths = place.activations(value)[0].amax(1)
    order = strengths.argsort(descending=True)[:LISTED].tolist()
    deviations = _deviations(record, site)
    faces, label = cached.faces(record), cached.label_of(record)
    for columns in (st.columns(LISTED // 2), st.columns(LISTED // 2)):
        for column in columns:
            if not order:
                return
            unit = Unit(place.name, order.pop(0))
            with column:
                if unit in faces and (small := cached.thumbnail(faces[unit], 96)):
                    show_picture(small, faces[unit].about, 96)
                number = float(strengths[unit.index])
                beside = (
                    f", {number / deviations[unit.index]:.1f} SD" if deviations is not None else ""
                )
                link(
                    "unit",
                    str(unit.index),
                    help=named(model, unit),
                    model=label,
                    site=unit.site,
                    unit=unit.index,
                )
                st.caption(f"{number:.3g}{beside}")
                if place.position_axes == ("y", "x"):
                    show_picture(
                        map_picture(value[0, unit.index].numpy()), f"where {unit} is active"
                    )
    python(f"""
import circuits
import PIL.Image

model = {record.code}
{code_of(one)}
print(model.run(examples.inputs, read=[{site!r}])[{site!r}].flatten(2).amax(2).topk({LISTED}))
""")


def _deviations(record: ModelRecord, site: str) -> np.ndarray | None:
    """Each unit's standard deviation on a dataset, where it is known."""
    store = next((s for s in cached.stores_of(record) if site in s.sites), None)
    if store is None:
        return None
    return np.maximum(cached.site_table(store, site)["std"].to_numpy(), 1e-12)
