"""What a run is asked for, and what each of its stages gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuits.figures import Figure

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Options:
    """What a run is to show.

    Attributes:
        fast: coarser angles, fewer pictures and images: for a test.
        transplant: the host, as models are named.
        site: of the host; of known hosts the branch with the largest kernels.
        weights: the host's weights file.
        calibrate: a folder of images for fitting; of `shapes`, which has its own drawings, none.
        evaluate: another, for measuring.
        labels: of both, as `circuits.stimuli.labels` reads them.
        seed: of everything random.
    """

    fast: bool = False
    transplant: str = "shapes"
    site: str = ""
    weights: Path | None = None
    calibrate: Path | None = None
    evaluate: Path | None = None
    labels: Path | None = None
    seed: int = 0


@dataclass
class Stage:
    """One part of the evidence.

    Attributes:
        numbers: for `results.json`.
        figures: captions and files.
    """

    numbers: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
