"""Claiming a circuit that is on the canvas."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import TROUBLE, action, link, open_page, plain
from apps.drawing import Drawing
from circuits import errors
from circuits.claims.kept import claim_saved, claims_path
from circuits.discovery import edges_of
from circuits.graph.saved import circuit_history
from circuits.models.adapter.hooked_model import HookedModel
from circuits.workspace import ModelRecord

_WRITTEN = "claims to open"


def claim_this_panel(record: ModelRecord, model: HookedModel, now: Drawing) -> None:
    """A button that writes the usual claims about the circuit and opens them; or why there is none, in a line."""
    name = st.query_params.get("circuit", "")
    why = _not_claimable(record, now, name)
    if why:
        st.caption(f"No claims: {plain(why)}.")
        return
    place = cached.workspace()
    path = claims_path(place, name, record)

    def written() -> None:
        made = claim_saved(place.writable(), name, record, model)
        st.session_state[_WRITTEN] = made.stem

    if path.exists():
        link("claims", "Its claims", model=cached.label_of(record), file=path.stem)
    else:
        about = "Write the usual claims about this circuit into a file, each with the test that could refute it"
        action("Claim this", written, "circuit-claim", help=about)
    asked = st.session_state.pop(_WRITTEN, None)
    if asked is not None:
        open_page("claims", model=cached.label_of(record), file=asked)


def _not_claimable(record: ModelRecord, now: Drawing, name: str) -> str:
    """Why nothing can be claimed of what is drawn; empty if it can be."""
    try:
        edges_of(now.graph)
        if not (name and now.version):
            return "save this circuit first, and open it by its name"
        if now.past:
            return "what is drawn was changed since it was saved"
        latest = circuit_history(cached.workspace().database, name, record.hash)[-1].version
    except TROUBLE as error:
        return errors.line(error)
    return (
        ""
        if now.version == latest
        else f"this is version {now.version}, and claims are about the latest, {latest}"
    )
