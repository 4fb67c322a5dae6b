"""Behaviours of image models: pairs of an image and its counterpart.

The counterpart is another image, or the same one blurred, in grey, rotated, or with its middle replaced. Images are RGB
in 0..1, before any model's preprocessing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import gaussian_filter, rotate
from skimage.color import rgb2gray
from torch import Generator, Tensor

from circuits.stimuli.drawing import curves
from circuits.stimuli.shapes import CLASSES, draw_shapes
from circuits.tasks.generated import check_count
from circuits.units import unknown

Images = Float[Tensor, "image 3 h w"]

Kind = Literal["another", "blurred", "grey", "turned", "patch"]
"""What a counterpart is; see `blurred`, `grey`, `turned` and `with_patch`."""


@dataclass(frozen=True, eq=False)
class ImagePairs:
    """Images and their counterparts, pair by pair.

    Attributes:
        name: the behaviour's name.
        clean: the images, in 0..1.
        corrupted: the counterpart of each image.
        names: a name for each pair.
        kind: how the counterparts were made, in words.
        about: one sentence on what a model does that shows the behaviour.
        classes: the class of each image, as an index into the model's outputs; empty if there are no classes.
        against: the wrong class that it is compared with; empty if there is none.
        groups: the instance that each pair belongs to; pairs of one group stay in one half of a split.
    """

    name: str
    clean: Images
    corrupted: Images
    names: tuple[str, ...]
    kind: str
    about: str = ""
    classes: tuple[int, ...] = ()
    against: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.clean)
        if not n:
            raise ValueError(f"pairs of {self.name}: there are no images, expected at least one")
        if self.clean.shape != self.corrupted.shape:
            raise ValueError(
                f"counterparts of {self.name} have shape {tuple(self.corrupted.shape)}: expected "
                f"{tuple(self.clean.shape)}, that of the images"
            )
        for what in ("names", "classes", "against", "groups"):
            if len(getattr(self, what)) not in ((n,) if what == "names" else (0, n)):
                raise ValueError(
                    f"{what} of {self.name}: there are {len(getattr(self, what))} for {n} pairs, expected one each"
                )

    def __len__(self) -> int:
        return len(self.clean)

    def with_counterparts(self, kind: Kind, **settings: float) -> ImagePairs:
        """The same images, each with a changed version of itself as the counterpart.

        Args:
            kind: `blurred`, `grey`, `turned` or `patch` (taken from the next image).
            **settings: the change's settings: `sigma`, `degrees` or `size`.

        Raises:
            KeyError: if there is no such change.
        """
        if kind not in _CHANGES:
            raise unknown("counterpart", kind, _CHANGES)
        changed = _CHANGES[kind](self.clean, **settings)
        said = ", ".join([kind, *(f"{name} {value:g}" for name, value in settings.items())])
        return replace(self, corrupted=changed, kind=said)


# --- counterparts ------------------------------------------------------------------------------


def blurred(images: Images, sigma: float = 4.0) -> Images:
    """Images under a Gaussian blur; beyond the border the edge pixels repeat.

    Args:
        images: in 0..1.
        sigma: standard deviation of the Gaussian, in pixels.

    Raises:
        ValueError: if `sigma` is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma {sigma:g} must be positive")
    made = gaussian_filter(images.numpy(), sigma, axes=(2, 3), mode="nearest")
    return torch.from_numpy(made).clamp(0, 1)


def grey(images: Images) -> Images:
    """Images without colour: the luminance of ITU-R BT.709 in all three channels."""
    luminance = np.asarray(rgb2gray(images.double().numpy(), channel_axis=1))
    return torch.from_numpy(luminance).to(images)[:, None].expand(-1, 3, -1, -1).contiguous()


def turned(images: Images, degrees: float = 180.0) -> Images:
    """Images rotated counter-clockwise about their centre; corners that rotate in from outside repeat the edge pixels.

    Quarter turns of square images and half turns of all images are exact; other angles are interpolated.
    """
    # Interpolation also blurs, which would be a second change besides the rotation.
    quarters, rest = divmod(degrees, 90)
    if not rest and (quarters % 2 == 0 or images.shape[-1] == images.shape[-2]):
        return images.rot90(int(quarters), (2, 3)).contiguous()
    made = rotate(images.numpy(), degrees, axes=(2, 3), reshape=False, order=1, mode="nearest")
    return torch.from_numpy(made).clamp(0, 1)


def with_patch(images: Images, size: float = 0.5, others: Images | None = None) -> Images:
    """Images whose middle is replaced by that of other images.

    Args:
        images: in 0..1.
        size: height and width of the patch, as a share of the image's.
        others: the images that the patches come from; each image's patch comes from the next image if not given.

    Raises:
        ValueError: if `size` is not above 0 and at most 1, or `others` are lacking or have another shape.
    """
    if not 0 < size <= 1:
        raise ValueError(f"size {size:g} must be above 0 and at most 1, a share of the image")
    if others is None and len(images) < 2:
        raise ValueError(
            f"others: with {len(images)} images there is no next one to take the patch from, expected at least two"
        )
    source = images.roll(-1, 0) if others is None else others
    if source.shape != images.shape:
        raise ValueError(
            f"others have shape {tuple(source.shape)}: expected {tuple(images.shape)}, that of the images"
        )
    (top, height), (left, width) = (
        ((side - max(1, round(side * size))) // 2, max(1, round(side * size)))
        for side in images.shape[2:]
    )
    made = images.clone()
    window = (..., slice(top, top + height), slice(left, left + width))
    made[window] = source[window]
    return made


_CHANGES: Mapping[str, Callable[..., Images]] = {
    "blurred": blurred,
    "grey": grey,
    "turned": turned,
    "patch": with_patch,
}


# --- behaviours --------------------------------------------------------------------------------


def curve_pairs(
    n: int,
    seed: int = 0,
    *,
    size: int = 64,
    radii: tuple[float, float] = (0.12, 0.3),
    kind: Kind = "turned",
    **settings: float,
) -> ImagePairs:
    """Drawn curves whose counterparts bulge the other way, for measuring the activation of a unit.

    Orientations are spread evenly over the circle and alternate between dark and light curves. The middle of each arc
    is at the image's centre, so that rotation by 180 degrees gives the arc of opposite orientation at the same place.

    Args:
        n: number of pairs.
        seed: seed of the radii and of the first orientation.
        size: height and width in pixels.
        radii: smallest and largest radius, as shares of the size.
        kind: how the counterparts are made.
        **settings: the change's settings.

    Raises:
        ValueError: if `n` is not positive, or the radii are not in order.
        KeyError: if there is no such kind of counterpart.
    """
    check_count(n)
    low, high = radii
    if not 0 < low <= high:
        raise ValueError(f"radii {radii} must be positive, the smaller one first")
    generator = Generator().manual_seed(seed)
    angles = (torch.arange(n) + torch.rand(1, generator=generator)) * (360 / n)
    radius = (low + (high - low) * torch.rand(n, generator=generator)) * size
    thickness = max(1.5, size * 5 / 128)
    dark, light = (
        curves(angles, radius, size, thickness, foreground=ink, background=1 - ink)
        for ink in (0.0, 1.0)
    )
    is_dark = torch.arange(n) % 2 == 0
    images = torch.where(is_dark[:, None, None, None], dark, light)
    names = tuple(
        f"{'dark' if d else 'light'} curve {a:.0f}°, radius {r:.0f}"
        for d, a, r in zip(is_dark.tolist(), angles.tolist(), radius.tolist(), strict=True)
    )
    about = "A curve of one orientation, rather than of the opposite one."
    return ImagePairs("curves", images, images, names, "", about).with_counterparts(
        kind, **settings
    )


def shape_pairs(
    n: int,
    seed: int = 0,
    *,
    first: str = "curve 90°",
    second: str = "curve 270°",
    kind: Kind = "another",
    **settings: float,
) -> ImagePairs:
    """Drawings of one class against another, from the classes that the `shapes` model is trained on.

    With the kind `another`, the counterpart is a drawing of the other class, and the classes alternate as the clean
    image, so that each is the answer equally often. With any other kind it is the same drawing, changed.

    Args:
        n: number of pairs.
        seed: seed of the drawings.
        first: the name of a class.
        second: the name of the class that it is compared with.
        kind: how the counterparts are made.
        **settings: the change's settings.

    Raises:
        KeyError: if there is no such class or kind of counterpart.
        ValueError: if `n` is not positive, or the two classes are the same.
    """
    check_count(n)
    for name in (first, second):
        if name not in CLASSES:
            raise unknown("class", name, CLASSES)
    if first == second:
        raise ValueError(f"second {second!r} is also the first class: expected a different one")
    both = CLASSES.index(first), CLASSES.index(second)
    classes = tuple(both[i % 2] for i in range(n))
    against = tuple(both[1 - i % 2] for i in range(n))
    generator = Generator().manual_seed(seed)
    clean, other = (draw_shapes(torch.tensor(some), generator) for some in (classes, against))
    made = ImagePairs(
        "class against class", clean, other, tuple(f"{CLASSES[c]} #{i}" for i, c in enumerate(classes)),
        "another", f"Which of two classes a drawing is of: {first} or {second}.", classes, against,
    )  # fmt: skip
    if kind != "another":
        return made.with_counterparts(kind, **settings)
    if settings:
        raise unknown("setting of another", next(iter(settings)), ["none"])
    return made


def pairs_of(
    images: Images,
    classes: tuple[int, ...],
    names: tuple[str, ...],
    seed: int = 0,
    *,
    name: str = "images",
    kind: Kind = "another",
    **settings: float,
) -> ImagePairs:
    """Labelled images of a user and their counterparts.

    With the kind `another`, each image is paired with an image of another class, which becomes the wrong answer; every
    image is the counterpart of exactly one other.

    Args:
        images: in 0..1.
        classes: the class of each image, as an index into the model's outputs.
        names: a name for each image.
        seed: seed of the pairing.
        name: the behaviour's name.
        kind: how the counterparts are made.
        **settings: the change's settings.

    Raises:
        ValueError: if more than half of the images are of one class, so that they cannot all be paired.
        KeyError: if there is no such kind of counterpart.
    """
    if kind != "another":
        plain = ImagePairs(name, images, images, names, "", classes=classes)
        return plain.with_counterparts(kind, **settings)
    order = _pair_across_classes(classes, Random(seed))
    return ImagePairs(
        name, images, images[order], names, "another", classes=classes, against=tuple(classes[i] for i in order)
    )  # fmt: skip


def _pair_across_classes(classes: tuple[int, ...], random: Random) -> list[int]:
    """For each image the index of one of another class: two images are each other's, of an odd number one joins two."""
    # Sorted by class, in random order within each, a class fills at most half of the places one after the other, so
    # that half of the places further on there is always another class.
    places = sorted(range(len(classes)), key=lambda i: (classes[i], random.random()))
    counts = Counter(classes)
    most = max(counts.values(), default=0)
    if 2 * most > len(classes):
        raise ValueError(
            f"classes: {most} of {len(classes)} images are of one class, expected at most half, so that each can be "
            "paired with another class"
        )
    found = [0] * len(classes)
    if len(places) % 2:
        largest = max(counts, key=counts.__getitem__)
        odd = next(i for i in places if classes[i] == largest)
        places.remove(odd)
        found[odd] = next(i for i in places if classes[i] != largest)
    half = len(places) // 2
    for k, i in enumerate(places):
        found[i] = places[(k + half) % len(places)]
    return found


IMAGE_PAIRS: Mapping[str, Callable[..., ImagePairs]] = {
    "curves": curve_pairs,
    "shapes": shape_pairs,
}
"""Generators of image pairs by the behaviour's name; each takes the number of pairs and a seed."""
