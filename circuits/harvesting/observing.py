"""Gathering what a shard keeps of one site, while forward passes run.

Statistics are computed by compiled loops (`kernels`) on a CPU and by torch elsewhere. Both assume finite activations;
a batch with NaN or infinite ones is computed again in a slower way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.harvesting import kernels
from circuits.store.provenance import Depth
from circuits.store.shards import CovariancePart, FullPart
from circuits.store.summaries import BINS, Summary
from circuits.units import Site


@lru_cache(maxsize=4096)
def looked_at(seed: int, example: int, places: int, n: int) -> Int[np.ndarray, " {n}"]:
    """The sample of an example's positions that histograms count: drawn uniformly, with replacement."""
    # Seeded by the example's own number: the sample does not depend on batches, shards or processes.
    return np.random.default_rng([seed, example, places]).integers(places, size=n)


def laid_out(site: Site, value: Tensor) -> tuple[Float[Tensor, "example a b"], int]:
    """A site's tensor with positions flattened, in the order in which it lies in memory, and the axis of positions.

    The other axis is that of units. A head's activation is the norm of its output.
    """
    units = site.activations(value).to(torch.float32)
    # Loops run along memory: transposing would cost more than the statistics.
    turned = units.movedim(2, 1)
    if (site.units_last and site.position_axes) or (
        turned.is_contiguous() and not units.is_contiguous()
    ):
        return turned.contiguous(), 1
    return units.contiguous(), 2


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """The statistics of a batch: `total` sums activation - center, `square` sums (activation - center)^2."""

    maximum: Float[np.ndarray, "example unit"]
    argmax: Int[np.ndarray, "example unit"]
    total: Float[np.ndarray, "example unit"]
    square: Float[np.ndarray, " unit"]
    minimum: Float[np.ndarray, " unit"]
    positive: Int[np.ndarray, " unit"]
    count: Int[np.ndarray, "example unit"]
    saturated: Int[np.ndarray, " unit"]
    nonfinite: Int[np.ndarray, " unit"] | int = 0


class Observer:
    """Gathers the statistics and tensors of one site over the examples of a shard.

    Args:
        site: the site.
        summary: the summary to write to.
        examples: the examples of the shard.
        depth: how many positions the histogram counts, and the seed of their choice.
        full: whether to keep the whole tensor.
        columns: the values about which to sum for the covariance, if that is kept.
    """

    def __init__(
        self,
        site: Site,
        summary: Summary,
        examples: range,
        depth: Depth,
        full: bool = False,
        columns: Float[np.ndarray, " column"] | None = None,
    ) -> None:
        self.site, self.examples = site, examples
        self._s, self._depth = summary, depth
        # float32, as the loops subtract; the reference is rounded to it, so that both are one number.
        self._center = summary.center.astype(np.float32)
        self._scale = (BINS / (summary.high.astype(np.float64) - summary.low)).astype(np.float32)
        self.full = _FullBuffer(site, len(examples)) if full else None
        self.covariance = None if columns is None else _CovarianceSums(columns)

    def see(self, value: Tensor, examples: Sequence[int]) -> None:
        """Add the site's tensor for some of the shard's examples."""
        rows = np.asarray(examples) - self.examples.start
        if self.full is not None:
            self.full.add(value, examples)
        if self.covariance is not None:
            self.covariance.add(self.site.rows(value).flatten(0, -2))
        x, axis = laid_out(self.site, value)
        if x.numel() == 0:
            return
        # As the model's own type has it: in bfloat16 a ceiling of 0.7 is 0.69921875.
        limit = torch.inf if self.site.ceiling is None else self.site.ceiling
        self._ceiling = np.float32(torch.tensor(limit, dtype=value.dtype).item())
        on_cpu = x.device.type == "cpu"
        found = self._compiled(x, axis) if on_cpu else self._in_torch(x, axis)
        # Any NaN or infinite activation makes its sum so.
        if not (np.isfinite(found.total).all() and np.isfinite(found.square).all()):
            found = self._without_nonfinite(x, axis)
        self._add(found, rows)
        self._relocate(value, rows)
        self._look(x, axis, examples)

    def _compiled(self, x: Tensor, axis: int) -> BatchStatistics:
        """The statistics of a batch on a CPU, in one pass over it."""
        numbers = x.numpy()
        n, units = x.shape[0], x.shape[3 - axis]
        argmax, total = np.empty((n, units), np.int32), np.empty((n, units))
        square, positive, saturated = (
            np.zeros(units),
            np.zeros(units, np.int64),
            np.zeros(units, np.int64),
        )
        least = np.full(units, np.iinfo(np.int32).max, np.int32)
        run = kernels.units_first if axis == 2 else kernels.units_last
        bits = numbers.view(np.int32)
        run(
            numbers, bits, self._center, self._ceiling, argmax, total, square, least, positive, saturated
        )  # fmt: skip
        at = np.expand_dims(argmax, axis)
        # From the tensor at the position found, as the loops only keep where the maximum is.
        maximum = np.take_along_axis(numbers, at, axis).squeeze(axis)
        minimum = kernels.ordered(least).view(np.float32)
        count = np.full((n, units), x.shape[axis])
        return BatchStatistics(maximum, argmax, total, square, minimum, positive, count, saturated)

    def _in_torch(self, x: Tensor, axis: int) -> BatchStatistics:
        """The statistics of a batch on any device."""
        center = torch.from_numpy(self._center).to(x.device)
        shifted = x - (center[:, None] if axis == 2 else center)
        maximum, argmax = x.max(axis)
        return BatchStatistics(
            maximum.cpu().numpy(),
            argmax.int().cpu().numpy(),
            shifted.sum(axis).double().cpu().numpy(),
            shifted.square().sum(axis).double().sum(0).cpu().numpy(),
            x.amin((0, axis)).cpu().numpy(),
            (x > 0).sum((0, axis)).cpu().numpy(),
            np.full(maximum.shape, x.shape[axis]),
            (x >= float(self._ceiling)).sum((0, axis)).cpu().numpy(),
        )

    def _without_nonfinite(self, x: Tensor, axis: int) -> BatchStatistics:
        """The statistics of a batch without the activations that are NaN or infinite, in float64."""
        wide = x.movedim(axis, 2).double().cpu().numpy()
        finite = np.isfinite(wide)
        count, best = finite.sum(2), np.where(finite, wide, -np.inf)
        shifted = np.where(finite, wide - self._s.center[:, None], 0.0)
        return BatchStatistics(
            np.where(count > 0, best.max(2), np.nan).astype(np.float32),
            best.argmax(2).astype(np.int32),
            shifted.sum(2),
            np.square(shifted).sum((0, 2)),
            np.where(finite, wide, np.inf).min((0, 2)).astype(np.float32),
            (finite & (wide > 0)).sum((0, 2)),
            count,
            (finite & (wide >= self._ceiling)).sum((0, 2)),
            (~finite).sum((0, 2)),
        )

    def _add(self, found: BatchStatistics, rows: np.ndarray) -> None:
        """Add a batch to the summary."""
        s, count = self._s, found.count
        s.maximum[rows], s.argmax[rows] = found.maximum, found.argmax
        # Total is of activation - center.
        mean = s.center + found.total / np.maximum(count, 1)
        s.mean[rows] = np.where(count > 0, mean, np.nan)
        s.total[:] += found.total.sum(0)
        s.square[:] += found.square
        s.minimum[:] = np.minimum(s.minimum, found.minimum)
        s.positive[:] += found.positive
        s.count[:] += count.sum(0)
        s.saturated[:] += found.saturated
        s.nonfinite[:] += found.nonfinite

    def _relocate(self, value: Tensor, rows: np.ndarray) -> None:
        """Number the position of a maximum in a pattern (query x key) of a short text as in that of the longest."""
        site = self.site
        shape = site.positions_of(value)
        # Query 2, key 3 is number 2 * 5 + 3 = 13 in a text of 5 tokens and 2 * 8 + 3 = 19 in one of 8.
        if len(shape) > 1 and shape != site.position_shape:
            where = np.unravel_index(self._s.argmax[rows], shape)
            self._s.argmax[rows] = np.ravel_multi_index(where, site.position_shape)

    def _look(self, x: Tensor, axis: int, examples: Sequence[int]) -> None:
        """Add a sample of each example's positions to the histogram, or all if they are few."""
        s, places, most = self._s, x.shape[axis], self._depth.positions
        numbers = x.movedim(axis, 2)
        if places <= most:
            at = np.tile(np.arange(places), (len(examples), 1))
        else:
            at = np.stack([looked_at(self._depth.seed, e, places, most) for e in examples])
        if x.device.type != "cpu":  # only the sample leaves the device
            chosen = torch.from_numpy(at).to(x.device)[:, None].expand(-1, numbers.shape[1], -1)
            numbers = numbers.gather(2, chosen).cpu()
            at = np.tile(np.arange(at.shape[1]), (len(examples), 1))
        powers = np.zeros(s.powers.shape)
        kernels.look(numbers.numpy(), at, self._center, s.low, self._scale, s.histogram, powers)
        s.powers[:] += powers


class _FullBuffer:
    """The whole tensors of a site over a shard's examples."""

    def __init__(self, site: Site, n_examples: int) -> None:
        self.site = site
        places = int(np.prod(site.position_shape))
        # Allocated once for the longest texts: growing it would need twice the memory at times.
        self._rows = torch.empty((n_examples * places, site.width))
        self._example: list[np.ndarray] = []
        self._position: list[np.ndarray] = []
        self._filled = 0

    def add(self, value: Tensor, examples: Sequence[int]) -> None:
        rows = self.site.rows(value).flatten(0, -2)
        self._rows[self._filled : self._filled + len(rows)].copy_(rows)
        self._filled += len(rows)
        shape = self.site.positions_of(value)
        # Positions in the order of the flattened map: (0, 0), (0, 1), …
        grid = np.indices(shape, np.int32).reshape(len(shape), int(np.prod(shape))).T
        self._position.append(np.tile(grid, (len(examples), 1)))
        self._example.append(np.repeat(np.asarray(examples, np.int32), len(grid)))

    def part(self) -> FullPart:
        axes = len(self.site.position_axes)
        position = [np.zeros((0, axes), np.int32), *self._position]
        example = [np.zeros(0, np.int32), *self._example]
        kept = self._rows[: self._filled].numpy()
        return FullPart(kept, np.concatenate(example), np.concatenate(position))


class _CovarianceSums:
    """Sums of rows and of their outer products about a center, so that a covariance loses no precision."""

    def __init__(self, center: Float[np.ndarray, " column"]) -> None:
        self.center, width = center, len(center)
        self._total = torch.zeros(width, dtype=torch.float64)
        self._product = torch.zeros((width, width), dtype=torch.float64)
        self._count = 0

    def add(self, rows: Float[Tensor, "row column"]) -> None:
        shifted = rows.float() - torch.from_numpy(self.center.astype(np.float32)).to(rows.device)
        # A row with one NaN is left out as a whole: a covariance needs all columns of the same rows.
        whole = torch.isfinite(shifted).all(1)
        if not bool(whole.all()):
            shifted = shifted[whole]
        for piece in shifted.split(
            1024
        ):  # products in float32 are fast, and exact enough over so few rows
            self._product += (piece.T @ piece).double().cpu()
            self._total += piece.double().sum(0).cpu()
        self._count += len(shifted)

    def part(self) -> CovariancePart:
        return CovariancePart(self.center, self._total.numpy(), self._product.numpy(), self._count)
