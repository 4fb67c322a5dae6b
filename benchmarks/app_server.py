"""For `app.py` and `app_sessions.py`: a workspace for the app, and the app as a process; measures nothing itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from circuits.demo import build
from circuits.featurevis.sheets import find_sheets
from circuits.files import write_json
from circuits.graph import CircuitGraph, GraphStore
from circuits.graph.saved import save_circuit, saved_circuits
from circuits.harvesting import find_stores, harvest
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.stimuli.sources import open_source
from circuits.units import Unit
from circuits.weights import build_graph
from circuits.workspace import ModelRecord, Workspace

MB = 1024 * 1024

NODES = 300
"""Of the circuit that is saved."""


@dataclass(frozen=True)
class Server:
    """A running app.

    Attributes:
        port: on 127.0.0.1.
        process: what `circuits app` became; the server is its child.
        log: what both have written.
    """

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def memory(self) -> float:
        """MB that its processes hold together (resident)."""
        return sum(_resident(pid) for pid in _tree(self.process.pid)) / MB

    def tracebacks(self) -> list[str]:
        """The last line of every traceback in its log."""
        found = []
        for part in self.log.read_text(errors="replace").split("Traceback (most recent call last)")[
            1:
        ]:
            ends = [
                line for line in part.splitlines()[1:] if line and not line.startswith((" ", "│"))
            ]
            found.append(ends[0] if ends else "traceback")
        return found


@contextmanager
def serving(workspace: Path, log: Path) -> Iterator[Server]:
    """The app on a workspace, as `circuits app` starts it; stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "circuits.cli.main", "app", "--workspace", str(workspace), "--port", str(port),
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        server = Server(port, process, log)
        _wait(server)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # the group is its own
        process.wait(timeout=30)


def _wait(server: Server) -> None:
    for _ in range(600):
        if server.process.poll() is not None:
            raise RuntimeError(f"the app ended at once:\n{server.log.read_text(errors='replace')}")
        try:
            with urllib.request.urlopen(f"{server.url}/_stcore/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"the app did not answer at {server.url}")


def _tree(pid: int) -> list[int]:
    """A process and all below it (Linux)."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return []
    return [pid, *(p for child in children for p in _tree(child))]


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- the workspace -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model whose pages are timed.

    Attributes:
        model: its name.
        site: whose units are looked at.
        first: the first of them.
        sheet: the site whose sheet is looked at.
    """

    model: str
    site: str
    first: int
    sheet: str


SHAPES = Subject("shapes", "mixed3a", 100, "mixed3b")
GOOGLENET = Subject("googlenet", "mixed3b", 379, "mixed5a")


def prepare(place: Workspace) -> list[Subject]:
    """Build what is missing: the demo, GoogLeNet if its weights are here, pictures, a large circuit."""
    build(place)
    subjects = [SHAPES]
    if os.environ.get("CIRCUITS_ASSETS"):
        subjects.append(GOOGLENET)
        model = load_model("googlenet")
        if not list(find_stores(place, model.hash)):
            record = ModelRecord("googlenet", model.hash)
            harvest(model, open_source("photos"), [GOOGLENET.site, GOOGLENET.sheet], place, record)
        stand_in(place, model, GOOGLENET.sheet)
        stand_in(place, model, GOOGLENET.site)
    else:
        stand_in(place, load_model("shapes"), SHAPES.sheet)
    for subject in subjects:
        circuit(place, load_model(subject.model), subject)
    return subjects


def stand_in(place: Workspace, model: HookedModel, site: str, size: int = 128) -> None:
    """Pictures of a unit each that cost nothing: smooth noise, as large as real ones, where there is no sheet."""
    folder = place.sheets_folder(model.hash)
    if any(sheet.site == site for sheet in find_sheets(folder)):
        return
    n, made = model.site(site).n_units, folder / f"{site}-standin"
    made.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(n):
        _noise(generator, size).save(made / f"{i:05d}.webp", "WEBP", quality=90)
    facts = [
        {"unit": f"{site}:{i}", "kind": "positive", "model_hash": model.hash} for i in range(n)
    ]
    about = {
        "site": site,
        "model": model.name,
        "model_hash": model.hash,
        "negative": False,
        "columns": 1,
    }
    write_json(made / "sheet.json", about | {"tile": [size, size], "units": facts})


def _noise(generator: np.random.Generator, size: int) -> Image.Image:
    coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def circuit(place: Workspace, model: HookedModel, subject: Subject) -> None:
    """Save a circuit of 300 nodes, grown from units by their five strongest neighbours on each side, with pictures."""
    if any(r.name == circuit_name(model.name) for r in saved_circuits(place.database, model.hash)):
        return
    folder = place.model_folder(model.hash)
    if not (folder / "graph.h5").is_file():
        build_graph(model, folder).close()
    with GraphStore(folder) as store:
        graph = _grown(store, subject, model)
    generator = np.random.default_rng(0)
    for unit in graph:
        path = place.picture_path(model.hash, str(unit), "0steps-standin")
        if isinstance(unit, Unit) and not place.pictures(model.hash, unit):
            path.parent.mkdir(exist_ok=True)
            _noise(generator, 128).save(path)
    save_circuit(place.database, circuit_name(model.name), graph, "for a benchmark")


def circuit_name(model: str) -> str:
    return f"benchmark of {NODES} nodes on {model}"


def _grown(store: GraphStore, subject: Subject, model: HookedModel) -> CircuitGraph:
    found = CircuitGraph(model_hash=model.hash)
    waiting, done = [Unit(subject.site, subject.first)], set()
    while waiting:
        unit = waiting.pop(0)
        if unit in done:
            continue
        done.add(unit)
        around = store.neighbourhood(unit, 1, 5)
        for a, b, key, data in around.edges(keys=True, data=True):
            if len(found) + len({a, b} - set(found)) <= NODES and not found.has_edge(a, b, key):
                found.add_edge(a, b, key, **data)
        if len(found) >= NODES:
            break
        waiting += [n for n in around if isinstance(n, Unit) and n.site != "input"]
        if not waiting:  # all that can be reached is there: go on elsewhere
            waiting = [
                Unit(subject.site, i) for i in range(len(done)) if Unit(subject.site, i) not in done
            ][:1]
    return found
