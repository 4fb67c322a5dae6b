"""Shuffled batches of rows to train on, from a store, an array, or a model as it runs, which can be resumed.

Rows come in groups that fit in memory: blocks of a store drawn at random, or the positions of examples drawn at
random. A group is shuffled and cut into batches; rows that make no whole batch go to the next group. So the state
of a stream is a few numbers and less than a batch of rows.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.stimuli.sources import Source
from circuits.stimuli.texts import TextSource
from circuits.store import ActivationStore

BLOCK = 4096
"""Rows in a block of a store, which are read together."""

_GROUP_BYTES = 2**27
"""Memory that a group of rows takes, about."""

_SAMPLE = 2**15
"""Rows from which means, scales and norms are estimated."""


@dataclass(frozen=True)
class RowFilter:
    """Which rows are left out of training and evaluation.

    Attributes:
        positions: for texts, how many positions at the start of each example are left out (the first tokens are
            attention sinks, with norms far above all other ones).
        norms: rows whose norm is more than this many times the median are left out; 0 leaves none out.
        hold_out: the share of examples that training does not see, so that they can be evaluated on; which examples
            these are depends only on their numbers.
    """

    positions: int = 0
    norms: float = 10.0
    hold_out: float = 0.1

    def __post_init__(self) -> None:
        if self.positions < 0:
            raise ValueError(f"positions {self.positions} to leave out must be 0 or more")
        if not 0 <= self.hold_out < 1:
            raise ValueError(f"hold_out {self.hold_out} must be 0 or more, and below 1")
        if self.norms != 0 and not 1 < self.norms < float("inf"):
            raise ValueError(
                f"norms {self.norms} must be above 1 (times the median), or 0 for no limit"
            )

    def held_out(self, examples: np.ndarray) -> np.ndarray:
        """Which examples training does not see."""
        # Multiplicative hashing (Knuth, The Art of Computer Programming, 6.4): 2654435769 is 2^32 divided by the
        # golden ratio, so that consecutive numbers spread evenly. An example is held out whatever else is harvested.
        drawn = (examples.astype(np.uint64) + 1) * 2654435769 % 2**32
        return drawn < self.hold_out * 2**32


Part = Literal["training", "held out", "all"]
"""Which examples: those that training sees, those that are held out, or both."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of a site.

    Attributes:
        x: the rows to encode.
        y: the rows to reconstruct; the same object as `x`, except for transcoders.
        example: the number of the example that each row is from.
        position: the row's position in that example, one column for each axis.
    """

    x: Float[Tensor, "row input"]
    y: Float[Tensor, "row output"]
    example: np.ndarray
    position: np.ndarray

    def kept(self, keep: np.ndarray) -> Group:
        """Some of the rows, by a mask, or by indices in any order."""
        at = torch.from_numpy(np.flatnonzero(keep) if keep.dtype == bool else keep)
        x = self.x[at]
        y = x if self.y is self.x else self.y[at]
        return Group(x, y, self.example[at.numpy()], self.position[at.numpy()])


class RowSource(ABC):
    """Where rows come from.

    Attributes:
        about: what the rows are, for the record: `rows` (`store`, `array` or `model`, on which their order depends),
            `model`, `model_hash`, `site`, `target`, `data`, `data_hash`, `width`, `target_width`.
        tokens: whether rows are positions of texts.
        skipped: the examples that cannot be read, by name, with the reasons.
    """

    about: Mapping[str, Any]
    tokens: bool = False
    skipped: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def n_groups(self) -> int:
        """The number of groups."""

    @abstractmethod
    def order(self, seed: int) -> np.ndarray:
        """The parts (blocks or examples) of which groups consist, in a random order."""

    @abstractmethod
    def load(self, order: np.ndarray, group: int) -> Group:
        """The rows of a group, not shuffled.

        Args:
            order: what `order` returned.
            group: the number of the group.
        """


class _BlockRows(RowSource):
    """Rows that can be read at random, and are read in blocks of consecutive ones."""

    @abstractmethod
    def take(self, rows: np.ndarray) -> Group:
        """Read the rows with these numbers."""

    @property
    def _per_group(self) -> int:
        return blocks_in_group(self.about["width"])

    def n_groups(self) -> int:
        return -(-len(range(0, len(self), BLOCK)) // self._per_group)  # division that rounds up

    def order(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(np.arange(0, len(self), BLOCK))

    def load(self, order: np.ndarray, group: int) -> Group:
        firsts = order[group * self._per_group : (group + 1) * self._per_group]
        return self.take(np.concatenate([np.arange(f, min(f + BLOCK, len(self))) for f in firsts]))


class StoreRows(_BlockRows):
    """Rows of sites whose whole tensors are in an activation store.

    Args:
        store: the store.
        site: the site to encode.
        target: the site to reconstruct, for a transcoder.

    Raises:
        KeyError: if the store does not hold a site's whole tensors.
        ValueError: if the store holds numbers that are not finite, or the two sites differ in positions.
    """

    def __init__(self, store: ActivationStore, site: str, target: str | None = None) -> None:
        self.rows = store.rows(site)
        self.target = None if target in (None, site) else store.rows(str(target))
        p, place = store.provenance, store.sites[site]
        goal = place if target is None else store.sites[target]
        if self.target is not None and len(self.target) != len(self.rows):
            raise ValueError(
                f"target {target!r} has {len(self.target)} rows, site {site!r} {len(self.rows)}: a transcoder needs "
                "two sites with the same positions"
            )
        for name in {place.name, goal.name}:
            if bad := int(store.summary(name).nonfinite.sum()):
                raise ValueError(
                    f"site {name!r} of the store has {bad} activations that are NaN or infinite: an autoencoder "
                    "needs finite rows (harvest again without those examples)"
                )
        self.tokens = "position" in place.axes
        self.skipped = store.skipped
        self.about = {
            "rows": "store", "model": p.model, "model_hash": p.model_hash, "site": place.name, "target": goal.name,
            "data": p.data, "data_hash": p.data_hash, "width": self.rows.shape[1],
            "target_width": (self.target or self.rows).shape[1],
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: np.ndarray) -> Group:
        """Read the rows with these numbers."""
        x = torch.from_numpy(self.rows.take(rows))
        y = x if self.target is None else torch.from_numpy(self.target.take(rows))
        example, position = self.rows.where(rows)
        return Group(x, y, example, position)


class ArrayRows(_BlockRows):
    """Rows of an array, which may be memory-mapped.

    Args:
        array: the rows, row x width.
        name: a name for the data, for the record.

    Raises:
        ValueError: if it is not a table of finite floating-point numbers.
    """

    def __init__(self, array: np.ndarray, name: str = "array") -> None:
        if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"array {name!r} of shape {array.shape} ({array.dtype}) is not a table of floating-point numbers: "
                "expected row x width"
            )
        # Hashed and checked block by block: the array may be larger than the memory.
        digest = hashlib.sha256(repr((array.shape, array.dtype.str)).encode())
        for start in range(0, len(array), BLOCK):
            block = np.ascontiguousarray(array[start : start + BLOCK])
            digest.update(block.data)
            good = np.isfinite(block).all(1)
            if not good.all():
                row = start + int((~good).argmax())
                raise ValueError(
                    f"row {row} of array {name!r} is NaN or infinite: expected finite rows"
                )
        self.array = array
        self.about = {
            "rows": "array", "model": "", "model_hash": "", "site": name, "target": name, "data": name,
            "data_hash": digest.hexdigest(), "width": array.shape[1], "target_width": array.shape[1],
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.array)

    def take(self, rows: np.ndarray) -> Group:
        """Read the rows with these numbers."""
        x = torch.from_numpy(np.array(self.array[rows], np.float32))
        # Every row is an example of its own, without positions.
        return Group(x, x, rows, np.zeros((len(rows), 0), np.int64))


class ModelRows(RowSource):
    """Rows that a model computes when they are needed: nothing is kept on disk.

    Files of a folder that cannot be read have no rows, and become `skipped`: each file is decoded once to know them.

    Args:
        model: the model.
        source: the examples.
        site: the site to encode.
        target: the site to reconstruct, for a transcoder.
        batch: examples in a forward pass.

    Raises:
        KeyError: if there is no such site.
        ValueError: if the examples do not fit the model, or the two sites differ in positions.
    """

    def __init__(
        self,
        model: HookedModel,
        source: Source,
        site: str,
        target: str | None = None,
        batch: int = 16,
    ) -> None:
        self.model, self.inputs, self.batch = model, Examples(model, source, None), batch
        self.site = model.site(site)
        self.goal = self.site if target is None else model.site(target)
        if self.goal.position_shape != self.site.position_shape:
            raise ValueError(
                f"target {self.goal.name} has positions {self.goal.position_shape}: expected those of site "
                f"{self.site.name}, {self.site.position_shape}"
            )
        self.tokens = "position" in self.site.axes
        self.about = {
            "rows": "model", "model": model.name, "model_hash": model.hash, "site": self.site.name,
            "target": self.goal.name, "data": source.spec, "data_hash": source.hash, "width": self.site.width,
            "target_width": self.goal.width,
        }  # fmt: skip
        positions = int(np.prod(self.inputs.fitted(self.site).position_shape or (1,)))
        rows = blocks_in_group(self.site.width) * BLOCK
        self._per_group = max(1, rows // positions)
        self._positions = positions

    def __len__(self) -> int:
        return len(self.inputs) * self._positions

    def n_groups(self) -> int:
        return -(-len(self.inputs) // self._per_group)

    def order(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(len(self.inputs))

    @cached_property
    def unreadable(self) -> dict[int, str]:
        """The examples that cannot be read, by number, and why: of all, also where a training meets only some."""
        return self.inputs.unreadable(range(len(self.inputs)))

    @property
    def skipped(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {self.inputs.names[i]: why for i, why in self.unreadable.items()}

    def load(self, order: np.ndarray, group: int) -> Group:
        # Sorted, so that texts of one length, which often stand together, share a pass; the group is shuffled later.
        examples = np.sort(order[group * self._per_group : (group + 1) * self._per_group])
        bad = self.unreadable
        parts = [
            self._rows(i) for i in self._passes([i for i in examples.tolist() if i not in bad])
        ]
        if not parts:
            x, y = (torch.zeros(0, site.width) for site in (self.site, self.goal))
            axes = len(self.site.position_axes)
            return Group(
                x, x if self.goal is self.site else y, examples[:0], np.zeros((0, axes), np.int64)
            )
        found = Group(
            torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]),
            np.concatenate([p.example for p in parts]), np.concatenate([p.position for p in parts]),
        )  # fmt: skip
        # One object, which is how an autoencoder is told from a transcoder further on.
        return replace(found, y=found.x) if self.goal is self.site else found

    def _passes(self, examples: list[int]) -> Iterator[list[int]]:
        """Cut examples into runs of at most `batch` that have the same length."""
        chunk: list[int] = []
        size = -1
        texts = isinstance(self.inputs.source, TextSource)
        for i in examples:
            own = len(self.inputs.load(i)) if texts else 0  # images are of one size
            if chunk and (len(chunk) == self.batch or own != size):
                yield chunk
                chunk = []
            chunk.append(i)
            size = own
        if chunk:
            yield chunk

    def _rows(self, examples: list[int]) -> Group:
        read = list(dict.fromkeys((self.site, self.goal)))
        x = self.inputs.batch(examples).inputs
        cache = self.model.run(x, read=read, until=self.model.last(read))
        values = [s.rows(cache[s]).float() for s in (self.site, self.goal)]
        shape = values[0].shape[1:-1]
        grid = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape or (1,)), -1)
        grid = grid[:, : len(shape)]
        n = len(grid)
        flat = [v.reshape(-1, v.shape[-1]).cpu() for v in values]
        return Group(
            flat[0],
            flat[1],
            np.repeat(examples, n),
            np.tile(grid, (len(examples), 1)).astype(np.int64),
        )


def blocks_in_group(width: int) -> int:
    """The number of blocks in a group: at most 16, and fewer where rows are wide."""
    return max(1, min(16, _GROUP_BYTES // (4 * width * BLOCK)))


def default_rule(source: RowSource) -> RowFilter:
    """The rows that are left out by default: the first position of texts, and outliers in norm."""
    return RowFilter(positions=1 if source.tokens else 0)


def rows_of(
    model: HookedModel, site: str, target: str | None, source: Source, store: ActivationStore | None
) -> RowSource:
    """Rows of a store, if it keeps both sites whole and is of the same data; else of the model as it runs."""
    if store is None or source.hash != store.provenance.data_hash:
        return ModelRows(model, source, site, target)
    if {site, target or site} <= set(store.provenance.depth.full):
        return StoreRows(store, site, target)
    return ModelRows(model, source, site, target)


@dataclass(frozen=True)
class Calibration:
    """Statistics of rows that training needs in advance, estimated on a sample.

    Attributes:
        mean: the mean of the rows to encode.
        scale: the factor that makes E||x - mean||^2 equal to their width.
        target_mean: the mean of the rows to reconstruct.
        target_median: their geometric median.
        target_scale: the factor that makes E||y - target_mean||^2 equal to their width.
        limit: the norm above which rows are left out; infinite without a limit.
        n: the number of rows in the sample.
    """

    mean: Tensor
    scale: float
    target_mean: Tensor
    target_median: Tensor
    target_scale: float
    limit: float
    n: int


class Batches:
    """An endless stream of shuffled batches of rows, epoch after epoch.

    Args:
        source: where rows come from.
        size: rows in a batch.
        rule: which rows are left out.
        seed: the seed of the order.
        part: which examples the rows are taken from.

    Raises:
        ValueError: if no row is left.
    """

    def __init__(
        self,
        source: RowSource,
        size: int,
        rule: RowFilter | None = None,
        seed: int = 0,
        part: Part = "training",
    ) -> None:
        if size < 1:
            raise ValueError(f"batch {size} must be at least 1")
        self.source, self.size, self.seed, self.part = source, size, seed, part
        self.rule = default_rule(source) if rule is None else rule
        self.epoch = self.group = self.at = (
            0  # the current group, and the first of its rows not given out yet
        )
        self.rest: list[Tensor] | None = None  # rows of earlier groups that made no whole batch
        self.seen = self.left_out = 0
        self._before = (0, 0)  # `seen` and `left_out` before the current group was counted

    @cached_property
    def calibration(self) -> Calibration:
        """Means, scales and the limit of norms, from a sample that is drawn apart from the training's order."""
        order = self.source.order(self.seed + 1_000_003)
        x, y, n = [], [], 0
        for group in range(self.source.n_groups()):
            found = self.of_part(self._without_positions(self.source.load(order, group)))
            # At random from the whole group: its first rows would all be of the same few examples.
            drawn = np.random.default_rng([self.seed, group]).permutation(len(found.x))
            found = found.kept(drawn[: _SAMPLE - n])
            x.append(found.x)
            y.append(found.y)
            n += len(found.x)
            if n >= _SAMPLE:
                break
        if not n:
            raise ValueError(
                f"rows: {self.rule} leaves out every one of {self.source.about['site']}"
            )
        rows = torch.cat(x)
        same = all(ours is theirs for ours, theirs in zip(x, y, strict=True))
        return _calibrate(rows, rows if same else torch.cat(y), self.rule.norms)

    def _without_positions(self, found: Group) -> Group:
        if not self.rule.positions or not self.source.tokens:
            return found
        return found.kept(found.position[:, 0] >= self.rule.positions)

    def of_part(self, found: Group) -> Group:
        """The rows of the examples of this part."""
        if self.part == "all" or not self.rule.hold_out:
            return found
        return found.kept(self.rule.held_out(found.example) == (self.part == "held out"))

    def kept(self, found: Group, limit: float | None = None) -> Group:
        """The rows that the rule keeps; counts those that it leaves out.

        Args:
            found: rows.
            limit: the limit of norms, if it is known from a training; else it is that of `calibration`.
        """
        found = self.of_part(found)
        n = len(found.x)
        found = self._without_positions(found)
        within = found.x.norm(dim=1) <= (self.calibration.limit if limit is None else limit)
        if not bool(within.all()):
            found = found.kept(within.numpy())
        self.seen += n
        self.left_out += n - len(found.x)
        return found

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        empty = 0
        while True:
            order = self.source.order(self.seed + self.epoch)
            while self.group < self.source.n_groups():
                self._before = (self.seen, self.left_out)
                found = self.kept(self.source.load(order, self.group))
                # A whole epoch without a row would go on for ever.
                empty = 0 if len(found.x) else empty + 1
                if empty > self.source.n_groups():
                    raise ValueError(
                        f"rows: {self.rule} leaves out every one of {self.source.about['site']}"
                    )
                yield from self._cut(found)
                self.group, self.at = self.group + 1, 0
            self.epoch, self.group = self.epoch + 1, 0

    def _cut(self, found: Group) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a group from row `at` on; the rows that are left over become `rest`."""
        # Seeded by epoch and group, so that a resumed run shuffles a group as the interrupted one did.
        generator = np.random.default_rng([self.seed, self.epoch, self.group])
        found = found.kept(generator.permutation(len(found.x)))
        own = found.y is found.x
        x, y = found.x, found.y
        if self.rest is not None:
            x = torch.cat([self.rest[0], x])
            y = x if own else torch.cat([self.rest[1], y])
        while len(x) - self.at >= self.size:
            here = slice(self.at, self.at + self.size)
            self.at += self.size
            # A copy in memory that torch allocates: a slice's alignment depends on where it begins, and with it the
            # order in which products are added up, to the last bit.
            batch = x[here].clone()
            yield batch, (batch if own else y[here].clone())
        self.rest = [x[self.at :].clone(), y[self.at :].clone()]

    def state(self) -> tuple[dict[str, int], list[Tensor]]:
        """The state from which `resume` continues: numbers, and the rows left over."""
        numbers = {
            "epoch": self.epoch, "group": self.group, "at": self.at,
            "seen": self._before[0], "left_out": self._before[1],
        }  # fmt: skip
        return numbers, list(self.rest or [])

    def resume(self, numbers: Mapping[str, int], rest: list[Tensor]) -> None:
        """Continue from a state: the next batch is the one that would have come next."""
        self.epoch, self.group, self.at = numbers["epoch"], numbers["group"], numbers["at"]
        self.rest = rest or None
        # The current group will be loaded again, and its rows counted again.
        self.seen, self.left_out = numbers["seen"], numbers["left_out"]


def _calibrate(x: Tensor, y: Tensor, norms: float) -> Calibration:
    """The statistics of a sample, from which rows above the limit are left out, as in training."""
    size = x.norm(dim=1)
    limit = float(size.median()) * norms if norms else float("inf")
    if norms and not limit > 0:  # more than half of the rows are zero: their median is no scale
        limit = float("inf")
    keep = size <= limit
    x, y = (x[keep],) * 2 if y is x else (x[keep], y[keep])
    if any(bool((rows == rows[0]).all()) for rows in (x, y)):
        raise ValueError("rows are all zero or all the same: there is nothing to learn")
    mean, scale = _center_and_scale(x)
    target_mean, target_scale = (mean, scale) if y is x else _center_and_scale(y)
    return Calibration(mean, scale, target_mean, geometric_median(y), target_scale, limit, len(x))


def _center_and_scale(rows: Float[Tensor, "row width"]) -> tuple[Float[Tensor, " width"], float]:
    """The mean of rows, and the factor by which rows less their mean have a mean squared norm equal to their width."""
    # In float64, and the mean first: where it is far above the spread, E||x||^2 - ||mean||^2 would cancel to noise.
    exact = rows.double()
    mean = exact.mean(0)
    squared_norm = (exact - mean).square().sum(1).mean()
    return mean.float(), (rows.shape[1] / squared_norm).sqrt().item()


def geometric_median(rows: Float[Tensor, "row width"], steps: int = 50) -> Float[Tensor, " width"]:
    """The point with the smallest sum of distances to the rows, by Weiszfeld's algorithm.

    Its iteration: the mean of the rows, each weighted by the inverse of its distance to the last point.
    """
    # About the mean, since where that is far above the spread, float32 would round away what moves the point.
    mean = rows.double().mean(0)
    rows = (rows - mean).float()
    point = torch.zeros_like(rows[0])
    for _ in range(steps):
        distance = (rows - point).norm(dim=1).clamp_min(1e-8)
        weight = 1 / distance
        before, point = point, (rows * weight[:, None]).sum(0) / weight.sum()
        if float((point - before).norm()) <= 1e-6 * float(distance.mean()):
            break
    return (mean + point).float()
