"""Rows to train on: from a store, an array, or a model as it runs; shuffled, and to be gone on with.

Rows come in groups that fit in memory: blocks of a store drawn at random, or the positions of examples drawn
at random. A group is shuffled and cut into batches; what is left goes to the next. So where a run stands is a
few numbers and less than a batch of rows.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.stimuli.sources import Source
from circuits.store import ActivationStore

BLOCK = 4096
"""Rows of a block of a store: what is read at once."""

_GROUP_BYTES = 2**27
"""About what a group of rows takes."""

_SAMPLE = 2**15
"""Rows that means and norms are estimated on."""


@dataclass(frozen=True)
class RowFilter:
    """Which rows are left out of training and evaluation.

    Attributes:
        positions: of tokens: the first so many of each example (what stands at the beginning of a text draws
            attention and has a norm of its own).
        norms: rows whose norm is more than so many times the median; 0 leaves none out.
        hold_out: the share of examples that training does not see, to measure on; which ones follows from their
            number.
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
        """Which examples training does not see (multiplicative hashing, Knuth 6.4)."""
        drawn = (examples.astype(np.uint64) + 1) * 2654435769 % 2**32
        return drawn < self.hold_out * 2**32


Part = Literal["training", "held out", "all"]
"""Which examples: those that training sees, those that it does not, or both."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of a site.

    Attributes:
        x: what is encoded.
        y: what is written; the same but for transcoders.
        example: which example each is of.
        position: where in it.
    """

    x: Float[Tensor, "row input"]
    y: Float[Tensor, "row output"]
    example: np.ndarray
    position: np.ndarray

    def kept(self, keep: np.ndarray) -> Group:
        """Some rows, chosen or in another order."""
        at = torch.from_numpy(np.flatnonzero(keep) if keep.dtype == bool else keep)
        x = self.x[at]
        y = x if self.y is self.x else self.y[at]
        return Group(x, y, self.example[at.numpy()], self.position[at.numpy()])


class RowSource(ABC):
    """Where rows come from.

    Attributes:
        about: what they are, for the record: `rows` (`store`, `array` or `model`: their order follows from it),
            `model`, `model_hash`, `site`, `target`, `data`, `data_hash`, `width`, `target_width`.
        tokens: whether rows are positions of texts.
    """

    about: Mapping[str, Any]
    tokens: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def n_groups(self) -> int:
        """How many groups there are."""

    @abstractmethod
    def order(self, seed: int) -> np.ndarray:
        """The parts that groups are cut from, in a random order."""

    @abstractmethod
    def load(self, order: np.ndarray, group: int) -> Group:
        """The rows of a group, in their own order."""


class _Blocks(RowSource):
    """Rows that are somewhere, to be read in blocks."""

    @abstractmethod
    def take(self, rows: np.ndarray) -> Group:
        """Some rows."""

    @property
    def _per_group(self) -> int:
        return blocks_in_group(self.about["width"])

    def n_groups(self) -> int:
        return -(-len(range(0, len(self), BLOCK)) // self._per_group)

    def order(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(np.arange(0, len(self), BLOCK))

    def load(self, order: np.ndarray, group: int) -> Group:
        firsts = order[group * self._per_group : (group + 1) * self._per_group]
        return self.take(np.concatenate([np.arange(f, min(f + BLOCK, len(self))) for f in firsts]))


class StoreRows(_Blocks):
    """Rows of sites of an activation store at full depth.

    Args:
        store: the store.
        site: what is encoded.
        target: what is written, for a transcoder.

    Raises:
        KeyError: if a site is not there at full depth.
        ValueError: if the store holds numbers that are not finite, or the sites have other positions.
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
        self.about = {
            "rows": "store", "model": p.model, "model_hash": p.model_hash, "site": place.name, "target": goal.name,
            "data": p.data, "data_hash": p.data_hash, "width": self.rows.shape[1],
            "target_width": (self.target or self.rows).shape[1],
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: np.ndarray) -> Group:
        """Some rows."""
        x = torch.from_numpy(self.rows.take(rows))
        y = x if self.target is None else torch.from_numpy(self.target.take(rows))
        example, position = self.rows.where(rows)
        return Group(x, y, example, position)


class ArrayRows(_Blocks):
    """Rows of an array, which may be memory-mapped.

    Args:
        array: one row each.
        name: what it is.

    Raises:
        ValueError: if it is no table of finite numbers.
    """

    def __init__(self, array: np.ndarray, name: str = "array") -> None:
        if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"array {name!r} of shape {array.shape} ({array.dtype}) is no table of numbers: expected row x width"
            )
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
        """Some rows."""
        x = torch.from_numpy(np.array(self.array[rows], np.float32))
        return Group(x, x, rows, np.zeros((len(rows), 0), np.int64))


class ModelRows(RowSource):
    """Rows that a model computes while it is trained on: nothing is kept on disk.

    Args:
        model: the model.
        source: the examples.
        site: what is encoded.
        target: what is written, for a transcoder.
        batch: examples in one pass.

    Raises:
        KeyError: if there is no such site.
        ValueError: if the examples do not fit the model, or the sites have other positions.
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
                f"target {self.goal.name} has other positions than site {self.site.name}"
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

    def load(self, order: np.ndarray, group: int) -> Group:
        examples = np.sort(order[group * self._per_group : (group + 1) * self._per_group])
        parts = [self._rows(i) for i in self._passes(examples)]
        found = Group(
            torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]),
            np.concatenate([p.example for p in parts]), np.concatenate([p.position for p in parts]),
        )  # fmt: skip
        return replace(found, y=found.x) if self.goal is self.site else found

    def _passes(self, examples: np.ndarray) -> Iterator[list[int]]:
        """Examples of one length together."""
        chunk: list[int] = []
        size = -1
        for i in examples.tolist():
            own = len(self.inputs.load(i))
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
    """How many blocks of rows a group has."""
    return max(1, min(16, _GROUP_BYTES // (4 * width * BLOCK)))


def default_rule(source: RowSource) -> RowFilter:
    """Which rows are left out if nothing is said: of texts, the first positions."""
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
    """What is known of rows before training: on a sample drawn with a seed.

    Attributes:
        mean: of what is encoded.
        median: its geometric median.
        scale: what inputs are multiplied by, so that E||x||^2 is their width.
        target_mean: of what is written.
        target_median: likewise.
        target_scale: likewise.
        variance: of what is written, in its scaled form: E||y - mean||^2.
        limit: the norm above which rows are left out; infinite without a limit.
        n: on how many rows.
    """

    mean: Tensor
    median: Tensor
    scale: float
    target_mean: Tensor
    target_median: Tensor
    target_scale: float
    variance: float
    limit: float
    n: int


class Batches:
    """Shuffled batches of rows, epoch after epoch.

    Args:
        source: where rows come from.
        size: rows in a batch.
        rule: which are left out.
        seed: of the order.
        part: which examples.

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
        self.epoch = self.group = self.at = 0  # the group that is being cut, and how far
        self.rest: list[Tensor] | None = None  # rows of earlier groups that made no whole batch
        self.seen = self.left_out = 0
        self._before = (0, 0)  # what those were before the group that is being cut

    @cached_property
    def calibration(self) -> Calibration:
        """Means, scales and the limit of norms, on the first rows of an order of their own."""
        order = self.source.order(self.seed + 1_000_003)
        x, y, n = [], [], 0
        for group in range(self.source.n_groups()):
            found = self.of_part(self._without_positions(self.source.load(order, group)))
            pick = np.random.default_rng([self.seed, group]).permutation(len(found.x))[
                : _SAMPLE - n
            ]
            found = found.kept(pick)
            x.append(found.x)
            y.append(found.y)
            n += len(found.x)
            if n >= _SAMPLE:
                break
        if not n:
            raise ValueError(
                f"rows: {self.rule} leaves out every one of {self.source.about['site']}"
            )
        return _calibrate(torch.cat(x), torch.cat(y), self.rule.norms)

    def _without_positions(self, found: Group) -> Group:
        if not self.rule.positions or not self.source.tokens:
            return found
        return found.kept(found.position[:, 0] >= self.rule.positions)

    def of_part(self, found: Group) -> Group:
        """The rows of the examples that are asked for."""
        if self.part == "all" or not self.rule.hold_out:
            return found
        return found.kept(self.rule.held_out(found.example) == (self.part == "held out"))

    def kept(self, found: Group, limit: float | None = None) -> Group:
        """The rows of the part that the rule leaves in; a limit of norms that is known goes before its own."""
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
                empty = 0 if len(found.x) else empty + 1
                if empty > self.source.n_groups():
                    raise ValueError(
                        f"rows: {self.rule} leaves out every one of {self.source.about['site']}"
                    )
                yield from self._cut(found)
                self.group, self.at = self.group + 1, 0
            self.epoch, self.group = self.epoch + 1, 0

    def _cut(self, found: Group) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a group from `at` on; what is left over becomes `rest`."""
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
            batch = x[here].clone()  # memory that torch allocated: the same alignment in every run
            yield batch, (batch if own else y[here].clone())
        self.rest = [x[self.at :].clone(), y[self.at :].clone()]

    def state(self) -> tuple[dict[str, int], list[Tensor]]:
        """Where it stands."""
        numbers = {
            "epoch": self.epoch, "group": self.group, "at": self.at,
            "seen": self._before[0], "left_out": self._before[1],
        }  # fmt: skip
        return numbers, list(self.rest or [])

    def go_on(self, numbers: Mapping[str, int], rest: list[Tensor]) -> None:
        """Stand where another one stood: its next batch comes next."""
        self.epoch, self.group, self.at = numbers["epoch"], numbers["group"], numbers["at"]
        self.rest = rest or None
        # the group that is being cut is loaded, and counted, once more
        self.seen, self.left_out = numbers["seen"], numbers["left_out"]


def _calibrate(x: Tensor, y: Tensor, norms: float) -> Calibration:
    size = x.norm(dim=1)
    limit = float(size.median()) * norms if norms else float("inf")
    if norms and not limit > 0:
        limit = float("inf")
    keep = size <= limit
    x, y = x[keep], y[keep]
    if not float(x.square().sum()) > 0 or not float((y - y.mean(0)).square().sum()) > 0:
        raise ValueError("rows are all zero or all the same: there is nothing to learn")
    scale, target_scale = (
        (rows.shape[1] / rows.double().square().sum(1).mean()).sqrt().item() for rows in (x, y)
    )
    variance = (y.double() - y.double().mean(0)).square().sum(1).mean().item() * target_scale**2
    return Calibration(
        x.double().mean(0).float(), geometric_median(x), scale, y.double().mean(0).float(),
        geometric_median(y), target_scale, variance, limit, len(x),
    )  # fmt: skip


def geometric_median(rows: Float[Tensor, "row width"], steps: int = 50) -> Float[Tensor, " width"]:
    """The point with the least sum of distances to rows (Weiszfeld's iteration)."""
    point = rows.mean(0)
    for _ in range(steps):
        distance = (rows - point).norm(dim=1).clamp_min(1e-8)
        weight = 1 / distance
        new = (rows * weight[:, None]).sum(0) / weight.sum()
        if float((new - point).norm()) <= 1e-6 * float(point.norm() + 1e-8):
            return new
        point = new
    return point
