"""`circuits case`: run a case study, by name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from typer import Typer

from circuits.cli import options
from circuits.cli.signatures import argument, command, option
from circuits.workspace import Workspace

app = Typer()

_PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """How a case is run; what is given must be a field of the case's `Options`, which has the defaults."""

    fast: Annotated[bool, option(
        "Run it coarsely: with fewer angles, pictures, images and texts.", "--fast"
    )] = False  # fmt: skip
    transplant: Annotated[str, option(
        "The model whose curve units are replaced, by curve-detector. By default shapes."
    )] = ""  # fmt: skip
    site: Annotated[str, option(
        "The site of these units, for curve-detector. By default mixed3b_5x5, for shapes and googlenet."
    )] = ""  # fmt: skip
    calibrate: Annotated[Path | None, option(
        "A folder of images on which curve-detector fits gains and thresholds; not needed for shapes, which has "
        "its drawings."
    )] = None  # fmt: skip
    evaluate: Annotated[Path | None, option(
        "A folder of images to measure on; the folder of --calibrate is halved. Not needed for shapes; "
        "imagenet defaults to the photographs in scikit-image."
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
    name: Annotated[str, argument("The name of the case: curve-detector, imagenet or ioi.")],
    settings: Settings,
    output: options.Output,
    workspace: options.WorkspaceFolder = None,
) -> None:
    """Run a case study and report its evidence as numbers and as a page. Run it again to resume."""
    study = _study(name)
    asked = _options(name, study.Options, settings)
    with output.progress(name) as progress:
        made = study.run(Workspace.default(workspace), asked, progress)
    output.show(made.results | {"page": str(made.page)}, [study.table(made)])


def _options(name: str, of_case: Any, settings: Settings) -> Any:
    """What a case is asked for: its own options, without those that were not given.

    Raises:
        ValueError: if one was given that the case does not have.
    """
    known = {field.name for field in fields(of_case)}
    given = {k: v for k, v in vars(settings).items() if v not in (None, "")}
    # Switches and the seed have a value in any case.
    if unknown := sorted(given.keys() - known - {"fast", "seed"}):
        raise ValueError(f"--{unknown[0]}: case {name} has no such option")
    return of_case(**{k: v for k, v in given.items() if k in known})


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
