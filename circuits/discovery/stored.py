"""Scores of large graphs by example, in HDF5 files: one for each batch of examples, read a range of edges at a time.

A file has its name only when it is whole, so that scoring which was stopped goes on with the next batch.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.experiments.running import MEMORY
from circuits.files import replacing
from circuits.hdf5 import array, created, opened
from circuits.memory import in_bytes

_NUMBERS = 2**23
"""How many scores are in memory at once as a file is read."""

_FIXED = 0.6e9
"""What Python, torch and a small model take, in bytes."""

_PASSES = 2.5
"""How often the memory of a pass is taken: by one that runs, by the runs of batches that are kept, and by evaluation.

Measured with 347,121 edges: 1.19 GB on 66 examples, 1.1 GB on 16.
"""

EDGE = 110
"""How many bytes of memory an edge takes at most, from its ends to the evaluation."""

Piece = tuple[slice, slice, Tensor]
"""Which examples of a batch, which edges, and their scores."""


@dataclass(frozen=True)
class Cost:
    """What scoring a large graph takes.

    Attributes:
        n_edges: the number of edges.
        n_examples: of how many examples scores are kept.
        sets: how many sets of scores there are: with swapped answers, too, and in shuffled weights.
        disk: how many bytes their files have.
        memory: about how many bytes of memory are needed.
    """

    n_edges: int
    n_examples: int
    sets: int
    disk: int
    memory: int

    @classmethod
    def of(cls, n_edges: int, n_examples: int, sets: int = 1) -> Cost:
        """That of float32 scores of some edges on some examples."""
        memory = int(_FIXED + _PASSES * MEMORY + EDGE * n_edges)
        return cls(n_edges, n_examples, sets, 4 * n_edges * n_examples * sets, memory)

    def __str__(self) -> str:
        more = f", {self.sets} times with those to compare with," if self.sets > 1 else ""
        return (
            f"{self.n_edges} edges: their scores on {self.n_examples} examples{more} take {in_bytes(self.disk)} of "
            f"disk, and all of it about {in_bytes(self.memory)} of memory"
        )


@dataclass(frozen=True, eq=False)
class StoredScores:
    """Scores by example in files.

    Attributes:
        files: a file for each batch.
        which: the examples of each.
        n_edges: the number of edges.
    """

    files: tuple[Path, ...]
    which: tuple[tuple[int, ...], ...]
    n_edges: int

    def remove_with(self, folder: Path) -> None:
        """Remove a folder with the files when nobody reads them any more."""
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def shape(self) -> tuple[int, int]:
        """How many examples and edges there are."""
        return sum(map(len, self.which)), self.n_edges

    def chunks(self) -> Iterator[tuple[slice, Float[np.ndarray, "example edge"]]]:
        """Ranges of edges, each with its scores on all examples, in the task's order."""
        n_examples = self.shape[0]
        size = max(1, _NUMBERS // n_examples)
        for start in range(0, self.n_edges, size):
            at = slice(start, min(start + size, self.n_edges))
            yield at, self._read(at, at.stop - start)

    def _read(self, at: Any, n: int) -> Float[np.ndarray, "example edge"]:
        values = np.empty((self.shape[0], n))
        for path, which in zip(self.files, self.which, strict=True):
            with opened(path) as file:
                values[list(which)] = array(file, "scores", (len(which), self.n_edges))[:, at]
        return values

    @cached_property
    def mean(self) -> Float[np.ndarray, " edge"]:
        """The mean score of each edge."""
        found = np.empty(self.n_edges)
        for at, values in self.chunks():
            found[at] = values.mean(0)
        return found

    def summed(self, weights: Float[np.ndarray, " example"]) -> Float[np.ndarray, " edge"]:
        """The sum of each edge's scores, each example's as often as its weight says."""
        found = np.empty(self.n_edges)
        for at, values in self.chunks():
            found[at] = weights @ values
        return found

    def of(self, edges: np.ndarray) -> Float[np.ndarray, "example chosen"]:
        """The scores of some edges."""
        places, back = np.unique(edges, return_inverse=True)
        return self._read(places, len(places))[:, back]

    def any(self, edges: Bool[np.ndarray, " edge"]) -> bool:
        """Whether some edge's score is not zero on some example."""
        return any(bool(values[:, edges[at]].any()) for at, values in self.chunks())


@dataclass(frozen=True)
class Rows:
    """What is kept of a batch besides the scores.

    Attributes:
        clean: the metric on each example, with no edge patched.
        corrupted: with every edge patched.
    """

    clean: list[float]
    corrupted: list[float]


def check_space(folder: Path, cost: Cost, there: int) -> None:
    """Raise ValueError unless a folder's disk has room for scores, of whose files some bytes are there already."""
    free = shutil.disk_usage(folder).free
    if (needed := cost.disk - there) > free:
        raise ValueError(
            f"{cost}; {str(folder)!r} has {in_bytes(free)} free, {in_bytes(needed)} are needed: expected another "
            "folder, or fewer edges or examples"
        )


def kept_rows(path: Path, which: Sequence[int], n_edges: int) -> Rows | None:
    """What an earlier run has kept of a batch; None if it has not, or of other examples or edges."""
    try:
        with opened(path) as file:
            n = len(which)
            array(file, "scores", (n, n_edges))
            if array(file, "which", (n,), "iu")[:].tolist() != list(which):
                return None
            return Rows(*(array(file, name, (n,))[:].tolist() for name in ("clean", "corrupted")))
    except OSError:
        return None


def write_rows(
    path: Path, which: Sequence[int], n_edges: int, pieces: Iterable[Piece], rows: Rows
) -> None:
    """Write a batch's scores, all or nothing.

    Args:
        path: the file.
        which: the examples.
        n_edges: the number of edges.
        pieces: their scores; together those of every example and edge.
        rows: what is kept besides.

    Raises:
        OSError: if it could not be written, e.g. for want of space.
    """
    n, written = len(which), 0
    with replacing(path) as temporary, created(temporary) as file:
        data = None
        for examples, edges, scores in pieces:
            made = scores.detach().cpu().numpy()
            if data is None:
                data = file.create_dataset("scores", (n, n_edges), made.dtype)
            data[examples, edges] = made
            written += made.size
        assert written == n * n_edges, "pieces are all scores"
        file["which"] = np.asarray(which, np.int64)
        file["clean"], file["corrupted"] = np.asarray(rows.clean), np.asarray(rows.corrupted)
