"""Images: sequences of them, reading them from files, and converting them to 8-bit RGB."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif",
    ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga",
})  # fmt: skip
"""How the names of image files end, in lower case."""

FORMATS = (
    "JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "QOI",
)  # fmt: skip
"""The formats that are read, by Pillow's names: those that it decodes itself. It hands others to programs of a machine
(EPS to Ghostscript), by what is in a file and not by its name."""

DEEP = ("PNG", "PPM")
"""Formats whose pixels of 32 bits in Pillow (mode I) were 16 bits in the file."""

MAX_PIXELS = 100_000_000
"""Larger images are refused: they are more often decompression bombs than photographs."""

_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error)
"""What Pillow raises for damaged files."""

_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # TIFF tags


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A sequence of images.

    Attributes:
        spec: its name, e.g. `photos`.
        names: the name of each image.
        hash: the SHA-256 of its content, in hexadecimal.
        image: function from an index to the image: a picture, or a tensor in 0..1, channel x y x x (in RGB order if
            it has three channels, with opacity as the fourth of four).
        folder: where the files are, of which `names` are the paths; None if they are no files of a folder.
        left_out: the files of the folder that are no examples, and why.
        groups: for each image, what it is part of, if several are of one: crops of one photograph are not independent,
            and stay in one half of a task. Empty if all are independent.
    """

    spec: str
    names: tuple[str, ...]
    hash: str
    image: Callable[[int], Image.Image | torch.Tensor]
    folder: Path | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def read_image(path: Path) -> Image.Image:
    """Decode an image file safely: turned upright, 8-bit RGB, transparency on white.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, is truncated, or has more than `MAX_PIXELS` pixels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {str(path)!r} does not exist or is not a file")
    return decode(path, str(path), MAX_PIXELS)


class TooManyPixelsError(OSError):
    """A picture whose header says that it is larger than Pillow opens."""


def open_picture(file: str | Path | BytesIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image file of one of some formats: the one way in which this package does.

    Raises:
        OSError: if it is of no such format.
        TooManyPixelsError: if it is larger than Pillow opens.
    """
    try:
        return Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"picture {str(file)!r} has too many pixels") from error


def decode(
    file: Path | BytesIO, name: str, most: int, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Decode an image safely: turned upright, 8-bit RGB, transparency on white; of several frames, the first (see
    `to_rgb`).

    The size in its header is checked before a pixel is decoded.

    Args:
        file: the file.
        name: its name in error messages.
        most: the most pixels that it may have.
        formats: the formats that are allowed, by Pillow's names.

    Raises:
        ValueError: if it is not such an image, is damaged or truncated, or has too many pixels.
    """
    try:
        if isinstance(file, Path) and not file.stat().st_size:
            raise ValueError("the file is empty")
        with open_picture(file, formats) as opened:
            width, height = max(opened.size, _tile(opened), key=math.prod)
            if width * height <= most:
                return to_rgb(opened)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"image {name!r} cannot be read: expected a whole image in {', '.join(formats)}"
        ) from error
    except TooManyPixelsError as error:
        raise ValueError(f"image {name!r} has too many pixels: expected at most {most}") from error
    except _UNREADABLE as error:
        raise ValueError(f"image {name!r} cannot be read: {error}") from error
    raise ValueError(f"image {name!r} has {width} x {height} pixels: expected at most {most}")


def _tile(image: Image.Image) -> tuple[int, int]:
    """The size of a TIFF's tiles, which are decoded whole even if they are larger than the image."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.size
    width, height = image.tag_v2.get(_TILE_WIDTH), image.tag_v2.get(_TILE_HEIGHT)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any picture to 8-bit RGB, turned upright as its EXIF orientation says.

    Values are scaled by what the picture says of them: whole numbers of 8 bits are in 0..255, of 16 bits in 0..65535,
    floats in 0..1. Transparency is put on white.

    Raises:
        ValueError: if nothing says what white is: whole numbers of 32 bits, and floats outside 0..1.
    """
    kind, mode = image.format, image.mode
    image = ImageOps.exif_transpose(image)
    if mode in ("I", "F") or mode.startswith("I;16"):
        # Pillow's own conversion of these modes clips at 255 instead of scaling.
        grey = (np.asarray(image, np.float64) / _white(image, kind) * 255).round()
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _white(image: Image.Image, kind: str | None) -> float:
    """The value that is white in a picture of more than 8 bits a pixel."""
    if image.mode != "F":
        if image.mode == "I" and kind not in DEEP:
            raise ValueError(
                "it has whole numbers of 32 bits, and nothing says which is white: expected 8 or 16 bits, or "
                "floats in 0..1"
            )
        return 65535.0
    check_range(np.asarray(image))
    return 1.0


def check_range(values: np.ndarray) -> None:
    """Raise ValueError unless all values of an image are in 0..1."""
    odd = int((~np.isfinite(values)).sum())
    if odd:
        raise ValueError(f"it has {odd} NaN or infinite values of {values.size}: expected 0 to 1")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"it has values {low:.3g} to {high:.3g}: expected 0 to 1, before the model's preprocessing"
        )


def on_white(values: Float[torch.Tensor, "4 y x"]) -> Float[torch.Tensor, "3 y x"]:
    """Put an image in 0..1 with opacity as its fourth channel on white, as is done with the files of pictures.

    >>> on_white(torch.tensor([0.0, 0.5, 1.0, 0.5])[:, None, None]).flatten().tolist()
    [0.5, 0.75, 1.0]
    """
    opacity = values[3:]
    return values[:3] * opacity + (1 - opacity)


def to_image(values: torch.Tensor) -> Image.Image:
    """Convert a tensor in 0..1, channel x y x x with 3 channels, to a picture."""
    pixels = (rearrange(values, "c y x -> y x c").clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())
