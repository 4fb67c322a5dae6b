"""The clean-room network: layers filled in by formulas, nothing learned, nothing copied.

Gabor filters -> complex Gabors (any phase) -> lines. Every unit's meaning is known because it was
written down; `UNIT_NAMES` says it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from circuits.cleanroom.filters import gabor, orientation_tuning, stroke

N_ORIENTATIONS = 12
PHASES = (0.0, 90.0, 180.0, 270.0)
ORIENTATIONS = tuple(180.0 * k / N_ORIENTATIONS for k in range(N_ORIENTATIONS))
WAVELENGTH, SIGMA = 5.0, 1.8
COLORS = {
    "red over green": (1.0, -1.0, 0.0),
    "green over red": (-1.0, 1.0, 0.0),
    "blue over yellow": (-0.5, -0.5, 1.0),
    "yellow over blue": (0.5, 0.5, -1.0),
}

UNIT_NAMES: dict[str, tuple[str, ...]] = {
    "gabor": (
        *(f"Gabor {o:g}°, phase {p:g}°" for o in ORIENTATIONS for p in PHASES),
        *COLORS,
    ),
    "complex": tuple(f"complex Gabor {o:g}°" for o in ORIENTATIONS),
    "line": tuple(f"line {o:g}°" for o in ORIENTATIONS),
}


class CleanRoom(nn.Module):
    """The hand-written network; input of any size, batch x 3 x y x x in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        n_gabor = N_ORIENTATIONS * len(PHASES) + len(COLORS)
        self.gabor_pre_relu = nn.Conv2d(3, n_gabor, 7, padding=3, padding_mode="replicate")
        self.gabor = nn.ReLU()
        self.complex_pre_relu = nn.Conv2d(n_gabor, N_ORIENTATIONS, 1)
        self.complex = nn.ReLU()
        self.line_pre_relu = nn.Conv2d(
            N_ORIENTATIONS, N_ORIENTATIONS, 7, padding=3, padding_mode="replicate"
        )
        self.line = nn.ReLU()
        self.strongest = nn.AdaptiveMaxPool2d(1)
        self.requires_grad_(False)
        _write(self.gabor_pre_relu, _gabor_weights())
        _write(self.complex_pre_relu, _complex_weights(), bias=-0.1)
        _write(self.line_pre_relu, _line_weights(), bias=-0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to the strongest response of each line unit, batch x orientation."""
        x = self.gabor(self.gabor_pre_relu(x))
        x = self.complex(self.complex_pre_relu(x))
        x = self.line(self.line_pre_relu(x))
        return self.strongest(x).flatten(1)


def _write(conv: nn.Conv2d, weight: Tensor, bias: float = 0.0) -> None:
    conv.weight.copy_(weight)
    assert conv.bias is not None, "clean-room convolutions have a bias"
    conv.bias.fill_(bias)


def _gabor_weights() -> Tensor:
    """Grey Gabors (a third of the weight to each of R, G, B) and colour-contrast blobs."""
    grey = torch.full((3,), 1 / 3, dtype=torch.float64)
    filters = [
        torch.einsum("c,yx->cyx", grey, gabor(7, o, p, WAVELENGTH, SIGMA))
        for o in ORIENTATIONS
        for p in PHASES
    ]
    offset = torch.arange(7, dtype=torch.float64) - 3
    blob = torch.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * SIGMA**2))
    blob = blob / blob.sum()
    filters += [
        torch.einsum("c,yx->cyx", torch.tensor(c, dtype=torch.float64), blob)
        for c in COLORS.values()
    ]
    return torch.stack(filters)


def _complex_weights() -> Tensor:
    """Sum the four rectified phases: |cos| + |sin| of the local phase, between 1 and 1.41.

    A quarter each, times two so that a full-contrast edge gives about 1; the tuning over orientation
    takes away what is common to all. Colour units are not read.
    """
    tuning = orientation_tuning(N_ORIENTATIONS) * (2 / N_ORIENTATIONS)
    by_phase = tuning.repeat_interleave(len(PHASES), dim=1)
    weight = torch.cat([by_phase, torch.zeros(N_ORIENTATIONS, len(COLORS))], dim=1)
    return weight[:, :, None, None]


def _line_weights() -> Tensor:
    """Excite along the tangent by the same orientation, inhibit beside it and by the perpendicular.

    Scaled so that a drawn line of full contrast gives about 1; the bias of -0.2 asks for a fifth of
    it.
    """
    tuning = orientation_tuning(N_ORIENTATIONS) * (2 / N_ORIENTATIONS)
    bars = torch.stack([stroke(7, o, length=2.5, width=1.5, flanks=0.5) for o in ORIENTATIONS])
    bars = bars / bars.abs().sum(dim=(1, 2), keepdim=True) * 2
    return torch.einsum("ts,tyx->tsyx", tuning, bars)
