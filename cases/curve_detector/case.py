"""The case: curve detectors written by hand, shown as the articles show theirs, and put into other networks.

Cammarata et al. 2020, "Curve Detectors", and 2021, "Curve Circuits" (Distill). Each stage is kept in the workspace by
what it was made from, and of the transplant each part, so that a second run, or one after an interruption, makes only
what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases.curve_detector import evidence, hosts
from cases.curve_detector.page import write_page
from cases.curve_detector.stage import Options
from cases.stages import Make, Progress, Result, code_of, each_stage
from circuits.cleanroom.network import provenance
from circuits.files import write_json
from circuits.models.zoo.loading import load_model
from circuits.tables import Table
from circuits.workspace import Workspace

NAME = "curve-detector"
FOLDER = Path(__file__).parent


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
    base = {
        "model": model.hash,
        "code": code_of(FOLDER, evidence.PUBLISHED),
        "fast": options.fast,
        "seed": options.seed,
    }
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
    # the host comes first: what is wrong with it is said before minutes have passed
    order = sorted(stages, key=lambda name: name != moving)
    made = dict(each_stage(folder, {name: stages[name] for name in order}, progress))
    numbers = {name: made[name].numbers for name in stages}
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
    write_page(page, results, {name: made[name].figures for name in stages})
    return Result(results, page, folder)


def table(made: Result) -> Table:
    """What came of putting something else in the place of the host's curve units."""
    rows = [_row(name, condition) for name, condition in made.results["transplant"].items()]
    title = f"{NAME}: curve units of {made.results['transplant_facts']['host']} replaced"
    columns = ("in their place", "KL recovered", "95 %", "KL", "top-1", "top-5")
    return Table(columns, rows, title, f"report: {made.page}")


def _row(name: str, condition: dict[str, Any]) -> tuple[Any, ...]:
    recovered = condition["recovered_kl"]
    low, high = recovered["low"], recovered["high"]
    values = (condition[k]["value"] for k in ("kl", "accuracy", "top5"))
    return name, recovered["value"], "" if low is None else f"{low:.3f} to {high:.3f}", *values
