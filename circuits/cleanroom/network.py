"""The clean-room network: five layers of units written by hand, and a sixth made of them.

Cammarata et al. 2021, "Curve Circuits" (Distill), describe such a network; theirs is not published. Gabor
filters -> complex Gabors (any phase) -> lines -> early curves and lines -> curves -> circles and S-shapes.
Nothing is learned and no number is read from a file: every weight follows from what its unit looks for
(`FAMILIES`) and the constants below.
"""

from __future__ import annotations

import hashlib
from pathlib import Path as FilePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.cleanroom.families import Feature, angles_of, rotations
from circuits.cleanroom.filters import gabor, stroke
from circuits.cleanroom.paths import Path, arc, circle, s_shape, straight
from circuits.cleanroom.tiling import Affinity, differences, tile

RADII = (20.0, 26.0, 34.0)
"""Of curves, in pixels: 1.3 times each other."""

EARLY_RADII = (32.0, 42.0, 54.0)
"""Of the early curves that each reads, 1.6 times its own: a short piece of a curve hardly differs from a line, and
a unit that looks for more bend than it can see answers to corners and clutter.
"""

N_LINES, N_CURVES, N_SHAPES = 12, 24, 12
PHASES = (0.0, 90.0, 180.0, 270.0)
COLOURS = {
    "red over green": (1.0, -1.0, 0.0),
    "green over red": (-1.0, 1.0, 0.0),
    "blue over yellow": (-0.5, -0.5, 1.0),
    "yellow over blue": (0.5, 0.5, -1.0),
}

LINES = rotations(Feature("line", period=180.0), N_LINES)
CURVES = {r: rotations(Feature("curve", period=360.0, radius=r), N_CURVES) for r in RADII}
S_SHAPES = tuple(
    f
    for mirrored in (False, True)
    for f in rotations(
        Feature("S-shape", period=180.0, radius=RADII[1], mirrored=mirrored), N_SHAPES
    )
)

FAMILIES: dict[str, tuple[tuple[Feature, ...], ...]] = {
    "gabor": (
        *(
            rotations(Feature("Gabor", period=180.0, phase=phase), N_LINES)
            for phase in PHASES
        ),
        tuple(Feature(name, colour=colour) for name, colour in COLOURS.items()),
    ),
    "complex": (rotations(Feature("complex Gabor", period=180.0), N_LINES),),
    "line": (LINES,),
    "early": (
        *(
            rotations(Feature("early curve", period=360.0, radius=r), N_CURVES)
            for r in EARLY_RADII
        ),
        rotations(Feature("early line", period=180.0), N_LINES),
    ),
    "curve": tuple(CURVES.values()),
    "shape": (
        tuple(Feature("circle", radius=r) for r in RADII),
        S_SHAPES[:N_SHAPES],
        S_SHAPES[N_SHAPES:],
    ),
}  # fmt: skip
"""What every unit looks for, by layer: families, in the order of the units."""

UNIT_NAMES: dict[str, tuple[str, ...]] = {
    layer: tuple(feature.name for family in families for feature in family)
    for layer, families in FAMILIES.items()
}

# --- constants ---------------------------------------------------------------------------------

_WAVELENGTH, _SIGMA = 12.0, 1.8  # pixels: edges, and lines of about 4 pixels
_FAINT = 0.3  # energy at which contrast is half normalised away; a sharp edge has about 2
_LINE = Affinity(excite=15.0, every=0.21)  # 15 sqrt(2 pi) / 180: the sum over orientations is zero
_EARLY = Affinity(excite=6.5, around=(0.2, 38.0))
_CURVE = Affinity(excite=18.0, opposed=(0.5, 60.0), every=0.05)
_S_SHAPE = Affinity(excite=12.0, opposed=(1.0, 90.0), every=0.1)  # half of it alone must not do
_STEP = 8.0  # pixels from position to position of the maps from early curves on
_WIDTH = 5.0  # pixels: with less, points of a path would fall between two positions
_EARLY_REACH, _CURVE_REACH = 0.65, 0.8  # half of a path's length, in radii
_GAINS = {"complex": 2.0, "line": 8.5, "early": 4.5, "curve": 0.9, "circle": 2.5, "S-shape": 6.0}
"""So that a line, early curve or curve of full contrast, drawn as it is wanted, gives about 1."""
_THRESHOLDS = {"line": 0.02, "curve": 0.1, "shape": 0.2}
"""What must be exceeded: rounding errors of a uniform image; of curves about half of what a straight line gives."""


class CleanRoom(nn.Module):
    """The hand-written network; input of any size from 32 pixels, batch x 3 x y x x in 0..1.

    Each pool takes the larger of 2 x 2 neighbours, so a map has one position for every 2, 4 and 8 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        n = {layer: len(names) for layer, names in UNIT_NAMES.items()}
        self.gabor_pre_relu = _conv(3, n["gabor"], 7, stride=2)
        self.gabor = nn.ReLU()
        self.complex_pre_relu = _conv(n["gabor"], n["complex"], 1)
        self.complex = nn.ReLU()
        every = 2 * n["complex"] + 1  # a window that reaches all orientations from each
        # torch divides by (k + alpha / n * sum of squares)^beta over n neighbours: with alpha = n, beta = 1/2 and k =
        # faint^2 that is x / sqrt(faint^2 + energy), the same for all orientations.
        self.complex_norm = nn.LocalResponseNorm(every, alpha=every, beta=0.5, k=_FAINT**2)
        self.complex_pool = nn.MaxPool2d(2)
        self.line_pre_relu = _conv(n["complex"], n["line"], 7)
        self.line = nn.ReLU()
        self.line_pool = nn.MaxPool2d(2)
        self.early_pre_relu = _conv(n["line"], n["early"], 5)
        self.early = nn.ReLU()
        self.curve_pre_relu = _conv(n["early"], n["curve"], 5)
        self.curve = nn.ReLU()
        self.shape_pre_relu = _conv(n["curve"], n["shape"], 11)
        self.shape = nn.ReLU()
        self.strongest = nn.AdaptiveMaxPool2d(1)
        self.requires_grad_(False)
        _write(self.gabor_pre_relu, _gabor_weights())
        _write(self.complex_pre_relu, _complex_weights())
        _write(self.line_pre_relu, _line_weights(), _THRESHOLDS["line"])
        _write(self.early_pre_relu, _early_weights())
        _write(self.curve_pre_relu, _curve_weights(), _THRESHOLDS["curve"])
        _write(self.shape_pre_relu, _shape_weights(), _THRESHOLDS["shape"])

    def forward(self, x: Tensor) -> Tensor:
        """Map images to the strongest response of each circle and S-shape, batch x unit."""
        x = self.gabor(self.gabor_pre_relu(x))
        x = self.complex(self.complex_pre_relu(x))
        x = self.complex_pool(self.complex_norm(x))
        x = self.line_pool(self.line(self.line_pre_relu(x)))
        x = self.early(self.early_pre_relu(x))
        x = self.curve(self.curve_pre_relu(x))
        x = self.shape(self.shape_pre_relu(x))
        return self.strongest(x).flatten(1)


def _conv(sources: int, units: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        sources, units, size, stride, padding=size // 2, padding_mode="replicate" if size > 1 else "zeros"
    )  # fmt: skip


_GRID = 2**20
"""Weights are multiples of its inverse, a millionth: they are the same on every machine."""


def _write(conv: nn.Conv2d, weight: Tensor, threshold: float = 0.0) -> None:
    assert conv.bias is not None, "clean-room convolutions have a bias"
    # Processors differ in the last digits of sines and exponentials: what is left of a sum that cancels, and with it
    # the hash of the network, would be another on each.
    conv.weight.copy_((weight * _GRID).round() / _GRID)
    conv.bias.fill_(-threshold)


# --- weights, layer by layer -------------------------------------------------------------------


def _gabor_weights() -> Tensor:
    """Grey Gabors (a third of the weight to each of R, G, B) and colour-contrast blobs."""
    grey = torch.full((3,), 1 / 3, dtype=torch.float64)
    offset = torch.arange(7, dtype=torch.float64) - 3
    blob = torch.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * _SIGMA**2))
    blob = blob / blob.sum()
    filters = []
    for family in FAMILIES["gabor"]:
        for f in family:
            colour = torch.tensor(f.colour, dtype=torch.float64) if f.colour else grey
            shape = blob if f.phase is None else gabor(7, f.angle, f.phase, _WAVELENGTH, _SIGMA)
            filters.append(torch.einsum("c,yx->cyx", colour, shape))
    return torch.stack(filters)


def _complex_weights() -> Tensor:
    """The mean of the four rectified phases: |cos| + |sin| of the local phase, between 1 and 1.41 over 4.

    Both polarities and edges as well as lines count alike from here on. Colour units are not read.
    """
    # Units of the four phases lie one family behind the other: unit o of a phase is number phase * 12 + o.
    same = torch.eye(N_LINES, dtype=torch.float64).repeat(1, len(PHASES))
    weight = torch.cat([same, torch.zeros(N_LINES, len(COLOURS))], 1) / len(PHASES)
    return _GAINS["complex"] * weight[:, :, None, None]


def _line_weights() -> Tensor:
    """Excite along the tangent by the same orientation, inhibit beside it and by all others.

    The sum over orientations is zero, so that what has energy at all of them (noise, a dot) cancels.
    """
    angles = angles_of(LINES)
    wanted = _LINE(differences(angles, angles, 180.0), 180.0)
    # Sizes sum to 1 whatever the affinity says: `_GAINS` then means the same for every unit.
    wanted = wanted / wanted.abs().sum(1, keepdim=True)
    # one position is 4 pixels: 10 pixels along, 2.4 across
    bars = torch.stack([stroke(7, f.angle, length=2.5, width=0.6, flanks=0.5) for f in LINES])
    bars = bars / bars.clamp_min(0).sum(dim=(1, 2), keepdim=True)
    return _GAINS["line"] * torch.einsum("ts,tyx->tsyx", wanted, bars)


def _early_weights() -> Tensor:
    """Curves and lines from lines: excite along the path by its tangents, inhibit by other orientations."""
    angles = angles_of(LINES)
    kernels = []
    for family in FAMILIES["early"]:
        for f in family:
            half = _EARLY_REACH * (f.radius or EARLY_RADII[1])
            path = arc(f.angle, f.radius, half) if f.radius else straight(f.angle, half)
            kernels.append(tile(path, angles, 180.0, _EARLY, size=5, step=_STEP, width=_WIDTH))
    return _GAINS["early"] * torch.stack(kernels)


def _curve_weights() -> Tensor:
    """Curves from early curves of their radius: excite along the arc, inhibit by what is opposed to it.

    Early lines are not read: a straight line excites early curves of both polarities, which cancel.
    """
    kernels = []
    for r, family in CURVES.items():
        for f in family:
            own = _over_curves(arc(f.angle, r, _CURVE_REACH * r), _CURVE, r, 5)
            # Early lines are read by no curve.
            kernels.append(torch.cat([own, torch.zeros(N_LINES, 5, 5)]))
    return _GAINS["curve"] * torch.stack(kernels)


def _shape_weights() -> Tensor:
    """Circles and S-shapes from curves of their radius."""
    kernels = []
    for family in FAMILIES["shape"]:
        for f in family:
            if f.kind == "circle":
                path, affinity = circle(f.radius), _CURVE
            else:
                path, affinity = s_shape(f.angle, f.radius, 2 * f.radius, f.mirrored), _S_SHAPE
            kernels.append(_GAINS[f.kind] * _over_curves(path, affinity, f.radius, 11))
    return torch.stack(kernels)


def _over_curves(
    path: Path, affinity: Affinity, radius: float, size: int
) -> Float[Tensor, "unit size size"]:
    """A path's kernel over the families of curves of all radii: none but from its own."""
    parts = []
    for r, family in CURVES.items():
        kernel = tile(path, angles_of(family), 360.0, affinity, size=size, step=_STEP, width=_WIDTH)
        # Curves of another radius get zeros and not nothing, as the layer is one convolution over all.
        parts.append(kernel if r == radius else torch.zeros_like(kernel))
    return torch.cat(parts)


# --- where it comes from -----------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """What all weights are computed from: the SHA-256 of this package's source files."""
    folder = FilePath(__file__).parent
    sources = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.py"))
        if path.name in ("families.py", "filters.py", "network.py", "paths.py", "tiling.py")
    }
    return {"learned": "nothing", "files read": "none", "sources": sources}
