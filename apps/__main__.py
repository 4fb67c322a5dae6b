"""The app's server, as `circuits app` starts it (layer 7)."""

from __future__ import annotations

import threading
from importlib import import_module

from streamlit.web.cli import main


def prepare() -> None:
    """Import what pages need while the server starts and a person turns to the browser."""
    for name in ("apps.views.home", "apps.views.unit", "apps.views.circuit", "transformer_lens"):
        import_module(name)


if __name__ == "__main__":
    threading.Thread(target=prepare, daemon=True).start()
    main(prog_name="circuits app")
