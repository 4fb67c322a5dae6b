"""Whether what an attribution marks matters to the model: deletion, insertion, ROAD, sensitivity-n, infidelity."""

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
from circuits.experiments.statistics import interval
from circuits.progress import Progress
from circuits.saliency.gradients import Blank, blanks, check_range

Heats = Float[Tensor, "example h w"]
Orders = Int[Tensor, "example place"]

BLANKS: tuple[Blank, ...] = ("zero", "blur", "black")
"""What pixels are replaced by: no single one is neutral."""

Kind = Literal["insertion", "deletion"]


@dataclass(frozen=True)
class Curve:
    """The target as pixels are put in, or taken out, from the most credited on; means over examples.

    Attributes:
        kind: in or out.
        blank: what stands where no pixel is.
        shares: of the pixels put in or taken out.
        values: the target's value.
        random: with as many pixels in random order (in blocks, the mean of several orders).
        area: under `values`: large is good for insertion, small for deletion.
        area_random: under `random`.
        low: lower end of the 95 % interval, by bootstrap over examples, of how much better than random the area is
            (larger for insertion, smaller for deletion); NaN for a single example.
        high: its upper end.
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
    """Insertion and deletion (Petsiuk et al. 2018) from three blanks, beside random orders.

    Args:
        passes: from the input to the target, whose quantity is best the probability.
        heats: one number a pixel; the largest come first.
        steps: along each curve.
        n_random: random orders.
        seed: of them.
        progress: called with curves done and all.

    Raises:
        ValueError: if heats do not fit the images, or an option is out of range.
    """
    check_heats(passes, heats)
    check_range("steps", steps, 2)
    check_range("n_random", n_random, 1)
    own = order_of(heats)
    others = [
        _random_order(heats.shape, Generator().manual_seed(seed + k)) for k in range(n_random)
    ]
    found = []
    total = 2 * len(BLANKS)
    for blank in BLANKS:
        base = blanks(passes, blank)
        for kind in ("insertion", "deletion"):
            start, end = (base, passes.inputs) if kind == "insertion" else (passes.inputs, base)
            values = _along(passes, start, end, own, steps)
            random = np.mean([_along(passes, start, end, order, steps) for order in others], 0)
            shares = np.linspace(0, 1, steps + 1)
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
    """Pixels from the most to the least credited; equals in a fixed, scattered order."""
    scatter = torch.randperm(heats[0].numel(), generator=Generator().manual_seed(0)).to(
        heats.device
    )
    found = heats.flatten(1)[:, scatter].argsort(dim=1, descending=True, stable=True)
    return scatter[found]


def check_heats(passes: Passes, heats: Heats) -> None:
    """Raise ValueError if heats are not one number a pixel of the images."""
    wanted = (len(passes), *passes.inputs.shape[-2:])
    if tuple(heats.shape) != wanted:
        raise ValueError(f"heats of shape {tuple(heats.shape)}: expected {wanted}")
    if not bool(torch.isfinite(heats).all()):
        raise ValueError("heats are not finite: nothing to rank")


def _check_shares(shares: tuple[float, ...]) -> None:
    if not shares:
        raise ValueError("shares: expected at least one, from 0 to 1")
    for share in shares:
        check_range("share", share, 0, 1)


def _random_order(shape: torch.Size, generator: Generator) -> Orders:
    """Blocks of pixels in random order: single pixels are noise, which no attribution competes with."""
    n, height, width = shape
    side = 16 if min(height, width) >= 64 else 4
    coarse = torch.rand(n, 1, -(-height // side), -(-width // side), generator=generator)
    return order_of(F.interpolate(coarse, scale_factor=side, mode="nearest")[:, 0, :height, :width])


def _along(
    passes: Passes, start: Tensor, end: Tensor, order: Orders, steps: int
) -> Float[np.ndarray, "step example"]:
    """The target's value as the pixels of `end` replace those of `start` in order."""
    n, _, height, width = start.shape
    pixels = height * width
    order = order.to(start.device)
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
class Road:
    """The target as pixels are imputed from their neighbours; means over examples (Rong et al. 2022).

    Attributes:
        shares: of the pixels removed.
        most_first: the target's value when the most credited are removed.
        least_first: and when the least credited are.
        random: when random blocks are.
        score: the mean of random less most first: above 0 if what is credited matters more than other parts.
        low: lower end of the score's 95 % interval, by bootstrap over examples; NaN for a single one.
        high: its upper end.
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
) -> Road:
    """Remove pixels so that no mask shows: noisy linear imputation (Rong et al. 2022, section 4).

    Every removed pixel is the weighted mean of its eight neighbours (1/6 beside, 1/12 across), removed or not:
    a linear system; a little noise hides that it was solved.

    Args:
        passes: from the input to the target.
        heats: one number a pixel.
        shares: of the pixels to remove.
        noise: standard deviation, as a share of the image's range.
        seed: of noise and random orders.
        progress: called with shares done and all.

    Raises:
        ValueError: if heats do not fit the images, or a share is not between 0 and 1.
    """
    check_heats(passes, heats)
    _check_shares(shares)
    check_range("noise", noise, 0)
    own = order_of(heats.to(passes.inputs.device))
    random_order = _random_order(heats.shape, Generator().manual_seed(seed)).to(own.device)
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
    return Road(shares, most, least, random, float(score.mean()), *interval(score, seed=seed))


def imputed(
    image: Float[Tensor, "channel h w"], removed: Tensor, noise: float, generator: Generator
) -> Float[Tensor, "channel h w"]:
    """An image whose removed pixels are the weighted means of their neighbours."""
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
            weight = {0: 0.0, 1: 1 / 6, 2: 1 / 12}[abs(dy) + abs(dx)]
            ny, nx = y + dy, x + dx
            inside = (ny >= 0) & (ny < height) & (nx >= 0) & (nx < width) & (weight > 0)
            total[inside] += weight
            at = np.nonzero(inside)[0]
            there = number[ny[inside], nx[inside]]
            unknown = there >= 0
            rows.append(at[unknown])
            columns.append(there[unknown])
            entries.append(np.full(int(unknown.sum()), -weight))
            known = at[~unknown]
            right[known] += weight * pixels[:, ny[known], nx[known]].T
    entries[0] = total
    if n == gone.size:  # nothing to go by: the mean
        filled = np.broadcast_to(pixels.mean((1, 2)), (n, channels))
    else:
        matrix = coo_matrix(
            (np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))), (n, n)
        ).tocsc()
        filled = spsolve(matrix, right)
    spread = noise * float(image.max() - image.min())
    drawn = torch.randn(channels, n, generator=generator) * spread
    out = image.clone()
    out[:, removed] = torch.tensor(filled.reshape(n, channels).T.copy(), dtype=image.dtype).to(
        image
    ) + drawn.to(image)
    return out


@dataclass(frozen=True)
class Sensitivity:
    """How far attributions of random sets of pixels add up to what the target loses without them.

    Attributes:
        shares: of the pixels in a set.
        correlations: Pearson's, over sets; means over examples.
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
        passes: from the input to the target.
        heats: one signed number a pixel.
        shares: of the pixels in a set.
        sets: of each size.
        blank: what pixels are replaced by.
        seed: of the sets.
        progress: called with examples done and all.

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
        generator = Generator().manual_seed(seed)
        for column, share in enumerate(shares):
            shape = torch.Size((sets, height, width))
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
    """Infidelity (Yeh et al. 2019): how badly attributions foretell the change under noise.

    The mean of (I . attribution - (f(x) - f(x - I)))^2 over Gaussian I, once attributions are scaled as fits
    best, over the mean square of the change: 0 is perfect, 1 says nothing.

    Args:
        passes: from the input to the target.
        values: a number for each channel of each pixel (what one more unit of it adds, so gradients rather
            than gradients x input), or one for all channels.
        samples: of noise.
        noise: standard deviation, as a share of the image's range.
        seed: of the noise.

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
            foretold = (drawn * credit).flatten(1).double().sum(1)
            scale = (foretold @ change) / foretold.square().sum().clamp_min(1e-30)
            row.append(
                float(
                    (scale * foretold - change).square().sum()
                    / change.square().sum().clamp_min(1e-30)
                )
            )
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
