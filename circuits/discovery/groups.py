"""Groups of channels as single nodes of a graph: what a family adds to a unit, or what units add to a family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.channels import ChannelGraph
from circuits.discovery.graphs import Cut, EdgeGraph, PlacedNode
from circuits.graph.circuit import UnitGroup
from circuits.hooks import Change
from circuits.json_files import read_json
from circuits.units import Site, Unit, Units, unknown

_NAME = re.compile("[^\\W0-9][\\w.-]*")


class GroupedGraph(EdgeGraph):
    """A graph of channels in which some stand together, each group as one source and one target, `SITE:NAME`.

    An edge of a group is all edges of its channels between the same two ends: they are patched together, which is one
    pass with all of them off, and gradient scores are the sums of theirs. The norm of its weights is that of all their
    weights together.

    Args:
        inner: the graph of channels.
        groups: the channels of each group by its name, of one site that the graph names.

    Raises:
        KeyError: if a channel of a group is not in the graph.
        ValueError: if a name is no word, a channel is in two groups, or channels of a group are made of each other.
    """

    def __init__(self, inner: ChannelGraph, groups: Mapping[str, Units]) -> None:
        self.inner, self.model = inner, inner.model
        self.grain, self.whole = "channels and groups of them", inner.whole
        self.input_sites = inner.input_sites
        self._groups = {
            f"{units.site}:{name}": _members(inner, name, units) for name, units in groups.items()
        }
        called = _called(self._groups)
        self.sources = tuple(dict.fromkeys(called.get(name, name) for name in inner.sources))
        number = {name: i for i, name in enumerate(self.sources)}
        self._source_of = np.array([number[called.get(name, name)] for name in inner.sources])
        unsorted = tuple(dict.fromkeys(called.get(name, name) for name in inner.targets))
        place = {name: i for i, name in enumerate(unsorted)}
        target_of = np.array([place[called.get(name, name)] for name in inner.targets])
        order = self._ordered(unsorted, target_of)
        self.targets = tuple(unsorted[i] for i in order)
        self._target_of = np.argsort(order)[target_of]
        ends = np.stack([self._source_of[inner.ends[:, 0]], self._target_of[inner.ends[:, 1]]], 1)
        pairs, parent = np.unique(ends[:, ::-1], axis=0, return_inverse=True)
        self.ends = np.ascontiguousarray(pairs[:, ::-1])
        self._parent: Int[Tensor, " inner"] = torch.from_numpy(parent.reshape(-1))
        feeds: list[dict[int, None]] = [{} for _ in self.targets]
        for target, fed in enumerate(inner.feeds):
            feeds[self._target_of[target]].update(
                dict.fromkeys(self._source_of[list(fed)].tolist())
            )
        self.feeds = tuple(tuple(sorted(fed)) for fed in feeds)

    def _ordered(self, names: Sequence[str], target_of: Int[np.ndarray, " target"]) -> list[int]:
        """Targets in an order in which each comes before those that read what it feeds.

        Raises:
            ValueError: if there is none, as channels of a group are made of each other.
        """
        inner, before = self.inner, [set[int]() for _ in names]
        readers: dict[int, set[int]] = {}
        for source, target in inner.ends.tolist():
            readers.setdefault(source, set()).add(int(target_of[target]))
        # A group is one source as well: who reads one of its channels reads the group.
        together: dict[int, set[int]] = {}
        for source, own in readers.items():
            together.setdefault(int(self._source_of[source]), set()).update(own)
        for target, fed in enumerate(inner.feeds):
            for source in fed:
                for later in together.get(int(self._source_of[source]), ()):
                    before[later].add(int(target_of[target]))
        found: list[int] = []
        left = dict.fromkeys(range(len(names)))
        done = set[int]()
        while left:
            ready = [i for i in left if before[i] <= done]
            if not ready:
                stuck = [names[i] for i in left if names[i] in self._groups]
                raise ValueError(
                    f"group {stuck[0].rpartition(':')[2]}: some of its channels are made of others of them; expected "
                    "channels of one layer, or a group for each"
                )
            found += ready
            done.update(ready)
            left = {i: None for i in left if i not in done}
        return found

    # --- names -----------------------------------------------------------------------------------

    def kind(self, name: str) -> str:
        return (
            f"group of {name.rpartition(':')[0]}" if name in self._groups else self.inner.kind(name)
        )

    def node(self, name: str) -> PlacedNode:
        if name not in self._groups:
            return self.inner.node(name)
        return UnitGroup(name.rpartition(":")[2], tuple(map(Unit.parse, self._groups[name])))

    # --- sites -----------------------------------------------------------------------------------

    @property
    def reads(self) -> tuple[str, ...]:
        return self.inner.reads

    @property
    def slopes(self) -> tuple[str, ...]:
        return self.inner.slopes

    @property
    def pull_reads(self) -> tuple[str, ...]:
        return self.inner.pull_reads

    def source_sites(self) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        made: list[tuple[tuple[str, ...], set[int]]] = []
        for sites, sources in self.inner.source_sites():
            own = {int(self._source_of[s]) for s in sources}
            # Sites that show channels of one group are changed together.
            for other in [m for m in made if m[1] & own]:
                made.remove(other)
                sites, own = (*other[0], *sites), own | other[1]
            made.append((sites, own))
        for sites, own in made:
            yield tuple(dict.fromkeys(sites)), sorted(own)

    @cached_property
    def _sites_of(self) -> tuple[tuple[str, ...], ...]:
        """The sites at which each target is changed, in order."""
        order = {site.name: i for i, site in enumerate(self.model.sites)}
        found: list[set[str]] = [set() for _ in self.targets]
        for target, own in enumerate(self._target_of.tolist()):
            found[own].add(self.inner.first_site(target))
        return tuple(tuple(sorted(sites, key=order.__getitem__)) for sites in found)

    def first_site(self, target: int) -> str:
        return self._sites_of[target][0]

    def starts(self, site: str) -> list[Site]:
        return self.inner.starts(site)

    def cut(self, sites: Sequence[str]) -> Cut | None:
        wider = {own for found in self._sites_of if found[0] in sites for own in found} | {*sites}
        return self.inner.cut([site for site in self.slopes if site in wider])

    # --- what is computed ------------------------------------------------------------------------

    def changes(
        self,
        off: Float[Tensor, "set edge"],
        other: Mapping[str, Tensor],
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Change]:
        return self.inner.changes(off.cpu()[:, self._parent], other, known)

    def pulled(
        self, cache: Mapping[str, Tensor], gradients: Mapping[str, Tensor], linear: bool = False
    ) -> dict[str, Tensor]:
        return self.inner.pulled(cache, gradients, linear)

    def contracted(
        self,
        clean: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        pulled: Mapping[str, Tensor],
        linear: bool = False,
    ) -> Float[Tensor, "example edge"]:
        made = self.inner.contracted(clean, other, pulled, linear)
        found = made.new_zeros(len(made), len(self))
        return found.index_add(1, self._parent.to(made.device), made)

    def weight_norms(self) -> Float[np.ndarray, " edge"]:
        squares = np.bincount(self._parent.numpy(), self.inner.weight_norms() ** 2, len(self))
        return np.sqrt(squares)

    def members(self, edge: int) -> Bool[np.ndarray, " inner"]:
        """Which edges of the graph of channels an edge is."""
        return self._parent.numpy() == edge


def _members(graph: ChannelGraph, name: str, units: Units) -> tuple[str, ...]:
    """The names of a group's channels."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"group {name!r}: expected a name that begins with a letter, such as curves"
        )
    own = [
        n
        for n in dict.fromkeys((*graph.sources, *graph.targets))
        if n.rpartition(":")[0] == units.site
    ]
    wanted = own if units.indices is None else [f"{units.site}:{i}" for i in units.indices]
    for channel in wanted or [f"{units.site}:*"]:
        if channel not in own:
            raise unknown(
                f"channel of group {name} in the graph of {graph.model.name}",
                channel,
                own or graph.sources,
            )
    return tuple(wanted)


def _called(groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The group of each channel that is in one."""
    found: dict[str, str] = {}
    for group, channels in groups.items():
        for channel in channels:
            if channel in found:
                first, second = (g.rpartition(":")[2] for g in (found[channel], group))
                raise ValueError(
                    f"channel {channel} is in the groups {first} and {second}: expected one"
                )
            found[channel] = group
    return found


def parse_groups(text: str) -> dict[str, Units]:
    """Groups by name, written `NAME=SITE:1,2,5-9` with `;` between, or a file of families (`circuits families --json`).

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is neither.

    >>> parse_groups("curves=mixed3a:1,2; lines=mixed3a:5-6")["lines"].indices
    (5, 6)
    """
    if text.endswith(".json"):
        return _from_file(Path(text))
    found: dict[str, Units] = {}
    for part in (p.strip() for p in text.split(";")):
        name, equals, units = (p.strip() for p in part.partition("="))
        if not equals:
            raise ValueError(
                f"groups {text!r}: expected NAME=SITE:1,2,5-9, with ; between groups, or a .json file of families"
            )
        if name in found:
            raise ValueError(f"groups {text!r}: {name} is there twice")
        found[name] = Units.parse(units)
    return found


def _from_file(path: Path) -> dict[str, Units]:
    read = read_json(path, f"groups {str(path)!r}")
    try:
        families = read["families"] if isinstance(read, Mapping) else read
        found = {
            str(family["name"]).replace(" ", "_"): Units.of([m["unit"] for m in family["members"]])
            for family in families
        }
    except KeyError as error:
        raise ValueError(f"groups {path}: no file of families: it has no {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"groups {path}: no file of families: {error}") from error
    if not found:
        raise ValueError(f"groups {path}: there is no family in it")
    return found
