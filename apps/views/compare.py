"""Two units side by side, of one model or of two."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import TROUBLE, choose, choose_model, line, link, named
from apps.inputs import picture_of
from circuits.edits.recipes import Recipe
from circuits.models.adapter.inputs import ImageInput
from circuits.plots import histogram_html, tuning_chart
from circuits.units import Unit
from circuits.workspace import ModelRecord

STRONGEST = 6


def page() -> None:
    """The page that compares two units."""
    st.title("Compare")
    labels = [cached.label_of(r) for r in cached.workspace().models()]
    if not labels:
        choose_model()  # says what to do
        return
    for column, name in zip(st.columns(2), ("unit", "other"), strict=True):
        with column:
            _side(name, "model" if name == "unit" else "other_model", labels)


def _side(name: str, model_name: str, labels: list[str]) -> None:
    """One of the two: its choice, kept in the URL, and what is known of it."""
    if model_name not in st.query_params:
        st.query_params[model_name] = st.query_params.get("model", labels[0])
    label = choose("Model", labels, model_name, sidebar=False)
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
        st.plotly_chart(tuning_chart({"intact": tuned}), key=f"compare-curve-{name}")
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
    st.html(histogram_html(store.statistics(unit)))
    st.caption(f"on {len(store.provenance.examples)} examples of {store.provenance.data}")
    try:
        examples = cached.examples_of(model, store)
    except TROUBLE as error:
        st.warning(line(error))
        return
    for column, example in zip(
        st.columns(STRONGEST), store.top_examples(unit, STRONGEST), strict=False
    ):
        picture = picture_of(examples.subset([example.index]))
        if picture is not None:
            column.image(picture, width="stretch")
        column.caption(f"{example.value:.3g}")
