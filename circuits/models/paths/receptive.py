"""Receptive fields: which part of the input can change a unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.units import Site

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels of the input; bottom and right are excluded."""


@dataclass(frozen=True)
class AxisReceptiveField:
    """The receptive fields of the positions along one axis of a map: from which pixel to which.

    Attributes:
        length: the input's length along the axis, in pixels.
        last: the map's last position.
        first_pixel: the first pixel that the last position sees, and by how much more it is than for the position
            before.
        end_pixel: one past the last pixel that position 0 sees, and by how much more it is for position 1.
        wraps: whether fields go around the border (circular padding): these two numbers are then those that the
            positions would have on an endless map, and a field over the border is the whole axis.
    """

    length: int
    last: int
    first_pixel: tuple[int, int]
    end_pixel: tuple[int, int]
    wraps: bool = False

    def at(self, position: int) -> tuple[int, int]:
        """The first pixel that a position sees, and one past the last."""
        start, back = self.first_pixel
        end, forth = self.end_pixel
        # Fields step by a constant number of pixels from position to position. `start` is of the last position, whose
        # first pixel no border cuts off; `end` of the first position, for the same reason.
        low, high = start - back * (self.last - position), end + forth * position
        if self.wraps and (low < 0 or high > self.length):
            return 0, self.length
        return max(0, low), min(self.length, high)


@dataclass(frozen=True)
class ReceptiveField:
    """The boxes of input pixels that can change a site's units, by position in its map.

    Attributes:
        size: height and width of the input.
        extents: along y and x; empty for a site without a map, which sees everything.
    """

    size: tuple[int, int]
    extents: tuple[AxisReceptiveField, ...] = ()

    def at(self, position: tuple[int, ...]) -> Box:
        """The box of a position (y, x) of the map, cut off at the border of the input."""
        if len(self.extents) != 2 or len(position) != 2:
            return (0, 0, *self.size)
        (top, bottom), (left, right) = (
            e.at(p) for e, p in zip(self.extents, position, strict=True)
        )
        return (top, left, bottom, right)


_FIELDS: WeakKeyDictionary[HookedModel, dict[Site, ReceptiveField]] = WeakKeyDictionary()
"""What has been measured, by model: receptive fields do not depend on the weights."""


def receptive_field(model: HookedModel, site: Site) -> ReceptiveField:
    """Measure a site's receptive field: which pixels, set to NaN, make a position NaN.

    NaN passes through every operation that reads it. Where fields go around the border (circular padding), they are
    measured in the middle. Otherwise the first pixel is measured at the last two positions and the
    end at the first two, where the border of the input cuts a field off least; in between, both move by a constant
    step. This is exact for convolutions and pooling of any stride and padding, and to a pixel or two where a map is
    upsampled.

    Raises:
        ValueError: if the model does not take images.
    """
    spec = model.input
    if not isinstance(spec, ImageInput):
        raise ValueError(
            f"model {model.name} takes tokens: only image models have receptive fields"
        )
    if model.edited:  # an edit may overwrite what pixels would have changed: measured, but not kept
        return _measured(model, spec, site)
    known = _FIELDS.setdefault(model, {})
    if site not in known:
        known[site] = _measured(model, spec, site)
    return known[site]


def _measured(model: HookedModel, spec: ImageInput, site: Site) -> ReceptiveField:
    size = (spec.height, spec.width)
    if site.position_axes != ("y", "x"):
        return ReceptiveField(size)
    example = spec.example(1).to(model.device)

    def reaches(axis: int, spoil: Callable[[Tensor], object], position: int) -> bool:
        """Whether NaN pixels reach a row (axis 0) or column (axis 1) of the map."""
        # NaN goes through every operation that reads it, a zero weight included, where a gradient may vanish by chance.
        spoiled = example.clone()
        spoil(spoiled.movedim(2 + axis, -1))
        cache = model.run(spoiled, read=[site], until=site)
        # All units at once: a field is that of the site, the union over its units.
        values = site.activations(cache[site])[0].reshape(-1, *site.position_shape)
        return bool(values.movedim(1 + axis, 0)[position].isnan().any())

    # The number of NaN pixels that were needed, by side, positions from the border, and the input's length.
    found: dict[tuple[str, int, int], int] = {}

    def extent(axis: int) -> AxisReceptiveField:
        length, last = size[axis], site.position_shape[axis] - 1
        # A guess at the step only, which bisection puts right.
        stride = round(length / (last + 1))

        def least(
            side: str, spoils: list[Callable[[Tensor], object]], position: int, away: int
        ) -> int:
            """The least number of pixels at a border that make a position NaN.

            Rows and columns usually agree, so do both borders, and neighbours are a stride apart: such a guess saves
            most of the bisection.
            """
            guess = found.get((side, away, length))
            if guess is None and away:
                guess = found[side, 0, length] - stride
            elif guess is None:
                guess = found.get(("first", 0, length))
            number = _least(1, length, lambda n: reaches(axis, spoils[n], position), guess)
            return found.setdefault((side, away, length), number)

        def first(position: int) -> int:
            """The first pixel that a position sees."""
            spoils = [lambda x, n=n: x[..., :n].fill_(torch.nan) for n in range(length + 1)]
            return least("first", spoils, position, last - position) - 1

        def end(position: int) -> int:
            """One past the last pixel that a position sees."""
            spoils = [
                lambda x, n=n: x[..., length - n :].fill_(torch.nan) for n in range(length + 1)
            ]
            return length - least("end", spoils, position, position) + 1

        def around() -> AxisReceptiveField | None:
            """The fields of two neighbours in the middle, if neither goes around the border."""
            middle = last // 2
            one, other = ((first(p), end(p)) for p in (middle, middle + 1))
            if (0, length) in (one, other):
                return None
            back, forth = other[0] - one[0], other[1] - one[1]
            start = one[0] + back * (last - middle)
            return AxisReceptiveField(
                length, last, (start, back), (one[1] - forth * middle, forth), True
            )

        low, high = first(last), end(0)
        # The last position sees the first pixel, though one before it does not.
        if (
            last > 1
            and low == 0
            and not reaches(axis, lambda x: x[..., :1].fill_(torch.nan), last // 2)
        ):
            endless = around()
            if endless is not None:
                return endless
        # If the border cuts off this field already, it cuts off those of all other positions too: the step does not
        # matter, and `at` clips.
        back = low - first(last - 1) if last and low else length
        forth = end(1) - high if last and high < length else length
        return AxisReceptiveField(length, last, (low, back), (high, forth))

    return ReceptiveField(size, (extent(0), extent(1)))


def _least(low: int, high: int, holds: Callable[[int], bool], guess: int | None = None) -> int:
    """The smallest number from low to high for which a monotone condition holds, by bisection."""
    # Two tests settle a right guess, bisection takes log2(length).
    if guess is not None and low <= guess <= high:
        if not holds(guess):
            low = min(guess + 1, high)
        elif guess > low and holds(guess - 1):
            high = guess - 1
        else:
            return guess
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
