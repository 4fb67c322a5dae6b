"""Undo and redo in memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U", bound="UndoStack[Any]")


@dataclass(frozen=True)
class UndoStack(Generic[T]):
    """A state that changes, with the states to which undo and redo lead.

    Attributes:
        now: the current state.
        past: the states before it, oldest first.
        future: the states that were undone, the one to redo next last.
        most: how many past states are kept.

    >>> a = UndoStack("a").changed("b")
    >>> a.undone().now, a.undone().redone() == a, a.undone().changed("c").redone().now
    ('a', True, 'c')
    """

    now: T
    past: tuple[T, ...] = ()
    future: tuple[T, ...] = ()
    most: ClassVar[int] = sys.maxsize

    @property
    def untouched(self) -> bool:
        """Whether there was no change at all, not even one that was undone."""
        return not self.past and not self.future

    def changed(self: U, now: Any) -> U:
        """With another state; what was undone is forgotten."""
        # The oldest states are dropped once there are more than `most`.
        return replace(self, now=now, past=(*self.past, self.now)[-self.most :], future=())

    def undone(self: U) -> U:
        """As before the last change; itself if there was none."""
        if not self.past:
            return self
        *past, now = self.past
        # `future` is a stack like `past`: its last state is the next to redo.
        return replace(self, now=now, past=tuple(past), future=(*self.future, self.now))

    def redone(self: U) -> U:
        """With the change that was undone last; itself if there is none."""
        if not self.future:
            return self
        *future, now = self.future
        return replace(self, now=now, past=(*self.past, self.now), future=tuple(future))
