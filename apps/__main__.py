"""The app's server, as `circuits app` starts it."""

from __future__ import annotations

import threading

from streamlit.web.cli import main

from apps.preparing import prepare

if __name__ == "__main__":
    threading.Thread(target=prepare, daemon=True).start()
    main(prog_name="circuits app")
