"""The case: how a language model tells who is given something, compared with what is known of GPT-2 small.

Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small". Each
stage is kept in the workspace by what it was made from, so that a run that was stopped goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cases.ioi import evidence
from cases.ioi.heads import heads
from cases.ioi.page import COLUMNS, rows_of, write_page
from cases.ioi.subject import Options, Sizes, Subject
from cases.stages import Made, Make, Progress, Result, Stage, code_of, each_stage
from circuits.files import Keep, write_json
from circuits.tables import Table
from circuits.workspace import Workspace

NAME = "ioi"
FOLDER = Path(__file__).parent


def run(
    workspace: Workspace, options: Options | None = None, progress: Progress | None = None
) -> Result:
    """Run the case, or what is missing of it; write `results.json` and `report.html`.

    Args:
        workspace: where stages are kept, below `cases/ioi`.
        options: what to show.
        progress: called with what is done and all there is.

    Raises:
        FileNotFoundError: if the model is missing.
    """
    options = Options() if options is None else options
    subject = Subject.of(options)
    facts = {
        "model": subject.model.hash, "code": code_of(FOLDER), "fast": options.fast, "seed": options.seed,
    }  # fmt: skip
    made: dict[str, Made] = {}
    stages: dict[str, Make] = {
        "behaviour": lambda *_: evidence.behaviour(subject),
        "heads": lambda told, _: heads(subject, told),
        "edits": lambda told, _: evidence.edits(subject, made["heads"].numbers, told),
        "circuit": lambda told, keep: evidence.circuit(subject, told, keep),
        "corruptions": lambda told, _: evidence.corruptions(subject, made["circuit"].numbers["edges"], told),
    }  # fmt: skip
    folder = workspace.writable().root / "cases" / NAME
    asked = {name: (facts, _timed(make)) for name, make in stages.items()}
    for name, stage in each_stage(folder, asked, progress):
        made[name] = stage
    results = {
        "case": NAME, **{name: stage.numbers for name, stage in made.items()}, "sizes": vars(Sizes.of(options)),
        "seed": options.seed, "fast": options.fast, "hashes": {subject.model.name: subject.model.hash},
    }  # fmt: skip
    write_json(folder / "results.json", results)
    page = folder / "report.html"
    write_page(page, results, {name: stage.figures for name, stage in made.items()})
    return Result(results, page, folder)


def _timed(make: Callable[[Progress, Keep], Stage]) -> Make:
    """A stage that says how long it took."""

    def made(progress: Progress, keep: Keep) -> Stage:
        start = time.monotonic()
        stage = make(progress, keep)
        stage.numbers["seconds"] = round(time.monotonic() - start, 1)
        return stage

    return made


def table(made: Result) -> Table:
    """The roles of heads, and how good the circuit is."""
    return Table(
        COLUMNS,
        rows_of(made.results),
        f"{NAME}: what was found, next to GPT-2 small",
        f"report: {made.page}",
    )
