"""Making edits, and keeping them."""

from __future__ import annotations

import json

import streamlit as st

from apps import cached, editing
from apps.address import TROUBLE, action, code, line, plain
from circuits.edits.ledger import Ledger
from circuits.edits.recipes import Recipe
from circuits.edits.records import OPERATORS, read_edit
from circuits.families import saved_families
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Unit, Units
from circuits.workspace import ModelRecord

MOST_BYTES, LISTED = 5_000_000, 50
"""Of a recipe that is opened from a file; edits in the list."""

_UNITS = {
    "Set to zero": "zero {on}",
    "Multiply by": "scale {on} factor={n}",
    "Pin to": "clamp {on} low={n} high={n}",
    "Not above": "clamp {on} high={n}",
    "Not below": "clamp {on} low={n}",
}
_INTO = {
    "Its weights: keep only positive ones": "filter_weights into={on} keep=positive",
    "Its weights: keep only negative ones": "filter_weights into={on} keep=negative",
    "Its weights: multiply by": "scale_weights into={on} factor={n}",
    "What it builds: multiply weights by": "scale_weights source={on} factor={n}",
    "Its kernels: turn, degrees": "rotate_weights into={on} degrees={n}",
}
_EDGE = {
    "Cut the connection": "scale_weights into={into} source={source} factor=0",
    "Multiply the connection by": "scale_weights into={into} source={source} factor={n}",
    "Keep only positive weights": "filter_weights into={into} source={source} keep=positive",
    "Keep only negative weights": "filter_weights into={into} source={source} keep=negative",
}


def stack_panel(record: ModelRecord) -> None:
    """The session's edits, in order, with undo and redo."""
    now = editing.stack(record.hash)
    st.subheader("Edits in force")
    if len(now.edits) > LISTED:
        st.caption(f"{len(now.edits)} edits; the last {LISTED} are listed.")
    for i, edit in list(enumerate(now.edits))[-LISTED:]:
        st.code(str(edit), language=None, wrap_lines=True)
        st.button(
            "Remove this", key=f"edit-remove-{i}", on_click=editing.remove, args=(record.hash, i)
        )
    if not now.edits:
        st.caption("None: the model is as it is.")
    with st.container(horizontal=True):
        st.button(
            "Undo",
            on_click=editing.undo,
            args=(record.hash,),
            disabled=not now.past,
            key="edit-undo",
        )
        st.button(
            "Redo",
            on_click=editing.redo,
            args=(record.hash,),
            disabled=not now.future,
            key="edit-redo",
        )
    st.caption(
        "Only you see them: they hold while a number is computed, and nowhere else. This tab keeps them."
    )


def add_panel(record: ModelRecord, model: HookedModel) -> None:
    """What to edit (the URL's `on`), how, and how much."""
    st.subheader("Add an edit")
    on = st.text_input(
        "What: units SITE:INDEX,INDEX or SITE:*, a family's name, or a connection SITE:INDEX->SITE:INDEX",
        st.query_params.get("on", ""), key=f"edit-on-{st.query_params.get('on', '')}", max_chars=400,
    )  # fmt: skip
    if on.strip():
        st.query_params["on"] = on
        try:
            ways = _ways(record, model, on.strip())
        except TROUBLE as error:
            st.error(line(error))
        else:
            _add_way(record, model, ways)
    with st.expander("Any operator, in words"):
        st.text_input(
            "OPERATOR NAME=VALUE …",
            key="edit-words",
            max_chars=2000,
            placeholder="steer direction=mixed3b:3 amount=2",
        )
        written = lambda: _add(record, model, st.session_state["edit-words"])  # noqa: E731
        action("Add", written, "edit-add-words")
        st.caption(
            "  \n".join(f"{code(name)}: {plain(kind.about)}" for name, kind in OPERATORS.items())
        )
        st.caption("`zero UNITS` is `scale UNITS factor=0`.")


def _ways(record: ModelRecord, model: HookedModel, on: str) -> dict[str, str]:
    """What can be done with the units or the connection that a person names: words of edits.

    Raises:
        KeyError, ValueError: if there is no such thing.
    """
    if "->" in on:
        source, _, into = on.partition("->")
        ends = {"source": str(model.unit(source.strip())), "into": str(model.unit(into.strip()))}
        return {name: words.format(**ends, n="{n}") for name, words in _EDGE.items()}
    units = _units(record, model, on)
    ways = _UNITS | (_INTO if model.site(units.site).kind != "latent" else {})
    return {name: words.format(on=units, n="{n}") for name, words in ways.items()}


def _units(record: ModelRecord, model: HookedModel, on: str) -> Units:
    for family in saved_families(cached.workspace().database, record.hash):
        if family.name == on:
            return Units(family.site, tuple(sorted(u.index for u in family.units)))
    units = Units.of(on)
    units.among(model.site(units.site))
    return units


def _add_way(record: ModelRecord, model: HookedModel, ways: dict[str, str]) -> None:
    way = st.selectbox("How", list(ways), key="edit-way")
    words = ways[way]
    if "{n}" in words:
        low, high, value, step = (
            (-180.0, 180.0, 90.0, 15.0) if "degrees" in words else (-3.0, 3.0, 0.5, 0.05)
        )
        words = words.format(
            n=st.slider("How much", low, high, value, step, key=f"edit-much-{way}")
        )
    st.code(words, language=None, wrap_lines=True)
    action("Add this edit", lambda: _add(record, model, words), "edit-add", primary=True)


def _add(record: ModelRecord, model: HookedModel, words: str) -> None:
    if words.strip():
        editing.add(record.hash, read_edit(model, words, files=False))


# --- keeping -------------------------------------------------------------------------------------


def keep_panel(record: ModelRecord, model: HookedModel, recipe: Recipe) -> None:
    """The edits as a file, into the ledger, and from a file."""
    st.subheader("Keep them")
    note = st.text_input("Why", key="edit-note", max_chars=1000)
    noted = Recipe(recipe.edits, recipe.model_hash, note)
    with st.container(horizontal=True):
        st.download_button(
            "Download the recipe", json.dumps(noted.to_dict(), indent=1), "recipe.json", "application/json",
            disabled=not recipe.edits, on_click="ignore",
        )  # fmt: skip
        kept = lambda: _keep(model, noted)  # noqa: E731
        action("Save to the ledger", kept, "edit-ledger", disabled=not recipe.edits)
    file = st.file_uploader("Open a recipe", type=["json"], key="edit-open", max_upload_size=5)
    if file is not None:
        data = file.getvalue()
        action("Put its edits in force", lambda: _load(record, model, data), "edit-load")


def _keep(model: HookedModel, recipe: Recipe) -> str:
    made = Ledger(cached.workspace().writable().database, model).apply(recipe)
    return f"{len(made)} on branch main, the last is {made[-1].hash[:12]}."


def _load(record: ModelRecord, model: HookedModel, data: bytes) -> None:
    if len(data) > MOST_BYTES:
        raise ValueError(f"the file has {len(data)} bytes: expected at most {MOST_BYTES}")
    found = editing.read_recipe(data)
    found.check(model)
    edits = Recipe.of(model, found.edits).edits
    editing.keep(record.hash, editing.stack(record.hash).changed(tuple(edits)))


def unit_of(recipe: Recipe, model: HookedModel) -> Unit | None:
    """The first unit that edits are about."""
    for edit in recipe.edits:
        for name in ("units", "into", "source"):
            units: Units | None = getattr(edit, name, None)
            if units is not None and units.site in {s.name for s in model.sites}:
                return Unit(units.site, units.among(model.site(units.site))[0])
    return None
