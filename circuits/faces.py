"""Faces: the small picture by which a unit is known wherever it is shown.

A unit's face is its visualization where one was made; else the part of a dataset example that excites it most; in a
model of tokens, the token at which it is most active. Examples' faces are found once, after a harvest, and kept in one
archive a site: `<model>/faces/SITE.zip` has `faces.json`, which says what each face is, and a JPEG for each unit of an
image model.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from circuits.examples import Examples
from circuits.featurevis.sheets import find_sheets
from circuits.files import replacing
from circuits.json_files import parse_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.paths.receptive import Box, receptive_field
from circuits.progress import Progress
from circuits.stimuli.images import open_picture
from circuits.stimuli.sources import Source
from circuits.stimuli.spelling import word_of
from circuits.store import ActivationStore, Example
from circuits.units import Site, Unit
from circuits.workspace import Workspace

SIDE = 72
"""Pixels along a side of an example's face."""

LEAST = 16
"""Pixels of the example that a face shows at least, along each side: what three pixels show is not seen."""

_INDEX = "faces.json"
_QUALITY = 80


@dataclass(frozen=True)
class Face:
    """What a unit is shown by.

    Attributes:
        kind: a visualization, a part of an example, or a token.
        about: what it is, in words, for those who do not see it.
        path: the file with the picture; the archive of a part of an example.
        member: the file within the archive.
        text: the token.
    """

    kind: Literal["visualization", "example", "token"]
    about: str
    path: Path
    member: str = ""
    text: str = ""

    def picture(self) -> Image.Image:
        """The picture, in RGB.

        Raises:
            ValueError: if the face is a token.
            OSError: if the file is gone or damaged.
        """
        if self.kind == "token":
            raise ValueError(f"the face {self.text!r} is a token and has no picture")
        if not self.member:
            with open_picture(self.path) as image:
                return image.convert("RGB")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return open_picture(io.BytesIO(archive.read(self.member))).convert("RGB")
        except (KeyError, zipfile.BadZipFile) as error:
            raise OSError(f"{str(self.path)!r} has no picture {self.member!r}: {error}") from error


def faces_of(workspace: Workspace, model_hash: str) -> dict[Unit, Face]:
    """The faces of all units of a model that have one, as the workspace has them; the model is not needed.

    Archives that are damaged are left out: `make_faces` makes them again.
    """
    found: dict[Unit, Face] = {}
    for path in sorted(workspace.faces_folder(model_hash).glob("*.zip")):
        found |= _kept(path)
    for sheet in find_sheets(workspace.sheets_folder(model_hash)):
        if any(facts.get("kind", "positive") == "positive" for facts in sheet.facts[:1]):
            for i in range(len(sheet.facts)):
                found[Unit(sheet.site, i)] = _visualization(Unit(sheet.site, i), sheet.tile_path(i))
    for unit, path in workspace.pictured(model_hash):
        if "-negative" not in path.name and "-diverse" not in path.name:
            found[unit] = _visualization(unit, path)
    return found


def _visualization(unit: Unit, path: Path) -> Face:
    return Face("visualization", f"feature visualization of {unit}", path)


def _kept(path: Path) -> dict[Unit, Face]:
    """The faces in an archive; none if it cannot be read."""
    try:
        raw = _read(path)
        site, units = str(raw["site"]), raw["units"]
        return {
            Unit(site, int(index)): Face(
                "token" if "text" in one else "example", str(one["about"]), path,
                "" if "text" in one else f"{int(index):05d}.jpg", str(one.get("text", "")),
            )
            for index, one in units.items()
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read(path: Path) -> dict[str, Any]:
    """What an archive says of its faces.

    Raises:
        OSError, ValueError, KeyError: if it is not there, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return parse_json(archive.read(_INDEX), str(path))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def make_faces(
    workspace: Workspace,
    model: HookedModel,
    store: ActivationStore,
    source: Source,
    *,
    sites: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> int:
    """Make the faces of all units of a store from the examples that excite them most.

    Only the examples that are best for some unit are read, each once. Sites whose faces were made from this store are
    left as they are; units that are never active have none.

    Args:
        workspace: where they are kept.
        model: the model, or another with the same receptive fields and vocabulary.
        store: what was harvested.
        source: the data that the store was made from.
        sites: which of its sites; all if None.
        progress: called with the examples read and all there are.

    Returns:
        How many units have a face from this store.

    Raises:
        KeyError: if a site was not harvested.
        ValueError, OSError: if the workspace cannot be written, or an example cannot be read.
    """
    wanted = {name: store.sites[name] for name in (store.sites if sites is None else sites)}
    made_from = {"data": store.provenance.data_hash, "run": store.folder.name}
    best: dict[str, dict[int, Example]] = {}
    n = 0
    for name, site in wanted.items():
        path = workspace.faces_path(model.hash, name)
        try:
            known = _read(path)
            if known["made_from"] == made_from:
                n += len(known["units"])
                continue
        except (OSError, ValueError, KeyError):
            pass  # there is none yet, or it is damaged
        best[name] = dict(_best(store, site))
    if not best:
        return n
    numbers = sorted({one.index for found in best.values() for one in found.values()})
    examples = Examples(model, source, None, among=numbers)
    at = {number: k for k, number in enumerate(numbers)}
    spec = model.input
    drawn = (
        _crops(model, spec, examples, at, best, progress)
        if isinstance(spec, ImageInput)
        else dict[tuple[str, int], bytes]()
    )
    for name, found in best.items():
        units: dict[int, dict[str, str]] = {}
        for index, example in found.items():
            units[index] = {"about": _about(Unit(name, index), example)}
            if isinstance(spec, TokenInput):
                units[index] |= _token(spec, examples.tokens(at[example.index]), example)
        said = {"site": name, "made_from": made_from, "units": units}
        with (
            replacing(workspace.faces_path(model.hash, name)) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,  # pictures are compressed already
        ):
            archive.writestr(_INDEX, json.dumps(said))
            for index in found:
                if (name, index) in drawn:
                    archive.writestr(f"{index:05d}.jpg", drawn[name, index])
        n += len(units)
    return n


def _best(store: ActivationStore, site: Site) -> Iterator[tuple[int, Example]]:
    """The example that excites each unit most, of those that are active at all."""
    for index, example in enumerate(store.best_examples(site.name)):
        if example is not None and example.value > (0 if site.floor is None else site.floor):
            yield index, example


def _crops(
    model: HookedModel,
    spec: ImageInput,
    examples: Examples,
    at: Mapping[int, int],
    best: dict[str, dict[int, Example]],
    progress: Progress | None,
) -> dict[tuple[str, int], bytes]:
    """What each unit sees of its best example, as JPEG."""
    by_example: dict[int, list[tuple[str, int]]] = {}
    for name, found in best.items():
        for index, example in found.items():
            by_example.setdefault(example.index, []).append((name, index))
    made: dict[tuple[str, int], bytes] = {}
    for done, (number, units) in enumerate(sorted(by_example.items())):
        image = spec.fit(examples.picture(at[number])).convert("RGB")
        boxes: dict[Box, bytes] = {}  # units of one site that peak at one place share a picture
        for name, index in units:
            box = box_of(model, name, best[name][index], image.size)
            if box not in boxes:
                boxes[box] = _jpeg(image, box)
            made[name, index] = boxes[box]
        if progress is not None:
            progress(done + 1, len(by_example))
    return made


def box_of(model: HookedModel, site: str, example: Example, size: tuple[int, int]) -> Box:
    """The part of an image that is shown of an example of a unit: what the unit sees there, with a little around it.

    Args:
        model: a model of images.
        site: of the unit.
        example: where the unit is most active.
        size: width and height of the image.
    """
    place = model.site(site)
    # A function with a ceiling changes no receptive field, and measuring one takes a second in a large model.
    place = next((s for s in model.sites if s.before == place.name), place)
    return _widened(receptive_field(model, place).at(example.position), size)


def _widened(box: Box, size: tuple[int, int]) -> Box:
    """A box, at least `LEAST` pixels high and wide, inside the image."""
    top, left, bottom, right = box
    (top, bottom), (left, right) = (
        _span(a, b, whole) for a, b, whole in ((top, bottom, size[1]), (left, right, size[0]))
    )
    return (top, left, bottom, right)


def _span(start: int, stop: int, whole: int) -> tuple[int, int]:
    """A stretch with as much around it as is missing to `LEAST`.

    >>> _span(4, 7, 100), _span(0, 3, 100), _span(97, 100, 100), _span(2, 5, 8), _span(10, 60, 100)
    ((0, 16), (0, 16), (84, 100), (0, 8), (10, 60))
    """
    length = max(stop - start, min(LEAST, whole))
    first = min(max(0, start - (length - (stop - start)) // 2), whole - length)
    return first, first + length


def _jpeg(image: Image.Image, box: Box) -> bytes:
    top, left, bottom, right = box
    buffer = io.BytesIO()
    small = image.crop((left, top, right, bottom)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _about(unit: Unit, example: Example) -> str:
    at = f" at {example.position}" if example.position else ""
    return f"what excites {unit} most, {example}{at} of {example.name}"


def _token(spec: TokenInput, tokens: Sequence[int], example: Example) -> dict[str, str]:
    """The token at which a unit is most active; none at a site without positions."""
    if len(example.position) != 1:
        return {"text": ""}
    at = example.position[0]
    return {"text": word_of(spec.vocabulary, tokens[at]) if at < len(tokens) else ""}
