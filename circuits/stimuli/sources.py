"""Opening data by name: photographs, folders of images, drawings, text.

A source is a fixed sequence of examples with a hash; the same name always gives the same examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from PIL import Image

from circuits.errors import UNREADABLE, line
from circuits.factories import call_factory
from circuits.specs import normal_data, python_spec, runs_code
from circuits.stimuli.datasets import from_dataset, open_array, open_hugging_face
from circuits.stimuli.drawing import curves
from circuits.stimuli.images import IMAGE_SUFFIXES, ImageSource, read_image, to_image
from circuits.stimuli.photos import photographs
from circuits.stimuli.repeats import draw_repeats
from circuits.stimuli.shapes import CLASSES, draw_shapes
from circuits.stimuli.texts import TextSource
from circuits.tables import by_reason
from circuits.units import unknown

Source = ImageSource | TextSource


def open_source(spec: str) -> Source:
    """Open data by name.

    Args:
        spec: `photos`, `crops`, `curves`, `shapes` or `repeats`; `folder:PATH` (images), `tokens:PATH` (a text in each
            line), `npz:PATH[:KEY]` (an array of images or of tokens), `hf:PATH[:COLUMN]` (a folder saved by Hugging
            Face `datasets`), `python:MODULE:FACTORY` (a function that returns a map-style dataset) or
            `FILE.py:FUNCTION`.

    The source's `spec` is the name in its one form (see `circuits.specs.normal_data`).

    Raises:
        KeyError: if there is no such source.
        FileNotFoundError: if the path does not exist.
        ValueError: if there are no images in the folder, or there is no text in the file.
    """
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in _OPENERS_WITH_PATH:
        if not rest:
            raise ValueError(f"data {spec!r} names nothing: expected {_form(scheme)}")
        return _OPENERS_WITH_PATH[scheme](rest)
    if spec in _OPENERS:
        return _OPENERS[spec]()
    if runs_code(spec):
        return _python(python_spec(spec).removeprefix("python:"))
    raise unknown("data", spec, DATA)


def _form(scheme: str) -> str:
    return next(form for form in DATA if form.startswith(f"{scheme}:"))


def _digest(*parts: bytes | str) -> str:
    """The SHA-256 of some parts, each ended by a zero byte, so that they cannot run into each other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()


# --- images ------------------------------------------------------------------------------------

_TILE, _MOST_TILES = 160, 12
"""The size of a crop of a photograph, and the most crops of one."""


def _photos() -> ImageSource:
    """The photographs of scikit-image, each cut into at most twelve square crops that are spread over it."""
    boxes: list[tuple[int, int, int]] = []
    names = []
    for index, photo in enumerate(photographs()):
        height, width = photo.pixels.shape[:2]
        corners = [(top, left) for top in _starts(height, _TILE) for left in _starts(width, _TILE)]
        step = max(1, -(-len(corners) // _MOST_TILES))
        for top, left in corners[::step]:
            boxes.append((index, top, left))
            names.append(f"{photo.name}@{left},{top}")

    def image(i: int) -> Image.Image:
        index, top, left = boxes[i]
        pixels = photographs()[index].pixels[top : top + _TILE, left : left + _TILE]
        return Image.fromarray(pixels)

    hash = _digest("photos", *names, *(p.pixels.tobytes() for p in photographs()))
    return ImageSource("photos", tuple(names), hash, image, groups=_photographs_of(names))


_SCALES, _SMALLEST = (1.0, 0.6, 0.35), 96
"""Sides of crops, as shares of a photograph's shorter side; and the smallest side, in pixels."""


def _crops() -> ImageSource:
    """Square crops of the photographs of scikit-image at three scales, about half of each overlapping the next.

    A network that was trained on whole objects sees them whole, and their parts large.
    """
    boxes: list[tuple[int, int, int, int]] = []
    for index, photo in enumerate(photographs()):
        height, width = photo.pixels.shape[:2]
        sides = {max(_SMALLEST, round(scale * min(height, width))) for scale in _SCALES}
        for side in sorted(sides, reverse=True):
            across = (_overlapping(n, side) for n in (height, width))
            boxes += [(index, top, left, side) for top, left in product(*across)]
    names = tuple(f"{photographs()[i].name}@{left},{top}+{side}" for i, top, left, side in boxes)

    def image(i: int) -> Image.Image:
        index, top, left, side = boxes[i]
        return Image.fromarray(photographs()[index].pixels[top : top + side, left : left + side])

    hash = _digest("crops", *names, *(p.pixels.tobytes() for p in photographs()))
    return ImageSource("crops", names, hash, image, groups=_photographs_of(names))


def _photographs_of(names: Sequence[str]) -> tuple[str, ...]:
    """The photograph that each crop is of, by its name."""
    return tuple(name.partition("@")[0] for name in names)


def _overlapping(length: int, side: int) -> list[int]:
    """The first pixels of crops that cover `length` and overlap by about half; at most four."""
    n = min(4, round(max(0, length - side) / (side / 2)) + 1)
    return [round(i * max(0, length - side) / max(1, n - 1)) for i in range(n)]


def _starts(length: int, tile: int) -> list[int]:
    """The first pixels of tiles that cover `length`; they overlap rather than reach beyond it."""
    n = max(1, -(-length // tile))
    return [round(i * max(0, length - tile) / max(1, n - 1)) for i in range(n)]


def _folder(path: str) -> ImageSource:
    """The images below a folder, by their paths in it; links to folders are followed."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {path!r} does not exist or is not a folder")
    root = root.resolve()
    left_out: dict[str, str] = {}
    hashes: dict[str, bytes] = {}
    for file, reason in _files(root, (root,)):
        name = file.relative_to(root).as_posix()
        if reason:
            left_out[name] = reason
            continue
        try:
            hashes[name] = hashlib.sha256(file.read_bytes()).digest()
        except OSError as error:
            left_out[name] = f"not to be opened: {error.strerror}"
    if not hashes:
        others = f" (it has {by_reason(left_out)})" if left_out else ""
        raise ValueError(
            f"data folder {path!r} holds no images{others}: expected files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    names = tuple(sorted(hashes, key=lambda name: name.split("/")))
    digest = _digest("folder", *(part for name in names for part in (name, hashes[name])))
    return ImageSource(
        f"folder:{root}", names, digest, lambda i: read_image(root / names[i]), root, left_out
    )


_SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin")
"""What operating systems put into folders, in lower case."""


def _files(folder: Path, trail: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    """What is in a folder and in those below, each with why it is no image; empty if it is one.

    Args:
        folder: the folder.
        trail: where it and the folders above it are, without links.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield folder, f"not to be opened: {error.strerror}"
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
            yield entry, "hidden or of the system"
        elif entry.is_dir():
            place = entry.resolve()
            if place in trail:
                yield entry, "a link to a folder that it is in"
            else:
                yield from _files(entry, (*trail, place))
        elif not entry.is_file():
            yield entry, "a link to nothing" if entry.is_symlink() else "no file"
        elif entry.suffix.lower() not in IMAGE_SUFFIXES:
            yield entry, f"of kind {entry.suffix}" if entry.suffix else "of no kind"
        else:
            yield entry, ""


def _curves() -> ImageSource:
    """Dark and light curves at 24 orientations and four radii, 128 pixels square."""
    cases = [
        (orientation, radius, dark)
        for radius in (16.0, 24.0, 36.0, 54.0)
        for dark in (True, False)
        for orientation in range(0, 360, 15)
    ]

    def image(i: int) -> Image.Image:
        orientation, radius, dark = cases[i]
        drawn = curves(
            torch.tensor([float(orientation)]),
            torch.tensor([radius]),
            size=128,
            thickness=5.0,
            foreground=0.0 if dark else 1.0,
            background=1.0 if dark else 0.0,
        )
        return to_image(drawn[0])

    names = tuple(f"{'dark' if d else 'light'} curve {o}°, radius {r:g}" for o, r, d in cases)
    return ImageSource("curves", names, _digest("curves 1", *names), image)


def _shapes() -> ImageSource:
    """Ten held-out drawings of each class of the model `shapes`, 64 pixels square."""
    labels = torch.arange(10 * len(CLASSES)) % len(CLASSES)
    drawn: list[torch.Tensor] = []

    def image(i: int) -> Image.Image:
        if (
            not drawn
        ):  # all are drawn together, as they share a generator, but not before one is needed
            drawn.append(draw_shapes(labels, torch.Generator().manual_seed(20_000)))
        return to_image(drawn[0][i])

    names = tuple(f"{CLASSES[c]} #{i // len(CLASSES)}" for i, c in enumerate(labels.tolist()))
    return ImageSource("shapes", names, _digest("shapes 1", *names), image)


# --- tokens ------------------------------------------------------------------------------------


def _tokens(path: str) -> TextSource:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"token file {path!r} does not exist or is not a file")
    try:
        text = file.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of a text
    except UNREADABLE as error:
        raise ValueError(f"token file {path!r} cannot be read: {line(error)}") from error
    # Opening it made \r\n and \r to \n. `splitlines` also cuts at characters of a text, such as U+2028.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"token file {path!r} is empty: expected one text a line")
    names = tuple(f"line {n}" for n, _ in lines)
    return TextSource(
        normal_data(f"tokens:{path}"),
        names,
        _digest("tokens", text),
        tuple(line for _, line in lines),
    )


def _repeats() -> TextSource:
    """200 held-out sequences of the kind on which the model `induction` is trained."""
    # A seed that training does not use.
    tokens, _ = draw_repeats(200, torch.Generator().manual_seed(20_000))
    texts = tuple(" ".join(map(str, row)) for row in tokens.tolist())
    names = tuple(f"sequence {i}" for i in range(len(texts)))
    return TextSource("repeats", names, _digest("repeats", *texts), texts)


def _python(name: str) -> Source:
    """A dataset that the user names; this runs the user's code."""
    made = call_factory("data", name)
    if isinstance(made, ImageSource | TextSource):
        return made
    return from_dataset(made, python_spec(f"python:{name}"))


_OPENERS: dict[str, Callable[[], Source]] = {
    "photos": _photos,
    "crops": _crops,
    "curves": _curves,
    "shapes": _shapes,
    "repeats": _repeats,
}
_OPENERS_WITH_PATH: dict[str, Callable[[str], Source]] = {
    "folder": _folder,
    "tokens": _tokens,
    "npz": open_array,
    "hf": open_hugging_face,
    "python": _python,
}

DATA = (
    *_OPENERS,
    "folder:PATH",
    "tokens:PATH",
    "npz:PATH[:KEY]",
    "hf:PATH[:COLUMN]",
    "python:MODULE:FACTORY",
)
"""The forms that `open_source` takes."""


def batches(n: int, size: int) -> Iterator[range]:
    """Cut `n` indices into runs of at most `size`.

    >>> [list(b) for b in batches(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
