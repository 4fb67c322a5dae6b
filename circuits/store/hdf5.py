"""HDF5 files: opening them, their checksums, and whole activations in them (layer 2)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float

from circuits.store.provenance import Depth

CHUNK = (4096, 64)
"""Rows and columns of a block of full activations."""

WORTH_COMPRESSING = 0.8
"""Compression pays if it makes the first block at least this much smaller."""


def opened(path: Path) -> Any:
    """A file for reading. (h5py's own types say of nothing what it is.)"""
    return h5py.File(path)


class _Sink:
    """A file that remembers the first error of writing instead of raising it.

    HDF5 cannot be trusted with a disk that fills up: it prints tracebacks when its objects are freed,
    and may crash. So it is told that all went well, and `created` raises once it has closed the file.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        n = len(left)
        while len(left) and self.error is None:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self.error = error
        return n

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def flush(self) -> None:
        """Nothing is held back."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)  # seek, tell, readinto


@contextmanager
def created(path: Path) -> Iterator[Any]:
    """A new file to fill, over what is there.

    Raises:
        OSError: if it could not be written, e.g. for want of space.
    """
    with FileIO(path, "w+") as raw:
        sink = _Sink(raw)
        try:
            with h5py.File(sink, "w") as file:
                yield file
        except (OSError, RuntimeError):
            if sink.error is None:
                raise
        if sink.error is not None:
            raise sink.error


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_full(group: Any, values: Float[np.ndarray, "row column"], depth: Depth) -> None:
    """Write whole activations: as float16, or float32 if a finite one is too large for that."""
    wide = torch.from_numpy(values)
    kind = torch.float16 if _fits_half(wide) else torch.float32
    numpy_kind = np.float16 if kind == torch.float16 else np.float32
    n, width = values.shape
    if depth.layout == "rows" or 0 in values.shape:
        out = group.create_dataset("activations", values.shape, numpy_kind)
        for start in range(0, n, CHUNK[0]):
            rows = wide[start : start + CHUNK[0]].to(kind).numpy()
            out.write_direct(rows, dest_sel=np.s_[start : start + len(rows)])
        return
    chunk = (min(n, CHUNK[0]), min(width, CHUNK[1]))
    packing: dict[str, Any] = {}
    if depth.compress and _pays(wide[: chunk[0], : chunk[1]].to(kind).numpy()):
        packing = {"compression": "lzf", "shuffle": True}
    out = group.create_dataset("activations", values.shape, numpy_kind, chunks=chunk, **packing)
    block = np.zeros(chunk, numpy_kind)
    target = torch.from_numpy(block)
    for start in range(0, n, chunk[0]):
        for left in range(0, width, chunk[1]):
            part = wide[start : start + chunk[0], left : left + chunk[1]]
            if packing:
                out[start : start + len(part), left : left + part.shape[1]] = part.to(kind).numpy()
                continue
            if part.shape != chunk:
                target.zero_()
            target[: part.shape[0], : part.shape[1]].copy_(part)
            out.id.write_direct_chunk((start, left), block)


def _fits_half(values: torch.Tensor) -> bool:
    if values.numel() == 0:
        return True
    top = torch.finfo(torch.float16).max
    least, most = torch.aminmax(values)
    if -top <= least and most <= top:  # False where there is a NaN
        return True
    finite = values[torch.isfinite(values)]
    return finite.numel() == 0 or bool(finite.abs().max() <= top)


def _pays(block: np.ndarray) -> bool:
    with h5py.File("probe", "w", driver="core", backing_store=False) as file:
        made = file.create_dataset(
            "block", data=block, chunks=block.shape, compression="lzf", shuffle=True
        )
        return made.id.get_storage_size() <= WORTH_COMPRESSING * block.nbytes
