"""Stimuli in which one property varies: curves, lines, angles, gratings, edges, checkerboards.

Each property is a number for all images, or one number for each image. Sizes are in pixels, angles in degrees,
counter-clockwise on the screen, and colours are red, green and blue in 0..1, or a grey level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.stimuli.drawing import (
    arc_distance,
    fill,
    grating,
    grid,
    heading,
    paint,
    segment_distance,
    stroke,
)  # fmt: skip

Images = Float[Tensor, "image 3 h w"]
Each = float | Float[Tensor, " image"]
"""A number for all images, or one for each."""
Colour = float | Sequence[float] | Float[Tensor, "image 3"]
"""A grey level, a colour, or one for each image."""

STRAIGHT = 1e5
"""The radius, in pixels, from which a curve is drawn as a line."""


def arcs(
    orientation: Float[Tensor, " image"],
    radius: Each,
    size: int = 64,
    *,
    length: Each | None = None,
    thickness: Each = 3.0,
    corner: Each = 0.0,
    filled: bool = False,
    ink: Colour = 0.0,
    paper: Colour = 1.0,
    background: Images | None = None,
    shift: Float[Tensor, "image 2"] | None = None,
) -> Images:
    """Draw one curve in each image, with its middle at the image's centre.

    Args:
        orientation: where each curve bulges: 90 is an arch, 270 a bowl.
        radius: the radius of curvature; `STRAIGHT` or more is a line at a right angle to `orientation`.
        size: the height and width of the images.
        length: the length of the curve, at most a full circle; by default two thirds of the size.
        thickness: the thickness of the line.
        corner: from 0, an arc, to 1, an angle: the curve turns by the same angle within a smaller radius and ends in
            straight lines, so that its length stays (the morph of Cammarata et al. 2020).
        filled: fill the disk that the arc bounds, instead of drawing a line.
        ink: the colour of the curve.
        paper: the colour around it.
        background: images to draw on instead of `paper`.
        shift: moves each curve, to the right and down.

    Raises:
        ValueError: if a size is not positive, or `corner` not in 0..1.

    >>> arcs(torch.tensor([90.0, 270.0]), 12.0, size=32, ink=(1.0, 0.0, 0.0)).shape
    torch.Size([2, 3, 32, 32])
    """
    n = len(orientation)
    r, thick = _each("radius", radius, n), _each("thickness", thickness, n)
    cornered = _each("corner", corner, n, positive=False)
    long = _each("length", 2 * size / 3 if length is None else length, n)
    if size < 1 or bool(((cornered < 0) | (cornered > 1)).any()):
        raise ValueError(f"size {size} must be positive and corner {corner} in 0..1")
    points = grid(size, size)
    if shift is not None:
        points = points - shift[:, None, None]
    # An arc of length l and radius r spans the angle l / r.
    half_span = (long / (2 * r)).clamp_max(math.pi)
    if filled:
        center = -r[:, None] * heading(orientation)
        coverage = fill((points - center[:, None, None]).norm(dim=-1) - r[:, None, None])
    else:
        coverage = stroke(_bent(points, orientation, r, half_span, cornered, long), thick)
    return _painted(coverage, ink, paper, background)


def _bent(
    points: Tensor,
    orientation: Tensor,
    radius: Tensor,
    half_span: Tensor,
    corner: Tensor,
    length: Tensor,
) -> Tensor:
    """The distance to an arc of a reduced radius, which ends in two straight lines."""
    small = (radius * (1 - corner)).clamp_min(0.01)
    center = -small[:, None] * heading(orientation)
    degrees = torch.rad2deg(half_span)
    distance = arc_distance(points, center, small, orientation, degrees)
    if not corner.any():
        return distance
    # What the smaller arc lacks in length, half of it on either side.
    rest = (length.minimum(2 * math.pi * radius) / 2 - small * half_span).clamp_min(0)
    for side in (1.0, -1.0):
        end = center + small[:, None] * heading(orientation + side * degrees)
        along = rest[:, None] * heading(orientation + side * (degrees + 90))
        distance = torch.minimum(distance, segment_distance(points, end, end + along))
    return distance


def lines(
    orientation: Float[Tensor, " image"],
    size: int = 64,
    *,
    length: Each | None = None,
    thickness: Each = 3.0,
    ink: Colour = 0.0,
    paper: Colour = 1.0,
    background: Images | None = None,
) -> Images:
    """Draw one straight line in each image, along `orientation`, through the centre.

    Raises:
        ValueError: if a size is not positive.
    """
    return arcs(
        orientation + 90, STRAIGHT, size, length=length, thickness=thickness, ink=ink, paper=paper,
        background=background,
    )  # fmt: skip


def angles(
    orientation: Float[Tensor, " image"],
    opening: Each,
    size: int = 64,
    *,
    length: Each | None = None,
    thickness: Each = 3.0,
    ink: Colour = 0.0,
    paper: Colour = 1.0,
) -> Images:
    """Draw two lines in each image that meet at the centre and point at `orientation` like an arrow.

    Args:
        orientation: where the tip points.
        opening: the angle between the lines, 0 to 180.
        size: the height and width of the images.
        length: the length of both lines together.
        thickness: the thickness of the lines.
        ink: the colour of the lines.
        paper: the colour around them.

    Raises:
        ValueError: if a size is not positive.
    """
    n = len(orientation)
    half = _each("opening", opening, n) / 2
    long = _each("length", 2 * size / 3 if length is None else length, n) / 2
    points, tip = grid(size, size), torch.zeros(n, 2)
    arms = [long[:, None] * heading(orientation + 180 + side * half) for side in (1.0, -1.0)]
    first, second = (segment_distance(points, tip, arm) for arm in arms)
    coverage = stroke(torch.minimum(first, second), _each("thickness", thickness, n))
    return _painted(coverage, ink, paper)


def circles(
    radius: Float[Tensor, " image"],
    size: int = 64,
    *,
    thickness: Each = 3.0,
    filled: bool = False,
    ink: Colour = 0.0,
    paper: Colour = 1.0,
) -> Images:
    """Draw one circle or disk in each image, about the centre."""
    n = len(radius)
    distance = grid(size, size).norm(dim=-1) - _each("radius", radius, n)[:, None, None]
    coverage = fill(distance) if filled else stroke(distance, _each("thickness", thickness, n))
    return _painted(coverage, ink, paper)


def gratings(
    orientation: Float[Tensor, " image"],
    wavelength: Each,
    size: int = 64,
    *,
    phase: Each = 0.0,
    contrast: Each = 1.0,
    sigma: Each | None = None,
) -> Images:
    """Draw sinusoidal gratings about mid-grey whose stripes run along `orientation`; with `sigma`, Gabor patches.

    Args:
        orientation: the direction of the stripes.
        wavelength: the distance from stripe to stripe.
        size: the height and width of the images.
        phase: 0 puts a bright stripe through the centre.
        contrast: 1 reaches from black to white.
        sigma: the width of the Gaussian with which the grating fades; by default it does not fade.

    Raises:
        ValueError: if a wavelength or sigma is not positive.
    """
    n = len(orientation)
    points = grid(size, size)
    waves = grating(
        points,
        orientation,
        _each("wavelength", wavelength, n),
        _each("phase", phase, n, positive=False),
    )
    strength = _each("contrast", contrast, n, positive=False)[:, None, None]
    made = (waves - 0.5) * strength
    if sigma is not None:
        wide = _each("sigma", sigma, n)[:, None, None]
        made = made * torch.exp(-0.5 * (points.norm(dim=-1) / wide) ** 2)
    return (0.5 + made)[:, None].expand(-1, 3, -1, -1).contiguous()


def contrasts(
    orientation: Float[Tensor, " image"], one: Colour, other: Colour, size: int = 64
) -> Images:
    """Draw two colours that meet at an edge through the centre, with `one` on the side of `orientation`."""
    side = (grid(size, size) * heading(orientation)[:, None, None]).sum(-1)
    return _painted(fill(-side), one, other)


def surrounds(
    radius: Float[Tensor, " image"], inside: Colour, around: Colour, size: int = 64
) -> Images:
    """Draw a disk of one colour in another, which colour-contrast units respond to."""
    return circles(radius, size, filled=True, ink=inside, paper=around)


def frequency_edges(
    orientation: Float[Tensor, " image"], fine: Each, coarse: Each, size: int = 64, seed: int = 0
) -> Images:
    """Draw a fine texture on the side of `orientation` and a coarse one on the other (high-low frequency edges).

    Args:
        orientation: the fine side.
        fine: the typical wavelength of the fine texture.
        coarse: the typical wavelength of the coarse one.
        size: the height and width of the images.
        seed: the seed of the textures, which are band-limited noise.
    """
    n = len(orientation)
    side = fill(-(grid(size, size) * heading(orientation)[:, None, None]).sum(-1))
    textures = [
        _noise(_each(name, wave, n), size, seed + k)
        for k, (name, wave) in enumerate((("fine", fine), ("coarse", coarse)))
    ]
    mixed = textures[0] * side + textures[1] * (1 - side)
    return mixed[:, None].expand(-1, 3, -1, -1).contiguous()


def _noise(wavelength: Tensor, size: int, seed: int) -> Float[Tensor, "image h w"]:
    """Noise of about one spatial frequency in all directions, in 0..1: white noise filtered by a ring in frequency."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(wavelength), size, size, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    center = 1 / wavelength[:, None, None]
    ring = torch.exp(-0.5 * ((frequency - center) / (0.25 * center)) ** 2)
    made = torch.fft.irfft2(torch.fft.rfft2(drawn) * ring, s=(size, size))
    # To a standard deviation of a quarter about mid-grey, so that few values are cut off.
    made = made / made.std(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    return (0.5 + 0.25 * made).clamp(0, 1)


def checkerboards(
    cell: Float[Tensor, " image"],
    size: int = 64,
    *,
    rotation: Each = 0.0,
    ink: Colour = 0.0,
    paper: Colour = 1.0,
) -> Images:
    """Draw checkerboards of squares that are `cell` pixels wide, turned by `rotation`, with a corner at the centre."""
    n = len(cell)
    wide = _each("cell", cell, n)[:, None, None]
    axis = heading(_each("rotation", rotation, n, positive=False))
    points = grid(size, size)
    along = (points * axis[:, None, None]).sum(-1)
    across = points[..., 0] * axis[:, 1, None, None] - points[..., 1] * axis[:, 0, None, None]
    soft = [_square_wave(x, wide) for x in (along, across)]
    coverage = 0.5 + 0.5 * soft[0] * soft[1]
    return _painted(coverage, ink, paper)


def _square_wave(x: Tensor, half: Tensor) -> Tensor:
    """A wave that is -1 and 1 in turns of `half` pixels, ramped over one pixel at each change."""
    phase = torch.remainder(x, 2 * half)
    return torch.minimum(phase.minimum((2 * half - phase).abs()), (phase - half).abs()).mul(
        2
    ).clamp_max(1) * (torch.where(phase < half, 1.0, -1.0))


def turned(images: Images, degrees: Each) -> Images:
    """Rotate images about their middle, counter-clockwise; outside of the frame their border is repeated."""
    radians = torch.deg2rad(_each("degrees", degrees, len(images), positive=False))
    cos, sin = radians.cos(), radians.sin()
    zero = torch.zeros_like(cos)
    return _moved(images, torch.stack([cos, -sin, zero, sin, cos, zero], 1).reshape(-1, 2, 3))


def enlarged(images: Images, factor: Each) -> Images:
    """Enlarge images about their middle (a factor below 1 shrinks them, and repeats their border)."""
    inverse = 1 / _each("factor", factor, len(images))
    zero = torch.zeros_like(inverse)
    return _moved(
        images, torch.stack([inverse, zero, zero, zero, inverse, zero], 1).reshape(-1, 2, 3)
    )


def _moved(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample images at the places to which matrices map each pixel."""
    # `affine_grid` has coordinates from -1 to 1 along both axes: entries that mix the axes of an image that is not
    # square are scaled by its aspect ratio.
    h, w = images.shape[-2:]
    aspect = matrices.new_tensor([[1.0, h / w, 1.0], [w / h, 1.0, 1.0]])
    places = F.affine_grid(matrices * aspect, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def _each(name: str, value: Each, n: int, positive: bool = True) -> Float[Tensor, " image"]:
    """One number for each image.

    Raises:
        ValueError: if there is not one for each image, or one that should be positive is not.
    """
    made = torch.as_tensor(value, dtype=torch.float32)
    if made.ndim > 1 or (made.ndim == 1 and len(made) != n):
        raise ValueError(f"{name} has {len(made)} values for {n} images: expected 1 or {n}")
    if positive and bool((made <= 0).any()):
        raise ValueError(f"{name} {made.min().item():g} must be positive")
    return made.expand(n)


def _colours(colour: Colour, n: int) -> Float[Tensor, "image 3"]:
    made = torch.as_tensor(colour, dtype=torch.float32)
    return made.expand(3).expand(n, 3) if made.ndim == 0 else made.expand(n, 3)


def _painted(
    coverage: Tensor, ink: Colour, paper: Colour, background: Images | None = None
) -> Images:
    n = len(coverage)
    under = background
    if under is None:
        under = _colours(paper, n)[:, :, None, None].expand(-1, -1, *coverage.shape[1:])
    return paint(under, coverage, _colours(ink, n))
