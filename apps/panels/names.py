"""What a unit is called, why, and by whom."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import action, plain
from circuits.concepts import history, name_unit, names_of
from circuits.database import Record
from circuits.units import Unit


def names_panel(unit: Unit, model_hash: str) -> None:
    """The unit's name with its evidence, and a place to give it another; what it was called stays in the history."""
    known = names_of(cached.workspace().database, model_hash).get(str(unit))
    left, right = st.columns([3, 1], vertical_alignment="center")
    left.caption(_in_words(known) if known else "No name yet.")
    if known and known.version > 1:
        with left.popover("History"):
            for old in history(cached.workspace().database, model_hash, unit):
                st.caption(_in_words(old))
    with right.popover("Name it"), st.form(f"name-{model_hash}-{unit}", clear_on_submit=True):
        key = f"name-{model_hash}-{unit}"
        st.text_input("What it is", max_chars=200, key=f"{key}-is")
        st.text_input("Why", max_chars=1000, key=f"{key}-why")

        def named() -> None:
            name, why = st.session_state[f"{key}-is"], st.session_state[f"{key}-why"]
            name_unit(cached.workspace().writable().database, model_hash, unit, name, why)

        action("Keep", named, f"{key}-keep", form=True)


def _in_words(record: Record) -> str:
    body = record.body
    if record.fault:
        return plain(record.fault)
    if body is None:
        return f"Not named (version {record.version:d})."
    said = [
        f"Called “{plain(body['text'])}” by {plain(record.author)}, {plain(record.created[:10])}"
    ]
    if body["score"] is not None:
        said.append(
            f"AUROC {body['score']:.2f} on examples that it was not chosen on (by chance 0.50), p {body['p_value']:.2g}"
        )
        evidence = body["evidence"]
        if "top_held_out" in evidence:
            said.append(
                f"{100 * evidence['top_held_out']:.0f} % of the ten that excite it most there, "
                f"{100 * evidence['base_rate']:.0f} % of all"
            )
    if record.note:
        said.append(plain(record.note))
    return "; ".join(said) + f" (version {record.version:d})."
