"""What the model does without a unit."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import link, part, python
from apps.inputs import show_input
from apps.panels.reports import choose_task, show_report
from apps.showing import show
from apps.subject import Look
from circuits.edits.activations import zero
from circuits.edits.recipes import Recipe
from circuits.examples import Examples
from circuits.figures import predictions_figure
from circuits.store import ActivationStore
from circuits.tasks.builtin import STATED

STRONGEST = 24  # examples offered first for an ablation


@part
def ablation_panel(look: Look, store: ActivationStore, examples: Examples) -> None:
    """A switch that removes the unit, and what becomes of the model's predictions and of a task."""
    model, unit = look.model, look.unit
    st.subheader("What it does")
    best = [e.index for e in store.top_examples(unit, STRONGEST)]
    order = best + [i for i in range(len(examples)) if i not in set(best)]
    example = st.selectbox(
        "Example (strongest first)",
        order,
        format_func=lambda i: examples.names[i],
        key=f"example-{unit}",
    )
    removed = st.toggle("Ablate this unit", key="ablate", help="Sets it to zero everywhere.")
    one = examples.subset([example])
    show_input(one, width=160)
    before = cached.predictions_of(model, Recipe((), look.record.hash), one)
    if not removed:
        show(predictions_figure({"intact": before}), "predictions")
        return
    recipe = Recipe.of(model, [zero(unit)])
    after = cached.predictions_of(model, recipe, one, of=[p.index for p in before])
    runs = {"intact": before, f"{unit} removed": after}
    show(predictions_figure(runs), "predictions")
    task = choose_task(look.record, model)
    if task is None:
        return
    with st.spinner(f"Compared with {cached.RANDOM} random units…"):
        report = cached.measured(model, recipe, task, progress=lambda *_: None)
    assert report is not None, "measured just now"
    show_report(report)
    data = f", data={task.examples.data!r}" if task.examples.how != "given" else ""
    name = st.session_state["effects-task"]
    with st.container(horizontal=True):
        link(
            "edits",
            "Edit it, and see on many examples",
            model=cached.label_of(look.record),
            on=unit,
        )
        python(f"""
import circuits

model = {look.record.code}
task = circuits.load_task(model, {name!r}, n={len(task)}{data if name in STATED else ""})
report = circuits.ablate(model, [{str(unit)!r}], task, n_random={cached.RANDOM})
print(report.effects["kl"])
""")
