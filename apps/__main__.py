"""The app's server, as `circuits app` starts it: `python -m apps HOST PORT`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware

from apps.guard import Guard
from apps.preparing import prepare

SETTINGS = {
    "server.headless": True, "server.fileWatcherType": "none", "server.maxUploadSize": 20,
    "browser.gatherUsageStats": False, "client.toolbarMode": "minimal", "runner.magicEnabled": False,
    "logger.hideWelcomeMessage": True,  # for which Streamlit asks a server of others what this machine's address is
    "client.allowedOrigins": [],  # by default a page of Streamlit's cloud that has the app in a frame may steer it
}  # fmt: skip


def serve(host: str, port: int) -> None:
    """Serve the app until it is stopped."""
    app = st.App(
        Path(__file__).with_name("workbench.py"), middleware=[Middleware(Guard, host=host)]
    )
    app.run(config={**SETTINGS, "server.address": host, "server.port": port})


if __name__ == "__main__":
    threading.Thread(target=prepare, daemon=True).start()
    serve(sys.argv[1], int(sys.argv[2]))
