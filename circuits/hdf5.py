"""HDF5 files: opening them, making them and their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import h5py


def opened(path: Path) -> Any:
    """A file for reading. (h5py's own types say of nothing what it is.)"""
    # Files do not change once they have their name, and not every file system has locks.
    return h5py.File(path, "r", locking=False)


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
