"""Labelled drawings on plain, noisy and photographic backgrounds, on which the model `shapes` is trained.

There are forty classes: curves by orientation (12), lines by orientation (6), angles by orientation (8), closed and
compound figures (6), textures (3), coloured discs (4) and background alone. The order in which numbers are drawn must
not change: the same seed would give other images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from circuits.stimuli import drawing
from circuits.stimuli.photos import photographs

SIZE = 64
"""Height and width of the drawings in pixels."""

N_CURVES, N_LINES, N_ANGLES = 12, 6, 8
FIGURES = ("circle", "s-curve", "spiral", "triangle", "square", "hexagon")
TEXTURES = ("stripes", "checkerboard", "dots")
DISC_COLORS = {
    "red disc": (0.85, 0.12, 0.12),
    "green disc": (0.1, 0.7, 0.2),
    "blue disc": (0.12, 0.25, 0.85),
    "yellow disc": (0.95, 0.85, 0.1),
}
CLASSES: tuple[str, ...] = (
    *(f"curve {360 * k // N_CURVES}°" for k in range(N_CURVES)),
    *(f"line {180 * k // N_LINES}°" for k in range(N_LINES)),
    *(f"angle {360 * k // N_ANGLES}°" for k in range(N_ANGLES)),
    *FIGURES,
    *TEXTURES,
    *DISC_COLORS,
    "background",
)


def draw_shapes(
    labels: Int[Tensor, " batch"], generator: Generator
) -> Float[Tensor, "batch 3 64 64"]:
    """Draw one random image of each label's class.

    Args:
        labels: indices into `CLASSES`.
        generator: the source of all randomness; the same labels and state give the same images.

    Returns:
        RGB in 0..1.
    """
    images = _backgrounds(len(labels), generator)
    images = _clutter(images, generator)
    # Classes before the textures are lines, all drawn by one stroke at the end; the others are areas.
    strokes = labels < labels.new_tensor(CLASSES.index("stripes"))
    distance = torch.full((len(labels), SIZE, SIZE), 1e3)
    for index in labels.unique().tolist():
        rows = (labels == index).nonzero()[:, 0]
        if strokes[rows[0]]:
            distance[rows] = _stroke_distance(CLASSES[index], len(rows), generator)
        else:
            images[rows] = _painted(CLASSES[index], images[rows], generator)
    thickness = _uniform(generator, len(labels), 1.5, 4.0)
    color = _contrasting(images, generator)
    opacity = _uniform(generator, len(labels), 0.7, 1.0)[:, None, None] * strokes[:, None, None]
    images = drawing.paint(images, drawing.stroke(distance, thickness) * opacity, color)
    noise = torch.randn(images.shape, generator=generator) * 0.03
    return (images + noise).clamp(0, 1)


def _uniform(generator: Generator, n: int, low: float, high: float) -> Float[Tensor, " n"]:
    return torch.rand(n, generator=generator) * (high - low) + low


def _centers(generator: Generator, n: int, spread: float = 9.0) -> Float[Tensor, "n 2"]:
    return (torch.rand(n, 2, generator=generator) * 2 - 1) * spread


def _oriented(name: str, n: int, period: int, step: float, generator: Generator) -> Tensor:
    """Random orientations in the bin that the name of the class states."""
    middle = float(name.split()[-1].rstrip("°"))
    return torch.remainder(middle + _uniform(generator, n, -step / 2, step / 2), period)


def _stroke_distance(name: str, n: int, generator: Generator) -> drawing.Field:
    """The distance field of `n` random figures of a stroked class."""
    points = drawing.grid(SIZE, SIZE)
    center = _centers(generator, n)
    kind = name.split()[0]
    if kind == "curve":
        angle = _oriented(name, n, 360, 360 / N_CURVES, generator)
        radius = _uniform(generator, n, 7.0, 22.0)
        span = _uniform(generator, n, 40.0, 75.0)
        pivot = center - (radius * 0.8)[:, None] * drawing.heading(angle)
        return drawing.arc_distance(points, pivot, radius, angle, span)
    if kind == "line":
        angle = _oriented(name, n, 180, 180 / N_LINES, generator)
        reach = _uniform(generator, n, 10.0, 24.0)[:, None] * drawing.heading(angle)
        return drawing.segment_distance(points, center - reach, center + reach)
    if kind == "angle":
        angle = _oriented(name, n, 360, 360 / N_ANGLES, generator)
        return _angle_distance(points, center, angle, generator)
    return _figure_distance(kind, points, center, generator)


def _angle_distance(
    points: drawing.Points, center: Tensor, angle: Tensor, generator: Generator
) -> drawing.Field:
    """Two arms that meet at a tip pointing at `angle`."""
    n = len(angle)
    half_opening = _uniform(generator, n, 25.0, 60.0)
    arm = _uniform(generator, n, 12.0, 22.0)[:, None]
    tip = center + 0.5 * arm * drawing.heading(angle)
    sides = [tip - arm * drawing.heading(angle + s * half_opening) for s in (-1, 1)]
    fields = [drawing.segment_distance(points, tip, end) for end in sides]
    return torch.minimum(*fields)


def _figure_distance(
    kind: str, points: drawing.Points, center: Tensor, generator: Generator
) -> drawing.Field:
    n = len(center)
    radius = _uniform(generator, n, 8.0, 20.0)
    turned = _uniform(generator, n, 0.0, 360.0)
    if kind == "circle":
        return drawing.arc_distance(points, center, radius, turned, torch.full((n,), 180.0))
    if kind == "s-curve":
        small = radius * 0.6
        offset = small[:, None] * drawing.heading(turned)
        half = torch.full((n,), 80.0)
        first = drawing.arc_distance(points, center + offset, small, turned + 90, half)
        second = drawing.arc_distance(points, center - offset, small, turned - 90, half)
        return torch.minimum(first, second)
    if kind == "spiral":
        turns = _uniform(generator, n, 1.8, 2.6)
        return drawing.spiral_distance(points, center, radius / 1.8, turns, turned)
    sides = {"triangle": 3, "square": 4, "hexagon": 6}[kind]
    return drawing.polygon_distance(points, center, radius, sides, turned)


def _painted(
    name: str, images: Float[Tensor, "n 3 h w"], generator: Generator
) -> Float[Tensor, "n 3 h w"]:
    """Draw a class that is an area rather than a line."""
    n = len(images)
    if name == "background":
        return images
    center = _centers(generator, n)
    patch = drawing.fill(
        drawing.arc_distance(
            drawing.grid(SIZE, SIZE),
            center,
            torch.zeros(n),
            torch.zeros(n),
            torch.full((n,), 180.0),
        )
        - _uniform(generator, n, 10.0, 26.0)[:, None, None]
    )
    if name in DISC_COLORS:
        base = torch.tensor(DISC_COLORS[name]).expand(n, 3)
        color = (base + torch.randn(n, 3, generator=generator) * 0.05).clamp(0, 1)
        return drawing.paint(images, patch, color)
    pattern = _TEXTURE_DRAWERS[name](n, generator) * patch
    return drawing.paint(images, pattern, _contrasting(images, generator))


def _stripes(n: int, generator: Generator) -> drawing.Field:
    turned = _uniform(generator, n, 0.0, 180.0)
    wavelength = _uniform(generator, n, 4.0, 10.0)
    return drawing.grating(
        drawing.grid(SIZE, SIZE), turned, wavelength, _uniform(generator, n, 0.0, 360.0)
    )


def _checkerboard(n: int, generator: Generator) -> drawing.Field:
    points = drawing.grid(SIZE, SIZE)
    turned = _uniform(generator, n, 0.0, 90.0)
    wavelength = _uniform(generator, n, 6.0, 14.0)
    phase = _uniform(generator, n, 0.0, 360.0)
    first = drawing.grating(points, turned, wavelength, phase) - 0.5
    second = drawing.grating(points, turned + 90, wavelength, phase) - 0.5
    return (first * second * 40 + 0.5).clamp(0, 1)


def _dots(n: int, generator: Generator) -> drawing.Field:
    points = drawing.grid(SIZE, SIZE)
    turned = _uniform(generator, n, 0.0, 90.0)
    wavelength = _uniform(generator, n, 6.0, 12.0)
    phase = _uniform(generator, n, 0.0, 360.0)
    first = drawing.grating(points, turned, wavelength, phase)
    second = drawing.grating(points, turned + 90, wavelength, phase)
    return ((first + second - 1.45) * 6).clamp(0, 1)


_TEXTURE_DRAWERS: dict[str, Callable[[int, Generator], drawing.Field]] = {
    "stripes": _stripes,
    "checkerboard": _checkerboard,
    "dots": _dots,
}


def _contrasting(images: Float[Tensor, "n 3 h w"], generator: Generator) -> Float[Tensor, "n 3"]:
    """A random colour for each image, at least 0.3 lighter or darker than the image's mean."""
    n = len(images)
    mean = images.mean(dim=(1, 2, 3))
    # The lighter the image, the more often the colour is darker: there is then more room below than above.
    darker = torch.rand(n, generator=generator) < ((mean - 0.15) / 0.7).clamp(0, 1)
    level = torch.where(
        darker,
        (mean - 0.3).clamp_min(0.0) * torch.rand(n, generator=generator),
        1 - (0.7 - mean).clamp_min(0.0) * torch.rand(n, generator=generator),
    )
    tint = torch.randn(n, 3, generator=generator) * 0.12
    return (level[:, None] + tint - tint.mean(dim=1, keepdim=True)).clamp(0, 1)


def _backgrounds(n: int, generator: Generator) -> Float[Tensor, "n 3 64 64"]:
    """Backgrounds: a third plain colours, a third smooth coloured noise, a third crops of photographs."""
    plain = torch.rand(n, 3, 1, 1, generator=generator)
    coarse = torch.rand(n, 3, 5, 5, generator=generator) - 0.5
    smooth = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    images = plain.expand(n, 3, SIZE, SIZE).clone()
    kind = torch.randint(3, (n,), generator=generator)
    images[kind == 1] += smooth[kind == 1]
    rows = (kind == 2).nonzero()[:, 0]
    for row in rows.tolist():
        images[row] = _photo_crop(generator)
    return images.clamp(0, 1)


def _photo_crop(generator: Generator) -> Float[Tensor, "3 64 64"]:
    pick = int(torch.randint(len(photographs()), (1,), generator=generator))
    photo: np.ndarray = photographs()[pick].pixels
    height, width = photo.shape[:2]
    side = int(torch.randint(SIZE, min(height, width, 3 * SIZE) + 1, (1,), generator=generator))
    top = int(torch.randint(height - side + 1, (1,), generator=generator))
    left = int(torch.randint(width - side + 1, (1,), generator=generator))
    crop = torch.tensor(photo[top : top + side, left : left + side]).permute(2, 0, 1)[None]
    small = F.interpolate(
        crop.float() / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True
    )
    return small[0]


def _clutter(images: Float[Tensor, "n 3 h w"], generator: Generator) -> Float[Tensor, "n 3 h w"]:
    """Add faint specks and short strokes that belong to no class."""
    n = len(images)
    points = drawing.grid(SIZE, SIZE)
    for _ in range(2):
        start = _centers(generator, n, SIZE / 2)
        end = start + _centers(generator, n, 5.0)
        distance = drawing.segment_distance(points, start, end)
        coverage = drawing.stroke(distance, _uniform(generator, n, 1.0, 3.0))
        opacity = _uniform(generator, n, 0.0, 0.6)[:, None, None]
        images = drawing.paint(images, coverage * opacity, torch.rand(n, 3, generator=generator))
    return images
