"""Which units, and which examples, a command is about (layer 7)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.units import Units
from circuits.workspace import Workspace


def units_of(model: Any, text: str) -> list[Any]:
    """Units written as `SITE:1,2,5-9` (several separated by a blank or `;`); a site alone is all of its units.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if it is not of this form, or there is no such unit.
    """
    found = []
    for part in filter(None, re.split(r"[;\s]+", text)):
        units = Units.parse(part if ":" in part else f"{part}:*")
        place = model.site(units.site)
        found += [place.unit(i) for i in units.among(place)]
    if not found:
        raise ValueError(f"units {text!r} name none: expected SITE:1,2,5-9")
    return found


@dataclass(frozen=True)
class Chosen:
    """Examples for a command.

    Attributes:
        inputs: as the model takes them, one tensor.
        images: in 0..1 with three channels, for figures; None for tokens.
        names: one an example.
        data: where they come from.
    """

    inputs: Any
    images: Any
    names: tuple[str, ...]
    data: str


def examples_of(
    model: Any,
    data: str,
    limit: int,
    image: list[Path] | None = None,
    text: str = "",
    exact: bool = False,
) -> Chosen:
    """Images by path, a text, or the first examples of some data (spread over it, for images).

    Args:
        model: the model.
        data: used where no image or text is given; empty for the usual one.
        limit: how many of the data.
        image: paths.
        text: for a model of tokens.
        exact: refuse images that have not the model's size, instead of fitting them.

    Raises:
        FileNotFoundError: if an image does not exist.
        ValueError: if what is given does not fit the model.
    """
    import torch

    from circuits.harvesting import Inputs
    from circuits.models.inputs import ImageInput
    from circuits.stimuli.images import read_image
    from circuits.stimuli.sources import open_source

    spec = model.input
    if limit < 1:
        raise ValueError(f"limit {limit} must be at least 1")
    if data and (image or text):
        raise ValueError(f"--data {data!r} does not go with --image or --text")
    if isinstance(spec, ImageInput):
        if text:
            raise ValueError(f"--text {text!r}: model {model.name} takes images")
        if image:
            pictures = [read_image(path) for path in image]
            for path, picture in zip(image, pictures, strict=True):
                if exact and picture.size != (spec.width, spec.height):
                    raise ValueError(
                        f"--image {str(path)!r} has {picture.width} x {picture.height} pixels: {model.name} "
                        f"takes {spec.width} x {spec.height} (leave out --exact to fit it)"
                    )
            images = torch.stack([spec.load(picture) for picture in pictures])
            names = tuple(path.name for path in image)
            return Chosen(spec.normalize(images), _three(images), names, ", ".join(map(str, image)))
        inputs = Inputs(model, open_source(data or "photos"))
        n = min(limit, len(inputs.source))
        which = [i * len(inputs.source) // n for i in range(n)]
        loaded = [inputs.load(i) for i in which]
        names = tuple(inputs.source.names[i] for i in which)
        return Chosen(inputs.joined(loaded), _three(torch.stack(loaded)), names, inputs.source.spec)
    if image:
        raise ValueError(
            f"--image {str(image[0])!r}: model {model.name} takes tokens: use --text or --data"
        )
    if text:
        tokens = spec.encode(text)
        if spec.bos is not None and tokens[:1] != [spec.bos]:
            tokens = [spec.bos, *tokens]
        checked = spec.check(torch.tensor([tokens], dtype=torch.int64))
        return Chosen(checked, None, (text,), "text")
    inputs = Inputs(model, open_source(data or "repeats"))
    first = inputs.upto(limit, size=limit)[0]
    return Chosen(first, None, tuple(inputs.source.names[: len(first)]), inputs.source.spec)


def _three(images: Any) -> Any:
    """Images as red, green, blue; None where they have neither one nor three channels."""
    if images.shape[1] == 3:
        return images
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else None


def stored(place: Workspace, model_hash: str, site: str, data: str = "") -> Any:
    """The newest finished store of a model that has a site (of some data, if it is named); None if none has."""
    from circuits.store import ActivationStore

    found = []
    for folder in place.store_folders(model_hash):
        try:
            store = ActivationStore.open(folder, model_hash)
        except (OSError, ValueError):
            continue
        if site in store.sites and data in ("", store.provenance.data):
            found.append(store)
    return max(found, key=lambda s: (s.folder / "statistics.h5").stat().st_mtime, default=None)


def options_of(given: list[str] | None) -> dict[str, Any]:
    """Options written NAME=VALUE: whole numbers, numbers, or words.

    Raises:
        ValueError: if one is not of this form.

    >>> options_of(["samples=20", "noise=0.1", "blank=blur"])
    {'samples': 20, 'noise': 0.1, 'blank': 'blur'}
    """
    found: dict[str, Any] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--option {item!r} is not of the form NAME=VALUE, e.g. samples=20")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text == "none" else text
