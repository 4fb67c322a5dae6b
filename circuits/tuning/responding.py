"""The responses of units to images whose content is in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.finiteness import check_finite
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.paths.receptive import receptive_field
from circuits.tensors import at_least_single
from circuits.units import Site, Unit

BATCH = 32
"""Images in a forward pass."""

_LARGEST = 1024
"""The largest size of a stimulus, in pixels."""


def of_one_site(model: HookedModel, units: Sequence[str | Unit]) -> list[Unit]:
    """The units that are named, which must be of one site.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if there is no unit, one does not exist, or they are of several sites.
    """
    wanted = [model.unit(unit) for unit in units]
    if len({unit.site for unit in wanted}) != 1:
        raise ValueError(
            f"units {', '.join(map(str, wanted)) or '(none)'}: expected units of one site"
        )
    return wanted


def check_step(step: float) -> int:
    """The number of steps in a full turn.

    Raises:
        ValueError: if it is not a whole number of at least four.
    """
    n_angles = round(360 / step) if step > 0 else 0
    if n_angles < 4 or abs(n_angles * step - 360) > 1e-6:
        raise ValueError(f"step {step} must divide 360 degrees into at least four")
    return n_angles


def responses(
    model: HookedModel,
    site: str | Site,
    images: Iterable[Float[Tensor, "image 3 h w"]],
    central: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "image unit"]:
    """Measure the largest activation of each unit of a site on each image.

    At a site with a ceiling (after ReLU6), it is what it would be without the ceiling, which would cut off the peaks of
    tuning curves.

    Args:
        model: a model of images with 1 or 3 channels.
        site: the site of the units.
        images: images in 0..1, in batches of any size.
        central: whether only the middle of the map counts: at most a fifth of its height and width, but at least the
            middle position (two, if their number is even).
        progress: called with how many images are done.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no such images.
    """
    place, spec = model.site(site), taking_photographs(model)
    read = model.before_ceiling(place)
    found: list[Tensor] = []
    done = 0
    for some in images:
        for part in some.split(BATCH):
            own = part.mean(1, keepdim=True) if spec.channels == 1 else part
            # After a flatten, the model takes images of its own size only.
            if place.position_axes != ("y", "x"):
                own = _framed(own, spec)
            # Channels last: convolutions on a CPU are faster in this layout.
            x = spec.normalize(own).contiguous(memory_format=torch.channels_last)
            value = model.run(x, read=[read], until=read)[read]
            if read != place:
                value = place.without_ceiling(value)
            largest = at_least_single(_largest(place, value, central))
            check_finite(model, largest, x, names=range(done, done + len(part)))
            found.append(largest.cpu())
            done += len(part)
            if progress is not None:
                progress(done)
    return torch.cat(found)


def _framed(images: Tensor, spec: ImageInput) -> Tensor:
    """Put images in the middle of the model's height and width, repeating their border."""
    height, width = images.shape[-2:]
    if height > spec.height or width > spec.width:
        raise ValueError(
            f"size {max(height, width)} must be at most {min(spec.height, spec.width)} for a site without a map"
        )
    top, left = (spec.height - height) // 2, (spec.width - width) // 2
    sides = (left, spec.width - width - left, top, spec.height - height - top)
    return F.pad(images, sides, mode="replicate")


def _largest(site: Site, value: Tensor, central: bool) -> Float[Tensor, "image unit"]:
    """The largest activation over positions, or over those in the middle."""
    units = site.activations(value)
    maps = units.reshape(*units.shape[:2], *site.positions_of(value))
    if central:
        for axis in range(2, maps.ndim):
            n = maps.shape[axis]
            # The middle fifth: drawings are in the middle of the image, and units at the border see its edge.
            keep = max(1, n // 5)
            # As many positions before as after the middle: an asymmetric choice would shift preferred angles.
            if (n - keep) % 2:
                keep += 1 if keep == 1 else -1
            maps = maps.narrow(axis, (n - keep) // 2, keep)
    return maps.flatten(2).amax(2) if maps.ndim > 2 else maps


def taking_photographs(model: HookedModel) -> ImageInput:
    """The model's input, which must be images with 1 or 3 channels.

    Raises:
        ValueError: if it is not.
    """
    spec = model.input
    if not isinstance(spec, ImageInput) or spec.channels not in (1, 3):
        raise ValueError(f"model {model.name} takes no photographs: stimuli need 1 or 3 channels")
    return spec


def stimulus_size(model: HookedModel, site: str | Site, size: int | None) -> int:
    """The height and width of images for a site: as given, or by default the receptive field of a unit in the middle,
    plus a quarter.

    Raises:
        ValueError: if the size given is out of range.
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
    # -(-a // 8) * 8 is a rounded up to a multiple of 8.
    return min(most, max(16, -(-seen * 5 // 4 // 8) * 8))
