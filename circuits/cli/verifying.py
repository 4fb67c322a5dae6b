"""`circuits verify`: test claims, and say what stands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Exit, Typer

from circuits.claims import exit_code, read_claims
from circuits.claims import verify as verified
from circuits.claims.files import is_claim_file
from circuits.claims.kept import report_folder
from circuits.claims.recording import LONG, read_recorded
from circuits.claims.recording import record as write_record
from circuits.claims.report import write_report
from circuits.claims.verifying import load
from circuits.cli import options
from circuits.cli.signatures import argument, command, option
from circuits.files import check_writable
from circuits.workspace import Workspace

app = Typer()


@command(app)
def verify(
    file: Annotated[Path, argument("A claim file, or with --all a folder of them.")],
    output: options.Output,
    every: Annotated[bool, option("Verify all claim files below the folder.", "--all")] = False,
    quick: Annotated[bool, option(
        "Do not test claims that took over a minute when they were recorded: say what was recorded then.", "--quick"
    )] = False,
    record: Annotated[bool, option(
        "Record the verdicts next to the claim file (NAME.expected.json), for --quick.", "--record"
    )] = False,
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
    if quick and record:
        raise ValueError("--quick tests only some claims: it does not go with --record")
    place = Workspace.default(workspace)
    check_writable(report or place.root, "folder")
    # All are read before any is tested.
    files = {path: read_claims(path) for path in (_below(file) if every else [file])}
    known = {path: read_recorded(path, claims) for path, claims in files.items()} if quick else {}
    facts, shown, verdicts = [], [], []
    for path, claims in files.items():
        recorded = known.get(path)
        # A model that changed is said by testing: that ends at once.
        if (
            recorded is not None
            and recorded.seconds > LONG
            and load(claims, path.parent).has_hash(claims.model_hash)
        ):
            facts.append({"file": str(path), "recorded": recorded.to_dict()})
            shown.append(recorded.table(claims))
            verdicts += [(recorded.verdicts[c.name], c.expect) for c in claims.claims]
            continue
        begun = time.monotonic()
        with output.stages() as stage:
            made = verified(claims, place, folder=path.parent, stage=stage)
        if record:
            write_record(path, made, time.monotonic() - begun)
        own = report_folder(place, claims.name)
        folder = own if report is None else report / own.name if every else report
        page = write_report(made, folder)
        facts.append(made)
        shown += [*made.tables(), f"report: {page}"]
        verdicts += [(j.verdict, j.claim.expect) for j in made.judged]
    output.show(facts if every else facts[0], shown)
    raise Exit(0 if exit_zero else exit_code(verdicts))


def _below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"--all {str(folder)!r} is no folder: expected one with claim files")
    found = sorted(p for p in folder.rglob("*.y*ml") if is_claim_file(p))
    if not found:
        raise ValueError(f"--all {str(folder)!r}: there is no claim file below it")
    return found
