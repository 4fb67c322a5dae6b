"""Stages of a case, each kept in the workspace by what it was made from: a second run makes what is missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import circuits
from circuits.figures import Figure, save_figure
from circuits.files import Keep, keeping, write_json
from circuits.json_files import read_json
from circuits.progress import Progress, portion


@dataclass
class Stage:
    """One part of the evidence.

    Attributes:
        numbers: for `results.json`.
        figures: captions and files.
    """

    numbers: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A stage as it is kept.

    Attributes:
        numbers: as they were read back from the file.
        figures: captions and files.
    """

    numbers: dict[str, Any]
    figures: dict[str, Path]


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


def each_stage(
    folder: Path, stages: Mapping[str, tuple[dict[str, Any], Make]], progress: Progress | None
) -> Iterator[tuple[str, Made]]:
    """Make stages in order, or what is missing of them; a stage is made when the one before was taken.

    Args:
        folder: the case's, in the workspace.
        stages: what each is made from, and how, by name.
        progress: called with what is done of all stages, and all there is.
    """
    for k, (name, (facts, make)) in enumerate(stages.items()):
        note = portion(progress, k, k + 1, len(stages))
        note(0, 1)
        made = _kept(folder, name, facts, make, note)
        note(1, 1)
        yield name, made


def code_of(folder: Path, *files: Path) -> str:
    """What the code of a case and of the library is, in short: other code, other results."""
    sources = [
        *folder.glob("*.py"), *Path(__file__).parent.glob("*.py"), *files,
        *Path(circuits.__file__).parent.rglob("*.py"),
    ]  # fmt: skip
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]


def _kept(folder: Path, name: str, facts: dict[str, Any], make: Make, progress: Progress) -> Made:
    """A stage as it was made before from the same facts, or made now."""
    key = hashlib.sha256(json.dumps([name, facts], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / "stages" / f"{name.replace(' ', '-')}-{key}"
    try:
        known = read_json(place / "stage.json")
        paths = {caption: place / file for caption, file in known["figures"].items()}
        if all(path.is_file() for path in paths.values()):
            return Made(known["numbers"], paths)
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
    return Made(numbers, {caption: place / file for caption, file in files.items()})
