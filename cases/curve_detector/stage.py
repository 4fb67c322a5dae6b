"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
