"""Input attribution by hiding parts of the image: occlusion and RISE."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.attribution.passes import Passes
from circuits.checks import check_range
from circuits.progress import Progress
from circuits.saliency.gradients import Blank, blanks


def occlusion(
    passes: Passes,
    window: int | None = None,
    stride: int | None = None,
    blank: Blank | Tensor = "zero",
    progress: Progress | None = None,
) -> Float[Tensor, "example 1 h w"]:
    """The target's loss when a window is occluded, averaged where windows overlap (Zeiler and Fergus 2014).

    As in captum's Occlusion, the last window of a row is cut off at the border.

    Args:
        passes: passes from the input to the target.
        window: height and width of the window in pixels; a seventh of the image if not given.
        stride: distance between windows; half a window if not given.
        blank: what covers the window.
        progress: called with the number of windows done and the total.

    Raises:
        ValueError: if an option is out of range.
    """
    height, width = passes.inputs.shape[-2:]
    window = max(1, round(min(height, width) / 7)) if window is None else window
    check_range("window", window, 1, min(height, width))
    stride = max(1, window // 2) if stride is None else stride
    check_range("stride", stride, 1, window)
    base = blanks(passes, blank)
    boxes = [
        (slice(top, top + window), slice(left, left + window))
        for top in _starts(height, window, stride)
        for left in _starts(width, window, stride)
    ]
    n = len(passes)
    total = torch.zeros(n, height, width).to(passes.inputs)
    count = torch.zeros(height, width, device=passes.inputs.device)
    for box in boxes:
        count[box] += 1
    # Pair k is box k // n of image k % n: every batch is full also where the number of images does not divide it.
    pairs = len(boxes) * n
    for chunk in passes.chunks(pairs):
        which = torch.tensor([k % n for k in chunk], device=passes.inputs.device)
        covered = passes.inputs[which].clone(memory_format=torch.channels_last)
        for row, k in enumerate(chunk):
            y, x = boxes[k // n]
            covered[row, :, y, x] = base[k % n, :, y, x]
        lost = passes.values[which] - passes.value(covered, which)
        for row, k in enumerate(chunk):
            total[(k % n, *boxes[k // n])] += lost[row]
        if progress is not None:
            progress(chunk.stop, pairs)
    # Divided by how many windows hid a pixel, else pixels at the border would count for less.
    return (total / count.clamp_min(1))[:, None]


def _starts(length: int, window: int, stride: int) -> range:
    # The last window starts at the last place where it fits whole, rounded up to a stride: 10 pixels, windows of 4
    # every 4 start at 0, 4 and 8; the last is cut off by the border.
    return range(0, (math.ceil((length - window) / stride) + 1) * stride, stride)


def rise(
    passes: Passes,
    samples: int = 1000,
    cells: int = 7,
    keep: float = 0.5,
    blank: Blank | Tensor = "zero",
    seed: int = 0,
    progress: Progress | None = None,
) -> Float[Tensor, "example 1 h w"]:
    """RISE: the target's mean over random masks that show a pixel (Petsiuk et al. 2018).

    Args:
        passes: passes from the input to the target (in the paper, to a probability).
        samples: number of masks; all examples get the same masks.
        cells: cells of a mask along each side.
        keep: the share of cells that are shown.
        blank: what replaces hidden pixels.
        seed: seed of the masks.
        progress: called with the number of masks done and the total.

    Raises:
        ValueError: if an option is out of range.
    """
    check_range("samples", samples, 1)
    check_range("cells", cells, 1, min(passes.inputs.shape[-2:]))
    check_range("keep", keep, 0.01, 0.99)
    base = blanks(passes, blank)
    generator = Generator().manual_seed(seed)
    n = len(passes)
    total = torch.zeros(n, *passes.inputs.shape[-2:]).to(passes.inputs)
    for chunk in passes.chunks(samples):
        masks = random_masks(len(chunk), passes.inputs.shape[-2:], cells, keep, generator)
        masks = masks.to(passes.inputs)
        for example in range(n):
            shown = masks * passes.inputs[example] + (1 - masks) * base[example]
            values = passes.value(shown, example)
            total[example] += torch.tensordot(values, masks[:, 0], dims=1)
        if progress is not None:
            progress(chunk.stop, samples)
    # E[f(x * m) m_p] / E[m_p] = E[f(x * m) | p shown] for masks of 0 and 1 (Petsiuk et al. 2018); E[m_p] is `keep`.
    return (total / (samples * keep))[:, None]


def random_masks(
    n: int, size: tuple[int, ...], cells: int, keep: float, generator: Generator
) -> Float[Tensor, "mask 1 h w"]:
    """Smooth random masks: coarse cells, shown with probability `keep`, enlarged and shifted."""
    height, width = size
    cell = (math.ceil(height / cells), math.ceil(width / cells))
    found = []
    for _ in range(n):  # one at a time, so that masks do not depend on how many are made in a batch
        coarse = (torch.rand(1, 1, cells, cells, generator=generator) < keep).float()
        top = int(torch.randint(cell[0], (1,), generator=generator))
        left = int(torch.randint(cell[1], (1,), generator=generator))
        # One cell more than the image needs, so that a window of its size fits at every shift of less than a cell.
        # Shifts keep the cells' borders from always lying at the same places.
        whole = ((cells + 1) * cell[0], (cells + 1) * cell[1])
        large = F.interpolate(coarse, whole, mode="bilinear", align_corners=False)
        found.append(large[0, :, top : top + height, left : left + width])
    return torch.stack(found)
