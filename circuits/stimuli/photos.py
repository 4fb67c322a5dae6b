"""The photographs in the package scikit-image, as real images without a download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from circuits.stimuli.images import open_picture

_FILES = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png",
    "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg",
    "rocket.jpg", "text.png",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Photograph:
    """One photograph.

    Attributes:
        name: its file name without the extension.
        pixels: height x width x 3, 8-bit RGB.
    """

    name: str
    pixels: np.ndarray


@cache
def photographs() -> tuple[Photograph, ...]:
    """All nineteen photographs, in the order of their names."""
    import skimage  # here and not at the top: importing it is slow, and few callers need it

    folder = Path(skimage.__file__).parent / "data"
    return tuple(
        Photograph(Path(name).stem, np.asarray(open_picture(folder / name).convert("RGB")))
        for name in _FILES
    )
