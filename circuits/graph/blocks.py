"""Blocks of edges in a file of the graph store, and writing them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from circuits.files import replacing
from circuits.graph.circuit import KINDS
from circuits.hdf5 import created

FORMAT = "circuits graph 1"
_BUFFER = 2**25
"""Bytes of a matrix that are gathered before its transpose is written."""


@dataclass(frozen=True)
class BlockInfo:
    """What a block of edges holds.

    Attributes:
        source: the site that edges come from.
        target: the site that they go to.
        kind: what edges are.
        layer: the layer whose weights they are, if they are that.
        through: sites between the source and the layer.
        targets: units of the target, a row each; empty for all.
        sources: units of the source, a column each; empty for all.
        shape: rows, columns.
        kernel: shape of a kernel; empty if an edge is one number.
        provenance: how the numbers came about: method, data, seed, baseline.
    """

    source: str
    target: str
    kind: str
    layer: str
    through: tuple[str, ...]
    targets: tuple[int, ...]
    sources: tuple[int, ...]
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, raw: dict[str, Any]) -> BlockInfo:
        """From JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**values)

    def row(self, unit: int) -> int | None:
        """The row of a unit of the target; None if it has none."""
        return _place(self.targets, self.shape[0], unit)

    def column(self, unit: int) -> int | None:
        """The column of a unit of the source; None if it has none."""
        return _place(self.sources, self.shape[1], unit)


def _place(listed: Sequence[int], n: int, unit: int) -> int | None:
    # An empty list means all units in order, which saves writing them down for whole layers.
    if not listed:
        return unit if unit < n else None
    return listed.index(unit) if unit in listed else None


# --- writing -----------------------------------------------------------------------------------


class BlockWriter:
    """Writes a block's rows in order; everything else about its edges is in `info`."""

    def __init__(self, group: Any, info: BlockInfo) -> None:
        rows, columns = info.shape
        self._info, self._done = info, 0
        names = ("sum", "norm") if info.kernel else ("sum",)
        # Both orders are stored. In one alone, what a unit leads to would be a column: as many separate reads as there
        # are rows.
        self._matrices = {name: group.create_dataset(name, (rows, columns), "f4") for name in names}
        self._turned = {
            name: group.create_dataset(f"{name}_by_source", (columns, rows), "f4") for name in names
        }
        self._kernels: Any = None
        if info.kernel:
            self._kernels = group.create_dataset("kernels", (rows, columns, *info.kernel), "f4")
        self._held: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._first = 0

    def write(self, kernels: np.ndarray) -> None:
        """The next rows: row x column x kernel axes."""
        info, n = self._info, len(kernels)
        if kernels.shape[1:] != (info.shape[1], *info.kernel) or self._done + n > info.shape[0]:
            raise ValueError(
                f"rows of shape {kernels.shape} do not fit a block of {info.shape} kernels {info.kernel}"
            )
        if not n:
            return
        kernels = np.ascontiguousarray(kernels, np.float32)
        # Summed in float64, and only the result is rounded: a 7 x 7 kernel's positive and negative weights nearly
        # cancel.
        flat = kernels.reshape(n, info.shape[1], -1).astype(np.float64)
        values = {"sum": flat.sum(2), "norm": np.sqrt(np.square(flat).sum(2))}
        rows = slice(self._done, self._done + n)
        for name, matrix in self._matrices.items():
            made = values[name].astype(np.float32)
            matrix[rows] = made
            self._held[name].append(made)
        if self._kernels is not None:
            self._kernels[rows] = kernels
        self._done += n
        # A row of the matrix is a column of the turned one, one number in each of its rows. Rows are gathered until
        # their columns are wide enough to be written in runs.
        if (self._done - self._first) * info.shape[1] * 4 >= _BUFFER:
            self._turn()

    def finish(self) -> None:
        """Write what is held back.

        Raises:
            ValueError: if rows are missing.
        """
        if self._done != self._info.shape[0]:
            raise ValueError(f"block has {self._done} of {self._info.shape[0]} rows")
        self._turn()

    def _turn(self) -> None:
        if self._done == self._first:
            return
        for name, turned in self._turned.items():
            turned[:, self._first : self._done] = np.concatenate(self._held[name]).T
            self._held[name].clear()
        self._first = self._done


class GraphWriter:
    """Writes one file of blocks; see `writing`."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._blocks: list[BlockInfo] = []

    @contextmanager
    def block(self, info: BlockInfo) -> Iterator[BlockWriter]:
        """A block to write.

        Raises:
            ValueError: if its kind is unknown or it lacks rows at the end.
        """
        if info.kind not in KINDS:
            raise ValueError(f"kind {info.kind!r} of a block is not one of {', '.join(KINDS)}")
        writer = BlockWriter(self._file.create_group(f"blocks/{len(self._blocks)}"), info)
        yield writer
        writer.finish()
        self._blocks.append(info)

    def finish(self, model: str, model_hash: str, sites: Mapping[str, int]) -> None:
        """Write the index."""
        index = {
            "format": FORMAT,
            "model": model,
            "model_hash": model_hash,
            "sites": dict(sites),
            "blocks": [asdict(info) for info in self._blocks],
        }
        # Last, so that a file without an index is one that was not finished.
        self._file["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)


@contextmanager
def writing(
    path: Path, model: str, model_hash: str, sites: Mapping[str, int]
) -> Iterator[GraphWriter]:
    """A new file of blocks, put into place when all is written.

    Args:
        path: where.
        model: its name.
        model_hash: of its weights.
        sites: how many units each site has, in order of execution.
    """
    with replacing(path) as temporary, created(temporary) as file:
        writer = GraphWriter(file)
        yield writer
        writer.finish(model, model_hash, sites)
