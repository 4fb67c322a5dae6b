"""Images: a sequence of them, reading them from files, bringing them to 8-bit RGB."""

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
"""Larger images are refused: they are decompression bombs more often than photographs."""

_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error)
"""What Pillow raises of damaged files."""

_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A sequence of images.

    Attributes:
        spec: its name, e.g. `photos`.
        names: one a image, for people.
        hash: SHA-256 of what it holds, in hexadecimal.
        image: the image at an index: a picture, or a tensor, channel x y x x, in 0..1 (RGB order if it
            has three channels).
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
        ValueError: if it is not an image, is cut off or has more than `MAX_PIXELS` pixels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {str(path)!r} does not exist or is not a file")
    return decode(path, str(path), MAX_PIXELS)


def decode(
    file: Path | BytesIO, name: str, most: int, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode an image safely: turned upright, 8-bit RGB, transparency on white; of several, the first.

    Its size is read from its header, and judged, before a pixel is decoded.

    Args:
        file: where it is.
        name: what error messages call it.
        most: how many pixels it may have.
        formats: which formats it may have, as Pillow calls them; all that Pillow knows if not given.

    Raises:
        ValueError: if it is not such an image, is damaged or cut off, or has too many pixels.
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
    """The size of a TIFF's tiles: one is decoded whole, even where it is larger than the image."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.size
    width, height = image.tag_v2.get(_TILE_WIDTH), image.tag_v2.get(_TILE_HEIGHT)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else image.size


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


def to_image(values: torch.Tensor) -> Image.Image:
    """A tensor, channel x y x x in 0..1 with 3 channels, as a picture."""
    pixels = (rearrange(values, "c y x -> y x c").clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())
