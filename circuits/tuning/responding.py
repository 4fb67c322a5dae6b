"""How units respond to images that are about their middle."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.paths.receptive import receptive_field
from circuits.units import Site

BATCH = 32
_LARGEST = 1024


def responses(
    model: HookedModel,
    site: str | Site,
    images: Iterable[Float[Tensor, "image 3 h w"]],
    central: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "image unit"]:
    """The largest activation of each unit of a site on each image.

    Args:
        model: of images with 1 or 3 channels.
        site: whose units.
        images: in 0..1, in parts of any size.
        central: whether to look only in the middle of the map, as images about their middle want: at most a
            fifth each way, but at least the middle position (two, where their number is even).
        progress: called with how many images are done.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no such images.
    """
    place, spec = model.site(site), taking_photographs(model)
    found: list[Tensor] = []
    done = 0
    for some in images:
        for part in some.split(BATCH):
            own = part.mean(1, keepdim=True) if spec.channels == 1 else part
            if place.position_axes != ("y", "x"):  # it may read a map of the model's own size only
                own = _framed(own, spec)
            x = spec.normalize(own).contiguous(memory_format=torch.channels_last)
            value = model.run(x, read=[place], until=place)[place]
            found.append(_largest(place, value, central).cpu())
            done += len(part)
            if progress is not None:
                progress(done)
    return torch.cat(found)


def _framed(images: Tensor, spec: ImageInput) -> Tensor:
    """Images in the middle of the model's height and width, their border repeated."""
    height, width = images.shape[-2:]
    if height > spec.height or width > spec.width:
        raise ValueError(
            f"size {max(height, width)} must be at most {min(spec.height, spec.width)} for a site without a map"
        )
    top, left = (spec.height - height) // 2, (spec.width - width) // 2
    sides = (left, spec.width - width - left, top, spec.height - height - top)
    return F.pad(images, sides, mode="replicate")


def _largest(site: Site, value: Tensor, central: bool) -> Float[Tensor, "image unit"]:
    units = site.activations(value)
    maps = units.reshape(*units.shape[:2], *site.positions_of(value))
    if central:
        for axis in range(2, maps.ndim):
            n = maps.shape[axis]
            keep = max(1, n // 5)
            if (
                n - keep
            ) % 2:  # as many positions before as behind: a lopsided middle moves what is preferred
                keep += 1 if keep == 1 else -1
            maps = maps.narrow(axis, (n - keep) // 2, keep)
    return maps.flatten(2).amax(2) if maps.ndim > 2 else maps


def taking_photographs(model: HookedModel) -> ImageInput:
    """What a model takes.

    Raises:
        ValueError: if it is no image with 1 or 3 channels.
    """
    spec = model.input
    if not isinstance(spec, ImageInput) or spec.channels not in (1, 3):
        raise ValueError(f"model {model.name} takes no photographs: stimuli need 1 or 3 channels")
    return spec


def stimulus_size(model: HookedModel, site: str | Site, size: int | None) -> int:
    """Height and width of images for a site: what a unit in the middle sees, if not given.

    Raises:
        ValueError: if it is below 8 pixels.
    """
    spec = taking_photographs(model)
    most = min(spec.height, spec.width)
    if size is not None:
        if not 8 <= size <= _LARGEST:
            raise ValueError(f"size {size} must be at least 8 pixels and at most {_LARGEST}")
        return size
    place = model.site(site)
    if place.position_axes != ("y", "x"):
        return most
    middle = tuple(n // 2 for n in place.position_shape)
    top, left, bottom, right = receptive_field(model, place).at(middle)
    seen = max(bottom - top, right - left)
    return min(most, max(16, -(-seen * 5 // 4 // 8) * 8))
