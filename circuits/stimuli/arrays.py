"""Arrays in `.npy` and `.npz` files: measured before they are read, and read by example unless they are compressed."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MOST = 1 << 30
"""Bytes of a compressed array: those have to be unpacked whole, and a small file may hold very many."""

_BLOCK = 1 << 24
"""Bytes that are read at once for a checksum."""

_LOCAL = 30
"""Bytes of the fixed part of a member's own header in a zip file; the lengths of the rest are in bytes 26 to 29."""


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
        place: the file.
        member: its part of an `.npz` file; empty for an `.npy` file.
        shape: its shape.
        dtype: its type.
        offset: where its numbers begin in the file; None if they are compressed.
        in_columns: whether they are in Fortran order.
    """

    place: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None
    in_columns: bool

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def n_bytes(self) -> int:
        """The size of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        if self.offset is None or self.in_columns:
            return np.asarray(self.whole[i])
        rest = self.shape[1:]
        size = math.prod(rest) * self.dtype.itemsize
        # Read and not mapped: the pages of a map count as memory once they were looked at.
        with self.place.open("rb") as file:
            file.seek(self.offset + i % len(self) * size)
            data = bytearray(file.read(size))
        return np.ndarray(rest, self.dtype, data)

    @cached_property
    def whole(self) -> np.ndarray:
        """All of it, in memory.

        Raises:
            ValueError: if it is compressed and larger than `MOST`.
        """
        if self.offset is None and self.n_bytes > MOST:
            raise ValueError(
                f"array {self.member!r} is compressed and takes {self.n_bytes / 1e9:.1f} GB, which would have to be in "
                f"memory at once (at most {MOST / 1e9:.1f} GB): save it with numpy.savez, or as .npy"
            )
        data, done = bytearray(self.n_bytes), 0
        for block in self._blocks():
            data[done : done + len(block)] = block
            done += len(block)
        return np.ndarray(self.shape, self.dtype, data, order="F" if self.in_columns else "C")

    def digest(self) -> str:
        """SHA-256 of its numbers in order, in hexadecimal."""
        if self.in_columns:
            return hashlib.sha256(self.whole.tobytes()).hexdigest()
        made = hashlib.sha256()
        for block in self._blocks():
            made.update(block)
        return made.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        """The bytes of its numbers, in the order of the file; ValueError if they are not all there."""
        if self.offset is not None:
            with self.place.open("rb") as file:
                file.seek(self.offset)
                yield from _pieces(file, self.n_bytes)
            return
        try:
            with zipfile.ZipFile(self.place) as archive, archive.open(self.member) as file:
                _header(file)
                yield from _pieces(file, self.n_bytes)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{self.member!r} is damaged: {error}") from error


def stored_arrays(place: Path) -> dict[str, StoredArray]:
    """The arrays of an `.npz` file by name; that of an `.npy` file has an empty name.

    Only headers are read.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is neither, is damaged, holds Python objects, or is smaller than its arrays.
    """
    if not zipfile.is_zipfile(place):
        with place.open("rb") as file:
            shape, in_columns, dtype = _header(file)
            offset = file.tell()
        found = StoredArray(place, "", shape, dtype, offset, in_columns)
        _check_size(found, place.stat().st_size - offset)
        return {"": found}
    try:
        with zipfile.ZipFile(place) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            return {m.filename.removesuffix(".npy"): _member(place, archive, m) for m in members}
    # RuntimeError is of archives with passwords.
    except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"it is not a whole .npz file: {error}") from error


def read_array(place: Path) -> np.ndarray:
    """The array of an `.npy` file.

    Raises:
        OSError, ValueError: as `stored_arrays`, or if it is an `.npz` file.
    """
    found = stored_arrays(place)
    if "" not in found:
        raise ValueError("it is an .npz file: expected .npy")
    return found[""].whole


def _member(place: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> StoredArray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename!r} is packed in a way that numpy does not use")
    with archive.open(member) as file:
        shape, in_columns, dtype = _header(file)
        before = file.tell()
    offset = None
    if member.compress_type == zipfile.ZIP_STORED:
        with place.open("rb") as file:
            file.seek(member.header_offset)
            local = file.read(_LOCAL)
        lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        offset = member.header_offset + _LOCAL + lengths + before
    found = StoredArray(place, member.filename, shape, dtype, offset, in_columns)
    _check_size(found, member.file_size - before)
    return found


def _check_size(found: StoredArray, there: int) -> None:
    """Raise ValueError if a header promises more numbers than there are, before memory is taken for them."""
    if found.n_bytes > there or min(found.shape, default=0) < 0:
        name = found.member or found.place.name
        raise ValueError(
            f"{name!r} is damaged: an array of type {found.dtype} and shape {found.shape} has {found.n_bytes} bytes, "
            f"and {max(there, 0)} are there"
        )


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"it is an .npy file of version {version}: expected 1.0 or 2.0")
    shape, in_columns, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects: expected numbers or texts")
    return shape, in_columns, dtype


def _pieces(file: BinaryIO | Any, n: int) -> Iterator[bytes]:
    while n:
        piece = file.read(min(n, _BLOCK))
        if not piece:
            raise ValueError("it is cut off")
        n -= len(piece)
        yield piece
