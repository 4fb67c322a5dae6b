"""What was done, and how to go back: append-only logs in SQLite, undo in memory. In the lowest layer."""

from circuits.history.log import LAST, Head, Log, content_hash, signed
from circuits.history.undo import UndoStack

__all__ = ["LAST", "Head", "Log", "UndoStack", "content_hash", "signed"]
