"""Neuron sheets: a picture of every unit of a site, as tiles and as one atlas.

<folder>/00000.webp …   a unit's picture, with its metadata inside
        sheet.json      what was made, by unit; written when all tiles are there
        atlas.webp      all of them in rows
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from circuits.featurevis.pictures import read_facts, write_image
from circuits.featurevis.render import Options, Settings, visualize_units
from circuits.files import write_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.stimuli.images import open_picture
from circuits.units import Site

TILES_AT_ONCE = 16
"""Units that are optimised together: what a kill can lose."""

MAX_SIDE = 16383
"""Pixels along a side that a WebP can have."""


@dataclass(frozen=True)
class Sheet:
    """A finished neuron sheet.

    Attributes:
        folder: where it is.
        site: whose units.
        facts: the metadata of each unit's picture, in order.
        columns: tiles in a row of the atlas.
        tile: pixels of a tile in the atlas, height and width.
    """

    folder: Path
    site: str
    facts: tuple[dict[str, Any], ...]
    columns: int
    tile: tuple[int, int]

    @property
    def atlas(self) -> Path:
        """The picture with all tiles."""
        return self.folder / "atlas.webp"

    def tile_path(self, index: int) -> Path:
        """A unit's own picture."""
        return _tile(self.folder, index)

    @classmethod
    def open(cls, folder: Path) -> Sheet:
        """A sheet that was made before.

        Raises:
            FileNotFoundError: if there is none, or it was not finished.
            ValueError: if it cannot be read.
        """
        path = folder / "sheet.json"
        if not path.is_file():
            raise FileNotFoundError(f"there is no finished sheet in {str(folder)!r}")
        try:
            raw = json.loads(path.read_text())
            height, width = raw["tile"]
            return cls(folder, raw["site"], tuple(raw["units"]), raw["columns"], (height, width))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"sheet {str(path)!r} cannot be read: {error}") from error


def _tile(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.webp"


def sheet_name(
    model: HookedModel, site: str | Site, negative: bool = False, **options: Unpack[Options]
) -> str:
    """The name of the folder for one way of making a site's sheet.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if an option is out of range, or the model does not take images.
    """
    if not isinstance(model.input, ImageInput):
        raise ValueError(f"model {model.name} takes tokens: feature visualization needs images")
    found = model.site(site)
    key = Settings(**options).key(model.input) + (" negative" if negative else "")
    # Eight hexadecimal digits tell apart the few ways in which one site's sheet is made; the tiles carry all facts.
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    # % first: were / escaped first, its own % would be escaped again.
    return f"{found.name.replace('%', '%25').replace('/', '%2F')}-{digest}"


def render_sheet(
    model: HookedModel,
    site: str | Site,
    folder: Path,
    *,
    negative: bool = False,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Sheet | None:
    """Make the pictures of all units of a site; go on where an earlier run stopped.

    Units are made in fixed groups, so that the result does not depend on where it was interrupted.

    Args:
        model: an image model.
        site: whose units.
        folder: where the sheet goes; tiles there that were made the same way are kept.
        negative: show what the units are least active on.
        progress: told the units done and in all; stops the work where it returns False.
        **options: see `Settings`.

    Returns:
        The sheet; None if it was stopped.

    Raises:
        KeyError: if the site is unknown.
        ValueError: as `visualize_units`.
        OSError: if the folder cannot be written.
    """
    found = model.site(site)
    sheet_name(model, found, **options)  # raises if it cannot be made
    n, model_hash = found.n_units, model.hash
    done = 0
    for start in range(0, n, TILES_AT_ONCE):
        group = range(start, min(start + TILES_AT_ONCE, n))
        if not all(_made(_tile(folder, i), model_hash) for i in group):
            units = [found.unit(i) for i in group]
            for picture, i in zip(
                visualize_units(model, units, negative=negative, **options), group, strict=True
            ):
                picture.save(_tile(folder, i))
        done = group.stop
        if progress and progress(done, n) is False and done < n:
            return None
    # From the tiles and not from memory, as some of them were made by an earlier run.
    facts = [read_facts(_tile(folder, i)) for i in range(n)]
    columns, tile = _atlas(folder, n, {"site": found.name, "model_hash": model_hash})
    write_json(
        folder / "sheet.json",
        {
            "site": found.name,
            "model": model.name,
            "model_hash": model_hash,
            "negative": negative,
            "columns": columns,
            "tile": list(tile),
            "units": facts,
        },
    )
    return Sheet.open(folder)


def _made(path: Path, model_hash: str) -> bool:
    """Whether a tile is there and of these weights; the folder's name says how it was made."""
    try:
        return read_facts(path).get("model_hash") == model_hash
    except OSError:
        return False


def _atlas(folder: Path, n: int, facts: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """Put the tiles in rows, smaller where they would not fit into one picture."""
    with open_picture(_tile(folder, 0)) as first:
        width, height = first.size
    # columns x width is about rows x height, for an atlas that is nearly square: c w = (n / c) h gives c = sqrt(n h /
    # w).
    columns = math.ceil(math.sqrt(n * height / width))
    rows = math.ceil(n / columns)
    # Never enlarged, at most 128 pixels a tile, and within what the format can hold either way.
    scale = min(
        1.0, 128 / max(width, height), MAX_SIDE / (columns * width), MAX_SIDE / (rows * height)
    )
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    atlas = Image.new("RGB", (columns * width, rows * height), (128, 128, 128))
    for i in range(n):
        with open_picture(_tile(folder, i)) as tile:
            small = tile.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        atlas.paste(small, (i % columns * width, i // columns * height))
    write_image(atlas, folder / "atlas.webp", facts | {"columns": columns, "tile": [height, width]})
    return columns, (height, width)


def find_sheets(folder: Path) -> Sequence[Sheet]:
    """The finished sheets in the folders of a folder; those that cannot be read are left out."""
    found = []
    for path in sorted(folder.glob("*/sheet.json")):
        try:
            found.append(Sheet.open(path.parent))
        except (ValueError, OSError):
            continue
    return found
