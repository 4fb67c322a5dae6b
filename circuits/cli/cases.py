"""`circuits case`: run a case study, by name."""

# no `from __future__ import annotations`: typer reads the annotations
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from circuits.cli.arguments import JsonOption, SeedOption, WeightsOption, WorkspaceOption
from circuits.cli.output import progress_bar, say, show_json, show_table
from circuits.workspace import Workspace

app = typer.Typer()

_PROJECT = Path(__file__).parents[2]


@app.command()
def case(
    name: Annotated[str, typer.Argument(help="Which case: curve-detector.")],
    fast: Annotated[
        bool, typer.Option("--fast", help="Coarse: fewer angles, pictures and images.")
    ] = False,
    transplant: Annotated[
        str, typer.Option(help="The model whose curve units are replaced.")
    ] = "shapes",
    site: Annotated[
        str, typer.Option(help="The site of them (of shapes and googlenet: mixed3b_5x5).")
    ] = "",
    calibrate: Annotated[
        Path | None, typer.Option(help="Folder of images that gains and thresholds are fitted on.")
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="Folder of images to measure on; the same folder: halves of it."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="JSON with the class of each image to measure on.")
    ] = None,
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Run a case study: all of its evidence, as numbers and as one page. Finished stages are kept."""
    study = _study(name)
    options = study.Options(
        fast=fast, transplant=transplant, site=site, weights=weights, calibrate=calibrate,
        evaluate=evaluate, labels=labels, seed=seed,
    )  # fmt: skip
    with progress_bar(name, quiet=json) as progress:
        made = study.run(Workspace.default(workspace), options, progress)
    if json:
        show_json(made.results | {"page": str(made.page)})
        return
    show_table(
        ("in their place", "KL recovered", "95 %", "KL", "top-1", "top-5"),
        [_row(k, c) for k, c in made.results["transplant"].items()],
        title=f"{name}: curve units of {made.results['transplant_facts']['host']} replaced",
    )
    say(f"report: {made.page}")


def _row(name: str, condition: dict[str, Any]) -> tuple[Any, ...]:
    recovered = condition["recovered_kl"]
    between = (
        "" if recovered["low"] is None else f"{recovered['low']:.3f} to {recovered['high']:.3f}"
    )
    values = (condition[k]["value"] for k in ("kl", "accuracy", "top5"))
    return name, recovered["value"], between, *values


def _study(name: str) -> Any:
    """The module of a case: cases stand beside the package, in the project's folder.

    Raises:
        ValueError: if there is none of that name, or cases are not there.
    """
    folder = _PROJECT / "cases"
    known = sorted(p.parent.name.replace("_", "-") for p in folder.glob("*/case.py"))
    if not known:
        raise ValueError(
            f"case {name!r}: cases are part of the project's folder, and {str(folder)!r} holds none"
        )
    if name not in known:
        raise ValueError(f"case {name!r} is not one of {', '.join(known)}")
    if str(_PROJECT) not in sys.path:
        sys.path.insert(0, str(_PROJECT))
    return import_module(f"cases.{name.replace('-', '_')}.case")
