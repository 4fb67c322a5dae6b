"""Images: sequences of them, reading them from files, and converting them to 8-bit RGB."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
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
            it has three channels).
    """

    spec: str
    names: tuple[str, ...]
    hash: str
    image: Callable[[int], Image.Image | torch.Tensor]

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


def decode(
    file: Path | BytesIO, name: str, most: int, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode an image safely: turned upright, 8-bit RGB, transparency on white; of several frames, the first.

    The size in its header is checked before a pixel is decoded.

    Args:
        file: the file.
        name: its name in error messages.
        most: the most pixels that it may have.
        formats: the formats that are allowed, by Pillow's names; by default all.

    Raises:
        ValueError: if it is not such an image, is damaged or truncated, or has too many pixels.
    """
    try:
        with Image.open(file, formats=formats) as opened:
            width, height = max(opened.size, _tile(opened), key=math.prod)
            if width * height <= most:
                return to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        known = ", ".join(formats) if formats else "a format that Pillow knows"
        raise ValueError(
            f"image {name!r} cannot be read: expected a whole image in {known}"
        ) from error
    except Image.DecompressionBombError as error:
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
    """Convert any image to 8-bit RGB: 16 bits are scaled down, transparency is put on white."""
    # Pillow's own conversion of these modes clips at 255 instead of scaling. Modes I and F do not say their range: if
    # a value exceeds 255, it is taken to be 16 bits.
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        deep = image.mode.startswith("I;16") or np.asarray(image).max() > 255
        top = 65535.0 if deep else 255.0
        scaled = image.convert("F").point(lambda v: v * (255.0 / top))
        return scaled.convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def to_image(values: torch.Tensor) -> Image.Image:
    """Convert a tensor in 0..1, channel x y x x with 3 channels, to a picture."""
    pixels = (rearrange(values, "c y x -> y x c").clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())
