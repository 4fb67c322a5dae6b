"""What a person has in hand outlives a reload, and the server: their browser's tab keeps it.

Edits in force and circuits that were drawn are texts by slot. After each change they go to the tab's
`sessionStorage`, which no other tab sees; a new session gets back what the last one of its tab has left. It comes
from a browser: it is parsed with the limits of an upload, and what does not fit the model shows as an error.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import streamlit as st
from streamlit.components import v2

from apps.address import AGAIN, TROUBLE, line, plain
from circuits.history import UndoStack

MOST_CHARACTERS = 2_000_000
"""Of one slot; a tab keeps a few of this size."""

RECALLED = "recalled from the tab"
"""Under which the session has what came back, until it is asked for."""

U = TypeVar("U", bound=UndoStack)


@cache
def _component() -> Any:
    script = Path(__file__).parent / "canvas" / "keeper.js"
    return v2.component("circuits_keeper", js=script.read_text(), isolate_styles=False)


def keep(slots: Mapping[str, str], key: str = "keeper", *, recalls: bool = False) -> None:
    """Let the tab keep texts: what was there in these slots is replaced, or forgotten for an empty text.

    Args:
        slots: texts by the names of their slots.
        key: of the element on the page, which cannot be seen.
        recalls: whether this element asks a new session's tab what it still has; one of a page does.
    """
    session = st.session_state.setdefault("session", secrets.token_hex(8))
    large = [slot for slot, text in slots.items() if len(text) > MOST_CHARACTERS]
    if large:
        what = " and ".join(sorted({slot.split()[0] for slot in large}))
        st.caption(f"Your {plain(what)}: too large to outlive a reload. Save or download it.")

    def recalled() -> None:
        found = st.session_state[key].recalled
        if isinstance(found, Mapping):
            st.session_state[RECALLED] = {str(slot): str(text) for slot, text in found.items()}
            st.session_state[AGAIN] = True

    def full() -> None:
        if st.session_state[key].full:
            st.toast("This tab cannot keep more: save what must outlive a reload.")

    _component()(
        key=key, on_recalled_change=recalled, on_full_change=full,
        data={"session": session, "recalls": recalls, "slots": {s: "" if s in large else t for s, t in slots.items()}},
    )  # fmt: skip


def in_hand(slot: str, read: Callable[[str], U]) -> U | None:
    """What the session has in a slot; while nothing was changed in it, what the tab has kept, as a change.

    Says why, if that cannot be read.

    Args:
        slot: where the session and the tab keep it.
        read: what a text from the tab stands for, with a past of its own, if the session has nothing yet.
    """
    now: U | None = st.session_state.get(slot)
    text = st.session_state.get(RECALLED, {}).pop(slot, "")
    if not text or (now is not None and not now.untouched):
        return now
    try:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"{len(text)} characters: at most {MOST_CHARACTERS} are kept")
        kept = read(text)
    except TROUBLE as error:
        st.warning(f"What this tab kept could not be taken up again: {line(error)}")
        return now
    st.session_state[slot] = kept if now is None else replace(kept, past=(now.now,))
    return st.session_state[slot]
