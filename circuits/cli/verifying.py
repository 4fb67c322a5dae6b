"""`circuits verify`: test claims, and say what stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Exit, Typer

from circuits.claims import Report, exit_code, read_claims
from circuits.claims import verify as verified
from circuits.claims.files import is_claim_file
from circuits.claims.kept import report_folder
from circuits.claims.report import write_report
from circuits.cli import options
from circuits.cli.signatures import argument, command, option
from circuits.workspace import Workspace

app = Typer()


@command(app)
def verify(
    file: Annotated[Path, argument("A claim file, or with --all a folder of them.")],
    output: options.Output,
    every: Annotated[bool, option("Verify all claim files below the folder.", "--all")] = False,
    report: Annotated[Path | None, option(
        "The folder for report.html and report.json. By default claims/NAME in the workspace."
    )] = None,
    exit_zero: Annotated[bool, option(
        "End with exit code 0 whatever the verdicts are, if every claim was looked at.", "--exit-zero"
    )] = False,
    workspace: options.WorkspaceFolder = None,
) -> None:  # fmt: skip
    """Test the claims of a file and say what stands.

    Exit codes: 0 if every verdict is the expected one; 1 if one is the opposite; 3 if one is undecided or could not be
    tested; 4 if the model changed since the claims were written; 2 for bad input.
    """
    place = Workspace.default(workspace)
    paths = _below(file) if every else [file]
    files = {path: read_claims(path) for path in paths}  # all are read before any is tested
    made: list[Report] = []
    pages: list[Path] = []
    for path, claims in files.items():
        with output.stages() as stage:
            made.append(verified(claims, place, folder=path.parent, stage=stage))
        own = report_folder(place, claims.name)
        folder = own if report is None else report / own.name if every else report
        pages.append(write_report(made[-1], folder))
    shown = [part for one in made for part in one.tables()]
    output.show(made if every else made[0], [*shown, *(f"report: {page}" for page in pages)])
    raise Exit(0 if exit_zero else max_code(made))


def max_code(reports: list[Report]) -> int:
    """The exit code of several reports together."""
    return exit_code([(j.verdict, j.claim.expect) for r in reports for j in r.judged])


def _below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"--all {str(folder)!r} is no folder: expected one with claim files")
    found = sorted(p for p in folder.rglob("*.y*ml") if is_claim_file(p))
    if not found:
        raise ValueError(f"--all {str(folder)!r}: there is no claim file below it")
    return found
