"""A session's edits: on a stack, undone and done again; nobody else sees them (layer 7)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import streamlit as st

from circuits.edits.recipes import Recipe
from circuits.edits.records import Edit


@dataclass(frozen=True)
class Stack:
    """Edits of one model, and those that were taken back.

    Attributes:
        edits: in force, applied first to last.
        past: the states before, oldest first.
        future: the states that were taken back, the last one last.
    """

    edits: tuple[Edit, ...] = ()
    past: tuple[tuple[Edit, ...], ...] = ()
    future: tuple[tuple[Edit, ...], ...] = ()

    def changed(self, edits: tuple[Edit, ...]) -> Stack:
        """With other edits in force; what was taken back is forgotten."""
        return Stack(edits, (*self.past, self.edits)[-MOST_STATES:], ())

    def undone(self) -> Stack:
        """As before the last change."""
        if not self.past:
            return self
        return Stack(self.past[-1], self.past[:-1], (*self.future, self.edits))

    def redone(self) -> Stack:
        """With the change that was last taken back."""
        if not self.future:
            return self
        return replace(
            self, edits=self.future[-1], past=(*self.past, self.edits), future=self.future[:-1]
        )


MOST_STATES = 200
"""How many changes can be taken back."""


def stack(model_hash: str) -> Stack:
    """This session's edits of a model."""
    return st.session_state.get(f"edits {model_hash}", Stack())


def keep(model_hash: str, stack: Stack) -> None:
    """Make these the session's edits."""
    st.session_state[f"edits {model_hash}"] = stack


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
