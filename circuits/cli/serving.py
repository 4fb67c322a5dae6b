"""Starting the app."""

import importlib.util
import ipaddress
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

from typer import Typer

from circuits import jobs
from circuits.cli import options
from circuits.cli.output import console, note, say
from circuits.cli.signatures import Within, command, option
from circuits.demo import (
    LANGUAGE,
    Row,
    build,
    build_first,
    build_language,
    is_built,
    is_language_built,
)
from circuits.environment import TRUST_PYTHON, WORKSPACE
from circuits.tables import Table
from circuits.units import unknown
from circuits.workspace import Workspace

app = Typer()

PORT = 8501
Port = Annotated[int, option("The port at which the app is served.", check=Within(1, 65535))]


def check_installed() -> None:
    """Raise FileNotFoundError if the package was installed without the app."""
    spec = importlib.util.find_spec("apps")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / "workbench.py").is_file():
        raise FileNotFoundError("the app's pages (package `apps`) are not installed")


def check_address(host: str, port: int) -> bool:
    """Whether only this machine reaches an address.

    Raises:
        ValueError: if `host` is not an address; an empty one, which sockets take for all addresses, is refused too.
        OSError: if the address is not this machine's, or the port is taken.
    """
    try:
        if not host.strip():
            raise ValueError("it is empty")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # a UnicodeError is a ValueError
        raise ValueError(
            f"host {host[:80]!r} is not valid: expected an address or a name of this machine, "
            "such as 127.0.0.1"
        ) from error
    family, _, _, _, address = found[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(
                f"port {port} on {host} cannot be used ({error.strerror}): choose another with --port"
            ) from error
    return all(ipaddress.ip_address(where[4][0]).is_loopback for where in found)


def serve_app(
    workspace: Path, port: int, host: str = "127.0.0.1", trust_python: bool = False
) -> NoReturn:
    """Run the app, in the place of this process, until it is stopped.

    Raises:
        ValueError: if there is no such port or address.
        OSError: if the port is taken.
    """
    alone = check_address(host, port)
    check_installed()
    say(f"app: http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C stops it)")
    if not alone:
        say("Whoever reaches this address can start jobs on this machine, and sees its workspace.")
    environment = {**os.environ, WORKSPACE: str(workspace.resolve())}
    if trust_python:
        environment[TRUST_PYTHON] = "1"
    console.file.flush()
    # the server takes this process' place, memory and all
    os.execve(sys.executable, [sys.executable, "-P", "-m", "apps", host, str(port)], environment)


@command(app)
def demo(
    output: options.Output,
    workspace: options.WorkspaceFolder = None,
    port: Port = PORT,
    folder: Annotated[str, option(
        "A folder of your own images: run EfficientNet-Lite0 on them too."
    )] = "",
    model: Annotated[str, option(
        "A language model to build the workspace of instead: smollm2, which is fetched if it is not there."
    )] = "",
    serve: Annotated[bool, option(
        "Open the app as soon as the first model is there and build the others in the background; with --no-serve, "
        "build everything and exit.", "--serve/--no-serve"
    )] = True,
) -> None:  # fmt: skip
    """Build a demo workspace from the built-in models (works offline) and open the app on it."""
    place = Workspace.default(workspace).writable()
    rows = (
        _language(place, model, folder, serve, output)
        if model
        else _builtin(place, folder, serve, output)
    )
    table = Table(
        ("model", "what", "result", "where"), [(r.model, r.what, r.result, r.where) for r in rows]
    )
    output.show([asdict(row) for row in rows], [table])
    if serve:
        serve_app(place.root, port)


def _builtin(place: Workspace, folder: str, serve: bool, output: options.Output) -> list[Row]:
    """Build the workspace of the built-in models; with the app, what takes longer in the background."""
    later = serve and not is_built(place)
    with output.progress("demo") as progress:
        rows = build_first(place, folder, progress) if folder or later else []
        if not later:
            rows = list(dict.fromkeys([*rows, *build(place, progress)]))
    if later:
        jobs.start(place, ["demo", "--no-serve"], "Build the demo's other models")
        say(
            "The other models are being built in the background; see the app's Jobs page for progress."
        )
    return rows


def _language(
    place: Workspace, model: str, folder: str, serve: bool, output: options.Output
) -> list[Row]:
    """Build the workspace of a language model; with the app, its circuit in the background."""
    if folder:
        raise ValueError(f"--folder {folder!r} is for images: model {model} takes texts")
    if model not in LANGUAGE:
        raise unknown("language model with a demo", model, list(LANGUAGE))
    later = serve and not is_language_built(place, model)
    first, last = LANGUAGE[model].minutes
    if not is_language_built(place, model):
        told = f"the circuit of {LANGUAGE[model].task} another {last}" + (
            ", in the background" if later else ""
        )
        note(f"the workspace of {model} takes about {first} minutes on two cores, and {told}")
    with output.stages() as stage:
        rows = build_language(place, model, not later, output.announced(stage), stage)
    if later:
        job = ["demo", "--model", model, "--no-serve"]
        jobs.start(place, job, f"Find the circuit of {LANGUAGE[model].task}")
        say(
            f"The circuit of {LANGUAGE[model].task} is being found in the background; see the app's Jobs page for "
            "progress."
        )
    return rows


@command(app, "app")
def open_app(
    workspace: options.WorkspaceFolder = None,
    port: Port = PORT,
    host: Annotated[str, option(
        "The address at which the app is served. By default this machine alone reaches it."
    )] = "127.0.0.1",
    trust_python: Annotated[bool, option(
        "Run the code that python: models and python: data of the workspace name.", "--trust-python"
    )] = False,
) -> None:  # fmt: skip
    """Start the app on a workspace."""
    serve_app(Workspace.default(workspace).root, port, host, trust_python)
