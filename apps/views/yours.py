"""A person's own picture or text: what fires, and why the model says what it says (layer 7)."""

from __future__ import annotations

from typing import cast, get_args

import numpy as np
import pandas as pd
import streamlit as st

from apps import cached
from apps.cached import Shown
from apps.choosing import TROUBLE, choose_model, choose_site, line, link, named, python
from apps.inputs import choose_input, show_input
from circuits.attribution.channels import ChannelMethod
from circuits.attribution.saliency import METHODS
from circuits.attribution.saliency import Method as PixelMethod
from circuits.edits.recipes import Recipe
from circuits.figures.tunings import overlaid
from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput
from circuits.models.sites import unit_activations
from circuits.plots import map_figure, predictions_figure
from circuits.units import Unit
from circuits.workspace import ModelRecord

LISTED = 12
FAST = ("gradient_x_input", "integrated_gradients", "grad_cam", "relevance")
"""Methods offered first."""


def page() -> None:
    """The page of one input."""
    st.title("Your own input")
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    site = choose_site(record, model)
    shown = choose_input(record, model)
    if shown is None:
        return
    left, right = st.columns([1, 2])
    with left:
        show_input(model, shown)
    with right:
        found = cached.predictions_of(model, Recipe((), record.hash), shown)
        st.plotly_chart(predictions_figure({"intact": found}), key="own-predictions")
    _units(record, model, shown, site)
    _credit(record, model, shown, site)


def _units(record: ModelRecord, model: HookedModel, shown: Shown, site: str) -> None:
    """The units of the site that are most active."""
    st.subheader(f"Most active at {site}")
    place = model.site(site)
    value = cached.recorded(model, Recipe((), record.hash), shown, site)
    strengths = unit_activations(place, value)[0].amax(1)
    order = strengths.argsort(descending=True)[:LISTED].tolist()
    deviations = _deviations(record, site)
    pictures, label = cached.pictured(record), cached.label_of(record)
    for columns in (st.columns(LISTED // 2), st.columns(LISTED // 2)):
        for column in columns:
            if not order:
                return
            unit = Unit(place.name, order.pop(0))
            with column:
                if unit in pictures:
                    st.image(cached.thumbnail(pictures[unit], 96), width=96)
                number = float(strengths[unit.index])
                beside = (
                    f", {number / deviations[unit.index]:.1f} SD" if deviations is not None else ""
                )
                link("unit", named(model, unit), model=label, site=unit.site, unit=unit.index)
                st.caption(f"{number:.3g}{beside}")
                if value.ndim == 4:
                    figure = map_figure(value[0, unit.index].numpy())
                    st.plotly_chart(figure, key=f"own-map-{unit}", config={"displayModeBar": False})
    python(f"""
import circuits
import torch

model = circuits.load_model({record.spec!r})
{shown.code}
print(model.run(x, read=[{site!r}])[{site!r}].flatten(2).amax(2).topk({LISTED}))
""")


def _deviations(record: ModelRecord, site: str) -> np.ndarray | None:
    """Each unit's standard deviation on a dataset, where it is known."""
    store = next((s for s in cached.stores_of(record) if site in s.sites), None)
    if store is None:
        return None
    return np.maximum(cached.site_table(store, site)["std"].to_numpy(), 1e-12)


@st.fragment
def _credit(record: ModelRecord, model: HookedModel, shown: Shown, site: str) -> None:
    """Which units, and which pixels, are responsible for a target."""
    st.subheader("What is responsible")
    target = st.text_input(
        "Target: top, class:NAME, token:WORD or SITE:INDEX", "top", key="own-target", max_chars=200
    )
    method: ChannelMethod = st.segmented_control(
        "Units by",
        get_args(ChannelMethod),
        default="activation_x_gradient",
        key="own-units-by",
        required=True,
    )
    try:
        found = cached.attributed(model, shown, site, target, method)
    except (*TROUBLE, TypeError) as error:
        st.warning(line(error))
    else:
        label = cached.label_of(record)
        rows = [
            {"unit": named(model, Unit(found.site, i)), "share": share}
            for i, share in found.top(0, LISTED)
        ]
        st.dataframe(pd.DataFrame(rows), hide_index=True, width="content")
        check = found.check
        agreed = (
            ""
            if check is None
            else f" Rank correlation with true ablation {check.correlation:.2f} (by chance up to {check.chance:.2f})."
        )
        st.caption(
            f"{found.target}: {found.target_values[0]:.3g}. {found.method}.{agreed} Seed {found.seed}."
        )
        with st.container(horizontal=True):
            for i, _ in found.top(0, 5):
                link("unit", f"{site}:{i}", model=label, site=site, unit=i)
    if isinstance(model.input, ImageInput):
        _pixels(model, shown, target)


def _pixels(model: HookedModel, shown: Shown, target: str) -> None:
    others = tuple(m for m in METHODS if m not in FAST)
    method = st.selectbox("Pixels by", (*FAST, *others), key="own-pixels-by")
    if not st.toggle("Attribution to pixels", key="own-pixels"):
        return
    try:
        found = cached.salient(model, shown, target, cast(PixelMethod, method))
    except (*TROUBLE, TypeError) as error:
        st.warning(line(error))
        return
    assert shown.picture is not None, "an image"
    heat = found.heat()[0].numpy()
    st.image(overlaid(np.asarray(shown.picture) / 255, heat), width=320)
    st.caption(
        f"{method}: red for, blue against {found.target}. `circuits sanity {model.name}` says which methods to believe."
    )
