"""The case: curve detectors written by hand, shown as the articles show theirs, and put into other networks.

Cammarata et al. 2020, "Curve Detectors", and 2021, "Curve Circuits" (Distill). Each stage is kept in the workspace by
what it was made from, and of the transplant each part, so that a second run, or one after an interruption, makes only
what is missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import circuits
from cases.curve_detector import evidence, hosts
from cases.curve_detector.page import write_page
from cases.curve_detector.stage import Options, Progress, Stage
from circuits.cleanroom.network import provenance
from circuits.figures import save_figure
from circuits.files import Keep, keeping, write_json
from circuits.json_files import read_json
from circuits.models.zoo.loading import load_model
from circuits.workspace import Workspace

NAME = "curve-detector"
FOLDER = Path(__file__).parent
_PARTS = 100  # of a stage, for the progress bar


@dataclass(frozen=True)
class Result:
    """What a run showed.

    Attributes:
        results: all numbers, as `results.json` has them.
        page: the report.
        folder: where both are.
    """

    results: dict[str, Any]
    page: Path
    folder: Path


Make = Callable[[Progress, Keep], Stage]


def run(
    workspace: Workspace, options: Options | None = None, progress: Progress | None = None
) -> Result:
    """Run the case, or what is missing of it; write `results.json` and `report.html`.

    Args:
        workspace: where stages are kept, below `cases/curve-detector`.
        options: what to show.
        progress: called with what is done and all there is.

    Raises:
        FileNotFoundError: if a model's weights or a folder of images are missing.
        KeyError, ValueError: if an option does not fit, or the host has no curve units.
    """
    options = Options() if options is None else options
    model = load_model("cleanroom")
    host = load_model(options.transplant, options.weights)
    images, site = hosts.images_of(options, host), hosts.site_of(host, options)
    base = {"model": model.hash, "code": _code(), "fast": options.fast, "seed": options.seed}
    own = {"host": host.hash, "site": site, "images": images.facts}
    moving = f"transplant into {host.name}"
    stages: dict[str, tuple[dict[str, Any], Make]] = {
        "tuning": (base, lambda *_: evidence.tuning(model, options)),
        "negative weights": (base, lambda *_: evidence.echo(model, options)),
        "weights": (base, lambda *_: evidence.weights(model, options)),
        "pictures": (base, lambda *_: evidence.pictures(model, options)),
        "photographs": (base, lambda *_: evidence.photographs(model, options)),
        moving: (base | own, lambda *how: hosts.transplant(model, host, images, options, *how)),
    }
    folder = workspace.writable().root / "cases" / NAME
    made: dict[str, tuple[dict[str, Any], dict[str, Path]]] = {}
    # the host comes first: what is wrong with it is said before minutes have passed
    for k, name in enumerate(sorted(stages, key=lambda name: name != moving)):
        note = partial(_within, progress, k, len(stages))
        note(0, 1)
        made[name] = _kept(folder, name, *stages[name], note)
        note(1, 1)
    numbers = {name: made[name][0] for name in stages}
    results = {
        "case": NAME,
        "units": numbers["tuning"].pop("units"),
        **numbers["tuning"],
        **numbers["negative weights"],
        **numbers["weights"],
        "photographs": numbers["photographs"],
        **numbers[moving],
        "seed": options.seed,
        "fast": options.fast,
        "hashes": {"cleanroom": model.hash, host.name: host.hash},
        "provenance": provenance(),
    }
    write_json(folder / "results.json", results)
    page = folder / "report.html"
    write_page(page, results, {name: made[name][1] for name in stages})
    return Result(results, page, folder)


def _within(progress: Progress | None, stage: int, n: int, done: int, total: int) -> None:
    """Tell the progress of one stage as a part of all."""
    if progress is not None:
        progress(stage * _PARTS + round(_PARTS * done / max(total, 1)), n * _PARTS)


def _code() -> str:
    """What the code of the case and of the library is, in short: other code, other results."""
    sources = [
        *FOLDER.glob("*.py"),
        evidence.PUBLISHED,
        *Path(circuits.__file__).parent.rglob("*.py"),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]


def _kept(
    folder: Path, name: str, facts: dict[str, Any], make: Make, progress: Progress
) -> tuple[dict[str, Any], dict[str, Path]]:
    """A stage as it was made before from the same facts, or made now."""
    key = hashlib.sha256(json.dumps([name, facts], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / "stages" / f"{name.replace(' ', '-')}-{key}"
    try:
        known = read_json(place / "stage.json")
        paths = {caption: place / file for caption, file in known["figures"].items()}
        if all(path.is_file() for path in paths.values()):
            return known["numbers"], paths
    except (OSError, ValueError, KeyError):
        pass  # there is none, or it was not finished: it is made now
    stage = make(progress, keeping(place / "parts"))
    place.mkdir(parents=True, exist_ok=True)
    files = {caption: f"figure-{k}.png" for k, caption in enumerate(stage.figures)}
    for caption, figure in stage.figures.items():
        save_figure(figure, place / files[caption])
    write_json(place / "stage.json", {"numbers": stage.numbers, "figures": files, "facts": facts})
    shutil.rmtree(place / "parts", ignore_errors=True)  # all of them are in it
    # read back, so that a first run and one from the cache say the same
    numbers = read_json(place / "stage.json")["numbers"]
    return numbers, {caption: place / file for caption, file in files.items()}
