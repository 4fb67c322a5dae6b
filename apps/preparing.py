"""Imports that take seconds, one thread at a time: of two at once, one may see half a module."""

from __future__ import annotations

import threading
from importlib import import_module

ALONE = threading.RLock()
"""Held while pages, or the libraries of a model, are imported."""


def prepare() -> None:
    """Import what pages need while the server starts and a person turns to the browser."""
    with ALONE:
        import_module("apps.views.unit")
    with ALONE:
        import_module("transformer_lens")
