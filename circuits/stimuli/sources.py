"""Opening data by name: photographs, folders of images, drawings, text.

A source is a fixed sequence of examples with a hash; the same name always gives the same examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from circuits.factories import call_factory
from circuits.stimuli.datasets import from_dataset, open_array, open_hugging_face
from circuits.stimuli.drawing import curves
from circuits.stimuli.images import IMAGE_SUFFIXES, ImageSource, read_image, to_image
from circuits.stimuli.photos import photographs
from circuits.stimuli.repeats import draw_repeats
from circuits.stimuli.shapes import CLASSES, draw_shapes
from circuits.stimuli.texts import TextSource
from circuits.units import unknown

Source = ImageSource | TextSource


def open_source(spec: str) -> Source:
    """Open data by name.

    Args:
        spec: `photos`, `curves`, `shapes` or `repeats`; `folder:PATH` (images), `tokens:PATH` (a text in each line),
            `npz:PATH[:KEY]` (an array of images or of tokens), `hf:PATH[:COLUMN]` (a folder saved by Hugging Face
            `datasets`), `python:MODULE:FACTORY` (a function, or FILE.py:FUNCTION, that returns a map-style dataset).

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
    return ImageSource("photos", tuple(names), hash, image)


def _starts(length: int, tile: int) -> list[int]:
    """The first pixels of tiles that cover `length`; they overlap rather than reach beyond it."""
    n = max(1, -(-length // tile))
    return [round(i * max(0, length - tile) / max(1, n - 1)) for i in range(n)]


def _folder(path: str) -> ImageSource:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {path!r} does not exist or is not a folder")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise ValueError(
            f"data folder {path!r} holds no images: expected files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    names = tuple(str(p.relative_to(root)) for p in files)
    parts: list[bytes | str] = ["folder"]
    for name, file in zip(names, files, strict=True):
        parts += [name, hashlib.sha256(file.read_bytes()).digest()]
    return ImageSource(
        f"folder:{root.resolve()}", names, _digest(*parts), lambda i: read_image(files[i])
    )


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
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"token file {path!r} is not text in UTF-8: {error}") from error
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"token file {path!r} is empty: expected one text a line")
    names = tuple(f"line {n}" for n, _ in lines)
    return TextSource(
        f"tokens:{file.resolve()}", names, _digest("tokens", text), tuple(line for _, line in lines)
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
    file, _, function = name.partition(":")
    place = str(Path(file).resolve()) if file.endswith(".py") else file
    return from_dataset(made, f"python:{place}:{function}")


_OPENERS: dict[str, Callable[[], Source]] = {
    "photos": _photos,
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
