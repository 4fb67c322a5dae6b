"""The graph store: the edges of a whole network on disk.

    <folder>/graph.h5              the weights, written once
             graph/<name>.h5       what was added later: expanded weights, attributions, effects

A file holds blocks. A block is the edges of one kind from units of one site to units of another: `sum`
(signed) and `norm` (strength) as matrices, target x source and again source x target, so that what
builds a unit and what it builds are each one read through a memory map; and, where edges have more than
one number, their `kernels`. NaN means that an edge was not measured. `index`, a JSON text, lists the
blocks. No file changes after it is renamed into place.
"""

from __future__ import annotations

import heapq
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuits.graph.blocks import FORMAT, BlockInfo, writing
from circuits.graph.circuit import KINDS, CircuitGraph
from circuits.graph.paths import sites_between, strongest_paths
from circuits.graph.surroundings import AllUnits
from circuits.hdf5 import DamagedError, array, opened
from circuits.json_files import parse_json
from circuits.units import Unit

FILE = "graph.h5"
ADDED = "graph"


class _Block:
    """A block, read through a memory map of its file."""

    def __init__(self, file: _File, number: int, info: BlockInfo) -> None:
        self._file, self._number, self.info = file, number, info
        self._known: dict[str, np.ndarray] = {}

    def _array(self, name: str) -> np.ndarray:
        if name not in self._known:
            shape = self.info.shape[::-1] if name.endswith("_by_source") else self.info.shape
            kernel = self.info.kernel if name == "kernels" else ()
            self._known[name] = self._file.array(f"blocks/{self._number}/{name}", (*shape, *kernel))
        return self._known[name]

    def sums(self, by_source: bool = False) -> np.ndarray:
        return self._array("sum_by_source" if by_source else "sum")

    def norms(self, at: Any, by_source: bool = False) -> np.ndarray:
        """Strengths at some places of the matrix."""
        if self.info.kernel:
            return np.asarray(self._array("norm_by_source" if by_source else "norm")[at])
        # Edges of one number have no norms stored, they are its size.
        return np.asarray(np.abs(self.sums(by_source)[at]))

    def typical(self, at: int, by_source: bool = False) -> float:
        """The median (the lower of two) of a row's strengths above zero."""
        norms = np.nan_to_num(self.norms(at, by_source), nan=0.0)
        strong = np.sort(norms[norms > 0])
        return float(strong[(len(strong) - 1) // 2]) if len(strong) else 0.0

    def edge(self, row: int, column: int, by_source: bool = False) -> dict[str, Any]:
        """The attributes of an edge; typical are those of the same target, or of the same source."""
        info = self.info
        found: dict[str, Any] = {
            "sum": float(self.sums()[row, column]),
            "norm": float(self.norms((row, column))),
            "typical": self.typical(column if by_source else row, by_source),
        }
        if info.kernel:
            found["kernel"] = self._array("kernels")[row, column].tolist()
        if info.layer:
            found |= {"layer": info.layer, "through": info.through}
        return found

    def units(self, row: int, column: int) -> tuple[Unit, Unit]:
        info = self.info
        source = info.sources[column] if info.sources else column
        target = info.targets[row] if info.targets else row
        return Unit(info.source, source), Unit(info.target, target)


class _File:
    """One file of blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = opened(path)
            self.index = parse_json(bytes(self._file["index"][()]), "its index", nan=True)
            if self.index["format"] != FORMAT:
                raise KeyError(self.index["format"])
            forms = {"model": str, "model_hash": str, "sites": dict, "blocks": list}
            if any(not isinstance(self.index[key], form) for key, form in forms.items()):
                raise TypeError("its index has other types")
            infos = [BlockInfo.read(raw) for raw in self.index["blocks"]]
        except FileNotFoundError:
            raise
        except DamagedError as error:
            raise self._damaged(error) from error
        # All that a file of something else can do, in one sentence to the person.
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"file {str(path)!r} is no graph of this version: build it again"
            ) from error
        with path.open("rb") as raw:
            self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # rows and kernels lie far apart: nothing to read ahead
            self._map.madvise(mmap.MADV_RANDOM)
        self.blocks = [_Block(self, i, info) for i, info in enumerate(infos)]

    def _damaged(self, error: DamagedError) -> ValueError:
        return ValueError(f"file {str(self.path)!r} is damaged: {error}; build it again")

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            dataset = array(self._file, name, shape)
        except DamagedError as error:
            raise self._damaged(error) from error
        offset = dataset.id.get_offset()
        if offset is None:
            return dataset[()]  # nothing was written: it is empty
        if offset + dataset.nbytes > len(self._map):
            raise self._damaged(DamagedError(f"{self.path.name}: {name!r} is cut off"))
        # A view of the mapped file: only the pages that are touched are read. HDF5 would read and copy through its own
        # cache.
        flat = np.frombuffer(self._map, dataset.dtype, dataset.size, offset)
        return flat.reshape(dataset.shape)

    def close(self) -> None:
        self._file.close()


class GraphStore(AllUnits):
    """The edges of a network on disk; reads what is asked for, never the whole.

    Args:
        folder: of the model, as `Workspace.model_folder` gives it; or a file of blocks.
        model_hash: of the model that is expected; not checked if not given.

    Raises:
        FileNotFoundError: if there is no graph.
        ValueError: if it was built for other weights, or cannot be read.
    """

    def __init__(self, folder: str | Path, model_hash: str | None = None) -> None:
        folder = Path(folder)
        main = folder / FILE if folder.is_dir() else folder
        if not main.is_file():
            raise FileNotFoundError(f"no graph at {str(main)!r}: `circuits graph build` makes one")
        added = sorted((main.parent / ADDED).glob("*.h5")) if main.name == FILE else []
        self._files = [_File(main)]
        index = self._files[0].index
        self.model: str = index["model"]
        self.model_hash: str = index["model_hash"]
        self.sites: dict[str, int] = index["sites"]
        self.skipped: list[Path] = []
        """Added files that belong to other weights or cannot be read."""
        if model_hash is not None and model_hash != self.model_hash:
            raise ValueError(
                f"graph {str(main)!r} was built for weights {self.model_hash[:16]}, the model has "
                f"{model_hash[:16]}: build it again"
            )
        for path in added:
            self._take(path)

    def _take(self, path: Path) -> None:
        try:
            file = _File(path)
        except ValueError:
            self.skipped.append(path)
            return
        if file.index["model_hash"] == self.model_hash:
            self._files.append(file)
        else:
            file.close()
            self.skipped.append(path)

    def __enter__(self) -> GraphStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files; arrays that were handed out stay as they are."""
        for file in self._files:
            file.close()

    @property
    def blocks(self) -> list[BlockInfo]:
        """What blocks of edges there are."""
        return [block.info for block in self._blocks()]

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return sum(info.shape[0] * info.shape[1] for info in self.blocks)

    def leads(self, source: str, target: str) -> bool:
        """Whether stored edges lead from a site to another, directly or through others."""
        return source != target and bool(sites_between(list(self._blocks()), source, target))

    def _blocks(self, kinds: Sequence[str] | None = None) -> Iterator[_Block]:
        wrong = next((kind for kind in kinds or () if kind not in KINDS), None)
        if wrong is not None:
            raise ValueError(f"kinds: {wrong!r} is not one of {', '.join(KINDS)}")
        for file in self._files:
            yield from (b for b in file.blocks if kinds is None or b.info.kind in kinds)

    def neighbourhood(
        self,
        unit: str | Unit,
        hops: int = 1,
        top: int = 10,
        kinds: Sequence[str] | None = None,
    ) -> CircuitGraph:
        """What builds a unit and what it builds, and so on for those.

        Args:
            unit: where to start.
            hops: how many steps to go.
            top: of each unit, how many edges in and how many out to follow, the strongest of each kind.
            kinds: which kinds of edges; all if not given.

        Raises:
            KeyError: if the unit's site is unknown.
            ValueError: if the unit does not exist, a kind is unknown, or a number is not positive.
        """
        start, graph = self._begun(unit, hops, top)
        blocks = list(self._blocks(kinds))
        # Breadth first, and every unit once.
        frontier, seen = [start], {start}
        for _ in range(hops):
            found: dict[Unit, None] = {}
            for here in frontier:
                for incoming in (True, False):
                    for other in self._add_strongest(graph, here, blocks, top, incoming):
                        found.setdefault(other)
            frontier = [other for other in found if other not in seen]
            seen.update(frontier)
        return graph

    def _add_strongest(
        self, graph: CircuitGraph, unit: Unit, blocks: Sequence[_Block], top: int, incoming: bool
    ) -> Iterator[Unit]:
        """Add a unit's strongest edges on one side, and give the units at their other ends."""
        best: dict[str, list[tuple[float, int, int, int]]] = {}
        for number, block in enumerate(blocks):
            info = block.info
            if (info.target if incoming else info.source) != unit.site:
                continue
            # A block may have some units of the site only.
            here = info.row(unit.index) if incoming else info.column(unit.index)
            if here is None:
                continue
            norms = np.nan_to_num(block.norms(here, by_source=not incoming), nan=0.0)
            strong = np.flatnonzero(norms)
            if not len(strong):
                continue
            if len(strong) > top:
                # argpartition finds the `top` largest without sorting the rest.
                strong = strong[np.argpartition(-norms[strong], top - 1)[:top]]
            for other in strong.tolist():
                row, column = (here, other) if incoming else (other, here)
                best.setdefault(info.kind, []).append((-float(norms[other]), number, row, column))
        for kind, edges in best.items():
            # The best over all blocks of a kind together, so that a unit that many layers read does not get `top` edges
            # from each. Ties go to the first block and place.
            for _, number, row, column in heapq.nsmallest(top, edges):
                block = blocks[number]
                source, target = block.units(row, column)
                graph.connect(source, target, kind, **block.edge(row, column, not incoming))
                yield source if incoming else target

    def subgraph(
        self, units: Sequence[str | Unit], kinds: Sequence[str] | None = None
    ) -> CircuitGraph:
        """Some units with all edges between them.

        Raises:
            KeyError: if a site is unknown.
            ValueError: if a unit does not exist or a kind is unknown.
        """
        wanted = list(dict.fromkeys(self.check(unit) for unit in units))
        graph = self._new({"subgraph": [str(unit) for unit in wanted]})
        graph.add_nodes_from(wanted)
        by_site: dict[str, list[int]] = {}
        for unit in wanted:
            by_site.setdefault(unit.site, []).append(unit.index)
        for block in self._blocks(kinds):
            info = block.info
            rows = [r for u in by_site.get(info.target, ()) if (r := info.row(u)) is not None]
            columns = [c for u in by_site.get(info.source, ()) if (c := info.column(u)) is not None]
            if not rows or not columns:
                continue
            # NaN, not measured, is no edge.
            norms = np.nan_to_num(block.norms(np.ix_(rows, columns)), nan=0.0)
            for i, j in np.argwhere(norms).tolist():
                source, target = block.units(rows[i], columns[j])
                graph.connect(source, target, info.kind, **block.edge(rows[i], columns[j]))
        return graph

    def paths(
        self,
        source: str | Unit,
        target: str | Unit,
        top: int = 10,
        kinds: Sequence[str] | None = ("weight",),
    ) -> CircuitGraph:
        """The strongest paths from a unit to a later one, put together as a circuit.

        A path's strength is the product of its edges' norms. Each path is listed under `paths` in the
        result's `graph`, strongest first: its units, strength and sign (the product of the signs of
        the edges' sums). Of several blocks between the same units the strongest edge counts.

        Args:
            source: where they start.
            target: where they end.
            top: how many.
            kinds: which kinds of edges to walk along.

        Raises:
            KeyError: if a site is unknown.
            ValueError: if a unit does not exist, or there is no path; the message says if there is
                one the other way round.
        """
        start, end = self.check(source), self.check(target)
        if top < 1:
            raise ValueError(f"top {top} must be at least 1")
        blocks = list(self._blocks(kinds))
        order = sites_between(blocks, start.site, end.site)
        if start == end or end.site not in order:
            back = bool(sites_between(blocks, end.site, start.site)) and start.site != end.site
            hint = f": {end} comes before {start}" if back else ""
            raise ValueError(f"no path from {start} to {end}{hint}")
        found = strongest_paths(blocks, order, self.sites, start, end, top)
        if not found:
            raise ValueError(f"no path from {start} to {end}: no edge between them is above zero")
        graph = self._new({"paths": [str(start), str(end)], "top": top})
        listed = []
        for strength, steps in found:
            units, sign = [start], 1
            for number, row, column in steps:
                block = blocks[number]
                a, b = block.units(row, column)
                attributes = block.edge(row, column)
                graph.connect(a, b, block.info.kind, **attributes)
                # A path excites if an even number of its edges inhibit.
                sign *= int(np.sign(attributes["sum"]))
                units.append(b)
            listed.append({"units": [str(u) for u in units], "strength": strength, "sign": sign})
        graph.graph["paths"] = listed
        return graph


# --- adding ------------------------------------------------------------------------------------


def add_edges(
    folder: str | Path,
    name: str,
    blocks: Sequence[tuple[BlockInfo, np.ndarray]],
) -> Path:
    """Store edges in addition to the weights of a graph: expanded weights, attributions, effects.

    Args:
        folder: of the model, which has a graph.
        name: of the new file; one of the same name is replaced.
        blocks: what each is, and its numbers: target x source x kernel axes, NaN for not measured.

    Raises:
        FileNotFoundError: if there is no graph.
        ValueError: if the name is not one of a file, a unit is not in the graph, the provenance does
            not name a method, or numbers do not fit.
    """
    path = _added(folder, name)
    with GraphStore(folder) as store:
        for info, values in blocks:
            if not info.provenance.get("method"):
                raise ValueError(
                    f"edges {name!r} from {info.source} to {info.target}: provenance needs a method"
                )
            for site, units, n in (
                (info.target, info.targets, info.shape[0]),
                (info.source, info.sources, info.shape[1]),
            ):
                known = store.check(Unit(site, 0)).site
                everything = units or range(store.sites[known])
                if len(everything) != n or len(set(everything)) != n:
                    raise ValueError(
                        f"edges {name!r}: {len(everything)} units of {site} do not fit shape "
                        f"{info.shape}, or one is listed twice"
                    )
                # The smallest and the largest fit only if all do.
                for unit in (min(everything), max(everything)):
                    store.check(Unit(site, unit))
            if values.shape != (*info.shape, *info.kernel) or np.isinf(values).any():
                raise ValueError(
                    f"edges {name!r} from {info.source} to {info.target}: numbers of shape {values.shape} "
                    f"must be finite or NaN, of shape {(*info.shape, *info.kernel)}"
                )
        model, model_hash, sites = store.model, store.model_hash, store.sites
    with writing(path, model, model_hash, sites) as writer:
        for info, values in blocks:
            with writer.block(info) as block:
                block.write(values)
    return path


def _added(folder: str | Path, name: str) -> Path:
    """The file of added edges of a name, which never leads out of the folder."""
    if not re.fullmatch(r"[\w.+-]{1,100}", name) or name.startswith("."):
        raise ValueError(f"name {name!r} of edges must be letters, digits and any of . _ + -")
    return Path(folder) / ADDED / f"{name}.h5"


def remove_edges(folder: str | Path, name: str) -> None:
    """Delete what `add_edges` stored under a name.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if it is not the name of a file.
    """
    path = _added(folder, name)
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.h5"))
        raise FileNotFoundError(f"no added edges {name!r}: there are {', '.join(known) or 'none'}")
    os.unlink(path)
