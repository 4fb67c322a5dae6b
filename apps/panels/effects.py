"""What the model does without a unit (layer 7)."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.choosing import link, part, python
from apps.inputs import shown_example
from apps.looking import Look
from circuits.edits.activations import zero
from circuits.edits.recipes import Recipe
from circuits.harvesting import Inputs
from circuits.plots import predictions_figure
from circuits.stimuli.images import ImageSource
from circuits.store import ActivationStore

STRONGEST = 24  # examples offered first for an ablation


@part
def ablation_panel(look: Look, store: ActivationStore, inputs: Inputs) -> None:
    """A switch that removes the unit, and what the model's predictions become."""
    model, unit = look.model, look.unit
    st.subheader("What it does")
    names = store.provenance.examples
    best = [e.index for e in store.top_examples(unit, STRONGEST)]
    order = best + [i for i in range(len(names)) if i not in set(best)]
    example = st.selectbox(
        "Example (strongest first)", order, format_func=lambda i: names[i], key=f"example-{unit}"
    )
    removed = st.toggle("Ablate this unit", key="ablate", help="Sets it to zero everywhere.")
    if isinstance(inputs.source, ImageSource):
        st.image(inputs.picture(example), width=160)
    shown = shown_example(model, inputs, example)
    before = cached.predictions_of(model, Recipe((), look.record.hash), shown)
    if not removed:
        st.plotly_chart(predictions_figure({"intact": before}), key="predictions")
        return
    recipe = Recipe.of(model, [zero(unit)])
    after = cached.predictions_of(model, recipe, shown, of=[p.index for p in before])
    st.plotly_chart(
        predictions_figure({"intact": before, f"{unit} removed": after}), key="predictions"
    )
    with st.spinner("Beside random units…"):
        report = cached.measured(
            model, recipe, inputs, range(example, example + 1), progress=lambda *_: None
        )
    assert report is not None, "measured just now"
    kl = report.measures["kl"]
    baseline = sorted(kl.random)
    st.caption(
        f"KL from the intact prediction: {kl.change:.3g} nats; removing each of "
        f"{len(baseline)} random units of the site instead: {baseline[0]:.3g} to {baseline[-1]:.3g} "
        f"(seed {report.seed}). Undone afterwards: "
        f"{'identical to the bit' if report.restored else 'NOT restored'}."
    )
    with st.container(horizontal=True):
        link(
            "edits",
            "Edit it, and see on many examples",
            model=cached.label_of(look.record),
            on=unit,
        )
        python(f"""
import circuits
from circuits.effects import measure

model = circuits.load_model({look.record.spec!r})
x = circuits.Inputs(model, circuits.open_source({inputs.source.spec!r})).batch([{example}])
report = measure(model, [circuits.zero({str(unit)!r})], x)
print(report.measures["kl"])
""")
