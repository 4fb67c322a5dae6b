"""Faithfulness of input attributions: deletion, insertion, ROAD, sensitivity-n, infidelity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve
from torch import Generator, Tensor

from circuits.attribution.channels import spearman
from circuits.attribution.passes import Passes
from circuits.checks import check_range
from circuits.experiments.statistics import interval
from circuits.progress import Progress
from circuits.saliency.gradients import Blank, blanks

Heats = Float[Tensor, "example h w"]
Orders = Int[Tensor, "example place"]

BLANKS: tuple[Blank, ...] = ("zero", "blur", "black")
"""What pixels are replaced by. Three, since no single replacement is neutral for every model."""

Kind = Literal["insertion", "deletion"]


@dataclass(frozen=True)
class Curve:
    """The target's value as pixels are inserted or deleted in order of attribution; means over examples.

    Attributes:
        kind: insertion or deletion.
        blank: what replaces the pixels.
        shares: the shares of the pixels that are inserted or deleted.
        values: the target's value at each share.
        random: the same with pixels in random order (in blocks; the mean of several orders).
        area: the area under `values`: a good map has a large one for insertion, a small one for deletion.
        area_random: the area under `random`.
        low: lower end of the 95 % interval, by bootstrap over examples, of how much better than random the area is
            (larger for insertion, smaller for deletion); NaN for a single example.
        high: upper end of the interval.
    """

    kind: Kind
    blank: Blank
    shares: tuple[float, ...]
    values: tuple[float, ...]
    random: tuple[float, ...]
    area: float
    area_random: float
    low: float
    high: float


def insertion_deletion(
    passes: Passes,
    heats: Heats,
    *,
    steps: int = 10,
    n_random: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Curve]:
    """Insertion and deletion (Petsiuk et al. 2018) with three blanks, compared with random orders.

    Args:
        passes: passes from the input to the target; its quantity should be the probability.
        heats: one number for each pixel; the largest come first.
        steps: number of steps along each curve.
        n_random: number of random orders.
        seed: seed of the random orders.
        progress: called with the number of curves done and the total.

    Raises:
        ValueError: if heats do not fit the images, or an option is out of range.
    """
    check_heats(passes, heats)
    check_range("steps", steps, 2)
    check_range("n_random", n_random, 1)
    own = order_of(heats)
    # More than one order: a single one may be lucky, and its noise would count as the method's.
    others = [
        _random_order(heats.shape, Generator().manual_seed(seed + k)) for k in range(n_random)
    ]
    found = []
    total = 2 * len(BLANKS)
    for blank in BLANKS:
        base = blanks(passes, blank)
        # Both ways, since they fail differently: deletion rewards maps that break the image up early, insertion maps
        # that find what is enough.
        for kind in ("insertion", "deletion"):
            start, end = (base, passes.inputs) if kind == "insertion" else (passes.inputs, base)
            values = _removal_curve(passes, start, end, own, steps)
            random = np.mean(
                [_removal_curve(passes, start, end, order, steps) for order in others], 0
            )
            shares = np.linspace(0, 1, steps + 1)
            # By example: the interval below is over examples, each with its own difference from random orders on the
            # same image.
            areas = np.trapezoid(values, shares, axis=0), np.trapezoid(random, shares, axis=0)
            better = (areas[0] - areas[1]) * (1 if kind == "insertion" else -1)
            found.append(
                Curve(
                    kind, blank, tuple(shares.tolist()), tuple(values.mean(1).tolist()),
                    tuple(random.mean(1).tolist()), float(areas[0].mean()), float(areas[1].mean()),
                    *interval(better, seed=seed),
                )
            )  # fmt: skip
            if progress is not None:
                progress(len(found), total)
    return found


def order_of(heats: Heats) -> Orders:
    """Pixels from the largest to the smallest attribution; ties in a fixed, scattered order."""
    # Ties in reading order would be contiguous areas at the top of the image, which no attribution marked.
    scatter = torch.randperm(heats[0].numel(), generator=Generator().manual_seed(0)).to(
        heats.device
    )
    found = heats.flatten(1)[:, scatter].argsort(dim=1, descending=True, stable=True)
    # `found` indexes into the scattered list; this leads back to places in the image.
    return scatter[found]


def check_heats(passes: Passes, heats: Heats) -> None:
    """Raise ValueError unless heats are one finite number for each pixel of the images."""
    wanted = (len(passes), *passes.inputs.shape[-2:])
    if tuple(heats.shape) != wanted:
        raise ValueError(f"heats of shape {tuple(heats.shape)}: expected {wanted}")
    if not bool(torch.isfinite(heats).all()):
        raise ValueError("heats contain NaN or infinity: expected finite numbers to rank")


def _check_shares(shares: tuple[float, ...]) -> None:
    if not shares:
        raise ValueError("shares: expected at least one, from 0 to 1")
    for share in shares:
        check_range("share", share, 0, 1)


def _random_order(shape: torch.Size, generator: Generator) -> Orders:
    """Blocks of pixels in random order."""
    # Removing single random pixels gives high-frequency noise, which destroys any prediction at once: too easy a null.
    n, height, width = shape
    side = 16 if min(height, width) >= 64 else 4
    # -(-h // s) is h / s rounded up: the last row of blocks may be cut off.
    coarse = torch.rand(n, 1, -(-height // side), -(-width // side), generator=generator)
    return order_of(F.interpolate(coarse, scale_factor=side, mode="nearest")[:, 0, :height, :width])


def _removal_curve(
    passes: Passes, start: Tensor, end: Tensor, order: Orders, steps: int
) -> Float[np.ndarray, "step example"]:
    """The target's value as the pixels of `end` replace those of `start` in order."""
    n, _, height, width = start.shape
    pixels = height * width
    order = order.to(start.device)
    # The inverse of `order`: order 2, 0, 1 gives pixel 0 rank 1, pixel 1 rank 2 and pixel 2 rank 0. Then `rank < k` are
    # the first k pixels.
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(pixels, device=order.device).expand_as(order)
    )
    values = []
    for step in range(steps + 1):
        put = (rank < round(pixels * step / steps)).reshape(n, 1, height, width)
        values.append(
            passes.value(torch.where(put, end, start), torch.arange(n)).double().cpu().numpy()
        )
    return np.stack(values)


@dataclass(frozen=True)
class RoadResult:
    """The target's value as pixels are imputed from their neighbours (ROAD, Rong et al. 2022); means over examples.

    Attributes:
        shares: the shares of the pixels that are removed.
        most_first: the target's value if the pixels with the largest attributions are removed.
        least_first: the same for the smallest attributions.
        random: the same for random blocks.
        score: the mean of random minus most first; above 0 if the marked pixels matter more than other pixels.
        low: lower end of the score's 95 % interval, by bootstrap over examples; NaN for a single one.
        high: upper end of the interval.
    """

    shares: tuple[float, ...]
    most_first: tuple[float, ...]
    least_first: tuple[float, ...]
    random: tuple[float, ...]
    score: float
    low: float
    high: float


def road(
    passes: Passes,
    heats: Heats,
    *,
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
    noise: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> RoadResult:
    """Remove pixels without leaving a visible mask, by noisy linear imputation (ROAD, Rong et al. 2022, section 4).

    Every removed pixel becomes the weighted mean of its eight neighbours (1/6 for direct, 1/12 for diagonal ones),
    removed neighbours included, which is a linear system; a little noise hides how smooth the solution is.

    Args:
        passes: passes from the input to the target.
        heats: one number for each pixel.
        shares: the shares of the pixels to remove.
        noise: standard deviation of the noise, as a share of the image's range.
        seed: seed of the noise and of random orders.
        progress: called with the number of shares done and the total.

    Raises:
        ValueError: if heats do not fit the images, or a share is not between 0 and 1.
    """
    check_heats(passes, heats)
    _check_shares(shares)
    check_range("noise", noise, 0)
    own = order_of(heats.to(passes.inputs.device))
    random_order = _random_order(heats.shape, Generator().manual_seed(seed)).to(own.device)
    # The least important first as well: a map that only finds large objects does badly at it.
    orders = [own, own.flip(1), random_order]
    generator = Generator().manual_seed(seed)
    height, width = heats.shape[1:]
    rows: list[list[np.ndarray]] = []
    for number, share in enumerate(shares):
        row = []
        for order in orders:
            removed = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
            removed.scatter_(1, order[:, : round(share * order.shape[1])], True)
            shown = [
                imputed(x, mask.reshape(height, width), noise, generator)
                for x, mask in zip(passes.inputs, removed, strict=True)
            ]
            value = passes.value(torch.stack(shown), torch.arange(len(passes)))
            row.append(value.double().cpu().numpy())
        rows.append(row)
        if progress is not None:
            progress(number + 1, len(shares))
    each = np.array(rows)  # share x order x example
    most, least, random = (tuple(each[:, k].mean(1).tolist()) for k in range(3))
    score = (each[:, 2] - each[:, 0]).mean(0)
    return RoadResult(shares, most, least, random, float(score.mean()), *interval(score, seed=seed))


def imputed(
    image: Float[Tensor, "channel h w"], removed: Tensor, noise: float, generator: Generator
) -> Float[Tensor, "channel h w"]:
    """An image whose removed pixels are the weighted means of their neighbours, plus noise."""
    # For removed pixel i with neighbours j: (sum_j w_ij) x_i - sum_{j removed} w_ij x_j = sum_{j kept} w_ij x_j. At the
    # border the weights of the missing neighbours are left out on both sides.
    channels, height, width = image.shape
    gone = removed.cpu().numpy()
    n = int(gone.sum())
    if not n:
        return image
    number = np.full(gone.shape, -1)
    number[gone] = np.arange(n)
    y, x = np.nonzero(gone)
    rows, columns, entries = [np.arange(n)], [np.arange(n)], [np.zeros(n)]
    right = np.zeros((n, channels))
    pixels = image.detach().cpu().double().numpy()
    total = np.zeros(n)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            # Direct neighbours weigh 1/6, diagonal ones 1/12 (Rong et al. 2022): 4/6 + 4/12 = 1.
            weight = {0: 0.0, 1: 1 / 6, 2: 1 / 12}[abs(dy) + abs(dx)]
            ny, nx = y + dy, x + dx
            inside = (ny >= 0) & (ny < height) & (nx >= 0) & (nx < width) & (weight > 0)
            total[inside] += weight
            at = np.nonzero(inside)[0]
            there = number[ny[inside], nx[inside]]
            # A removed neighbour is an unknown of its own (a coefficient left of the equals sign), a kept one a number
            # on the right.
            unknown = there >= 0
            rows.append(at[unknown])
            columns.append(there[unknown])
            entries.append(np.full(int(unknown.sum()), -weight))
            known = at[~unknown]
            right[known] += weight * pixels[:, ny[known], nx[known]].T
    # The diagonal, whose rows and columns were listed first.
    entries[0] = total
    if n == gone.size:  # the system is singular if no pixel is kept: take the mean of the image
        filled = np.broadcast_to(pixels.mean((1, 2)), (n, channels))
    else:
        matrix = coo_matrix(
            (np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))), (n, n)
        ).tocsc()
        filled = spsolve(matrix, right)
    # Without noise removed regions are smooth, by which a network could still tell where something was removed.
    spread = noise * float(image.max() - image.min())
    drawn = torch.randn(channels, n, generator=generator) * spread
    out = image.clone()
    out[:, removed] = torch.tensor(filled.reshape(n, channels).T.copy(), dtype=image.dtype).to(
        image
    ) + drawn.to(image)
    return out


@dataclass(frozen=True)
class Sensitivity:
    """How well the summed attributions of random sets of pixels predict the target's loss without these pixels.

    Attributes:
        shares: the shares of the pixels in a set.
        correlations: Pearson's correlation over sets; means over examples.
        random: the same for shuffled attributions.
    """

    shares: tuple[float, ...]
    correlations: tuple[float, ...]
    random: tuple[float, ...]


def sensitivity_n(
    passes: Passes,
    heats: Heats,
    *,
    shares: tuple[float, ...] = (0.02, 0.1, 0.4),
    sets: int = 32,
    blank: Blank = "zero",
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Sensitivity-n (Ancona et al. 2018), over sets of pixels in blocks.

    Args:
        passes: passes from the input to the target.
        heats: one signed number for each pixel.
        shares: the shares of the pixels in a set.
        sets: number of sets of each size.
        blank: what pixels are replaced by.
        seed: seed of the sets.
        progress: called with the number of examples done and the total.

    Raises:
        ValueError: if heats do not fit the images, or an option is out of range.
    """
    check_heats(passes, heats)
    _check_shares(shares)
    check_range("sets", sets, 3)
    base = blanks(passes, blank)
    n, height, width = heats.shape
    pixels = height * width
    found = np.zeros((2, n, len(shares)))
    for example in range(n):
        # The same sets of pixels for every example, so that examples differ in nothing but themselves.
        generator = Generator().manual_seed(seed)
        for column, share in enumerate(shares):
            shape = torch.Size((sets, height, width))
            # In blocks, for the reason that random orders are.
            order = _random_order(shape, generator)[:, : max(1, round(share * pixels))]
            gone = torch.zeros(sets, pixels, dtype=torch.bool).scatter_(1, order, True)
            own = heats[example].flatten().double().cpu()
            shuffled = own[torch.randperm(pixels, generator=generator)]
            mask = gone.reshape(sets, 1, height, width).to(base.device)
            shown = torch.where(mask, base[example], passes.inputs[example])
            lost = (passes.values[example] - passes.value(shown, example)).double().cpu().numpy()
            for row, credit in enumerate((own, shuffled)):
                sums = (gone.double() @ credit).numpy()
                found[row, example, column] = _pearson(sums, lost)
        if progress is not None:
            progress(example + 1, n)
    means = found.mean(1)
    return Sensitivity(tuple(shares), tuple(means[0].tolist()), tuple(means[1].tolist()))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    # A constant map predicts nothing, and has no correlation.
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def infidelity(
    passes: Passes,
    values: Float[Tensor, "example channel h w"],
    *,
    samples: int = 32,
    noise: float = 0.1,
    seed: int = 0,
) -> tuple[float, float]:
    """Infidelity (Yeh et al. 2019): how badly attributions predict the target's change under noise.

    The mean of (I . attribution - (f(x) - f(x - I)))^2 over Gaussian I, with attributions scaled to fit best, divided
    by the mean square of the change: 0 is perfect, 1 is as bad as predicting no change.

    Args:
        passes: passes from the input to the target.
        values: a number for each channel of each pixel, or one for all channels; a slope, so a gradient rather than
            gradient x input.
        samples: number of noise samples.
        noise: standard deviation of the noise, as a share of the image's range.
        seed: seed of the noise.

    Returns:
        The infidelity, and that of shuffled attributions; means over examples.
    """
    check_range("samples", samples, 2)
    check_range("noise", noise, 1e-9)
    found = []
    for example in range(len(passes)):
        generator = Generator().manual_seed(seed)
        x = passes.inputs[example]
        spread = noise * float(x.max() - x.min())
        drawn = torch.randn(samples, *x.shape, generator=generator).to(x) * spread
        change = (passes.values[example] - passes.value(x - drawn, example)).double()
        own = values[example].expand_as(x)
        order = torch.randperm(own.numel(), generator=generator).to(own.device)
        shuffled = own.flatten()[order].reshape(own.shape)
        row = []
        for credit in (own, shuffled):
            predicted = (drawn * credit).flatten(1).double().sum(1)
            # Least squares: min over s of |s p - c|^2 is at s = p.c / p.p. Methods differ in scale by convention only.
            scale = (predicted @ change) / predicted.square().sum().clamp_min(1e-30)
            missed = (scale * predicted - change).square().sum()
            row.append(float(missed / change.square().sum().clamp_min(1e-30)))
        found.append(row)
    own_mean, shuffled_mean = np.mean(found, 0)
    return float(own_mean), float(shuffled_mean)


def agreement(heats: Mapping[str, Heats]) -> tuple[list[str], Float[np.ndarray, "method method"]]:
    """The mean rank correlation of each pair of methods' maps, over examples."""
    names = list(heats)
    table = np.eye(len(names))
    for i, first in enumerate(names):
        for j, second in enumerate(names[:i]):
            pairs = zip(heats[first], heats[second], strict=True)
            found = [
                spearman(a.flatten().cpu().numpy(), b.flatten().cpu().numpy()) for a, b in pairs
            ]
            table[i, j] = table[j, i] = float(np.mean(found))
    return names, table
