"""`circuits case`: run a case study, by name."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from typer import Typer

from circuits.cli import options
from circuits.cli.signatures import argument, command, option
from circuits.tables import Table
from circuits.workspace import Workspace

app = Typer()

_PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """How a case is run; `Options` of the case has the same fields."""

    fast: Annotated[bool, option(
        "Run it coarsely: with fewer angles, pictures and images.", "--fast"
    )] = False  # fmt: skip
    transplant: Annotated[str, option("The model whose curve units are replaced.")] = "shapes"
    site: Annotated[str, option(
        "The site of these units. By default mixed3b_5x5, for shapes and googlenet."
    )] = ""  # fmt: skip
    calibrate: Annotated[Path | None, option(
        "A folder of images on which gains and thresholds are fitted; not needed for shapes, which has its drawings."
    )] = None  # fmt: skip
    evaluate: Annotated[Path | None, option(
        "A folder of images to measure on; the folder of --calibrate is halved. Not needed for shapes."
    )] = None  # fmt: skip
    labels: Annotated[Path | None, option(
        "A JSON file with the class of each of these images; not needed for shapes."
    )] = None  # fmt: skip
    weights: Annotated[Path | None, option("A file of weights for the model of --transplant.")] = (
        None
    )
    seed: options.Seed = 0


@command(app)
def case(
    name: Annotated[str, argument("The name of the case, e.g. curve-detector.")],
    settings: Settings,
    output: options.Output,
    workspace: options.WorkspaceFolder = None,
) -> None:
    """Run a case study and report its evidence as numbers and as a page. Run it again to resume."""
    study = _study(name)
    with output.progress(name) as progress:
        made = study.run(Workspace.default(workspace), study.Options(**vars(settings)), progress)
    rows = [_row(k, c) for k, c in made.results["transplant"].items()]
    title = f"{name}: curve units of {made.results['transplant_facts']['host']} replaced"
    columns = ("in their place", "KL recovered", "95 %", "KL", "top-1", "top-5")
    output.show(
        made.results | {"page": str(made.page)},
        [Table(columns, rows, title, f"report: {made.page}")],
    )


def _row(name: str, condition: dict[str, Any]) -> tuple[Any, ...]:
    recovered = condition["recovered_kl"]
    low, high = recovered["low"], recovered["high"]
    values = (condition[k]["value"] for k in ("kl", "accuracy", "top5"))
    return name, recovered["value"], "" if low is None else f"{low:.3f} to {high:.3f}", *values


def _study(name: str) -> Any:
    """The module of a case: cases are in the project's folder, next to the package.

    Raises:
        ValueError: if there is none of that name, or cases are not there.
    """
    folder = _PROJECT / "cases"
    known = sorted(p.parent.name.replace("_", "-") for p in folder.glob("*/case.py"))
    if not known:
        raise ValueError(
            f"case {name!r}: cases are part of the project's folder, and {str(folder)!r} holds none"
        )
    if (claims := folder / name.replace("-", "_") / "claims.yaml").is_file() and name not in known:
        raise ValueError(f"case {name!r} is a file of claims: run circuits verify {claims}")
    if name not in known:
        raise ValueError(f"case {name!r} is not one of {', '.join(known)}")
    if str(_PROJECT) not in sys.path:
        sys.path.insert(0, str(_PROJECT))
    return import_module(f"cases.{name.replace('-', '_')}.case")
