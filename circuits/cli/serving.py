"""Starting the app (layer 7)."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from circuits.cli.output import say
from circuits.workspace import ROOT, TRUST_PYTHON


def app_file() -> Path:
    """The app's entry page.

    Raises:
        FileNotFoundError: if the package was installed without it.
    """
    spec = importlib.util.find_spec("apps")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / "workbench.py").is_file():
        raise FileNotFoundError("the app's pages (package `apps`) are not installed")
    return folder / "workbench.py"


def check_port(port: int) -> None:
    """Raise ValueError if there is no such port."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not valid: expected 1 to 65535")


def serve_app(
    workspace: Path, port: int, host: str = "127.0.0.1", trust_python: bool = False
) -> NoReturn:
    """Run the app, in the place of this process, until it is stopped.

    Raises:
        ValueError: if there is no such port.
        OSError: if the port is taken.
    """
    check_port(port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"port {port} on {host} cannot be used ({error.strerror}): choose another with --port"
            ) from error
    say(f"app: http://{host}:{port}  (Ctrl-C stops it)")
    command = [
        sys.executable, "-P", "-m", "apps", "run", str(app_file()),
        "--server.address", host, "--server.port", str(port), "--server.headless", "true",
        "--browser.gatherUsageStats", "false", "--server.fileWatcherType", "none",
        "--server.maxUploadSize", "20", "--client.toolbarMode", "minimal", "--runner.magicEnabled", "false",
    ]  # fmt: skip
    environment = {**os.environ, ROOT: str(workspace.resolve())}
    if trust_python:
        environment[TRUST_PYTHON] = "1"
    sys.stdout.flush()
    # the server takes this process' place, memory and all
    os.execve(sys.executable, command, environment)
