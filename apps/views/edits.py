"""Edits: made, undone, and what they do beside random ones (layer 7)."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from apps import cached, editing
from apps.choosing import TROUBLE, choose_model, line, python
from apps.inputs import choose_input, show_input
from apps.panels.recipes import add_panel, keep_panel, stack_panel, unit_of
from circuits.edits.recipes import Recipe
from circuits.effects import EditReport
from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput
from circuits.plots import effects_figure, predictions_figure, tuning_figure
from circuits.workspace import ModelRecord

EXAMPLES = (16, 64, 256)


def page() -> None:
    """The page of edits."""
    st.title("Edits")
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    left, right = st.columns([2, 3], gap="large")
    with left:
        stack_panel(record)
        add_panel(record, model)
    recipe = editing.recipe(record.hash)
    with right:
        _on_input(record, model, recipe)
        _tuning(model, recipe)
        _side_effects(record, model, recipe)
    keep_panel(record, model, recipe)


def _on_input(record: ModelRecord, model: HookedModel, recipe: Recipe) -> None:
    """The model's predictions for one input, before and after."""
    st.subheader("On one input")
    shown = choose_input(record, model)
    if shown is None:
        return
    try:
        before = cached.predictions_of(model, Recipe((), record.hash), shown)
        runs = {"intact": before}
        if recipe.edits:
            runs["edited"] = cached.predictions_of(
                model, recipe, shown, of=[p.index for p in before]
            )
    except TROUBLE as error:
        st.error(line(error))
        return
    show_input(model, shown)
    st.plotly_chart(predictions_figure(runs), key="edit-predictions")
    lines = "\n".join(f"#  {p.name}: {p.probability:.6f}" for p in list(runs.values())[-1])
    python(f"""
import circuits
import torch
from circuits.effects import predictions

model = circuits.load_model({record.spec!r}{f", {record.weights!r}" if record.weights else ""})
{shown.code}
recipe = circuits.Recipe.load("recipe.json")  # as downloaded below
with circuits.edited(model, recipe):
    for p in predictions(model, x, of={[p.index for p in before]}):
        print(p.name, p.probability)
{lines}
""")


@st.fragment
def _tuning(model: HookedModel, recipe: Recipe) -> None:
    """A unit's tuning, before and after."""
    spec = model.input
    if not isinstance(spec, ImageInput) or spec.channels not in (1, 3):
        return
    st.subheader("Tuning to curves")
    first, asked = unit_of(recipe, model), st.query_params.get("on", "").rpartition("->")[2]
    watched = st.query_params.get("watch") or (str(first) if first else asked)
    address = st.text_input(
        "Watch unit", watched, key=f"watch-{watched}", placeholder="SITE:INDEX", max_chars=200
    )
    if not address:
        return
    try:
        unit = model.unit(address)
        before = cached.tuning_of(model, Recipe((), recipe.model_hash), unit)
        runs = {"intact": before}
        if recipe.edits:
            runs["edited"] = cached.tuning_of(model, recipe, unit, before.radius)
    except TROUBLE as error:
        st.error(line(error))
        return
    st.plotly_chart(tuning_figure(runs), key="edit-tuning")
    for name, tuned in runs.items():
        m = tuned.measures
        st.caption(
            f"{name}: prefers {m.direction.value:.0f}°, half-width {m.half_width.value:.0f}°, echo {m.echo.value:.2f} "
            f"({m.echo.low:.2f} to {m.echo.high:.2f}), radius {tuned.radius:.3g} px"
        )


@st.fragment
def _side_effects(record: ModelRecord, model: HookedModel, recipe: Recipe) -> None:
    """What else changes, on many examples, beside random twins and random changes of the same size."""
    st.subheader("Side effects")
    stores = {s.provenance.data: s for s in cached.stores_of(record)}
    if not recipe.edits or not stores:
        st.caption(
            "Add an edit first." if stores else f"No data yet: `circuits harvest {record.spec} …`."
        )
        return
    data = st.selectbox("On", list(stores), key="effects-data")
    n = st.segmented_control(
        "Examples", EXAMPLES, default=EXAMPLES[0], key="effects-n", required=True
    )
    try:
        inputs = cached.inputs_of(model, stores[data])
        examples = range(min(n, len(inputs.source)))
        report = cached.measured(model, recipe, inputs, examples)
        if report is None and st.button("Measure beside random twins", key="effects-measure"):
            bar = st.progress(
                0.0, "Intact, edited, five twins, five random changes of the same size"
            )
            report = cached.measured(
                model,
                recipe,
                inputs,
                examples,
                progress=lambda done, total: bar.progress(done / total),
            )
            bar.empty()
    except TROUBLE as error:
        st.error(line(error))
        return
    if report is not None:
        show_report(report)


def show_report(report: EditReport) -> None:
    """A report: its changes with their intervals and baselines."""
    effects = {**report.targets, **report.measures}
    st.plotly_chart(
        effects_figure({k: e for k, e in effects.items() if e.change == e.change}), key="effects"
    )
    rows = [
        {
            "measure": name, "intact": e.intact, "edited": e.edited, "change": e.change,
            "95 %": f"{e.low:.3g} to {e.high:.3g}",
            "random twins": f"{min(e.random):.3g} to {max(e.random):.3g}" if e.random else "",
            "same size": f"{min(e.noise):.3g} to {max(e.noise):.3g}" if e.noise else "", "p": e.p_value,
        }
        for name, e in {**effects, **{f"other units of {k}": e for k, e in report.others.items()}}.items()
    ]  # fmt: skip
    st.dataframe(pd.DataFrame(rows), hide_index=True)
    st.caption(
        f"{report.n_examples} examples of {report.data}, seed {report.seed}, weights {report.model_hash[:16]}; "
        f"{100 * report.locality:.0f} % of predictions are what they were. Undone afterwards: "
        f"{'identical to the bit' if report.restored else 'NOT restored'}."
    )
