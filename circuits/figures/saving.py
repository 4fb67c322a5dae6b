"""Writing figures."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from circuits.files import replacing


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the path's ending.

    Raises:
        ValueError: if it ends in something else.
    """
    path = Path(path)
    check_figure_path(path)
    # kernels and pictures stay images of their own in an SVG
    with replacing(path) as temporary, rc_context({"image.composite_image": False}):
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150, bbox_inches="tight")


def check_figure_path(path: Path) -> None:
    """Raise ValueError if a figure cannot be written under this name."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"figure {str(path)!r} must end in .png or .svg")
    if path.is_dir():
        raise ValueError(f"figure {str(path)!r} is a folder: expected a file")
