"""Kinds of drawings that tell units of early layers apart: curves, lines, their ends, edges of colours, and others.

A kind is one property, shown at many angles, sizes and colours, so that a unit that prefers a kind is not one that was
shown the others at sizes or colours that it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.stimuli.patterns import (
    angles,
    arcs,
    checkerboards,
    contrasts,
    frequency_edges,
    gratings,
    lines,
    surrounds,
)

Kind = Literal[
    "curve", "line", "line end", "corner", "edge", "colour edge", "grating", "high-low frequency edge", "texture",
    "colour", "grey", "spot", "colour spot", "checkerboard",
]  # fmt: skip
"""What is drawn. A line end is half a line; a high-low frequency edge has a fine texture on one side and a coarse one
on the other; `colour` and `grey` fill the image; a spot is a disk in another grey or, of the same brightness, in the
opposed colour."""

KINDS: tuple[Kind, ...] = get_args(Kind)
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
"""Colours of the colour wheel, 60 degrees apart; each is opposed to the one three places on."""

_LUMINANCE = torch.tensor([0.299, 0.587, 0.114])  # of red, green and blue (Rec. 601)
_TURN, _HALF = 16, 8  # angles of what repeats after a whole turn and after half of one


@dataclass(frozen=True, eq=False)
class Drawings:
    """All drawings of one kind.

    Attributes:
        kind: what is drawn.
        images: in 0..1.
        angles: of each image in degrees: where a curve bulges, a corner points or a line ends, where the first colour,
            the lighter side or the finer texture is, or along which a line or stripe runs; NaN where nothing is turned.
        looks: of each image, what it has besides its angle, such as `dark, radius 0.2`.
        period: the angle after which the drawing is the same again, 360 or 180; 0 where nothing is turned.
    """

    kind: Kind
    images: Float[Tensor, "image 3 h w"]
    angles: Float[Tensor, " image"]
    looks: tuple[str, ...]
    period: float


def hue_colour(hue: str, strength: float = 1.0) -> tuple[float, float, float]:
    """A colour as bright as mid-grey, of a hue of the colour wheel, as colourful as fits into 0..1 at strength 1.

    Raises:
        ValueError: if the hue is unknown.

    >>> [round(v, 2) for v in hue_colour("blue")]
    [0.44, 0.44, 1.0]
    """
    if hue not in HUES:
        raise ValueError(f"hue {hue!r} is not one of {', '.join(HUES)}")
    k = HUES.index(hue)
    pure = torch.tensor([float((k - c) % 6 in (5, 0, 1)) for c in (0, 2, 4)])
    change = pure - (pure * _LUMINANCE).sum()  # of no brightness
    grown = 0.5 + change * (0.5 * strength / change.abs().max())
    return tuple(grown.tolist())  # type: ignore[return-value]


def draw_kind(kind: Kind, size: int, replicate: int = 0) -> Drawings:
    """Draw a kind at all its angles and looks.

    Args:
        kind: the kind.
        size: height and width in pixels, with which the drawings scale.
        replicate: 0 is drawn as is; others differ in what should not matter: they are moved by up to a twentieth of the
            size, have three to four fifths of the contrast, and other noise where there is any.

    Raises:
        ValueError: if the kind is unknown or the size below 16.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if size < 16:
        raise ValueError(f"size {size} must be at least 16 pixels")
    period, draw = _DRAWN[kind]
    parts = list(draw(size, replicate))
    images = torch.cat([part for _, _, part in parts])
    placed = torch.cat([at for at, _, _ in parts])
    looks = tuple(look for at, look, _ in parts for _ in at)
    return Drawings(kind, _varied(images, replicate), placed, looks, period)


def _varied(images: Tensor, replicate: int) -> Tensor:
    if replicate == 0:
        return images
    generator = torch.Generator().manual_seed(replicate)
    far = max(1, images.shape[-1] // 20)
    dy, dx = (int(torch.randint(-far, far + 1, (), generator=generator)) for _ in range(2))
    contrast = 0.6 + 0.2 * float(torch.rand((), generator=generator))
    n = images.shape[-1]
    rows, columns = ((torch.arange(n) - d).clamp(0, n - 1) for d in (dy, dx))
    return 0.5 + contrast * (images[:, :, rows][:, :, :, columns] - 0.5)


Part = tuple[Float[Tensor, " image"], str, Float[Tensor, "image 3 h w"]]
"""Angles, the look of all of them, and the images."""

_INKS = (("dark", 0.0, 1.0), ("light", 1.0, 0.0))
_WHOLE, _HALVED = torch.arange(_TURN) * 360.0 / _TURN, torch.arange(_HALF) * 180.0 / _HALF
_NOWHERE = torch.full((1,), float("nan"))


def _thicknesses(size: int) -> tuple[tuple[str, float], ...]:
    return ("thin", max(1.5, size / 32)), ("thick", max(2.5, size / 14))


def _curves(size: int, replicate: int) -> Iterator[Part]:
    for name, ink, paper in _INKS:
        for radius in (0.12, 0.2, 0.32):
            made = arcs(
                _WHOLE, radius * size, size, thickness=max(1.5, size / 24), ink=ink, paper=paper
            )
            yield _WHOLE, f"{name}, radius {radius:g}", made


def _lines(size: int, replicate: int) -> Iterator[Part]:
    for name, ink, paper in _INKS:
        for wide, thick in _thicknesses(size):
            made = lines(_HALVED, size, length=3 * size, thickness=thick, ink=ink, paper=paper)
            yield _HALVED, f"{name}, {wide}", made


def _pointed(size: int, opening: float) -> Iterator[Part]:
    for name, ink, paper in _INKS:
        for wide, thick in _thicknesses(size):
            made = angles(
                _WHOLE, opening, size, length=4 * size, thickness=thick, ink=ink, paper=paper
            )
            yield _WHOLE, f"{name}, {wide}" + (f", {opening:g}°" if opening > 1 else ""), made


def _line_ends(size: int, replicate: int) -> Iterator[Part]:
    yield from _pointed(size, 0.01)  # both arms on one another: half a line


def _corners(size: int, replicate: int) -> Iterator[Part]:
    yield from _pointed(size, 60.0)
    yield from _pointed(size, 105.0)


def _edges(size: int, replicate: int) -> Iterator[Part]:
    for contrast in (0.5, 0.25):
        look = f"contrast {2 * contrast:g}"
        yield _WHOLE, look, contrasts(_WHOLE, 0.5 + contrast, 0.5 - contrast, size)


def _opposed(k: int) -> str:
    return HUES[(k + 3) % 6]


def _colour_edges(size: int, replicate: int) -> Iterator[Part]:
    for k, hue in enumerate(HUES[:3]):  # turned by half, they are those of the other three
        one, other = hue_colour(hue), hue_colour(_opposed(k))
        yield _WHOLE, f"{hue} and {_opposed(k)}", contrasts(_WHOLE, one, other, size)


def _gratings(size: int, replicate: int) -> Iterator[Part]:
    for share in (0.08, 0.14, 0.25, 0.4):
        for phase in (0.0, 180.0):
            made = gratings(_HALVED, max(3.0, share * size), size, phase=phase)
            yield _HALVED, f"wavelength {share:g}, phase {phase:g}", made


def _frequency_edges(size: int, replicate: int) -> Iterator[Part]:
    for share in (0.06, 0.1):
        fine = max(2.5, share * size)
        made = frequency_edges(_WHOLE, fine, 3.5 * fine, size, seed=10 * replicate)
        yield _WHOLE, f"fine {share:g}", made


def _textures(size: int, replicate: int) -> Iterator[Part]:
    for share in (0.06, 0.1, 0.2, 0.35):
        wave = max(2.5, share * size)
        made = frequency_edges(torch.zeros(4), wave, wave, size, seed=10 * replicate + 3)
        yield _NOWHERE.expand(4), f"wavelength {share:g}", made


def _colours(size: int, replicate: int) -> Iterator[Part]:
    for hue in HUES:
        yield _NOWHERE, hue, _plain(hue_colour(hue), size)


def _greys(size: int, replicate: int) -> Iterator[Part]:
    for grey in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield _NOWHERE, f"{grey:g}", _plain((grey, grey, grey), size)


def _plain(colour: tuple[float, float, float], size: int) -> Tensor:
    return torch.tensor(colour)[None, :, None, None].expand(1, 3, size, size)


_RADII = (0.08, 0.16, 0.28)


def _spots(size: int, replicate: int) -> Iterator[Part]:
    for name, ink, paper in _INKS:
        for radius in _RADII:
            made = surrounds(torch.tensor([radius * size]), ink, paper, size)
            yield _NOWHERE, f"{name}, radius {radius:g}", made


def _colour_spots(size: int, replicate: int) -> Iterator[Part]:
    for k, hue in enumerate(HUES):
        inside, around = hue_colour(hue), hue_colour(_opposed(k))
        for radius in _RADII:
            made = surrounds(torch.tensor([radius * size]), inside, around, size)
            yield _NOWHERE, f"{hue} in {_opposed(k)}, radius {radius:g}", made


def _checkerboards(size: int, replicate: int) -> Iterator[Part]:
    for rotation in (0.0, 45.0):
        for share in (0.07, 0.14, 0.25):
            made = checkerboards(torch.tensor([max(2.0, share * size)]), size, rotation=rotation)
            yield _NOWHERE, f"cells {share:g}, turned by {rotation:g}°", made


_DRAWN: dict[str, tuple[float, Callable[[int, int], Iterator[Part]]]] = {
    "curve": (360.0, _curves), "line": (180.0, _lines), "line end": (360.0, _line_ends),
    "corner": (360.0, _corners), "edge": (360.0, _edges), "colour edge": (360.0, _colour_edges),
    "grating": (180.0, _gratings), "high-low frequency edge": (360.0, _frequency_edges), "texture": (0.0, _textures),
    "colour": (0.0, _colours), "grey": (0.0, _greys), "spot": (0.0, _spots), "colour spot": (0.0, _colour_spots),
    "checkerboard": (0.0, _checkerboards),
}  # fmt: skip
