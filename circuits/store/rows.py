"""Reading whole activations: by example, by range, at random, or as a shuffled stream."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from circuits.hdf5 import DamagedError, array, opened

MIXED = 16
"""Blocks of rows that a shuffled stream mixes."""

MAPPED = 256
"""The most shards whose files stay mapped into memory: a process may open a limited number of files only."""

BLOCK = 4096
"""Rows in a block of a shuffled stream."""


class _ShardRows:
    """The activations of a site in one shard, read through a memory map if they are not compressed."""

    def __init__(self, path: Path, site: str, width: int | None) -> None:
        self.path, self.site = path, site
        with opened(path) as file:
            data = array(file, f"full/{site}/activations", (None, width))
            array(file, f"full/{site}/example", data.shape[:1], "i")
            array(file, f"full/{site}/position", (data.shape[0], None), "i")
            self.shape, self.dtype, self.chunks = data.shape, data.dtype, data.chunks
            # Any filter, also one that does not compress, changes the bytes that a memory map would show.
            self.compressed = data.id.get_create_plist().get_nfilters() > 0
            self._offsets = self._find_offsets(data)

    def column(self, name: str) -> np.ndarray:
        """`example` or `position` of every row; not kept, so that the memory does not grow with the store."""
        with opened(self.path) as file:
            found: np.ndarray = file[f"full/{self.site}"][name][()]
        return found

    def _find_offsets(self, data: Any) -> dict[tuple[int, int], int]:
        """Where each block begins in the file, by its first row and column."""
        # A memory map reads scattered rows without loading whole blocks for them, as HDF5 does.
        if self.compressed or 0 in self.shape:
            return {}
        found: dict[tuple[int, int], int] = {}
        if self.chunks is None:
            found[0, 0] = data.id.get_offset()
        else:
            # One walk over HDF5's index of chunks instead of one look-up for each block.
            data.id.chunk_iter(lambda c: found.__setitem__(c.chunk_offset, c.byte_offset))
        end = max(found.values()) + math.prod(self.chunks or self.shape) * self.dtype.itemsize
        if end > self.path.stat().st_size:
            raise DamagedError(f"{self.path.name}: the activations of {self.site} are cut off")
        return found

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def _block(self, row: int, column: int) -> np.ndarray:
        shape: tuple[int, int] = self.chunks or self.shape
        count = shape[0] * shape[1]
        offset = self._offsets[row, column]
        return np.frombuffer(self._map, self.dtype, count, offset).reshape(shape)

    def release(self) -> None:
        """Close the file until it is read again."""
        # `cached_property` keeps its value there: the next access maps the file again.
        self.__dict__.pop("_map", None)

    def take(self, rows: Int[np.ndarray, " row"], out: np.ndarray) -> None:
        """Write some rows, in increasing order, into `out`."""
        if not len(rows) or 0 in self.shape:
            return
        if self.compressed:
            self._take_compressed(rows, out)
        elif self.chunks is None:
            out[:] = self._block(0, 0)[rows]
        else:
            height, width = self.chunks
            # Rows are in order: they are cut where the block changes. Of rows 3, 5, 4097 and height 4096 the pieces are
            # 3, 5 | 4097.
            cuts = np.flatnonzero(np.diff(rows // height)) + 1
            for piece in np.split(np.arange(len(rows)), cuts):
                at = rows[piece[0]] // height * height
                where = slice(int(piece[0]), int(piece[-1]) + 1)
                inside = rows[where] - at
                for left in range(0, self.shape[1], width):
                    n = min(width, self.shape[1] - left)
                    # Blocks at the right border are stored whole: only n of their columns are the site's.
                    out[where, left : left + n] = self._block(int(at), left)[inside, :n]

    def _take_compressed(self, rows: Int[np.ndarray, " row"], out: np.ndarray) -> None:
        height = self.chunks[0]
        with opened(self.path) as file:
            data = file[f"full/{self.site}"]["activations"]
            # Block by block, since each has to be decompressed whole.
            for at in np.unique(rows // height) * height:
                here = (rows >= at) & (rows < at + height)
                first, last = rows[here][0], rows[here][-1] + 1
                out[here] = data[first:last][rows[here] - first]


class Rows:
    """Whole activations of a site: a row for each position of an example, a column for each unit.

    Rows are in the order of examples, and of positions within an example. Each dimension of a head is a column.
    Values are float32, in whatever type they are stored.

    Args:
        paths: the shards.
        site: the name of the site's group in them.
        damaged: whether to refuse shards that cannot be read, or to skip them.
        check: raises OSError if a shard is not what it should be.
        width: how many columns the site has; a shard with another number is damaged.

    Raises:
        OSError, KeyError: if a shard cannot be read, or, with `skip`, none can.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        site: str,
        damaged: Literal["refuse", "skip"] = "refuse",
        check: Callable[[Path], None] = lambda path: None,
        width: int | None = None,
    ) -> None:
        self.site = site
        self._parts: list[_ShardRows] = []
        for path in paths:
            try:
                check(path)
                self._parts.append(_ShardRows(path, site, width))
            except (OSError, KeyError):
                if damaged == "refuse" or (path == paths[-1] and not self._parts):
                    raise
        # Row numbers count through all shards: shard i has the rows from starts[i] to starts[i + 1].
        self._starts = np.cumsum([0, *(part.shape[0] for part in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns."""
        return len(self), self._parts[0].shape[1]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The type in each shard: float16, or float32 where that would overflow."""
        return tuple(str(part.dtype) for part in self._parts)

    @cached_property
    def example(self) -> Int[np.ndarray, " row"]:
        """The example of each row."""
        return np.concatenate([part.column("example") for part in self._parts])

    @cached_property
    def position(self) -> Int[np.ndarray, "row axis"]:
        """The position of each row in its example, along the site's position axes."""
        return np.concatenate([part.column("position") for part in self._parts])

    def where(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples and positions of some rows, without keeping those of all rows."""
        wanted = np.asarray(rows, np.int64).reshape(-1)
        # Side `right`: row starts[i] is the first of shard i, not the last of the one before.
        part_of = np.searchsorted(self._starts, wanted, side="right") - 1
        example = np.zeros(len(wanted), np.int64)
        position: np.ndarray | None = None
        for i in np.unique(part_of).tolist():
            here = part_of == i
            inside = wanted[here] - self._starts[i]
            example[here] = self._parts[i].column("example")[inside]
            found = self._parts[i].column("position")[inside]
            if position is None:
                position = np.zeros((len(wanted), *found.shape[1:]), found.dtype)
            position[here] = found
        return example, np.zeros((0, 0), np.int64) if position is None else position

    def take(self, rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "row column"]:
        """Read some rows, in any order; they are read sorted and block by block.

        Raises:
            IndexError: if there is no such row.
        """
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            bad = wanted.min() if wanted.min() < 0 else wanted.max()
            raise IndexError(f"row {bad} does not exist: {self.site} has rows 0 to {len(self) - 1}")
        # Sorted, a shard is read once and forwards; `back` puts the rows in the order that was asked for.
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        # float32 for all, as shards may differ in type.
        out = np.empty((len(wanted), self.shape[1]), np.float32)
        cuts = np.searchsorted(ordered, self._starts)
        for i, part in enumerate(self._parts):
            where = slice(int(cuts[i]), int(cuts[i + 1]))
            part.take(ordered[where] - self._starts[i], out[where])
            if len(self._parts) > MAPPED:
                part.release()
        back = np.empty_like(out)
        back[order] = out
        return back

    def range(self, start: int, stop: int) -> Float[np.ndarray, "row column"]:
        """Read consecutive rows."""
        return self.take(np.arange(start, stop))

    def of_example(self, example: int) -> Float[np.ndarray, "row column"]:
        """Read all rows of one example."""
        first, last = np.searchsorted(self.example, [example, example + 1])
        return self.range(int(first), int(last))

    def random(self, n: int, seed: int = 0) -> Float[np.ndarray, "row column"]:
        """Draw `n` different rows at random; all of them, shuffled, if there are fewer."""
        generator = np.random.default_rng(seed)
        return self.take(generator.choice(len(self), min(n, len(self)), replace=False))

    def stream(
        self, batch: int, seed: int = 0, start: int = 0
    ) -> Iterator[Float[np.ndarray, "row column"]]:
        """Read every row once, in shuffled order, in batches; the last batch may be smaller.

        Blocks of `BLOCK` rows are permuted, and then the rows of each `MIXED` consecutive blocks together. The order
        depends on the seed alone; each epoch should have its own.

        Args:
            batch: rows in a batch.
            seed: the seed of the order.
            start: the number of the first batch, to resume a training.

        Raises:
            ValueError: if `batch` is not positive or `start` is negative.
        """
        if batch < 1:
            raise ValueError(f"batch {batch} must be at least 1")
        if start < 0:
            raise ValueError(f"start {start} must not be negative")
        return self._streamed(batch, seed, start * batch)

    def _streamed(self, batch: int, seed: int, skip: int) -> Iterator[np.ndarray]:
        # Whole blocks in random order, 16 of them mixed row by row: nearly a shuffle of all rows, at the speed of
        # reading blocks.
        firsts = np.random.default_rng(seed).permutation(np.arange(0, len(self), BLOCK))
        rest = np.empty((0, self.shape[1]), np.float32)
        for group in range(0, len(firsts), MIXED):
            blocks = [
                np.arange(f, min(f + BLOCK, len(self))) for f in firsts[group : group + MIXED]
            ]
            rows = np.concatenate(blocks)
            if skip >= len(rows):
                skip -= len(rows)
                continue
            # Each group has its own stream of random numbers, so that a group can be made without those before it.
            order = np.random.default_rng([seed, group + 1]).permutation(len(rows))
            # `skip` counts rows, not groups: a stream that is resumed reads only the group in which it stopped.
            rest = np.concatenate([rest, self.take(rows)[order[skip:]]])
            skip = 0
            whole = len(rest) // batch * batch
            for at in range(0, whole, batch):
                yield rest[at : at + batch]
            rest = rest[whole:]
        if len(rest):
            yield rest
