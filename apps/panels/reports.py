"""What edits change on a task, compared with random edits."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import TROUBLE, code, line, part, plain
from apps.showing import show
from circuits.edits.recipes import Recipe
from circuits.effects import EditReport
from circuits.figures import edit_figure
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks import Task
from circuits.tasks.builtin import STATED
from circuits.workspace import ModelRecord

EXAMPLES = (16, 64, 256)


@part
def side_effects_panel(record: ModelRecord, model: HookedModel, recipe: Recipe) -> None:
    """What edits change on a task."""
    st.subheader("Effects on a task")
    if not recipe.edits:
        st.caption("Add an edit first.")
        return
    task = choose_task(record, model)
    if task is None:
        return
    try:
        report = cached.measured(model, recipe, task)
        if report is None and st.button("Compare with random edits", key="effects-measure"):
            bar = st.progress(0.0, f"Intact, edited, {cached.RANDOM} random edits")
            report = cached.measured(
                model, recipe, task, progress=lambda done, total: bar.progress(done / total)
            )
            bar.empty()
    except TROUBLE as error:
        st.error(line(error))
        return
    if report is not None:
        show_report(report)


def choose_task(record: ModelRecord, model: HookedModel) -> Task | None:
    """The task that a person chooses, the model's own first; None, after saying why, if it cannot be made."""
    stores = {s.provenance.data: s for s in cached.stores_of(record)}
    with st.container(horizontal=True):
        name = st.selectbox("Task", cached.tasks_of(model), key="effects-task")
        data = ""
        try:
            if name in STATED:
                fitting = [
                    d for d, s in stores.items() if name != "classes" or cached.labels_of(model, s)
                ]
                if not fitting:
                    what = "with classes" if name == "classes" else "yet"
                    st.caption(f"No data {what}: {code(f'circuits harvest {record.arguments} …')}.")
                    return None
                data = st.selectbox("On", fitting, key="effects-data")
            n = st.segmented_control(
                "Examples", EXAMPLES, default=EXAMPLES[0], key="effects-n", required=True
            )
            task = cached.task_of(model, name, n, stores.get(data))
        except TROUBLE as error:
            st.error(line(error))
            return None
    about = task.about or task.name
    st.caption(plain(f"{about} Taken: {task.examples}. Measured first: {task.metric.name}."))
    return task


def show_report(report: EditReport) -> None:
    """A report: its changes with their intervals and nulls."""
    effects = {**report.targets, **report.effects}
    show(edit_figure(report), "effects")
    rows = [
        {
            "measure": name, "intact": e.intact, "edited": e.changed, "change": e.change,
            "95 %": f"{e.low:.3g} to {e.high:.3g}",
            "null": "{:.3g} to {:.3g}".format(*e.null_range) if e.null else "", "p": e.p_value,
        }
        for name, e in {**effects, **{f"other units of {k}": e for k, e in report.others.items()}}.items()
    ]  # fmt: skip
    st.dataframe(rows, hide_index=True)
    record, least = report.record, max((e.least_p for e in effects.values()), default=1.0)
    st.caption(
        f"{plain(record.measured_on)}; seed {record.seed:d}, weights {plain(record.model_hash[:16])}. Null: "
        f"{plain(report.null_is)}, so that p is at least {least:.2g} (`circuits edit measure` takes more). "
        f"{100 * report.locality:.0f} % of predictions are what they were. Undone afterwards: "
        f"{'identical to the bit' if report.restored else 'NOT restored'}."
    )
