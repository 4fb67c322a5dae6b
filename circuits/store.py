"""Activation stores: what a model's units did on a dataset, on disk (layer 2).

A store is a folder: `provenance.json` (what was measured, on what), numbered HDF5 shards of
consecutive examples, `manifest.jsonl` (one line a finished shard: rows and SHA-256) and
`statistics.h5` (everything per unit, merged). Shards are written under a temporary name and renamed;
none is changed afterwards, so a harvest that was killed goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float, Int

from circuits.files import replacing, write_json
from circuits.units import Site, Unit, unknown

TOP = 24
"""How many of a unit's strongest examples are kept."""

BINS = 64
"""Bins of a unit's histogram between its recorded edges; one more on each side takes the rest."""


class StaleCacheError(ValueError):
    """A store was made from something else than what is asked for now."""


@dataclass(frozen=True)
class Provenance:
    """Where a store's numbers come from.

    Attributes:
        model: what `load_model` took.
        model_hash: of its weights.
        data: what `open_source` took.
        data_hash: of its examples.
        sites: what was recorded.
        examples: the examples' names, in order.
        input: the model's preprocessing.
        version: of the package that wrote it.
    """

    model: str
    model_hash: str
    data: str
    data_hash: str
    sites: tuple[Site, ...]
    examples: tuple[str, ...]
    input: dict[str, Any]
    version: str

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        """Read `provenance.json`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it cannot be understood.
        """
        path = folder / "provenance.json"
        try:
            raw = json.loads(path.read_text())
            sites = tuple(_site(s) for s in raw.pop("sites"))
            return cls(sites=sites, examples=tuple(raw.pop("examples")), **raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"activation store {str(folder)!r} has a damaged {path.name}: delete the folder and "
                "harvest again"
            ) from error

    def write(self, folder: Path) -> None:
        """Write `provenance.json`."""
        write_json(folder / "provenance.json", asdict(self))

    def difference(self, other: Provenance) -> str | None:
        """In words, the first thing in which `other` differs; None if it was made the same way.

        How model and data are called does not count: their hashes do.
        """
        for field in fields(self):
            if field.name in ("model", "data"):
                continue
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            # json has no tuples
            if json.dumps(ours, default=asdict) != json.dumps(theirs, default=asdict):
                return f"{field.name} was {_short(theirs)}, is {_short(ours)}"
        return None


def _site(raw: dict[str, Any]) -> Site:
    lists = {k: tuple(v) for k, v in raw.items() if isinstance(v, list)}
    return Site(**{**raw, **lists})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, eq=False)
class Summary:
    """One site over a run of examples.

    Attributes:
        maximum: the largest activation over positions, per example and unit.
        argmax: where it is, as an index into the flattened positions.
        mean: over positions, per example and unit.
        total: sum of activations over examples and positions, per unit.
        square: sum of their squares.
        positive: how many are above zero.
        minimum: the smallest, per unit.
        count: how many activations went into each unit's sums.
        edges: of each unit's histogram.
        histogram: counts below, in and above the edges.
    """

    maximum: Float[np.ndarray, "example unit"]
    argmax: Int[np.ndarray, "example unit"]
    mean: Float[np.ndarray, "example unit"]
    total: Float[np.ndarray, " unit"]
    square: Float[np.ndarray, " unit"]
    positive: Int[np.ndarray, " unit"]
    minimum: Float[np.ndarray, " unit"]
    count: int
    edges: Float[np.ndarray, "unit edge"]
    histogram: Int[np.ndarray, "unit bin"]


def merge(parts: Sequence[Summary]) -> Summary:
    """Join summaries of consecutive runs of examples that share their histogram edges."""
    return Summary(
        maximum=np.concatenate([p.maximum for p in parts]),
        argmax=np.concatenate([p.argmax for p in parts]),
        mean=np.concatenate([p.mean for p in parts]),
        total=np.sum([p.total for p in parts], axis=0),
        square=np.sum([p.square for p in parts], axis=0),
        positive=np.sum([p.positive for p in parts], axis=0),
        minimum=np.min([p.minimum for p in parts], axis=0),
        count=sum(p.count for p in parts),
        edges=parts[0].edges,
        histogram=np.sum([p.histogram for p in parts], axis=0),
    )


@dataclass(frozen=True)
class Example:
    """One of a unit's examples.

    Attributes:
        index: which example of the dataset.
        name: its name.
        value: the unit's largest activation on it.
        position: where that is: (y, x), (position,), or () where the site has no positions.
    """

    index: int
    name: str
    value: float
    position: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class UnitStatistics:
    """A unit over a whole dataset.

    Attributes:
        mean: over examples and positions.
        std: likewise.
        minimum: the smallest activation.
        maximum: the largest.
        density: the share of activations above zero.
        edges: of the histogram's inner bins.
        histogram: counts: below the first edge, between the edges, above the last.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    density: float
    edges: Float[np.ndarray, " edge"]
    histogram: Int[np.ndarray, " bin"]


# --- writing -----------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path, provenance: Provenance) -> Iterator[StoreWriter]:
    """Write a store, alone; what an earlier, unfinished run left is kept if it was made the same way.

    Raises:
        BlockingIOError: if another process is writing it.
        StaleCacheError: if the folder holds a store made from something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"activation store {str(folder)!r} is being written by another process: wait for it, "
                "or stop it first"
            ) from error
        if (folder / "provenance.json").exists():
            changed = provenance.difference(Provenance.read(folder))
            if changed:
                raise StaleCacheError(
                    f"activation store {str(folder)!r} is stale: {changed}; delete the folder to "
                    "make it anew"
                )
        provenance.write(folder)
        yield StoreWriter(folder, provenance)


class StoreWriter:
    """Adds shards to a store; made by `writing`.

    Attributes:
        rows: how many examples valid shards hold already.
        finished: whether all of it, statistics too, is there and intact.
    """

    def __init__(self, folder: Path, provenance: Provenance) -> None:
        self.folder, self.provenance = folder, provenance
        lines = valid_lines(folder)
        self._shards = [line for line in lines if "rows" in line]
        self.rows = self._shards[-1]["rows"][1] if self._shards else 0
        self.finished = len(lines) > len(self._shards)

    def edges(self) -> dict[str, Float[np.ndarray, "unit edge"]] | None:
        """The histogram edges of each site that the first shard fixed."""
        if not self._shards:
            return None
        with h5py.File(self.folder / self._shards[0]["file"]) as file:
            return {s.name: _read_summary(file[s.name]).edges for s in self.provenance.sites}

    def add(self, summaries: dict[str, Summary]) -> None:
        """Write the next shard: one summary a site, all of the same examples."""
        rows = len(next(iter(summaries.values())).maximum)
        name = f"summary-{len(self._shards):05d}.h5"
        with replacing(self.folder / name) as temporary:
            with h5py.File(temporary, "w") as file:
                for site, summary in summaries.items():
                    _write_summary(file.create_group(site), summary)
            digest = _sha256(temporary)
        entry = {"file": name, "rows": [self.rows, self.rows + rows], "sha256": digest}
        self._shards.append(entry)
        self.rows += rows
        self._write_manifest(self._shards)

    def _write_manifest(self, lines: list[dict[str, Any]]) -> None:
        with replacing(self.folder / "manifest.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def finish(self) -> None:
        """Merge all shards into `statistics.h5`, one site at a time."""
        with replacing(self.folder / "statistics.h5") as temporary:
            with h5py.File(temporary, "w") as out:
                for site in self.provenance.sites:
                    self._merge_site(site, out.create_group(site.name))
            digest = _sha256(temporary)
        self._write_manifest([*self._shards, {"file": "statistics.h5", "sha256": digest}])
        self.finished = True

    def _merge_site(self, site: Site, group: Any) -> None:
        parts = []
        for shard in self._shards:
            with h5py.File(self.folder / shard["file"]) as file:
                parts.append(_read_summary(file[site.name]))
        merged = merge(parts)
        _write_summary(group, merged)
        order = np.argsort(-merged.maximum, axis=0, kind="stable")[:TOP]
        group["top"] = order.T.astype(np.int64)


def valid_lines(folder: Path) -> list[dict[str, Any]]:
    """The manifest's lines, up to the first that is damaged or whose file is not what it was."""
    path = folder / "manifest.jsonl"
    shards: list[dict[str, Any]] = []
    if not path.exists():
        return shards
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            file = folder / entry["file"]
            intact = file.is_file() and _sha256(file) == entry["sha256"]
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        if not intact:
            break
        shards.append(entry)
    return shards


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_summary(group: Any, summary: Summary) -> None:
    for field in fields(Summary):
        value = getattr(summary, field.name)
        if isinstance(value, np.ndarray) and value.ndim == 2:
            chunks = (min(len(value), 4096), min(value.shape[1], 64))
            group.create_dataset(field.name, data=value, chunks=chunks)
        else:
            group[field.name] = value


def _read_summary(group: Any) -> Summary:
    arrays = {f.name: group[f.name][()] for f in fields(Summary)}
    return Summary(**{**arrays, "count": int(arrays["count"])})


# --- reading -----------------------------------------------------------------------------------


class ActivationStore:
    """A finished store, for reading.

    Attributes:
        folder: where it is.
        provenance: what it was made from.
    """

    def __init__(self, folder: Path, provenance: Provenance) -> None:
        self.folder, self.provenance = folder, provenance

    @classmethod
    def open(cls, folder: Path, model_hash: str | None = None) -> ActivationStore:
        """Open the store in a folder.

        Args:
            folder: where it is.
            model_hash: the model it must be of.

        Raises:
            FileNotFoundError: if there is none, or its harvest was not finished.
            StaleCacheError: if it is of another model.
            ValueError: if it is damaged.
        """
        provenance = Provenance.read(folder)
        if not (folder / "statistics.h5").exists():
            raise FileNotFoundError(
                f"activation store {str(folder)!r} is not finished: run the same harvest again"
            )
        if not h5py.is_hdf5(folder / "statistics.h5"):
            raise ValueError(
                f"activation store {str(folder)!r} has a damaged statistics.h5: run the same harvest "
                "again"
            )
        if model_hash is not None and provenance.model_hash != model_hash:
            raise StaleCacheError(
                f"activation store {str(folder)!r} is of model {provenance.model_hash[:16]}, not "
                f"{model_hash[:16]}"
            )
        return cls(folder, provenance)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The recorded sites by name."""
        return {site.name: site for site in self.provenance.sites}

    def _site(self, name: str) -> Site:
        if name not in self.sites:
            raise unknown("site of the activation store", name, self.sites)
        return self.sites[name]

    @contextmanager
    def _group(self, site: Site) -> Iterator[Any]:
        path = self.folder / "statistics.h5"
        try:
            file = h5py.File(path)
        except OSError as error:
            raise ValueError(f"activation store file {str(path)!r} is damaged: {error}") from error
        with file:
            yield file[site.name]

    def summary(self, site: str) -> Summary:
        """Everything about a site.

        Raises:
            KeyError: if the site was not recorded.
        """
        with self._group(self._site(site)) as group:
            return _read_summary(group)

    def statistics(self, unit: Unit) -> UnitStatistics:
        """A unit over the whole dataset.

        Raises:
            KeyError: if its site was not recorded.
            ValueError: if the site has no such unit.
        """
        i = self._site(unit.site).unit(unit.index).index
        with self._group(self.sites[unit.site]) as group:
            count = int(group["count"][()])
            mean = float(group["total"][i]) / count
            variance = max(0.0, float(group["square"][i]) / count - mean**2)
            return UnitStatistics(
                mean=mean,
                std=variance**0.5,
                minimum=float(group["minimum"][i]),
                maximum=float(group["maximum"][:, i].max()),
                density=float(group["positive"][i]) / count,
                edges=group["edges"][i],
                histogram=group["histogram"][i],
            )

    def top_examples(self, unit: Unit, k: int = 9) -> list[Example]:
        """The examples on which a unit's largest activation is largest, strongest first.

        Args:
            unit: which.
            k: how many; at most `TOP` are kept.

        Raises:
            KeyError: if its site was not recorded.
            ValueError: if the site has no such unit.
        """
        site = self._site(unit.site)
        i = site.unit(unit.index).index
        with self._group(site) as group:
            rows = group["top"][i][:k]
            values, places = group["maximum"][:, i], group["argmax"][:, i]
        return [self._example(site, int(r), float(values[r]), int(places[r])) for r in rows]

    def _example(self, site: Site, row: int, value: float, place: int) -> Example:
        shape = site.position_shape
        position = tuple(int(p) for p in np.unravel_index(place, shape)) if shape else ()
        return Example(row, self.provenance.examples[row], value, position)
