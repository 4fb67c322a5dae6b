"""Reading a store: the statistics and examples of units, summaries of sites, whole activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import Float, Int

from circuits.hdf5 import DamagedError, array, opened
from circuits.json_files import parse_json
from circuits.specs import normal_data
from circuits.store.provenance import Provenance, StaleCacheError
from circuits.store.rows import Rows
from circuits.store.shards import (
    ManifestLine,
    StoreWriter,
    check_unchanged,
    read_manifest,
    shard_name,
)
from circuits.store.summaries import (
    BINS,
    PER_EXAMPLE,
    WHOLE,
    Summary,
    TailFit,
    edges,
    fit_tail,
    skewness_and_kurtosis,
)
from circuits.tables import Table, by_reason
from circuits.units import Site, Unit, unknown

_AT_ONCE = 1 << 24
"""Numbers of units on examples that are in memory together."""

_SMALL = 1 << 26
"""Bytes of statistics that are compared with their checksum whenever a process opens them first: 0.15 seconds."""


@dataclass(frozen=True)
class Example:
    """An example, with a unit's largest activation on it.

    Attributes:
        index: the number of the example in the dataset.
        name: its name.
        value: the unit's largest activation on it.
        position: where that is: (y, x), (position,), or () for a site without positions.
        before: what it would be without the ceiling, at a site with one (`Site.ceiling`) whose site before it was
            recorded.
    """

    index: int
    name: str
    value: float
    position: tuple[int, ...]
    before: float | None = None

    def __str__(self) -> str:
        """The activation; what it would be without the ceiling if it is at one.

        >>> str(Example(0, "dog", 6.0, (), 9.71)), str(Example(0, "cat", 5.2, (), 5.2))
        ('9.71, cut off at 6', '5.2')
        """
        if self.before is not None and self.before > self.value:
            return f"{self.before:.3g}, cut off at {self.value:.3g}"
        return f"{self.value:.3g}"


@dataclass(frozen=True, eq=False)
class UnitStatistics:
    """A unit's activations over a whole dataset; numbers are NaN if none of its activations is finite.

    Attributes:
        mean: the mean over examples and positions.
        std: the standard deviation over examples and positions.
        skewness: the third standardised moment, over the positions that the histogram counts.
        kurtosis: the fourth standardised moment; 3 for a normal distribution.
        minimum: the smallest activation.
        maximum: the largest activation.
        density: the share of activations above zero.
        count: the number of finite activations.
        nonfinite: the number of activations that are NaN or infinite, which are left out of everything.
        edges: the edges of the histogram's inner bins.
        histogram: counts below the first edge, between the edges and above the last one; of a random sample of each
            example's positions if `looked_at` is less than `count`.
        tail: the exponential that fits the largest activations; at a site with a ceiling (`Site.ceiling`), the largest
            that they would be without it.
        saturated: the share of activations at the site's ceiling (`Site.ceiling`); None if it has none.
    """

    mean: float
    std: float
    skewness: float
    kurtosis: float
    minimum: float
    maximum: float
    density: float
    count: int
    nonfinite: int
    edges: Float[np.ndarray, " edge"]
    histogram: Int[np.ndarray, " bin"]
    tail: TailFit
    saturated: float | None = None

    @property
    def looked_at(self) -> int:
        """The number of activations that the histogram counts."""
        return int(self.histogram.sum())


@dataclass(frozen=True, eq=False)
class Covariance:
    """The covariance of a site's units over examples and positions.

    Attributes:
        mean: the mean of each column (a unit, or a dimension of a head).
        covariance: the covariance, with division by the number of rows.
        count: the number of rows.
    """

    mean: Float[np.ndarray, " column"]
    covariance: Float[np.ndarray, "column column"]
    count: int


@dataclass(frozen=True)
class Health:
    """The state of one file of a store, as found by `verify`.

    Attributes:
        file: its name.
        state: `consistent`, `missing`, `damaged` (not what the manifest says), or `unnoted` (not in the manifest).
    """

    file: str
    state: str


def describe(folder: Path) -> dict[str, Any]:
    """What a list of stores says of one, also if it is not finished or damaged."""
    facts = {"bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file())}
    try:
        p = Provenance.read(folder)
    except (OSError, ValueError):
        return facts | {"state": "damaged"}
    state = "finished" if (folder / "statistics.h5").exists() else "unfinished"
    return facts | {
        "state": state, "model": p.model, "data": p.data, "examples": len(p.examples), "sites": len(p.sites),
        "full": len(p.depth.full),
    }  # fmt: skip


def newest_store(
    folders: Iterable[Path], model_hash: str, site: str, data: str = ""
) -> ActivationStore | None:
    """The newest finished store of a model that has a site (of some data, if it is named); None if none has."""
    found, data = [], normal_data(data)
    for folder in folders:
        try:
            store = ActivationStore.open(folder, model_hash)
        except (OSError, ValueError):
            continue
        if site in store.sites and data in ("", normal_data(store.provenance.data)):
            found.append(store)
    # By the last file that a harvest writes.
    return max(found, key=lambda s: (s.folder / "statistics.h5").stat().st_mtime, default=None)


class ActivationStore:
    """A finished store, for reading.

    Attributes:
        folder: its folder.
        provenance: what it was made from.
    """

    def __init__(self, folder: Path, provenance: Provenance) -> None:
        self.folder, self.provenance = folder, provenance

    def to_dict(self) -> dict[str, Any]:
        """What it was made from and what is in it, as JSON has it."""
        p = self.provenance
        return {
            "folder": str(self.folder), "model": p.model, "model_hash": p.model_hash, "data": p.data,
            "data_hash": p.data_hash, "examples": len(p.examples), "skipped": self.skipped, "left_out": p.left_out,
            "version": p.version,
            "batch": p.batch, "depth": asdict(p.depth), "same": p.same, "sites": [site.name for site in p.sites],
            "nonfinite": self.nonfinite(),
        }  # fmt: skip

    def nonfinite(self) -> dict[str, int]:
        """How many activations are NaN or infinite, of the sites that have such."""
        each = {
            site.name: int(self.summary(site.name).nonfinite.sum())
            for site in self.provenance.sites
        }
        return {name: n for name, n in each.items() if n}

    def problems(self) -> Iterator[str]:
        """What is wrong with it, in lines."""
        if self.skipped:
            yield f"skipped {by_reason(self.skipped)}"
        for name, n in self.nonfinite().items():
            yield f"site {name}: {n} activations are NaN or infinite, and left out of statistics"

    def tables(self) -> Iterator[Table | str]:
        """Its sites, and what is kept of each."""
        p, rows = self.provenance, []
        for site in p.sites:
            depth = "summary" + ", full" * (site.name in p.depth.full)
            depth += ", covariance" * (site.name in p.depth.covariance)
            s = self.summary(site.name)
            best, density = float(np.fmax.reduce(s.maximum, axis=None)), float(s.density().mean())
            full = "" if site.ceiling is None else float(s.saturation().mean())
            rows.append((site.name, site.n_units, depth, best, density, full))
        bad = len(self.skipped)
        less = f", without {bad} that could not be read" if bad else ""
        yield f"{len(p.examples) - bad} examples of {p.data}{less}, in {self.folder}"
        columns = (
            "site",
            "units",
            "kept",
            "largest activation",
            "mean share above 0",
            "mean share at the ceiling",
        )
        width = len(columns) - all(row[-1] == "" for row in rows)
        yield Table(columns[:width], [row[:width] for row in rows])

    @classmethod
    def open(
        cls, folder: Path, model_hash: str | None = None, data_hash: str | None = None
    ) -> ActivationStore:
        """Open the store in a folder.

        Args:
            folder: the store's folder.
            model_hash: the hash that its model must have, if given.
            data_hash: the hash that its data must have, if given.

        Raises:
            FileNotFoundError: if there is no store, or its harvest is not finished.
            StaleCacheError: if it was made from another model or other data.
            ValueError: if it is damaged.
        """
        if not (folder / "provenance.json").is_file():
            raise FileNotFoundError(f"there is no activation store in {str(folder)!r}")
        provenance = Provenance.read(folder)
        if not (folder / "statistics.h5").is_file():
            raise FileNotFoundError(
                f"activation store {str(folder)!r} is not finished: run the same harvest again"
            )
        if not h5py.is_hdf5(folder / "statistics.h5"):
            raise ValueError(
                f"activation store {str(folder)!r} has a damaged statistics.h5: run the same harvest "
                "again"
            )
        for what, ours, wanted in (
            ("model", provenance.model_hash, model_hash),
            ("data", provenance.data_hash, data_hash),
        ):
            if wanted is not None and ours != wanted:
                raise StaleCacheError(
                    f"activation store {str(folder)!r} is of {what} {ours[:16]}, not {wanted[:16]}: "
                    "harvest again"
                )
        return cls(folder, provenance)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The recorded sites, by name and by alias."""
        sites = self.provenance.sites
        aliases = {alias: site for site in sites for alias in site.aliases}
        # Names last: a site's own name wins over another's alias.
        return aliases | {site.name: site for site in sites}

    def _site(self, name: str) -> Site:
        if name not in self.sites:
            raise unknown("site of the activation store", name, self.sites)
        return self.sites[name]

    def stored_as(self, site: str) -> str:
        """The site under which a site's numbers are kept: itself, or an earlier one with the same tensor."""
        return self.provenance.same.get(site, site)

    @contextmanager
    def _statistics(self) -> Iterator[Any]:
        path = self.folder / "statistics.h5"
        try:
            check_unchanged(path, _SMALL)
            with opened(path) as file:
                yield file
        except OSError as error:
            raise ValueError(
                f"activation store file {str(path)!r} is damaged: {error}; run the same harvest again"
            ) from error

    @cached_property
    def skipped(self) -> dict[str, str]:
        """The examples that could not be read, by name, with the reasons."""
        with self._statistics() as file:
            reasons = parse_json(bytes(array(file, "reasons", (None,), "u")[()]), str(self.folder))
            skipped = array(file, "skipped", (len(reasons),), "i")[()].tolist()
            names = self.provenance.examples
            if not all(0 <= i < len(names) for i in skipped):
                raise DamagedError(
                    f"statistics.h5: 'skipped' names examples that are not among the {len(names)}"
                )
            return {names[i]: r for i, r in zip(skipped, reasons, strict=True)}

    # --- summaries -----------------------------------------------------------------------------

    def summary(self, site: str) -> Summary:
        """The summary of a site, as arrays.

        Raises:
            KeyError: if the site was not recorded.
        """
        return self._summary(self.provenance.places[self._site(site).name])

    def _summary(self, units: slice) -> Summary:
        with self._statistics() as file:
            arrays = {
                f.name: self._kept(file, f.name)[np.s_[:, units] if f.name == "powers" else units]
                # Units are read as one run of the file's first axis; `powers` has the power first.
                for f in fields(Summary)
            }
        arrays["histogram"] = arrays["histogram"].astype(np.int64)  # kept in the fewest bytes
        return Summary(**{k: v.T if k in PER_EXAMPLE else v for k, v in arrays.items()})

    def _kept(self, file: Any, name: str) -> Any:
        """A field of the summaries as the file has it, which is checked to be of all units and examples."""
        units = sum(site.n_units for site in self.provenance.stored)
        shape: tuple[int, ...] = (units,)
        if name == "saturated" and f"summary/{name}" not in file:
            return np.zeros(units, np.int64)  # made when sites had no ceilings
        if name in PER_EXAMPLE:
            shape = (units, len(self.provenance.examples))
        elif name in ("histogram", "powers"):
            shape = (units, BINS + 2) if name == "histogram" else (4, units)
        return array(file, f"summary/{name}", shape, "iu" if name in WHOLE else "f")

    def _place(self, unit: Unit) -> int:
        """The index of a unit among those of all stored sites."""
        index = self._site(unit.site).unit(unit.index).index
        return self.provenance.places[self._site(unit.site).name].start + index

    def statistics(self, unit: Unit) -> UnitStatistics:
        """The statistics of a unit over the whole dataset.

        Raises:
            KeyError: if its site was not recorded.
            ValueError: if the site has no such unit.
        """
        place = self._place(unit)
        s = self._summary(slice(place, place + 1))
        mean, std = s.moments()
        histogram = s.histogram[0]
        skewness, kurtosis = skewness_and_kurtosis(s.powers[:, 0], int(histogram.sum()))
        bins = edges(float(s.low[0]), float(s.high[0]))
        finite = s.count[0] > 0
        return UnitStatistics(
            mean=float(mean[0]),
            std=float(std[0]),
            skewness=skewness,
            kurtosis=kurtosis,
            minimum=float(s.minimum[0]) if finite else float("nan"),
            maximum=float(np.nanmax(s.maximum)) if finite else float("nan"),
            density=float(s.density()[0]),
            count=int(s.count[0]),
            nonfinite=int(s.nonfinite[0]),
            edges=bins,
            histogram=histogram,
            tail=self._tail(unit, bins, histogram),
            saturated=None if self.sites[unit.site].ceiling is None else float(s.saturation()[0]),
        )

    def _tail(self, unit: Unit, bins: np.ndarray, histogram: np.ndarray) -> TailFit:
        """The tail of a unit's activations, from the site before a ceiling if that was recorded."""
        site = self._site(unit.site)
        if site.before not in self.sites:
            return fit_tail(bins, histogram)
        place = self._place(Unit(site.before, unit.index))
        s = self._summary(slice(place, place + 1))
        return fit_tail(edges(float(s.low[0]), float(s.high[0])), s.histogram[0])

    def _strengths(self, unit: Unit) -> tuple[Site, np.ndarray, np.ndarray]:
        """A unit's largest activation on each example, and its flattened position.

        At a site with a ceiling these are what they would be without it, if the site before it was recorded.
        """
        # Two rows of the file, read by themselves: a page on a unit needs none of its other statistics.
        site = self._site(unit.site)
        open_above = site.before in self.sites
        place = self._place(Unit(site.before, unit.index) if open_above else unit)
        with self._statistics() as file:
            values, places = (self._kept(file, name)[place] for name in ("maximum", "argmax"))
        if open_above and site.floor is not None:
            values = np.maximum(values, np.float32(site.floor))  # NaN stays
        return site, values, places

    def largest(self, unit: Unit) -> Float[np.ndarray, " example"]:
        """A unit's largest activation on each example; NaN where none is finite.

        At a site with a ceiling no number is above it.

        Raises:
            KeyError: if its site was not recorded.
            ValueError: if the site has no such unit.
        """
        site, values, _ = self._strengths(unit)
        return values if site.ceiling is None else np.minimum(values, np.float32(site.ceiling))

    def top_examples(self, unit: Unit, k: int = 9) -> list[Example]:
        """The examples on which a unit's largest activation is largest, strongest first.

        Many examples can be equal at the ceiling of a site; what the function with the ceiling was given puts them in
        order, if the site before it was recorded, as `harvest` does.

        Args:
            unit: the unit.
            k: the number of examples. Ties are broken by the order in the dataset; examples without a finite
                activation are left out.

        Raises:
            KeyError: if its site was not recorded.
            ValueError: if the site has no such unit.
        """
        site, values, places = self._strengths(unit)
        order = np.argsort(-values, kind="stable")  # NaN comes last
        # At most as many as have a finite value: beyond those only examples without any activation would follow.
        rows = order[: max(0, min(k, int(np.isfinite(values).sum())))]
        return [self._example(site, r, values, places) for r in rows.tolist()]

    def best_examples(self, site: str) -> list[Example | None]:
        """Each unit's strongest example, as `top_examples` has it; None of a unit without a finite activation.

        Raises:
            KeyError: if the site was not recorded.
        """
        place = self._site(site)
        open_above = place.before in self.sites
        stored = self.provenance.places[self._site(place.before).name if open_above else place.name]
        n = max(1, len(self.provenance.examples))
        found: list[Example | None] = []
        for start in range(stored.start, stored.stop, max(1, _AT_ONCE // n)):
            units = slice(start, min(stored.stop, start + max(1, _AT_ONCE // n)))
            with self._statistics() as file:
                values, places = (self._kept(file, name)[units] for name in ("maximum", "argmax"))
            if open_above and place.floor is not None:
                values = np.maximum(values, np.float32(place.floor))  # NaN stays
            known = np.isfinite(values)
            rows = np.where(known, values, -np.inf).argmax(1)
            found += [
                self._example(place, int(row), values[k], places[k]) if known[k].any() else None
                for k, row in enumerate(rows)
            ]
        return found

    def quantile_examples(
        self, unit: Unit, quantiles: int = 10, k: int = 4, seed: int = 0
    ) -> list[list[Example]]:
        """Draw examples from the whole range of a unit's activation: some from each quantile.

        Examples are ranked by the unit's largest activation on them, ties in random order, and cut into `quantiles`
        groups of nearly equal size. From each, `k` are drawn without replacement, all with the same probability.

        Args:
            unit: the unit.
            quantiles: the number of groups.
            k: the number of examples from each group; fewer where a group has fewer.
            seed: the seed of the draw.

        Returns:
            A list for each quantile, the strongest quantile first; in each, the strongest examples first.

        Raises:
            KeyError: if its site was not recorded.
            ValueError: if the site has no such unit, or `quantiles` or `k` is not positive.
        """
        for name, value in (("quantiles", quantiles), ("k", k)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        site, values, places = self._strengths(unit)
        generator = np.random.default_rng(seed)
        finite = np.flatnonzero(np.isfinite(values))
        # By value, ties in random order: many examples of a sparse unit have the value 0.
        # The last key counts first: strongest first, then at random.
        order = np.lexsort((generator.random(len(finite)), -values[finite]))
        found = []
        for group in np.array_split(finite[order], quantiles):
            drawn = generator.choice(group, min(k, len(group)), replace=False)
            drawn = drawn[np.argsort(-values[drawn], kind="stable")]
            found.append([self._example(site, r, values, places) for r in drawn.tolist()])
        return found

    def _example(self, site: Site, row: int, values: np.ndarray, places: np.ndarray) -> Example:
        shape = site.position_shape
        position = tuple(int(p) for p in np.unravel_index(places[row], shape)) if shape else ()
        name, value = self.provenance.examples[row], float(values[row])
        if site.ceiling is None or site.before not in self.sites:
            return Example(row, name, value, position)
        return Example(row, name, min(value, site.ceiling), position, value)

    # --- whole activations, covariance -----------------------------------------------------------

    def rows(self, site: str, damaged: Literal["refuse", "skip"] = "refuse") -> Rows:
        """The whole activations of a site.

        Args:
            site: the site.
            damaged: whether to refuse shards that are missing or cannot be read, or to skip their rows.

        Raises:
            KeyError: if the site's whole activations were not recorded.
            ValueError: if a shard is missing or damaged.
        """
        depth, name = self.provenance.depth, self._site(site).name
        if name not in depth.full:
            raise unknown("site at full depth", name, depth.full)
        files = [self.folder / shard_name(i) for i in range(len(self._shards))]
        try:
            width = self._site(name).width
            return Rows(files, self.stored_as(name), damaged, check_unchanged, width)
        except (OSError, KeyError) as error:
            raise ValueError(
                f"activation store {str(self.folder)!r} has a missing or damaged shard ({error}): run "
                "the same harvest again, or read the others with damaged='skip'"
            ) from error

    @property
    def _shards(self) -> tuple[range, ...]:
        return StoreWriter(self.folder, self.provenance).shards

    def covariance(self, site: str) -> Covariance:
        """Mean and covariance of a site's units.

        Raises:
            KeyError: if the site's covariance was not recorded.
            ValueError: if no row of the site is finite.
        """
        kept, site = self.provenance.depth.covariance, self._site(site).name
        if site not in kept:
            raise unknown("site with covariance", site, kept)
        with self._statistics() as file:
            path, width = f"covariance/{self.stored_as(site)}", self._site(site).width
            n = int(array(file, f"{path}/count", (), "iu")[()])
            if n == 0:
                raise ValueError(f"site {site} has no row of finite activations: no covariance")
            # With sums about c: E[x] = c + E[x - c], and cov(x) = E[(x - c)(x - c)^T] - E[x - c] E[x - c]^T.
            # Sums about a value near the mean, as E[x x^T] - E[x] E[x]^T would lose its digits for units whose mean is
            # far from 0.
            offset = array(file, f"{path}/total", (width,))[()] / n
            product = array(file, f"{path}/product", (width, width))[()] / n
            mean = array(file, f"{path}/center", (width,))[()] + offset
        return Covariance(mean, product - np.outer(offset, offset), n)

    # --- health ----------------------------------------------------------------------------------

    def verify(self) -> list[Health]:
        """Read every file and compare it with the manifest; damage is reported, not raised."""
        return verify(self.folder, self.provenance)


def verify(folder: Path, provenance: Provenance) -> list[Health]:
    """Read every file of a store, finished or not, and compare it with the manifest."""
    lines, bad = read_manifest(folder)
    names = ["reference.h5"]
    names += [shard_name(i) for i in range(len(StoreWriter(folder, provenance).shards))]
    found = [Health(f"manifest.jsonl line {number}", "damaged") for number in bad]
    for name in [*names, "statistics.h5"]:
        found.append(Health(name, _state(folder, name, lines.get(name))))
    return found


def _state(folder: Path, name: str, line: ManifestLine | None) -> str:
    if not (folder / name).is_file():
        return "missing"
    if line is None:
        return "unnoted"
    return "consistent" if line.intact(folder) else "damaged"
