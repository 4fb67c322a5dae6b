"""A session's edits: on a stack, undone and done again; nobody else sees them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import streamlit as st

from apps import tab_storage
from circuits.edits.recipes import Recipe
from circuits.edits.records import Edit
from circuits.history import UndoStack
from circuits.json_files import parse_json

MOST_EDITS = 1000
"""In a recipe that comes from a file or from the tab."""

_STACK = "edits "


@dataclass(frozen=True)
class Stack(UndoStack[tuple[Edit, ...]]):
    """The edits of one model that are in force, applied first to last, with undo and redo."""

    now: tuple[Edit, ...] = ()
    most: ClassVar[int] = 200

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits in force."""
        return self.now

    @cached_property
    def text(self) -> str:
        """The edits in force, for the browser's tab to keep; empty if there are none."""
        return json.dumps(Recipe(self.edits).to_dict()) if self.edits else ""


def stack(model_hash: str) -> Stack:
    """This session's edits of a model; those of the tab's last session if there are none yet."""
    return tab_storage.in_hand(_STACK + model_hash, _read) or Stack()


def _read(text: str) -> Stack:
    return Stack().changed(read_recipe(text).edits)


def keep(model_hash: str, stack: Stack) -> None:
    """Make these the session's edits; the tab keeps them when the page is loaded again."""
    st.session_state[_STACK + model_hash] = stack


def kept() -> dict[str, str]:
    """The edits of all models that this session has had any of, for the tab to keep."""
    return {str(name): now.text for name, now in st.session_state.items() if isinstance(now, Stack)}


def read_recipe(text: str | bytes) -> Recipe:
    """A recipe that comes from a browser.

    Raises:
        ValueError, KeyError: if it is none, or has too many edits.
    """
    try:
        raw = parse_json(text, "the file")
    except (ValueError, RecursionError) as error:
        raise ValueError("the file is not a recipe file: expected JSON") from error
    found = Recipe.from_dict(raw, "the file")
    if len(found.edits) > MOST_EDITS:
        raise ValueError(f"the file has {len(found.edits)} edits: the app takes {MOST_EDITS}")
    return found


def recipe(model_hash: str) -> Recipe:
    """This session's edits as a recipe."""
    return Recipe(stack(model_hash).edits, model_hash)


def add(model_hash: str, edit: Edit) -> None:
    """Put an edit on top."""
    now = stack(model_hash)
    keep(model_hash, now.changed((*now.edits, edit)))


def remove(model_hash: str, place: int) -> None:
    """Take one out of the stack."""
    now = stack(model_hash)
    keep(model_hash, now.changed(now.edits[:place] + now.edits[place + 1 :]))


def undo(model_hash: str) -> None:
    """Take the last change back."""
    keep(model_hash, stack(model_hash).undone())


def redo(model_hash: str) -> None:
    """Make the change again that was last taken back."""
    keep(model_hash, stack(model_hash).redone())
