"""Pictures of units that come with the package, so that nobody has to wait for the first ones.

`python -m circuits.featurevis.shipping --out DIR` makes those of `efficientnet-lite0`, and a log of how: about twenty
minutes on one core. They are small WebP files in one zip archive, each with its facts inside, as all pictures have.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from circuits.featurevis.pictures import Picture, as_webp
from circuits.featurevis.render import visualize_units
from circuits.files import replacing
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import BUILTIN, load_model
from circuits.progress import Progress
from circuits.units import Unit
from circuits.workspace import Workspace

log = logging.getLogger(__name__)

TILE, QUALITY = 80, 75
"""Pixels along a side of the pictures that are shipped, and the quality of their compression."""

AT_ONCE = 16


@dataclass(frozen=True)
class Batch:
    """Units of a site whose pictures are made in one way.

    Attributes:
        site: of the units.
        units: which of them.
        size: side of the pictures in pixels, before they are made smaller.
        steps: of optimisation.
    """

    site: str
    units: Sequence[int]
    size: int
    steps: int


def _named(model: str, site: str) -> tuple[int, ...]:
    """The units of a site that the names file of a built-in model names."""
    units = [
        Unit.parse(name["unit"]) for name in read_json(BUILTIN / f"{model}.names.json")["names"]
    ]
    return tuple(sorted(unit.index for unit in units if unit.site == site))


_LITE0 = "efficientnet-lite0"
_NAMED = {
    "block2b_depthwise": 96, "block3a_depthwise": 96, "block3b_depthwise": 96, "block4a_expand": 96,
    "block4a_depthwise": 128, "block4c_depthwise": 128, "block5a_depthwise": 128, "block5b_depthwise": 128,
    "block5c_depthwise": 128, "block6c_depthwise": 160,
}  # fmt: skip
"""The sites of named units, with the size of their pictures."""

SHIPPED = {
    _LITE0: (
        Batch("stem", range(32), 64, 96),
        Batch("block1a_depthwise", range(32), 64, 96),
        Batch("block2b_expand", range(144), 96, 128),
        Batch("block3b_expand", range(240), 96, 128),
        Batch("block4c_expand", range(64), 128, 128),
        Batch("block5c_expand", range(64), 128, 128),
        Batch("block6d_expand", range(64), 160, 192),
        Batch("head", range(64), 160, 192),
        *(Batch(site, _named(_LITE0, site), size, 128) for site, size in _NAMED.items()),
    )
}
"""What is shipped, by the model's name: early sites as a whole, some units of later ones, and the units with names."""


def archive(model: str) -> Path:
    """The file with the pictures of a built-in model; there is none for most."""
    return BUILTIN / f"{model}.pictures.zip"


def unpack(model: HookedModel, workspace: Workspace) -> int:
    """Put the pictures that come with the package into a workspace.

    Pictures that are there are left as they are.

    Args:
        model: a built-in model.
        workspace: where they go.

    Returns:
        How many pictures of the model's units there are now.

    Raises:
        ValueError: if they were made of other weights.
        OSError: if the workspace cannot be written.
    """
    path = archive(model.name)
    if not path.is_file():
        return 0
    folder = workspace.pictures_folder(model.hash)
    with zipfile.ZipFile(path) as file:
        if (made_of := file.comment.decode()) != model.hash:
            raise ValueError(
                f"pictures {str(path)!r} are of weights {made_of[:16]}, not of {model.hash[:16]}"
            )
        names = file.namelist()
        for name in names:
            if not (folder / name).exists():
                with replacing(folder / name) as temporary:
                    temporary.write_bytes(file.read(name))
    return len(names)


def make(
    model: HookedModel,
    batches: Sequence[Batch],
    out: Path,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Make pictures, and write them into an archive and how they were made into a log next to it.

    What an archive of that name has already is taken from it.
    """
    total, done = sum(len(b.units) for b in batches), 0
    log_path = out.with_suffix(".log.jsonl")
    known, lines = _made_before(out, model.hash), _log_before(log_path)
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        file.comment = model.hash.encode()
        for batch in batches:
            for start in range(0, len(batch.units), AT_ONCE):
                some = replace(batch, units=batch.units[start : start + AT_ONCE])
                names = [_name(batch, i, seed) for i in some.units]
                if not set(names) <= set(known):
                    known |= _made(model, some, seed, lines)
                for name in names:
                    # A fixed date: the same pictures make the same archive.
                    info = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
                    file.writestr(info, known[name], zipfile.ZIP_DEFLATED)
                done += len(names)
                if progress is not None:
                    progress(done, total)
    with replacing(log_path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _name(batch: Batch, index: int, seed: int) -> str:
    how = f"{batch.steps}steps-{batch.size}px-seed{seed}"
    return Workspace.picture_name(f"{batch.site}:{index}", how, ".webp")


def _made(model: HookedModel, batch: Batch, seed: int, lines: list[str]) -> dict[str, bytes]:
    """Pictures of a few units, as files by name; how they were made is added to the log."""
    began, site = time.monotonic(), model.site(batch.site)
    units = [site.unit(i) for i in batch.units]
    pictures = visualize_units(model, units, steps=batch.steps, size=batch.size, seed=seed)
    line = {
        "site": batch.site, "units": list(batch.units), "size": batch.size, "steps": batch.steps, "seed": seed,
        "mean_activation": round(sum(p.activation for p in pictures) / len(pictures), 4),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    log.info("%s", json.dumps(line))
    lines.append(json.dumps(line))
    return {_name(batch, i, seed): _small(p) for i, p in zip(batch.units, pictures, strict=True)}


def _made_before(path: Path, model_hash: str) -> dict[str, bytes]:
    """The files of an archive, if there is one and it is of these weights."""
    if not path.is_file():
        return {}
    with zipfile.ZipFile(path) as file:
        if file.comment.decode() != model_hash:
            return {}
        return {name: file.read(name) for name in file.namelist()}


def _log_before(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _small(picture: Picture) -> bytes:
    """A picture as a small WebP, with its facts."""
    tile = picture.to_pil().resize((TILE, TILE), Image.Resampling.LANCZOS)
    made = io.BytesIO()
    as_webp(tile, made, picture.metadata() | {"tile": TILE}, QUALITY)
    return made.getvalue()


def main() -> None:
    """Make the pictures that are shipped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILTIN, help="the folder to write into")
    parser.add_argument("--model", default="efficientnet-lite0", choices=sorted(SHIPPED))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name: str = args.model
    make(
        load_model(name), SHIPPED[name], args.out / archive(name).name, args.seed,
        lambda n, of: log.info("%d of %d", n, of),
    )  # fmt: skip


if __name__ == "__main__":
    main()
