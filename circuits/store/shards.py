"""Writing a store: shards under temporary names, renamed, then noted in the manifest.

A store is a folder: `provenance.json` (what was measured, on what), `reference.h5` (what all shards
share), `shard-00000.h5` … (consecutive examples), `manifest.jsonl` (one line a finished file, with its
SHA-256) and `statistics.h5` (everything per unit, merged). Every process that writes shards has a
manifest of its own until they are joined at the end, and no file is changed once it has its name. A
harvest that was killed therefore goes on where it stopped.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jaxtyping import Float, Int

from circuits.files import replacing
from circuits.hdf5 import created, file_hash, opened
from circuits.store.hdf5 import write_full
from circuits.store.provenance import Provenance, StaleCacheError
from circuits.store.summaries import FIXED, PER_EXAMPLE, Summary

PATIENCE = 1.0
"""How long to wait for a store's lock, in seconds."""

_MERGED = 1 << 22  # numbers in memory at once while per-example arrays are joined


@dataclass(frozen=True, eq=False)
class FullPart:
    """Whole activations of a site over a run of examples.

    Attributes:
        activations: one row a position of an example; heads have all their inner dimensions side by
            side.
        example: whose row it is.
        position: where, along each of the site's position axes.
    """

    activations: Float[np.ndarray, "row column"]
    example: Int[np.ndarray, " row"]
    position: Int[np.ndarray, "row axis"]


@dataclass(frozen=True, eq=False)
class CovariancePart:
    """Sums over rows, from which a mean and a covariance follow.

    Attributes:
        center: the value about which sums are taken.
        total: of row - center.
        product: of its outer product with itself.
        count: rows with finite activations; others are left out.
    """

    center: Float[np.ndarray, " column"]
    total: Float[np.ndarray, " column"]
    product: Float[np.ndarray, "column column"]
    count: int


@dataclass(frozen=True, eq=False)
class Shard:
    """What a shard holds.

    Attributes:
        summary: of the units of all stored sites, side by side.
        full: whole activations, by site.
        covariance: sums, by site.
        skipped: the examples that could not be read, and why.
    """

    summary: Summary
    full: Mapping[str, FullPart]
    covariance: Mapping[str, CovariancePart]
    skipped: Mapping[int, str]


@dataclass(frozen=True)
class Line:
    """A line of the manifest.

    Attributes:
        file: its name.
        sha256: of the file, in hexadecimal.
        rows: first example of a shard, and the one after its last.
    """

    file: str
    sha256: str
    rows: tuple[int, int] | None = None

    def intact(self, folder: Path) -> bool:
        """Whether the file is what it was."""
        path = folder / self.file
        return path.is_file() and file_hash(path) == self.sha256

    def written(self) -> str:
        """As it stands in the manifest."""
        rows = {} if self.rows is None else {"rows": list(self.rows)}
        return json.dumps({"file": self.file, **rows, "sha256": self.sha256}) + "\n"

    @classmethod
    def parse(cls, text: str) -> Line | None:
        """Read a line; None if it is damaged."""
        try:
            raw = json.loads(text)
            rows = raw.get("rows")
            name, sha256 = raw["file"], raw["sha256"]
            if not isinstance(sha256, str) or Path(name).name != name:
                return None
            return cls(name, sha256, None if rows is None else (int(rows[0]), int(rows[1])))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None


def read_manifest(folder: Path) -> tuple[dict[str, Line], list[int]]:
    """The manifest's lines by file, and the numbers of its damaged lines, counted from 1."""
    lines: dict[str, Line] = {}
    bad: list[int] = []
    for path in sorted(folder.glob("manifest*.jsonl")):
        for number, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
            line = Line.parse(text)
            if line is None:
                bad.append(number)
            else:
                lines[line.file] = line
    return lines, bad


def shard_name(index: int) -> str:
    """The file of a shard.

    >>> shard_name(3)
    'shard-00003.h5'
    """
    return f"shard-{index:05d}.h5"


# --- one writer at a time ----------------------------------------------------------------------


@contextmanager
def locked(folder: Path, provenance: Provenance, anew: bool = False) -> Iterator[None]:
    """Hold a store's folder alone, whoever made it before having made it the same way.

    Args:
        folder: of the store.
        provenance: of the store.
        anew: whether to throw away what is there.

    Raises:
        BlockingIOError: if another process is writing it.
        StaleCacheError: if the folder holds a store made from something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        take(lock, folder)
        if anew:
            clear(folder)
        if (folder / "provenance.json").exists():
            changed = provenance.difference(Provenance.read(folder))
            if changed:
                raise StaleCacheError(
                    f"activation store {str(folder)!r} is stale: {changed}; delete the folder to "
                    "make it anew"
                )
        for left in folder.glob(".*.tmp"):
            left.unlink()  # by a run that was killed
        provenance.write(folder)
        yield


def remove(folder: Path) -> None:
    """Delete a store, unless it is being written.

    Raises:
        BlockingIOError: if it is being written.
        OSError: if it cannot be deleted.
    """
    with (folder / ".lock").open("a") as lock:
        take(lock, folder)
        (folder / "provenance.json").unlink(missing_ok=True)  # from here on it is no store
        shutil.rmtree(folder)


def clear(folder: Path, *names: str) -> None:
    """Delete a store's files, all or those that match."""
    for name in names or ("provenance.json", "*.jsonl", "*.h5"):  # first what makes it a store
        for path in folder.glob(name):
            path.unlink()


def take(lock: TextIO, folder: Path) -> None:
    """Take a store's lock, which lasts until the file is closed; wait a moment for it.

    Raises:
        BlockingIOError: if another process has it: not the workers of one that has just been killed.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise BlockingIOError(
                    f"activation store {str(folder)!r} is being written by another process: wait for "
                    "it, or stop it first"
                ) from error
        time.sleep(0.02)


@dataclass(frozen=True)
class StoreWriter:
    """Writes one store's files.

    Attributes:
        folder: of the store.
        provenance: of the store.
        name: of this process' own manifest.
    """

    folder: Path
    provenance: Provenance
    name: str = "manifest.jsonl"
    shards: tuple[range, ...] = field(init=False)

    def __post_init__(self) -> None:
        n, size = len(self.provenance.examples), self.provenance.shard
        ranges = tuple(range(i, min(i + size, n)) for i in range(0, n, size))
        object.__setattr__(self, "shards", ranges)

    def intact(self) -> dict[str, Line]:
        """What is there and whole, in the order of the manifest; noted so in one manifest.

        Shards that a killed run had renamed, but not noted, count if they can be read.
        """
        lines, _ = read_manifest(self.folder)
        found: dict[str, Line] = {}
        for name, rows in self._expected():
            line = lines.get(name) or self._adopted(name, rows)
            if line is not None and line.rows == rows and line.intact(self.folder):
                found[name] = line
            else:  # a damaged file must not be taken for one that was only not noted
                (self.folder / name).unlink(missing_ok=True)
            if name == "reference.h5" and name not in found:
                clear(self.folder, "shard-*.h5", "statistics.h5")  # sums about what it held
        if len(found) < len(self._expected()):
            found.pop("statistics.h5", None)
        self.note_all(found.values())
        return found

    def _expected(self) -> list[tuple[str, tuple[int, int] | None]]:
        shards = [(shard_name(i), (r.start, r.stop)) for i, r in enumerate(self.shards)]
        return [("reference.h5", None), *shards, ("statistics.h5", None)]

    def _adopted(self, name: str, rows: tuple[int, int] | None) -> Line | None:
        path = self.folder / name
        if name == "statistics.h5" or not path.is_file():
            return None
        try:
            with opened(path) as file:
                if rows is None:
                    whole = all(f"summary/{name}" in file for name in FIXED)
                else:
                    whole = tuple(file.attrs["rows"]) == rows and _complete(file, self.provenance)
        except (OSError, KeyError, RuntimeError):
            return None
        return Line(name, file_hash(path), rows) if whole else None

    def note_all(self, lines: Iterable[Line]) -> None:
        """Make these lines the manifest, and the only one."""
        with replacing(self.folder / "manifest.jsonl") as temporary:
            temporary.write_text("".join(line.written() for line in lines))
        for other in self.folder.glob("manifest-*.jsonl"):
            other.unlink()

    def note(self, line: Line) -> None:
        """Add a line to this process' manifest."""
        with (self.folder / self.name).open("a") as file:
            file.write(line.written())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _file(self, name: str, rows: tuple[int, int] | None = None) -> Iterator[Any]:
        """A new HDF5 file, in place and noted once the block has ended."""
        try:
            with replacing(self.folder / name) as temporary:
                with created(temporary) as file:
                    yield file
                digest = file_hash(temporary)
            self.note(Line(name, digest, rows))
        except OSError as error:
            raise OSError(self._lost(error)) from error

    def _lost(self, error: OSError) -> str:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk" if full else str(error)
        return (
            f"activation store {str(self.folder)!r} cannot be written: {reason}; what was finished is "
            "kept: run the same harvest again"
        )

    def add_reference(
        self, fixed: Mapping[str, np.ndarray], centers: Mapping[str, np.ndarray]
    ) -> None:
        """Write what all shards share: the fields `FIXED` of summaries, and covariances' centers."""
        with self._file("reference.h5") as file:
            for name in FIXED:
                file[f"summary/{name}"] = fixed[name]
            for site, center in centers.items():
                file[f"covariance/{site}/center"] = center

    def reference(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What `add_reference` wrote."""
        with opened(self.folder / "reference.h5") as file:
            sites = self.provenance.kept(self.provenance.depth.covariance)
            fixed = {name: _read(file, f"summary/{name}") for name in FIXED}
            return fixed, {site: _read(file, f"covariance/{site}/center") for site in sorted(sites)}

    def add(self, index: int, shard: Shard) -> None:
        """Write a shard.

        Raises:
            OSError: if it cannot be written; nothing of it is left then.
        """
        rows, skipped = self.shards[index], shard.skipped
        with self._file(shard_name(index), (rows.start, rows.stop)) as file:
            file.attrs["rows"] = (rows.start, rows.stop)
            file["skipped"] = np.array(sorted(skipped), np.int64)
            reasons = json.dumps([skipped[i] for i in sorted(skipped)]).encode()
            file["reasons"] = np.frombuffer(reasons, np.uint8)
            _write_summary(file.create_group("summary"), shard.summary)
            for site, sums in shard.covariance.items():
                group = file.create_group(f"covariance/{site}")
                group["product"], group["total"], group["count"] = (
                    sums.product,
                    sums.total,
                    sums.count,
                )
            for site, part in shard.full.items():
                group = file.create_group(f"full/{site}")
                group["example"], group["position"] = part.example, part.position
                write_full(group, part.activations, self.provenance.depth)

    def finish(self) -> None:
        """Merge all shards into `statistics.h5`, and all manifests into one."""
        fixed, centers = self.reference()
        paths = [self.folder / shard_name(i) for i in range(len(self.shards))]
        with self._file("statistics.h5") as out:
            for name, value in fixed.items():
                out[f"summary/{name}"] = value
            _merge_summaries(paths, len(self.provenance.examples), out["summary"])
            for site, center in centers.items():
                group = out.create_group(f"covariance/{site}")
                group["center"] = center
                for key in ("product", "total", "count"):
                    group[key] = sum(_each(paths, f"covariance/{site}/{key}"))
            out["skipped"] = np.concatenate(list(_each(paths, "skipped")))
            reasons = [r for text in _each(paths, "reasons") for r in json.loads(text.tobytes())]
            out["reasons"] = np.frombuffer(json.dumps(reasons).encode(), np.uint8)
        noted, _ = read_manifest(self.folder)
        self.note_all(noted[name] for name, _ in self._expected())


def _read(file: Any, name: str) -> Any:
    return file[name][()]


def _each(paths: Sequence[Path], name: str, units: slice = slice(None)) -> Iterator[Any]:
    """A dataset of every shard, one file open at a time: there may be thousands."""
    for path in paths:
        with opened(path) as file:
            yield file[name][() if units == slice(None) else units]


def _complete(file: Any, provenance: Provenance) -> bool:
    """Whether a shard holds all that it should."""
    depth = provenance.depth
    return (
        "powers" in file["summary"]
        and all("activations" in file[f"full/{site}"] for site in provenance.kept(depth.full))
        and all("count" in file[f"covariance/{s}"] for s in provenance.kept(depth.covariance))
    )


def _write_summary(group: Any, summary: Summary) -> None:
    for item in fields(Summary):
        value = getattr(summary, item.name)
        if item.name in PER_EXAMPLE:
            value = np.ascontiguousarray(value.T)  # a unit's examples lie side by side
        if item.name == "histogram":
            value = _smallest(value)
        if item.name not in FIXED:
            group[item.name] = value


def _smallest(counts: Int[np.ndarray, "unit bin"]) -> np.ndarray:
    """Counts in the fewest bytes that hold them."""
    return counts.astype(np.min_scalar_type(counts.max(initial=0)))


def _merge_summaries(paths: Sequence[Path], n_examples: int, out: Any) -> None:
    for item in fields(Summary):
        if item.name not in (*PER_EXAMPLE, *FIXED):
            join = np.minimum if item.name == "minimum" else np.add
            wide = np.int64 if item.name == "histogram" else None
            parts = (np.asarray(v, wide) for v in _each(paths, f"summary/{item.name}"))
            merged = reduce(join, parts)
            out[item.name] = _smallest(merged) if item.name == "histogram" else merged
    n_units = len(out["center"])
    block = max(1, _MERGED // n_examples)
    for key, kind in zip(PER_EXAMPLE, (np.float32, np.int32, np.float32), strict=True):
        made = out.create_dataset(key, (n_units, n_examples), kind)
        for start in range(0, n_units, block):
            units = slice(start, start + block)
            made[units] = np.concatenate(list(_each(paths, f"summary/{key}", units)), axis=1)
