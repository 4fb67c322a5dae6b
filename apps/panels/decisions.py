"""A classifier on latents: why it decides as it does, and what switching latents changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import streamlit as st

from apps import cached, editing, tab_storage
from apps.address import TROUBLE, action, line, link, part, plain, python
from apps.cached import Decisions
from apps.showing import show_picture
from circuits.concepts import Intervention, as_recipe
from circuits.concepts.bottleneck import Explanation
from circuits.database import Record
from circuits.stimuli.images import ImageSource
from circuits.units import Unit
from circuits.workspace import ModelRecord

SHARES = 10


@part
def decisions_panel(record: ModelRecord, site: str, names: Mapping[str, Record]) -> None:
    """The bottleneck: how often it is right, one decision, and interventions."""
    st.subheader("Decisions by latents")
    store = next((s for s in cached.stores_of(record) if site in s.sites), None)
    if store is None:
        return
    try:
        model = cached.model_of(record)
        examples = cached.examples_of(model, store)
        made = cached.decisions_of(model, store, site)
    except TROUBLE as error:
        st.caption(f"No classifier: {line(error)}")
        return
    a = made.accuracy
    st.caption(
        f"A linear classifier on the mean of each latent, trained on half of {plain(store.provenance.data)}: right on "
        f"{100 * a.own:.1f} % of {a.n:d} other examples ({100 * a.low:.1f} to {100 * a.high:.1f}); trained on shuffled "
        f"labels {100 * a.shuffled_labels:.1f} %, always the commonest class {100 * a.majority:.1f} % (seed 0)."
    )
    example = st.selectbox(
        "Example",
        made.rest,
        format_func=lambda i: store.provenance.examples[i],
        key=f"decide-{record.hash}",
    )
    explained = made.bottleneck.explain(made.units[example], top=SHARES)
    left, right = st.columns([1, 3])
    if isinstance(examples.source, ImageSource):
        show_picture(examples.picture(example), f"example {examples.names[example]}", 160, left)
    with right:
        _explanation(explained, names, model.classes[made.labels[example]])
    done = _switches(record, made, explained, names)
    if not done:
        return
    changed = done[0].on(made.units[[example]])[0]
    after = made.bottleneck.explain(changed, top=SHARES)
    found = cached.intervened(store, made, done)
    effect = found.effect
    random = ""
    if effect.null:
        low, high = effect.null_range
        random = f"; {low:+.3f} to {high:+.3f} for {plain(effect.null_is)}"
    st.markdown(f"This example: **{plain(explained.label)}** → **{plain(after.label)}**")
    st.caption(
        f"Accuracy on {effect.n:d} held-out examples {effect.intact:.3f} → {effect.changed:.3f}, change "
        f"{effect.change:+.3f} ({effect.low:+.3f} to {effect.high:+.3f}){random} (seed 0)."
    )
    if found.classes:
        rows = [
            {"class": c.name, "examples": c.n, "before": c.intact, "after": c.changed}
            for c in found.classes
        ]
        st.dataframe(rows, hide_index=True, width="content")
    _keep(record, done)


def _explanation(explained: Explanation, names: Mapping[str, Record], true: str) -> None:
    st.markdown(f"Decides **{plain(explained.label)}** (it is {plain(true)})")
    rows = [
        {
            "latent": _named(s.unit, names),
            "activation": s.activation,
            "weight": s.weight,
            "adds": s.contribution,
        }
        for s in explained.shares
    ]
    st.dataframe(rows, hide_index=True, width="content")
    st.caption(
        f"logit {explained.logit:.3f} = bias {explained.bias:.3f} + these + all others {explained.left:.3f}"
    )


def _named(unit: Unit, names: Mapping[str, Record]) -> str:
    known = names.get(str(unit))
    return f"{unit.index} · {known.body['text']}" if known else str(unit.index)


def _switches(
    record: ModelRecord, made: Decisions, explained: Explanation, names: Mapping[str, Record]
) -> list[Intervention]:
    """What the person switches: latents of this decision and named ones."""
    site = made.bottleneck.site
    own = [s.unit.index for s in explained.shares]
    given = [Unit.parse(u).index for u in names if u.rpartition(":")[0] == site]
    offered = list(dict.fromkeys([*own, *given]))
    chosen = st.multiselect(
        "Switch latents",
        offered,
        format_func=lambda i: _named(Unit(site, i), names),
        key=f"switch-{record.hash}",
    )
    how: Literal["off", "scale"] = st.segmented_control(
        "How", ("off", "scale"), default="off", key=f"how-{record.hash}", required=True
    )
    factor = (
        st.slider("Times", 0.0, 5.0, 2.0, 0.1, key=f"times-{record.hash}")
        if how == "scale"
        else 0.0
    )
    return [Intervention(tuple(Unit(site, i) for i in chosen), how, factor)] if chosen else []


def _keep(record: ModelRecord, done: list[Intervention]) -> None:
    model = cached.model_of(record)
    with st.container(horizontal=True):
        edits = as_recipe(model, done).edits
        tab_storage.keep(editing.kept(), "keeper-decisions")  # this part runs without the page

        def put() -> None:
            editing.keep(record.hash, editing.stack(record.hash).changed(edits))

        action("Put in force as edits of the model", put, "decide-edit")
        if editing.stack(record.hash).text == editing.Stack(edits).text:
            st.success("In force in your session.")
        link("edits", "See the edits", model=cached.label_of(record))
        python(
            f"""
import circuits
from circuits.concepts import Intervention, as_recipe

model = {record.code}
done = {done!r}
recipe = as_recipe(model, done)  # circuits sae bottleneck --off … measures the same with a classifier
recipe.save("recipe.json")
""".replace("Unit(site=", "circuits.Unit(site=")
        )
