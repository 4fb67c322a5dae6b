"""Feature visualizations as results: the image, what it reached, and how it was made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from circuits.files import replacing
from circuits.json_files import parse_json
from circuits.stimuli.images import open_picture, to_image
from circuits.units import Unit

DESCRIPTION = 0x010E
"""The EXIF tag (ImageDescription) that holds a WebP's metadata; PNGs have a text chunk `circuits`."""

SUFFIXES = (".png", ".webp")


@dataclass(frozen=True, eq=False)
class Picture:
    """A feature visualization.

    Attributes:
        objective: what it was made for, in words.
        unit: the unit that it shows, if it is a unit's.
        image: in 0..1, in the model's channels.
        activation: the objective's value on it, untransformed: for a unit its mean activation over
            positions.
        start: the same for the image that the optimisation started from.
        model_hash: of the model's weights.
        steps: of optimisation that were done.
        seed: of the start and the transforms.
        settings: everything else it was made with.
        alpha: how opaque each pixel is, if that was made.
        at: the image after each number of steps that was asked for.
    """

    objective: str
    unit: Unit | None
    image: Float[Tensor, "channel h w"]
    activation: float
    start: float
    model_hash: str
    steps: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    alpha: Float[Tensor, "1 h w"] | None = None
    at: dict[int, Float[Tensor, "channel h w"]] = field(default_factory=dict)

    def file_name(self, number: int = 0) -> str:
        """Steps, size and seed, and what sets it apart from the plain picture of these; `number` among diverse ones."""
        facts = self.settings
        # Only what differs from the default is named, so that plain pictures keep a short name that people can type.
        parts = [facts["param"]] if facts["param"] != "fourier" else []
        parts += ["alpha"] if facts["alpha"] else []
        parts += ["natural"] if "images" in facts and facts["param"] != "maco" else []
        parts += {"negative": ["negative"], "diverse": [f"diverse{number}"]}.get(facts["kind"], [])
        if self.unit is None or self.objective != str(self.unit):
            named = "".join(c if c.isalnum() else "_" for c in self.objective)
            # A long one ends in its hash: what sets two objectives apart may come late in their texts.
            mark = hashlib.sha256(self.objective.encode()).hexdigest()[:8]
            parts += [named if len(named) <= 40 else f"{named[:31]}_{mark}"]
        plain = f"{self.steps}steps-{self.image.shape[-1]}px-seed{self.seed}"
        return plain + "".join(f"-{part}" for part in dict.fromkeys(parts))

    def metadata(self) -> dict[str, Any]:
        """Everything but the image, as a plain dictionary."""
        return {
            "unit": None if self.unit is None else str(self.unit),
            "objective": self.objective,
            "activation": self.activation,
            "start_activation": self.start,
            "model_hash": self.model_hash,
            "steps": self.steps,
            "seed": self.seed,
            "size": list(self.image.shape[1:]),
            **self.settings,
        }

    def to_pil(self) -> Image.Image:
        """As a picture; images with other than 1 or 3 channels show the mean of their channels."""
        found = shown(self.image)
        if self.alpha is None:
            return found
        opacity = (self.alpha[0].clamp(0, 1) * 255).round().to(torch.uint8)
        found.putalpha(Image.fromarray(opacity.numpy()))
        return found

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write a PNG or WebP, by the path's ending, with the metadata inside.

        Args:
            path: where.
            metadata: more to put there.

        Raises:
            ValueError: if the path ends in something else.
        """
        write_image(self.to_pil(), Path(path), self.metadata() | (metadata or {}))


def shown(image: Float[Tensor, "channel h w"]) -> Image.Image:
    """An image in 0..1 as a picture, grey where it has other than three channels."""
    colored = image if image.shape[0] == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    return to_image(colored)


def check_suffix(path: Path) -> Path:
    """Return `path` if it ends as a picture does.

    Raises:
        ValueError: if not.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"picture {str(path)!r} must end in {' or '.join(SUFFIXES)}")
    return path


def write_image(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Write a picture as PNG or WebP with facts inside, all or nothing.

    Raises:
        ValueError: if the path ends in something else.
    """
    if check_suffix(path).suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("circuits", json.dumps(facts))
        with replacing(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
        return
    with replacing(path) as temporary:
        as_webp(image, temporary, facts)


def as_webp(
    image: Image.Image, file: Path | IO[bytes], facts: dict[str, Any], quality: int = 90
) -> None:
    """Write a picture as WebP with facts inside."""
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(facts)
    image.save(file, format="WEBP", quality=quality, method=4, exif=exif)


def read_facts(path: Path) -> dict[str, Any]:
    """A picture's metadata; none if it carries none that can be read.

    Raises:
        OSError: if it is not a picture.
    """
    with open_picture(path) as image:
        # PNG has text chunks, WebP EXIF; either is absent from a picture that somebody else made.
        text = getattr(image, "text", {}).get("circuits") or image.getexif().get(DESCRIPTION)
    try:
        facts = parse_json(text or "", "its metadata", nan=True)
    except (TypeError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
