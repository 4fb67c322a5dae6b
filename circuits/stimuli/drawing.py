"""Anti-aliased drawing of lines, curves and textures, many images at a time.

Everything is drawn from a distance field, the distance of each pixel's centre to the shape, which is then stroked or
filled. Coordinates are in pixels from the centre of the image, x to the right and y down; angles are in degrees,
counter-clockwise as seen on the screen, with 0 pointing right.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Points = Float[Tensor, "#batch h w 2"]
Field = Float[Tensor, "batch h w"]
Scalars = Float[Tensor, " batch"]


def grid(height: int, width: int) -> Float[Tensor, "1 h w 2"]:
    """Pixel centres as (x, y) from the image's centre, in pixels.

    >>> grid(2, 2)[0, 0].tolist()
    [[-0.5, -0.5], [0.5, -0.5]]
    """
    y = torch.arange(height) - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([xx, yy], dim=-1)[None]


def heading(degrees: Scalars) -> Float[Tensor, "batch 2"]:
    """The unit vector (x, y) that points at `degrees` on the screen, where y grows downwards."""
    radians = torch.deg2rad(degrees)
    return torch.stack([radians.cos(), -radians.sin()], dim=-1)


def _rotated(points: Points, center: Float[Tensor, "batch 2"], degrees: Scalars) -> Tensor:
    """Coordinates along and across the axis through `center` that points at `degrees`."""
    relative = points - rearrange(center, "b c -> b 1 1 c")
    axis = heading(degrees)
    # The axis turned by 90 degrees, counter-clockwise on the screen, where y grows downwards.
    across = torch.stack([axis[:, 1], -axis[:, 0]], dim=-1)
    basis = torch.stack([axis, across], dim=-1)
    return torch.einsum("bhwc,bcd->bhwd", relative, basis)


def segment_distance(
    points: Points, start: Float[Tensor, "batch 2"], end: Float[Tensor, "batch 2"]
) -> Field:
    """Distance in pixels to the segment from `start` to `end`."""
    a = rearrange(start, "b c -> b 1 1 c")
    ab = rearrange(end - start, "b c -> b 1 1 c")
    # The projection onto the line, clamped to the segment; a segment of length 0 is a point.
    length2 = ab.square().sum(-1).clamp_min(1e-12)
    t = (((points - a) * ab).sum(-1) / length2).clamp(0, 1)
    return (points - a - t[..., None] * ab).norm(dim=-1)


def arc_distance(
    points: Points,
    center: Float[Tensor, "batch 2"],
    radius: Scalars,
    orientation: Scalars,
    half_span: Scalars,
) -> Field:
    """Distance in pixels to a circular arc.

    Args:
        points: the points to measure from.
        center: the arc's centre of curvature.
        radius: the radius, in pixels.
        orientation: the direction from the centre of curvature to the middle of the arc, in degrees.
        half_span: half of the angle that the arc covers, in degrees (180 is the whole circle).
    """
    along, across = _rotated(points, center, orientation).unbind(-1)
    across = across.abs()  # an arc is symmetric about its own axis
    span = torch.deg2rad(half_span)[:, None, None]
    r = radius[:, None, None]
    on_ring = (torch.hypot(along, across) - r).abs()
    to_end = torch.hypot(along - r * span.cos(), across - r * span.sin())
    # Points at an angle within the span are nearest to the ring, all others to an end of the arc.
    return torch.where(torch.atan2(across, along) <= span, on_ring, to_end)


def polygon_distance(
    points: Points,
    center: Float[Tensor, "batch 2"],
    radius: Scalars,
    sides: int,
    rotation: Scalars,
) -> Field:
    """Signed distance in pixels to a regular polygon of circumradius `radius` (negative inside)."""
    along, across = _rotated(points, center, rotation).unbind(-1)
    # A regular polygon repeats in sectors: each point is turned into the one whose side is at a right angle to 0.
    sector = 2 * math.pi / sides
    angle = torch.remainder(torch.atan2(across, along), sector) - sector / 2
    r = torch.hypot(along, across)
    apothem = radius[:, None, None] * math.cos(sector / 2)
    half_side = radius[:, None, None] * math.sin(sector / 2)
    depth = r * angle.cos() - apothem
    beyond = ((r * angle.sin()).abs() - half_side).clamp_min(0)
    # Outside of the polygon and beyond the ends of the side, the nearest point is a corner.
    return torch.where((beyond > 0) & (depth > 0), torch.hypot(depth, beyond), depth)


def spiral_distance(
    points: Points,
    center: Float[Tensor, "batch 2"],
    pitch: Scalars,
    turns: Scalars,
    rotation: Scalars,
) -> Field:
    """Approximate distance in pixels to an Archimedean spiral r = pitch * angle / 360.

    It is measured along the radius, which is close to the true distance beyond the first turn.
    """
    along, across = _rotated(points, center, rotation).unbind(-1)
    r = torch.hypot(along, across)
    p = pitch[:, None, None]
    phase = torch.remainder(torch.atan2(across, along) / (2 * math.pi), 1.0)
    turn = (
        (r / p - phase).round().clamp_min(0)
    )  # the turn of the spiral that is nearest along the radius
    last = turns[:, None, None] - phase
    turn = torch.minimum(turn, last.floor().clamp_min(0))
    return (r - p * (turn + phase)).abs()


def stroke(distance: Field, thickness: Scalars) -> Field:
    """The coverage, in 0..1, of a line of `thickness` pixels, with an edge that is ramped over one pixel."""
    return (thickness[:, None, None] / 2 + 0.5 - distance.abs()).clamp(0, 1)


def fill(distance: Field) -> Field:
    """The coverage, in 0..1, of the inside of a signed distance field, where it is negative."""
    return (0.5 - distance).clamp(0, 1)


def grating(
    points: Points, orientation: Scalars, wavelength: Scalars, phase: Scalars
) -> Float[Tensor, "batch h w"]:
    """A sinusoidal grating in 0..1 whose stripes run along `orientation`.

    Args:
        points: the points to draw at.
        orientation: the direction of the stripes, in degrees.
        wavelength: the distance between stripes, in pixels.
        phase: in degrees; 0 puts a bright stripe through the centre.
    """
    origin = torch.zeros(len(orientation), 2)
    _, across = _rotated(points, origin, orientation).unbind(-1)
    cycles = across / wavelength[:, None, None] + phase[:, None, None] / 360
    return 0.5 + 0.5 * (2 * math.pi * cycles).cos()


def paint(
    image: Float[Tensor, "batch 3 h w"],
    coverage: Float[Tensor, "batch h w"],
    color: Float[Tensor, "batch 3"],
) -> Float[Tensor, "batch 3 h w"]:
    """Paint `color` over `image` where `coverage` is 1, blending in between."""
    alpha = coverage[:, None]
    return image * (1 - alpha) + rearrange(color, "b c -> b c 1 1") * alpha


def curves(
    orientation: Scalars,
    radius: Scalars,
    size: int = 64,
    thickness: float = 3.0,
    half_span: float = 60.0,
    foreground: float = 0.0,
    background: float = 1.0,
) -> Float[Tensor, "batch 3 size size"]:
    """Draw one arc in each image, with its middle at the image's centre.

    Args:
        orientation: where each arc bulges, in degrees (90 is an arch, 270 a bowl).
        radius: the radius of each arc, in pixels.
        size: the height and width of the images.
        thickness: the thickness of the line, in pixels.
        half_span: half of the angle that the arc covers, in degrees.
        foreground: the grey level of the line, 0..1.
        background: the grey level around it, 0..1.

    Raises:
        ValueError: if a radius, the size or the thickness is not positive.

    >>> curves(torch.tensor([90.0]), torch.tensor([12.0]), size=32).shape
    torch.Size([1, 3, 32, 32])
    """
    if size < 1 or thickness <= 0 or (radius <= 0).any():
        raise ValueError(
            f"size {size}, thickness {thickness} and radius {radius.min().item():g} must be positive"
        )
    n = len(orientation)
    distance = arc_distance(
        grid(size, size),
        -radius[:, None] * heading(orientation),
        radius,
        orientation,
        torch.full((n,), half_span),
    )
    image = torch.full((n, 3, size, size), background)
    coverage = stroke(distance, torch.full((n,), thickness))
    return paint(image, coverage, torch.full((n, 3), foreground))
