"""Data by name: photographs, folders of images, drawings, text (layer 2).

A source is a fixed sequence of examples with a hash; the same name gives the same examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError

from circuits.stimuli.drawing import curves
from circuits.stimuli.photos import photographs
from circuits.stimuli.repeats import draw_repeats
from circuits.stimuli.shapes import CLASSES, draw_shapes
from circuits.units import unknown

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
MAX_PIXELS = 100_000_000
"""Larger images are refused: they are decompression bombs more often than photographs."""


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A sequence of images.

    Attributes:
        spec: its name, e.g. `photos`.
        names: one a image, for people.
        hash: SHA-256 of what it holds, in hexadecimal.
        image: the image at an index.
    """

    spec: str
    names: tuple[str, ...]
    hash: str
    image: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class TextSource:
    """A sequence of texts or token sequences.

    Attributes:
        spec: its name.
        names: one a text.
        hash: SHA-256 of what it holds, in hexadecimal.
        texts: the texts; numbers separated by spaces where a model has no vocabulary.
    """

    spec: str
    names: tuple[str, ...]
    hash: str
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


Source = ImageSource | TextSource


def open_source(spec: str) -> Source:
    """Open data by name.

    Args:
        spec: `photos`, `curves`, `shapes`, `repeats`, `folder:PATH` or `tokens:PATH`.

    Raises:
        KeyError: if there is no such source.
        FileNotFoundError: if the path does not exist.
        ValueError: if the folder holds no images, or the file no text.
    """
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in _OPENERS_WITH_PATH:
        if not rest:
            raise ValueError(f"data {spec!r} names no path: expected {scheme}:PATH")
        return _OPENERS_WITH_PATH[scheme](rest)
    if spec in _OPENERS:
        return _OPENERS[spec]()
    raise unknown("data", spec, DATA)


def _digest(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()


# --- images ------------------------------------------------------------------------------------

_TILE, _MOST_TILES = 160, 12


def _photos() -> ImageSource:
    """The bundled photographs, each cut into at most twelve square crops spread over it."""
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
    """Left edges of tiles that cover `length`, overlapping rather than running over."""
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


def read_image(path: Path) -> Image.Image:
    """Decode an image file safely: turned upright, 8-bit RGB, transparency on white.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, is cut off or has more than `MAX_PIXELS` pixels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {str(path)!r} does not exist")
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(
                    f"image {str(path)!r} has {opened.width} x {opened.height} pixels: expected at "
                    f"most {MAX_PIXELS}"
                )
            return to_rgb(ImageOps.exif_transpose(opened))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {str(path)!r} cannot be read: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB: 16 bits scaled down, transparency on white."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        deep = image.mode.startswith("I;16") or np.asarray(image).max() > 255
        top = 65535.0 if deep else 255.0
        scaled = image.convert("F").point(lambda v: v * (255.0 / top))
        return scaled.convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


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
    """Ten held-out drawings of each class that the `shapes` model knows, 64 pixels square."""
    labels = torch.arange(10 * len(CLASSES)) % len(CLASSES)
    drawn: list[torch.Tensor] = []

    def image(i: int) -> Image.Image:
        if not drawn:
            drawn.append(draw_shapes(labels, torch.Generator().manual_seed(20_000)))
        return to_image(drawn[0][i])

    names = tuple(f"{CLASSES[c]} #{i // len(CLASSES)}" for i, c in enumerate(labels.tolist()))
    return ImageSource("shapes", names, _digest("shapes 1", *names), image)


def to_image(values: torch.Tensor) -> Image.Image:
    """A tensor, channel x y x x in 0..1 with 3 channels, as a picture."""
    pixels = (rearrange(values, "c y x -> y x c").clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())


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
    """200 held-out sequences of the kind that the `induction` model is trained on."""
    tokens, _ = draw_repeats(200, torch.Generator().manual_seed(20_000))
    texts = tuple(" ".join(map(str, row)) for row in tokens.tolist())
    names = tuple(f"sequence {i}" for i in range(len(texts)))
    return TextSource("repeats", names, _digest("repeats", *texts), texts)


_OPENERS: dict[str, Callable[[], Source]] = {
    "photos": _photos,
    "curves": _curves,
    "shapes": _shapes,
    "repeats": _repeats,
}
_OPENERS_WITH_PATH: dict[str, Callable[[str], Source]] = {"folder": _folder, "tokens": _tokens}

DATA = (*_OPENERS, "folder:PATH", "tokens:PATH")
"""The forms that `open_source` takes."""


def batches(n: int, size: int) -> Iterator[range]:
    """Cut `n` indices into runs of at most `size`.

    >>> [list(b) for b in batches(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
