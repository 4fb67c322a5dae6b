"""Behaviours of models that take images: pairs of an image and its counterpart.

The counterpart is another image, or the same one blurred, grey, turned, or with a patch replaced. Images are in 0..1,
RGB, before a model's own preprocessing.
"""

from __future__ import annotations

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
        name: of the behaviour.
        clean: the images, in 0..1.
        corrupted: the counterpart of each.
        names: one a pair.
        kind: how the counterparts were made, in words.
        about: one sentence on what a model does that shows the behaviour.
        classes: the class of each image, a number among the model's; empty where there are no classes.
        against: the class that it is compared with; empty where there is none.
        groups: the instance that each pair belongs to: pairs of one group stay in one half of a split.
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
            raise ValueError(f"pairs of {self.name}: there is no image")
        if self.clean.shape != self.corrupted.shape:
            raise ValueError(
                f"counterparts of {self.name} are {tuple(self.corrupted.shape)}: expected "
                f"{tuple(self.clean.shape)}, as the images"
            )
        for what in ("names", "classes", "against", "groups"):
            if len(getattr(self, what)) not in ((n,) if what == "names" else (0, n)):
                raise ValueError(f"{what} of {self.name}: {len(getattr(self, what))} for {n} pairs")

    def __len__(self) -> int:
        return len(self.clean)

    def compared(self, kind: Kind, **settings: float) -> ImagePairs:
        """The same images, each with its own changed version as the counterpart.

        Args:
            kind: `blurred`, `grey`, `turned` or `patch` (from the next image).
            **settings: of that change: `sigma`, `degrees`, `size`.

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
    """Images under a Gaussian blur; edges go on as they end.

    Args:
        images: in 0..1.
        sigma: of the Gaussian, in pixels.

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
    """Images turned about their middle, counter-clockwise; corners that come in from outside repeat the edge.

    Quarter turns of square images, and half turns of all, are exact; others are interpolated.
    """
    quarters, rest = divmod(degrees, 90)
    if not rest and (quarters % 2 == 0 or images.shape[-1] == images.shape[-2]):
        return images.rot90(int(quarters), (2, 3)).contiguous()
    made = rotate(images.numpy(), degrees, axes=(2, 3), reshape=False, order=1, mode="nearest")
    return torch.from_numpy(made).clamp(0, 1)


def with_patch(images: Images, size: float = 0.5, others: Images | None = None) -> Images:
    """Images whose middle is that of other images.

    Args:
        images: in 0..1.
        size: height and width of the patch, as a share of the image's.
        others: where the patches are from; each image's is from the next one if not given.

    Raises:
        ValueError: if `size` is not above 0 and at most 1, the others have another shape, or there are none.
    """
    if not 0 < size <= 1:
        raise ValueError(f"size {size:g} must be above 0 and at most 1, a share of the image")
    if others is None and len(images) < 2:
        raise ValueError("patch: expected at least two images, or others to take it from")
    source = images.roll(-1, 0) if others is None else others
    if source.shape != images.shape:
        raise ValueError(f"others are {tuple(source.shape)}: expected {tuple(images.shape)}")
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
    """Drawn curves whose counterparts bulge the other way; what is measured is a unit's activation.

    Orientations are spread evenly over the circle, dark and light in turn, with the middle of each arc at the image's
    centre: turned by 180 degrees, it is the arc of the opposite orientation at the same place.

    Args:
        n: how many pairs.
        seed: of radii and of where the orientations start.
        size: height and width in pixels.
        radii: smallest and largest radius, as shares of the size.
        kind: the counterparts.
        **settings: of that change.

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
    return ImagePairs("curves", images, images, names, "", about).compared(kind, **settings)


def shape_pairs(
    n: int,
    seed: int = 0,
    *,
    first: str = "curve 90°",
    second: str = "curve 270°",
    kind: Kind = "another",
    **settings: float,
) -> ImagePairs:
    """Drawings of one class against another, as the `shapes` model is trained on.

    With `another` as the kind, the counterpart is a drawing of the other class; both classes are there as clean
    images in turn, so that each is as often the answer. With other kinds it is the same drawing, changed.

    Args:
        n: how many pairs.
        seed: of the drawings.
        first: the name of a class.
        second: the name of the class that it is compared with.
        kind: the counterparts.
        **settings: of that change.

    Raises:
        KeyError: if there is no such class or kind of counterpart.
        ValueError: if `n` is not positive, or the two classes are one.
    """
    check_count(n)
    for name in (first, second):
        if name not in CLASSES:
            raise unknown("class", name, CLASSES)
    if first == second:
        raise ValueError(f"second {second!r} is the first class: expected another")
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
        return made.compared(kind, **settings)
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
    """A person's own labelled images and their counterparts.

    With `another` as the kind, each image is paired with one of another class, whose class its own is compared with;
    every image is the counterpart of one other image.

    Args:
        images: in 0..1.
        classes: the class of each, a number among the model's.
        names: one an image.
        seed: of the pairing.
        name: of the behaviour.
        kind: the counterparts.
        **settings: of that change.

    Raises:
        ValueError: if more than half of the images are of one class, so that they cannot all be paired.
        KeyError: if there is no such kind of counterpart.
    """
    if kind != "another":
        plain = ImagePairs(name, images, images, names, "", classes=classes)
        return plain.compared(kind, **settings)
    order = _across(classes, Random(seed))
    return ImagePairs(
        name, images, images[order], names, "another", classes=classes, against=tuple(classes[i] for i in order)
    )  # fmt: skip


def _across(classes: tuple[int, ...], random: Random) -> list[int]:
    """For each place another one of another class; each place is taken once.

    Sorted by class (at random within one), everybody takes the place that lies as many places on as the largest
    class has members: nobody can then meet their own class.
    """
    places = sorted(range(len(classes)), key=lambda i: (classes[i], random.random()))
    most = max((classes.count(c) for c in set(classes)), default=0)
    if 2 * most > len(classes):
        raise ValueError(
            f"classes: {most} of {len(classes)} images are of one class, which cannot all be paired with others: "
            "expected at most half"
        )
    found = [0] * len(classes)
    for k, i in enumerate(places):
        found[i] = places[(k + most) % len(places)]
    return found


IMAGE_PAIRS: Mapping[str, Callable[..., ImagePairs]] = {
    "curves": curve_pairs,
    "shapes": shape_pairs,
}
"""Generators of pairs of images by the behaviour's name; each takes how many and a seed."""
