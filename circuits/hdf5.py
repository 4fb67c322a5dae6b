"""HDF5 files: opening them, making them and their checksums."""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import h5py

_low: Any = h5py
"""h5py with its low level, which its types do not list."""

_NUMBERS = (_low.h5t.INTEGER, _low.h5t.FLOAT)


class DamagedError(OSError):
    """A file that is HDF5, and holds what no file of this package does; the message begins with the file's name."""


def opened(path: Path) -> Any:
    """A file for reading. (h5py's own types say of nothing what it is.)

    Raises:
        OSError: if there is no such file, or it is not HDF5.
        DamagedError: if it holds anything but groups and arrays of numbers whose bytes are all in the file itself.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for ever
        raise DamagedError(f"{path.name} is not a regular file")
    _check(path, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
    return _open(path)


def _open(path: Path) -> Any:
    # Files do not change once they have their name, and not every file system has locks.
    return h5py.File(path, "r", locking=False)


@lru_cache(maxsize=1 << 16)
def _check(path: Path, state: tuple[int, ...]) -> None:
    """Walk a file once, before anything in it is read: HDF5 follows links and reads other files by itself."""
    del state  # it is what the walk is remembered by
    with _open(path) as file:
        try:
            for name, fault in _faults(file.id):
                raise DamagedError(f"{path.name}: {name!r} {fault}")
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise DamagedError(f"{path.name}: {error}") from error


def _faults(root: Any) -> Iterator[tuple[str, str]]:
    """What a file holds that this package never writes, with its name."""
    # On h5py's low level: its `Group` and `Dataset` take ten times as long, and may follow links on the way.
    seen = {_low.h5o.get_info(root).addr}
    left = [("", root)]
    while left:
        above, group = left.pop()
        for key in group:
            name = f"{above}{key.decode(errors='replace')}"
            link = group.links.get_info(key)
            if link.type != _low.h5l.TYPE_HARD:
                yield name, "is a link, where a group or an array of numbers is expected"
                continue
            if link.u in seen:  # `u` is its address; a group inside itself would be walked for ever
                yield name, "is there under two names"
            seen.add(link.u)
            made = _low.h5o.open(group, key)
            if isinstance(made, _low.h5g.GroupID):
                left.append((f"{name}/", made))
            elif not isinstance(made, _low.h5d.DatasetID):
                yield name, "is neither a group nor an array"
            elif fault := _fault(made):
                yield name, fault


def _fault(data: Any) -> str:
    """What is wrong with an array; empty if nothing is."""
    plan = data.get_create_plist()
    layout = plan.get_layout()
    if layout == _low.h5d.VIRTUAL or plan.get_external_count():
        return "has its numbers in another file"
    kind = data.get_type()
    if kind.get_class() not in _NUMBERS:
        return "holds something other than numbers"
    # Numbers that nobody wrote read as zeros, of which a file of a kilobyte can promise any number.
    shape = data.shape
    if layout == _low.h5d.CHUNKED:
        wanted = math.prod(-(-n // c) for n, c in zip(shape, plan.get_chunk(), strict=True))
        whole = data.get_num_chunks() == wanted
    else:
        whole = data.get_storage_size() == math.prod(shape) * kind.get_size()
    return "" if whole else f"of shape {shape} lacks numbers"


def array(group: Any, name: str, shape: tuple[int | None, ...], kinds: str = "f") -> Any:
    """An array of a file or group, without reading it.

    Args:
        group: the file or group.
        name: of the array in it.
        shape: what it must have; None for an axis of any length.
        kinds: which kinds of numbers it may hold, as numpy's `dtype.kind` says them.

    Raises:
        DamagedError: if there is none of that name, or it has another shape or holds other numbers.
    """
    found = group.get(name)
    said = f"{Path(group.file.filename).name}: {f'{group.name}/{name}'.strip('/')!r}"
    if not isinstance(found, h5py.Dataset):
        raise DamagedError(f"{said} is missing or no array")
    fits = len(found.shape) == len(shape) and all(
        b in (None, a) for a, b in zip(found.shape, shape, strict=True)
    )
    if not fits or found.dtype.kind not in kinds:
        axes = ", ".join("any" if n is None else str(n) for n in shape)
        wanted = "floats" if kinds == "f" else "whole numbers"
        raise DamagedError(
            f"{said} holds {found.dtype} of shape {found.shape}, expected {wanted} of shape ({axes})"
        )
    return found


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
