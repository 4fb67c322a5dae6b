"""The case: what is in a network that recognises photographs, compared with the same network with shuffled weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases.imagenet import evidence
from cases.imagenet.names import ABOUT, name_all
from cases.imagenet.page import COLUMNS, rows_of, write_page
from cases.imagenet.photographs import EYES, photographs_of, shuffled_model
from cases.stages import Made, Make, Progress, Result, Stage, code_of, each_stage
from circuits.concepts import Name
from circuits.concepts.names_files import write_names
from circuits.files import Keep, write_json
from circuits.models.zoo.loading import load_model
from circuits.tables import Table
from circuits.workspace import Workspace

NAME = "imagenet"
MODEL = "efficientnet-lite0"
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """What a run is to show.

    Attributes:
        fast: fewer sites, drawings and photographs: for a test.
        evaluate: a folder of photographs; by default those that are installed, of which there are few.
        labels: their classes, as `circuits.stimuli.labels` reads them; without, no unit is named after classes.
        seed: of everything random.
    """

    fast: bool = False
    evaluate: Path | None = None
    labels: Path | None = None
    seed: int = 0


def run(
    workspace: Workspace, options: Options | None = None, progress: Progress | None = None
) -> Result:
    """Run the case, or what is missing of it; write `results.json`, `names.json` and `report.html`.

    Args:
        workspace: where stages are kept, below `cases/imagenet`.
        options: what to show.
        progress: called with what is done and all there is.

    Raises:
        FileNotFoundError: if the model's weights, or a folder or file, are missing.
        ValueError: if labels do not fit the photographs.
    """
    options = Options() if options is None else options
    model = load_model(MODEL)
    shown = photographs_of(model, options.evaluate, options.labels, 40 if options.fast else None)
    first = shown.shown.subset(range(0, len(shown.shown), max(1, len(shown.shown) // 32)))
    control = shuffled_model(model, first.inputs, options.seed)
    again = range(options.seed + 1, options.seed + (2 if options.fast else 4))
    pair = {evidence.OWN: model, evidence.CONTROL: control}
    few, curved = (2, (evidence.HOST,)) if options.fast else (None, evidence.CURVES)
    made: dict[str, Made] = {}
    facts = {
        "model": model.hash, "code": code_of(FOLDER, EYES), "photographs": shown.facts,
        "fast": options.fast, "seed": options.seed,
    }  # fmt: skip

    def found() -> dict[str, Any]:
        return {name: stage.numbers for name, stage in made.items()}

    stages: dict[str, Callable[[Progress], Stage]] = {
        "drawings": lambda note: evidence.drawings(
            pair, evidence.EARLY[:few], 6 if options.fast else 7, note
        ),
        "curves": lambda note: evidence.curves(
            pair,
            [shuffled_model(model, first.inputs, seed) for seed in again],
            curved,
            19 if options.fast else 99,
            note,
        ),
        "origins": lambda _: evidence.origins(model, found(), options.seed),
        "classes": lambda _: evidence.classes(pair, shown, evidence.LATE, options.seed),
        "eyes": lambda _: evidence.eyes(pair, shown, evidence.EYES),
        "names": lambda _: name_all(model, found(), shown, 3 if options.fast else 8, options.seed),
        "decision": lambda _: evidence.decision(
            model, shown, 5 if options.fast else 30, options.seed
        ),
        "transplant": lambda note: evidence.transplant(model, found(), shown, options, note),
    }
    folder = workspace.writable().root / "cases" / NAME
    asked = {name: (facts, _alone(make)) for name, make in stages.items()}
    for name, stage in each_stage(folder, asked, progress):
        made[name] = stage
    numbers = found()
    names = numbers["names"].pop("names")
    results = {
        "case": NAME, "photographs": shown.facts, "thin": not shown.groups, **numbers,
        "n_names": len(names), "names": names,
        "directions": numbers["names"]["directions"], "seed": options.seed, "fast": options.fast,
        "hashes": {model.name: model.hash},
    }  # fmt: skip
    write_json(folder / "results.json", results)
    write_names(folder / "names.json", model, [Name.from_dict(n) for n in names], ABOUT)
    page = folder / "report.html"
    write_page(page, results, {name: stage.figures for name, stage in made.items()})
    return Result(results, page, folder)


def _alone(make: Callable[[Progress], Stage]) -> Make:
    """A stage that is made as a whole: none of its parts are kept."""

    def made(progress: Progress, keep: Keep) -> Stage:
        return make(progress)

    return made


def table(made: Result) -> Table:
    """What was found, compared with shuffled weights."""
    title = f"{NAME}: units of {MODEL}, on {made.results['photographs']['data']}"
    return Table(COLUMNS, rows_of(made.results), title, f"report: {made.page}")
