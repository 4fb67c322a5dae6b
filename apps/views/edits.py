"""The page of edits: make them, undo them, and compare their effects with those of random edits."""

from __future__ import annotations

import streamlit as st

from apps import cached, editing
from apps.address import TROUBLE, choose_model, line, part, plain, python, visible
from apps.inputs import choose_input, code_of, show_input
from apps.panels.recipes import add_panel, keep_panel, stack_panel, unit_of
from apps.panels.reports import side_effects_panel
from apps.showing import show
from circuits.edits.recipes import Recipe
from circuits.examples import Examples
from circuits.figures import losses_figure, predictions_figure, tuning_figure
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.stimuli.spelling import marked, words_of
from circuits.workspace import ModelRecord


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
        side_effects_panel(record, model, recipe)
    keep_panel(record, model, recipe)


def _on_input(record: ModelRecord, model: HookedModel, recipe: Recipe) -> None:
    """The model's predictions for one input, before and after."""
    st.subheader("On one input")
    one = choose_input(record, model)
    if one is None:
        return
    try:
        before = cached.predictions_of(model, Recipe((), record.hash), one)
        runs = {"intact": before}
        if recipe.edits:
            runs["edited"] = cached.predictions_of(model, recipe, one, of=[p.index for p in before])
    except TROUBLE as error:
        st.error(line(error))
        return
    show_input(one)
    show(predictions_figure(runs), "edit-predictions")
    if isinstance(model.input, TokenInput) and len(one.tokens(0)) > 1:
        _losses(model, recipe, one)
    # a name may have lines of its own, which would be code
    lines = "\n".join(
        f"#  {' '.join(visible(p.name))}: {p.probability:.6f}" for p in list(runs.values())[-1]
    )
    python(f"""
import circuits
import PIL.Image
from circuits.effects import predictions

model = {record.code}
{code_of(one)}
recipe = circuits.Recipe.load("recipe.json")  # as downloaded below
with circuits.edited(model, recipe):
    for p in predictions(model, examples, of={[p.index for p in before]}):
        print(p.name, p.probability)
{lines}
""")


def _losses(model: HookedModel, recipe: Recipe, one: Examples) -> None:
    """How surprising each token is, before and after."""
    assert isinstance(model.input, TokenInput), "checked by the caller"
    runs = {"intact": cached.losses_of(model, Recipe((), recipe.model_hash), one)}
    if recipe.edits:
        runs["edited"] = cached.losses_of(model, recipe, one)
    words = words_of(model.input.vocabulary, one.tokens(0)[1:])
    show(losses_figure(runs, list(map(marked, words))), "edit-losses")
    for name, losses in runs.items():
        half = len(losses) // 2
        st.caption(
            f"{plain(name)}: loss {losses[:half].mean():.3f} nats in the first half, {losses[half:].mean():.3f} in "
            "the second"
        )


@part
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
    show(tuning_figure({name: [tuned] for name, tuned in runs.items()}), "edit-tuning")
    for name, tuned in runs.items():
        m = tuned.measures
        if not tuned.mean.any():
            st.caption(f"{plain(name)}: silent at every angle, radius {tuned.radius:.3g} px")
            continue
        st.caption(
            f"{plain(name)}: mean direction {m.direction.value:.0f}°, full width at half maximum {m.fwhm.value:.0f}°, "
            f"echo {m.echo.value:.2f} ({m.echo.low:.2f} to {m.echo.high:.2f}), radius {tuned.radius:.3g} px"
        )
