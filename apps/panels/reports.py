"""What edits change besides, on many examples (layer 7)."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from apps import cached
from apps.choosing import TROUBLE, line, part
from circuits.edits.recipes import Recipe
from circuits.effects import EditReport
from circuits.models.adapter import HookedModel
from circuits.plots import effects_figure
from circuits.workspace import ModelRecord

EXAMPLES = (16, 64, 256)


@part
def side_effects_panel(record: ModelRecord, model: HookedModel, recipe: Recipe) -> None:
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
        _report(report)


def _report(report: EditReport) -> None:
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
