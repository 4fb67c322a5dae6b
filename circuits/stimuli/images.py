"""Images: a sequence of them, reading them from files, bringing them to 8-bit RGB (layer 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError

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


def to_image(values: torch.Tensor) -> Image.Image:
    """A tensor, channel x y x x in 0..1 with 3 channels, as a picture."""
    pixels = (rearrange(values, "c y x -> y x c").clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())
