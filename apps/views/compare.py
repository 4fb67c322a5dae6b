"""Two units side by side, of one model or of two (layer 7)."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.choosing import TROUBLE, choose_model, line, link, named
from apps.inputs import shown_example
from circuits.edits.recipes import Recipe
from circuits.models.inputs import ImageInput
from circuits.plots import histogram_figure, tuning_figure
from circuits.units import Unit
from circuits.workspace import ModelRecord

STRONGEST = 6


def page() -> None:
    """The page that compares two units."""
    st.title("Compare")
    chosen = choose_model()
    if chosen is None:
        return
    labels = [cached.label_of(r) for r in cached.workspace().models()]
    left, right = st.columns(2)
    with left:
        _side("unit", "model", labels, labels.index(cached.label_of(chosen[0])))
    with right:
        _side("other", "other_model", labels, labels.index(cached.label_of(chosen[0])))


def _side(name: str, model_name: str, labels: list[str], default: int) -> None:
    """One of the two: its choice, kept in the URL, and what is known of it."""
    wanted = st.query_params.get(model_name, labels[default])
    label = wanted if wanted in labels else labels[default]
    if model_name != "model":
        label = st.selectbox("Model", labels, labels.index(label), key=f"compare-{model_name}")
        st.query_params[model_name] = label
    record = next(r for r in cached.workspace().models() if cached.label_of(r) == label)
    address = st.text_input(
        "Unit, SITE:INDEX", st.query_params.get(name, ""), key=f"compare-{name}", max_chars=200
    )
    st.query_params[name] = address
    try:
        model = cached.model_of(record)
        unit = model.unit(address)
    except TROUBLE as error:
        st.error(line(error))
        return
    st.subheader(named(model, unit))
    st.caption(f"{model.name} · weights {record.hash[:16]}")
    link("unit", "Its page", model=label, site=unit.site, unit=unit.index)
    picture = cached.pictured(record).get(unit)
    if picture is not None and (small := cached.thumbnail(picture, 224)):
        st.image(small, width=224)
    _harvested(record, unit, name)
    spec = model.input
    if (
        isinstance(spec, ImageInput)
        and spec.channels in (1, 3)
        and st.toggle("Tuning", key=f"compare-tuning-{name}")
    ):
        tuned = cached.tuning_of(model, Recipe((), record.hash), unit)
        st.plotly_chart(tuning_figure({"intact": tuned}), key=f"compare-curve-{name}")
        m = tuned.measures
        st.caption(
            f"mean direction {m.direction.value:.0f}°, half-width {m.half_width.value:.0f}°, echo {m.echo.value:.2f}"
        )


def _harvested(record: ModelRecord, unit: Unit, name: str) -> None:
    model = cached.model_of(record)
    store = next((s for s in cached.stores_of(record) if unit.site in s.sites), None)
    if store is None:
        st.info(f"No activations of {unit.site} yet.")
        return
    st.plotly_chart(histogram_figure(store.statistics(unit)), key=f"compare-histogram-{name}")
    st.caption(f"on {len(store.provenance.examples)} examples of {store.provenance.data}")
    try:
        inputs = cached.inputs_of(model, store)
    except TROUBLE as error:
        st.warning(line(error))
        return
    for column, example in zip(
        st.columns(STRONGEST), store.top_examples(unit, STRONGEST), strict=False
    ):
        shown = shown_example(model, inputs, example.index)
        if shown.picture is not None:
            column.image(shown.picture, width="stretch")
        column.caption(f"{example.value:.3g}")
