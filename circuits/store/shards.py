"""Writing a store: each file is written under a temporary name, renamed, and then noted in the manifest.

A store is a folder with `provenance.json` (what it was made from), `reference.h5` (what all shards have in common),
`shard-00000.h5` … (consecutive examples), `manifest.jsonl` (a line for each finished file, with its SHA-256) and
`statistics.h5` (everything for each unit, merged). Every process that writes shards has its own manifest, until these
are merged at the end, and no file is changed once it has its name. So a harvest that was killed can be resumed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from circuits.files import is_inside, owned, remove_owned, replacing
from circuits.hdf5 import created, file_hash, opened
from circuits.json_files import parse_json, read_bytes
from circuits.locks import held
from circuits.store.hdf5 import write_full
from circuits.store.provenance import Provenance, StaleCacheError
from circuits.store.summaries import FIXED, PER_EXAMPLE, Summary

_FILES = owned(
    r"provenance\.json|manifest(-[0-9]+)*\.jsonl|(reference|statistics|shard-[0-9]{5,})\.h5|\.lock(~.*)?"
)
"""The files of a store."""

_MERGED = 1 << 22
"""Numbers in memory together while the arrays with a row for each example are merged."""


@dataclass(frozen=True, eq=False)
class FullPart:
    """Whole activations of a site over a run of examples.

    Attributes:
        activations: a row for each position of an example; each dimension of a head is a column.
        example: the example of each row.
        position: the position of each row, along the site's position axes.
    """

    activations: Float[np.ndarray, "row column"]
    example: Int[np.ndarray, " row"]
    position: Int[np.ndarray, "row axis"]


@dataclass(frozen=True, eq=False)
class CovariancePart:
    """Sums over rows, from which mean and covariance follow.

    Attributes:
        center: the value about which sums are taken.
        total: the sum of row - center.
        product: the sum of the outer products of row - center with itself.
        count: the number of rows; rows with NaN or infinite activations are left out.
    """

    center: Float[np.ndarray, " column"]
    total: Float[np.ndarray, " column"]
    product: Float[np.ndarray, "column column"]
    count: int


@dataclass(frozen=True, eq=False)
class Shard:
    """The content of a shard.

    Attributes:
        summary: the summary of the units of all stored sites, concatenated.
        full: whole activations, by site.
        covariance: sums for covariances, by site.
        skipped: the examples that could not be read, with the reasons.
    """

    summary: Summary
    full: Mapping[str, FullPart]
    covariance: Mapping[str, CovariancePart]
    skipped: Mapping[int, str]


@dataclass(frozen=True)
class ManifestLine:
    """A line of the manifest.

    Attributes:
        file: the name of the file.
        sha256: the hash of the file, in hexadecimal.
        rows: for a shard, its first example and the one after its last.
    """

    file: str
    sha256: str
    rows: tuple[int, int] | None = None

    def intact(self, folder: Path) -> bool:
        """Whether the file is there and unchanged."""
        path = folder / self.file
        return path.is_file() and file_hash(path) == self.sha256

    def as_text(self) -> str:
        """The line's text in the manifest."""
        rows = {} if self.rows is None else {"rows": list(self.rows)}
        return json.dumps({"file": self.file, **rows, "sha256": self.sha256}) + "\n"

    @classmethod
    def parse(cls, text: str) -> ManifestLine | None:
        """Read a line; None if it is damaged."""
        try:
            raw = parse_json(text, "line")
            rows = raw.get("rows")
            name, sha256 = raw["file"], raw["sha256"]
            if not isinstance(sha256, str) or Path(name).name != name:  # no path out of the folder
                return None
            return cls(name, sha256, None if rows is None else (int(rows[0]), int(rows[1])))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None


def read_manifest(folder: Path) -> tuple[dict[str, ManifestLine], list[int]]:
    """The lines of a store's manifests by file, and the numbers of damaged lines, counted from 1.

    Raises:
        ValueError: if a manifest is no regular file, or too large to be one.
    """
    lines: dict[str, ManifestLine] = {}
    bad: list[int] = []
    for path in sorted(folder.glob("manifest*.jsonl")):
        read = read_bytes(path, f"manifest {str(path)!r}").decode(errors="replace")
        for number, text in enumerate(read.splitlines(), 1):
            line = ManifestLine.parse(text)
            if line is None:
                bad.append(number)
            else:
                # A later line wins: a file may have been deleted as damaged and written again.
                lines[line.file] = line
    return lines, bad


def check_unchanged(path: Path, most: int = 0) -> None:
    """Raise OSError if a file of a finished store is not what the manifest says, as far as that is cheap to know.

    A file that was changed after the manifest was written is read whole and compared with its SHA-256, once a process.
    One that was not is trusted, unless it is small: reading costs a second for about 500 MB, and `verify` reads all.

    Args:
        path: the file.
        most: the bytes up to which it is compared in any case.
    """
    file, manifest = path.stat(), _stat_of(path.with_name("manifest.jsonl"))
    changed = file.st_mtime_ns > manifest.st_mtime_ns
    if not changed and file.st_size > most:
        return
    noted = (manifest.st_size, manifest.st_mtime_ns)
    line = _noted(path.parent, noted).get(path.name)
    if line is None:
        raise OSError(f"manifest.jsonl does not name {path.name}")
    if not _is_as_noted(path, line, (file.st_size, file.st_mtime_ns)):
        raise OSError(f"{path.name} is not what the manifest says it was when it was written")


def _stat_of(manifest: Path) -> os.stat_result:
    try:
        return manifest.stat()
    except FileNotFoundError:
        raise OSError(
            f"there is no {manifest.name}, which says what the files of a store are"
        ) from None


# What an answer is remembered by is its second argument: the size and time of what was read.
@lru_cache(maxsize=8)
def _noted(folder: Path, state: tuple[int, int]) -> dict[str, ManifestLine]:
    return read_manifest(folder)[0]


@lru_cache(maxsize=1 << 16)
def _is_as_noted(path: Path, line: ManifestLine, state: tuple[int, int]) -> bool:
    return line.intact(path.parent)


def shard_name(index: int) -> str:
    """The file of a shard.

    >>> shard_name(3)
    'shard-00003.h5'
    """
    return f"shard-{index:05d}.h5"


# --- the lock ----------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, provenance: Provenance, overwrite: bool = False) -> Iterator[None]:
    """Hold the lock of a store's folder inside the block, after a check that what is there was made in the same way.

    Args:
        folder: the store's folder.
        provenance: the store's provenance.
        overwrite: whether to delete what is there.

    Raises:
        BlockingIOError: if another process is writing it.
        StaleCacheError: if the folder holds a store made from something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if overwrite:
            # The provenance first: if this is interrupted, what is left is not taken for a store.
            _clear(folder, "provenance", "manifest", "shard", "reference", "statistics")
        if (folder / "provenance.json").exists():
            changed = provenance.difference(Provenance.read(folder))
            if changed:
                raise StaleCacheError(
                    f"activation store {str(folder)!r} is stale: {changed}; delete the folder to "
                    "harvest again"
                )
        # The lock is held, so nobody is writing them any more.
        for left in folder.glob(".*.tmp"):
            if _FILES.fullmatch(left.name):
                left.unlink()  # left by a harvest that was killed
        provenance.write(folder)
        yield


def remove(folder: Path, root: Path) -> list[str]:
    """Delete a store of a workspace, unless it is being written: its files, and its folder if nothing else is in it.

    Args:
        folder: the store's folder.
        root: the workspace's folder.

    Returns:
        The names of what is left in the folder, which is not the store's.

    Raises:
        BlockingIOError: if it is being written.
        ValueError: if it is not in the workspace, or only by a symbolic link.
        OSError: if it cannot be deleted.
    """
    if not is_inside(folder, root):
        raise ValueError(
            f"activation store {str(folder)!r} is not in the workspace {str(root)!r}, or is a symbolic link: expected "
            "a store's own folder there; name its workspace with --workspace, or delete it by hand"
        )
    with _alone(folder):
        return remove_owned(folder, _FILES, first="provenance.json", root=root)


def _clear(folder: Path, *kinds: str) -> None:
    """Delete the files of a store of some kinds (`shard`, `reference`, …)."""
    for kind in kinds:
        for path in folder.glob(f"{kind}*"):
            if _FILES.fullmatch(path.name):
                path.unlink()


def _alone(folder: Path) -> AbstractContextManager[int]:
    """Hold a store's lock."""
    refusal = (
        f"activation store {str(folder)!r} is being written by another process: wait for it, or "
        "stop it first"
    )
    return held(folder / ".lock", refusal)


@dataclass(frozen=True)
class StoreWriter:
    """Writes the files of one store.

    Attributes:
        folder: the store's folder.
        provenance: the store's provenance.
        name: the name of this process's manifest.
        shards: the examples of each shard.
    """

    folder: Path
    provenance: Provenance
    name: str = "manifest.jsonl"
    shards: tuple[range, ...] = field(init=False)

    def __post_init__(self) -> None:
        n, size = len(self.provenance.examples), self.provenance.shard
        ranges = tuple(range(i, min(i + size, n)) for i in range(0, n, size))
        object.__setattr__(self, "shards", ranges)

    def intact(self) -> dict[str, ManifestLine]:
        """Find the intact files, make their lines the manifest, and delete damaged files.

        Shards that a killed harvest had renamed but not noted yet count if they are complete.
        """
        lines, _ = read_manifest(self.folder)
        found: dict[str, ManifestLine] = {}
        # The reference comes first, since the shards depend on it.
        for name, rows in self._expected():
            # A process may have been killed between renaming a file and noting it.
            line = lines.get(name) or self._unnoted(name, rows)
            if line is not None and line.rows == rows and line.intact(self.folder):
                found[name] = line
            else:  # a damaged file must not be taken, next time, for one that was only not noted
                (self.folder / name).unlink(missing_ok=True)
            if name == "reference.h5" and name not in found:
                # Their sums are about the centers that the lost file held.
                _clear(self.folder, "shard", "statistics")
        if len(found) < len(self._expected()):
            # The merged numbers are of all shards, one of which may now be made again.
            found.pop("statistics.h5", None)
        self.note_all(found.values())
        return found

    def _expected(self) -> list[tuple[str, tuple[int, int] | None]]:
        """The files of a finished store, with the examples of shards."""
        shards = [(shard_name(i), (r.start, r.stop)) for i, r in enumerate(self.shards)]
        return [("reference.h5", None), *shards, ("statistics.h5", None)]

    def _unnoted(self, name: str, rows: tuple[int, int] | None) -> ManifestLine | None:
        """The line for a file that is complete but not in the manifest; None if it is not complete."""
        path = self.folder / name
        # Merged again from the shards rather than trusted.
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
        return ManifestLine(name, file_hash(path), rows) if whole else None

    def note_all(self, lines: Iterable[ManifestLine]) -> None:
        """Make these lines the only manifest."""
        with replacing(self.folder / "manifest.jsonl") as temporary:
            temporary.write_text("".join(line.as_text() for line in lines))
        for other in self.folder.glob("manifest-*.jsonl"):
            other.unlink()

    def note(self, line: ManifestLine) -> None:
        """Add a line to this process's manifest."""
        with (self.folder / self.name).open("a") as file:
            file.write(line.as_text())
            file.flush()
            # On the disk before the next file is begun, so that a power failure costs one shard at most.
            os.fsync(file.fileno())

    @contextmanager
    def _file(self, name: str, rows: tuple[int, int] | None = None) -> Iterator[Any]:
        """Create an HDF5 file, which is renamed into place and noted when the block ends."""
        try:
            with replacing(self.folder / name) as temporary:
                with created(temporary) as file:
                    yield file
                # Of the finished file before it is renamed: a line is only written of what is in place.
                digest = file_hash(temporary)
            self.note(ManifestLine(name, digest, rows))
        except OSError as error:
            raise OSError(self._write_error(error)) from error

    def _write_error(self, error: OSError) -> str:
        """The message for a failed write."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk" if full else str(error)
        return (
            f"activation store {str(self.folder)!r} cannot be written: {reason}; what was finished is "
            "kept: run the same harvest again"
        )

    def add_reference(
        self, fixed: Mapping[str, np.ndarray], centers: Mapping[str, np.ndarray]
    ) -> None:
        """Write what all shards have in common: the fields `FIXED` of summaries, and the centers of covariances."""
        with self._file("reference.h5") as file:
            for name in FIXED:
                file[f"summary/{name}"] = fixed[name]
            for site, center in centers.items():
                file[f"covariance/{site}/center"] = center

    def reference(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Read what `add_reference` wrote."""
        with opened(self.folder / "reference.h5") as file:
            sites = self.provenance.kept(self.provenance.depth.covariance)
            fixed = {name: _read(file, f"summary/{name}") for name in FIXED}
            return fixed, {site: _read(file, f"covariance/{site}/center") for site in sorted(sites)}

    def add(self, index: int, shard: Shard) -> None:
        """Write a shard.

        Raises:
            OSError: if it cannot be written; then nothing of it is left.
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
                    group[key] = sum(_from_each(paths, f"covariance/{site}/{key}"))
            out["skipped"] = np.concatenate(list(_from_each(paths, "skipped")))
            reasons = [
                r
                for text in _from_each(paths, "reasons")
                for r in parse_json(text.tobytes(), "reasons")
            ]
            out["reasons"] = np.frombuffer(json.dumps(reasons).encode(), np.uint8)
        noted, _ = read_manifest(self.folder)
        # In a fixed order and not in that in which processes finished, so that equal harvests give equal folders.
        self.note_all(noted[name] for name, _ in self._expected())


def _read(file: Any, name: str) -> Any:
    return file[name][()]


def _from_each(paths: Sequence[Path], name: str, units: slice = slice(None)) -> Iterator[Any]:
    """A dataset of every shard, with one file open at a time, since there may be thousands."""
    for path in paths:
        with opened(path) as file:
            yield file[name][() if units == slice(None) else units]


def _complete(file: Any, provenance: Provenance) -> bool:
    """Whether a shard holds everything that it should: each check is for what is written last in a group."""
    depth = provenance.depth
    return (
        "saturated" in file["summary"]
        and all("activations" in file[f"full/{site}"] for site in provenance.kept(depth.full))
        and all("count" in file[f"covariance/{s}"] for s in provenance.kept(depth.covariance))
    )


def _write_summary(group: Any, summary: Summary) -> None:
    for item in fields(Summary):
        value = getattr(summary, item.name)
        if item.name in PER_EXAMPLE:
            value = np.ascontiguousarray(
                value.T
            )  # unit x example: a unit's examples are then one read
        if item.name == "histogram":
            value = _smallest(value)
        if item.name not in FIXED:
            group[item.name] = value


def _smallest(counts: Int[np.ndarray, "unit bin"]) -> np.ndarray:
    """Counts as the smallest integer type that holds them."""
    return counts.astype(np.min_scalar_type(counts.max(initial=0)))


def _merge_summaries(paths: Sequence[Path], n_examples: int, out: Any) -> None:
    """Merge the summaries of all shards, some units at a time where there is a row for each example."""
    for item in fields(Summary):
        if item.name not in (*PER_EXAMPLE, *FIXED):
            join = np.minimum if item.name == "minimum" else np.add
            wide = np.int64 if item.name == "histogram" else None
            parts = (np.asarray(v, wide) for v in _from_each(paths, f"summary/{item.name}"))
            merged = reduce(join, parts)
            out[item.name] = _smallest(merged) if item.name == "histogram" else merged
    n_units = len(out["center"])
    block = max(1, _MERGED // n_examples)
    # Units in blocks: a matrix of all units by all examples of a large data set would not fit into memory.
    for key, kind in zip(PER_EXAMPLE, (np.float32, np.int32, np.float32), strict=True):
        made = out.create_dataset(key, (n_units, n_examples), kind)
        for start in range(0, n_units, block):
            units = slice(start, start + block)
            made[units] = np.concatenate(list(_from_each(paths, f"summary/{key}", units)), axis=1)
