"""The graph of a convolutional network: its channels, from each nonlinearity to the next."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.discovery.channel_names import ChannelNames
from circuits.discovery.channel_routes import (
    ChannelRoute,
    by_offset,
    chosen_channels,
    connected_channels,
)
from circuits.discovery.channel_sizes import CarriedMaps
from circuits.discovery.graphs import LIMIT, Cut, EdgeGraph, PlacedNode
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.adapter.program import Value
from circuits.models.paths.channels import ChannelFlow, ChannelPath
from circuits.models.paths.restarting import restart_candidates
from circuits.units import Site, Units


class ChannelGraph(EdgeGraph):
    """The direct paths between channels of an image model.

    A source is a channel as later layers read it, after its nonlinearity; a target is a channel as it is given to its
    nonlinearity: what a convolution or linear layer, batch norm and the addition of a shortcut make of sources. Of the
    model's output the classes are targets. An edge is a path from a source to a target along which channels pass one
    layer at most, through all offsets of its kernel, and through pooling, concatenation and shortcuts. Several such
    paths between the same two are one edge. What one layer puts out and another reads without a nonlinearity in between
    is a target and a source.

    Max pooling of one channel by itself is no end of a path: an edge carries the change of the pooled channel, which is
    exact in patching, while integrated gradients no longer add up to the whole effect. Where an operation mixes
    channels nonlinearly (local response normalisation), the source is a channel of what it puts out, and each target
    whose channel it reads feeds it.

    Sites that lie between named ones, such as bottlenecks, belong to the graph with all channels that have an effect.
    Of the first named sites, channels are sources only. Sources that were not named or lie before those are not in the
    graph: what they carry stays as it is.

    Args:
        model: an image model.
        sites: sites, written `SITE` or with units `SITE:1,2,5-9`, or `Units`; `input` is the image. None takes all
            channels of the model and the image.
        offsets: whether each offset of a kernel is an edge of its own, into a target `SITE:INDEX@y-1x+0`: what the
            source adds from one pixel higher. Offsets count from the middle of the kernel (of an even one, the later of
            the two), in pixels of what the layer reads; what comes along no kernel is at `@y+0x+0`.
        limit: the most edges.

    Attributes:
        model: the model, with further sites where targets and sources had none.
        complete: for each target whether all that it reads is in the graph.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if the model takes no images or is edited, a site holds neither what a nonlinearity is given nor
            what one puts out, no direct path leads from a named site to another, or there are more edges than `limit`.
    """

    def __init__(
        self,
        model: HookedModel,
        sites: Sequence[str | Units] | None = None,
        *,
        offsets: bool = False,
        limit: int = LIMIT,
    ) -> None:
        if not isinstance(model.input, ImageInput):
            raise ValueError(f"model {model.name} takes tokens: a graph of channels needs images")
        if model.edited:
            raise ValueError(f"model {model.name} is edited: build its graph outside the edit")
        if sites is not None and not sites:
            raise ValueError("sites are an empty list: expected names of sites, or None for all")
        self.grain = "channels, by offset of kernels" if offsets else "channels"
        self._by_offset = offsets
        flow = ChannelFlow(model)
        names = ChannelNames(flow)
        kept = chosen_channels(flow, names, None if sites is None else [*map(_units, sites)], limit)
        self.whole = sites is None
        self._flow, self._kept = flow, kept
        self._number(names, limit)
        self._place(names)

    def _number(self, names: ChannelNames, limit: int) -> None:
        """Give sources, targets and edges their names and numbers."""
        kept, flow = self._kept, self._flow
        self._source_at = _numbered(kept.sources, flow)
        self.sources = _unique(names.source(v, c) for v, c in self._source_at)
        columns = {v: _columns(self._source_at, v, flow) for v in kept.sources}
        self._target_at: list[tuple[Value, int]] = []
        self._routes: dict[Value, list[ChannelRoute]] = {}
        self._span: dict[Value, tuple[int, int]] = {}
        called: list[str] = []
        ends: list[np.ndarray] = []
        stop = 0
        for target in sorted(kept.targets, key=flow.order):
            first, self._routes[target] = stop, []
            for offset, paths, tables in self._apart(target):
                sources = sorted(tables, key=flow.order)
                joined = torch.cat([tables[s] for s in sources], 1)
                where = torch.cat([columns[s] for s in sources])
                row, column = joined.nonzero().T
                start, stop = stop, stop + len(row)
                channels = joined.any(1).nonzero()[:, 0].tolist()
                numbers = torch.full((len(joined),), -1)
                numbers[channels] = torch.arange(len(channels)) + len(self._target_at)
                self._target_at += [(target, c) for c in channels]
                called += [names.target(target, c) + offset for c in channels]
                ends.append(torch.stack([where[column], numbers[row]], 1).numpy())
                number = torch.full(joined.shape, -1)
                number[row, column] = torch.arange(start, stop)
                at = number.split([tables[s].shape[1] for s in sources], 1)
                places = dict(zip(sources, at, strict=True))
                found = [
                    ChannelRoute.of(path, places[path.source], flow)
                    for path in paths
                    if path.source in places
                ]
                self._routes[target] += [route for route in found if len(route.edges)]
            self._span[target] = first, stop
            if stop > limit:
                raise ValueError(
                    f"sites of {flow.model.name} have more than {limit} edges through offsets of kernels: name fewer "
                    "sites, or units of them (SITE:1,2,5-9)"
                )
        self.targets = _unique(called)
        self.ends = np.concatenate(ends)
        self.complete = np.array([bool(kept.complete[v][c]) for v, c in self._target_at])
        self.feeds = self._fed(columns)

    def _apart(
        self, target: Value
    ) -> Iterator[tuple[str, list[ChannelPath], dict[Value, Bool[Tensor, "_ _"]]]]:
        """The paths to a target that are edges of their own: what the target is then called behind its name, the paths,
        and which channels they connect, by source.
        """
        flow, tables = self._flow, self._kept.tables[target]
        paths = [path for path in flow.paths(target) if path.source in tables]
        if not self._by_offset:
            yield "", paths, tables
            return
        apart: dict[tuple[int, int], list[ChannelPath]] = defaultdict(list)
        for path in paths:
            for offset, own in by_offset(path):
                apart[offset].append(own)
        for y, x in sorted(apart):
            made: dict[Value, Tensor] = {}
            for path in apart[y, x]:
                own = connected_channels(path, flow, target) & tables[path.source]
                made[path.source] = made[path.source] | own if path.source in made else own
            yield f"@y{y:+d}x{x:+d}", apart[y, x], made

    # --- names -----------------------------------------------------------------------------------

    def kind(self, name: str) -> str:
        whole, offset = _without_offset(name)
        return super().kind(whole) + offset

    def node(self, name: str) -> PlacedNode:
        return super().node(_without_offset(name)[0])

    def way(self, target: int) -> str:
        return _without_offset(self.targets[target])[1]

    def _fed(self, columns: Mapping[Value, Tensor]) -> tuple[tuple[int, ...], ...]:
        found: dict[int, list[int]] = defaultdict(list)
        numbers: dict[tuple[Value, int], list[int]] = defaultdict(list)
        for i, at in enumerate(self._target_at):
            numbers[at].append(i)
        for source, where in columns.items():
            for target, table in self._flow.computed_from(source).items():
                for s, t in table.nonzero().tolist():
                    for i in numbers.get((target, t), ()):
                        if where[s] >= 0:
                            found[i].append(int(where[s]))
        return tuple(tuple(sorted(found[i])) for i in range(len(self._target_at)))

    def _place(self, names: ChannelNames) -> None:
        """Choose the sites at which targets are changed and sources are read; sites are added where there are none."""
        flow = self._flow
        sources = {v: names.read_at(v) for v in self._kept.sources}
        taken = {site for found in sources.values() for site in found}
        self._target_site = {v: names.changed_at(v, taken) for v in self._routes}
        self._source_site = {v: found[0] for v, found in sources.items()}
        self.model = names.showing()
        given = {self._source_at[s][0] for s in self.inputs}
        self.input_sites = tuple(
            dict.fromkeys(site for v in sorted(given, key=flow.order) for site in sources[v])
        )
        self._site_target = {site: v for v, site in self._target_site.items()}
        self._held = {v: sites[0] for v, sites in flow.shown.items()} | self._source_site
        self._cuts: dict[tuple[str, ...], Cut | None] = {}
        order = {s.name: i for i, s in enumerate(self.model.sites)}
        self._starts = {site: names.starts(site, order)[:1] for site in self.slopes}

    # --- sites -----------------------------------------------------------------------------------

    @property
    def reads(self) -> tuple[str, ...]:
        return self._reads

    @cached_property
    def _reads(self) -> tuple[str, ...]:
        starts = (site for found in self._starts.values() for site in found)
        cuts = [self.cut([site]) for site in self.slopes]
        given = (site for cut in cuts if cut is not None for site in cut.given)
        sources = self._source_site.values()
        return tuple(dict.fromkeys([*sources, *self.input_sites, *self.slopes, *starts, *given]))

    @property
    def slopes(self) -> tuple[str, ...]:
        return tuple(self._target_site.values())

    def source_sites(self) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        yield self.input_sites, sorted(self.inputs)
        together: dict[str, list[int]] = defaultdict(list)
        for i, (value, _) in enumerate(self._source_at):
            if i not in self.inputs:
                together[self._source_site[value]].append(i)
        for site, sources in together.items():
            yield (site,), sources

    def first_site(self, target: int) -> str:
        return self._target_site[self._target_at[target][0]]

    def starts(self, site: str) -> list[Site]:
        before = [self.model.site(name) for name in self._starts[site]]
        return [*restart_candidates(self.model, self.model.site(site)), *before]

    def cut(self, sites: Sequence[str]) -> Cut | None:
        key = tuple(sites)
        if key not in self._cuts:
            self._cuts[key] = self._cut({self._site_target[site] for site in key})
        return self._cuts[key]

    def _cut(self, changed: set[Value]) -> Cut | None:
        """The changed targets that no other reaches, and what they do not reach but is read with what they do."""
        flow = self._flow.flow
        reached, first, joined = set[Value](), list[Value](), dict[Value, None]()
        for op in flow.program.operations:
            if not reached.isdisjoint(op.inputs):
                given = (v for v in op.inputs if v in flow.dependent and v not in reached)
                joined.update(dict.fromkeys(given))
                reached.update(op.outputs)
            else:
                first += (v for v in op.outputs if v in changed)
                reached.update(v for v in op.outputs if v in changed)
        if any(v in self._flow.image or v not in self._held for v in joined):
            return None
        given = [self._target_site[v] for v in first] + [self._held[v] for v in joined]
        shown = self._target_site | self._source_site
        names = {site for v, site in shown.items() if v in reached}
        names.update(name for name, (v, _) in self._flow.places.items() if v in reached)
        return Cut(tuple(given), frozenset(names))

    # --- what is computed ------------------------------------------------------------------------

    def changes(
        self,
        off: Float[Tensor, "set edge"],
        other: Mapping[str, Tensor],
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Change]:
        off = off.cpu()  # the numbers of edges are there, too
        touched = (off.detach() != 0).any(0)
        if off.requires_grad:
            touched = torch.ones_like(touched)
        live = dict(known or {})
        found: dict[str, Change] = {}
        for site, target in self._site_target.items():
            start, stop = self._span[target]
            if not bool(touched[start:stop].any()):
                continue
            for route in self._routes[target]:
                read = self._source_site[route.path.source]
                if read not in live and read not in found:
                    found[read] = _noting(live, read)
            found[site] = self._patching(target, off, touched, other, live)
        return found

    def _patching(
        self,
        target: Value,
        off: Tensor,
        touched: Tensor,
        other: Mapping[str, Tensor],
        live: Mapping[str, Tensor],
    ) -> Change:
        """The change of a target's site."""
        site = self._target_site[target]

        def change(value: Tensor) -> Tensor:
            n = len(value) // len(off)
            made = value.unflatten(0, (-1, n))
            for route in self._routes[target]:
                if bool(touched[route.edges].any()):
                    read = self._source_site[route.path.source]
                    before, after = (
                        x.to(value).unflatten(0, (-1, n)) for x in (live[read], other[read])
                    )
                    made = route.patched(made, off, touched, before, after)
            if site in other:
                made = self._given_whole(made, target, off, other[site].unflatten(0, (-1, n)))
            return made.flatten(0, 1)

        return change

    def _given_whole(self, made: Tensor, target: Value, off: Tensor, other: Tensor) -> Tensor:
        """What targets are given, to the bit what they were given in the other run where all their edges are off."""
        start, stop = self._span[target]
        first, last = self.ends[start, 1], self.ends[stop - 1, 1]
        row = torch.from_numpy(self.ends[start:stop, 1] - first)
        kept = off.new_zeros(len(off), int(last - first + 1))
        kept = kept.index_add(1, row, (off[:, start:stop] != 1).to(off))
        whole = torch.zeros(len(off), made.shape[2], dtype=torch.bool)
        channel = torch.tensor([c for v, c in self._target_at[first : last + 1]])
        complete = torch.from_numpy(self.complete[first : last + 1])
        # A channel is several targets where offsets are told apart.
        still = kept.new_zeros(len(off), made.shape[2]).index_add(1, channel, kept)
        whole[:, channel] = (still == 0)[:, channel] & complete
        if not bool(whole.any()):
            return made
        wide = whole.to(made.device).reshape(len(off), 1, -1, *(1,) * (made.ndim - 3))
        # A zero with the gradient of what is replaced, so that derivatives by `off` stay.
        return torch.where(wide, other + (made - made.detach()), made)

    def pulled(
        self, cache: Mapping[str, Tensor], gradients: Mapping[str, Tensor], linear: bool = False
    ) -> dict[str, Tensor]:
        # Targets are what sites show.
        return {site: gradients[site].clone() for site in self.slopes}

    def contracted(
        self,
        clean: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        pulled: Mapping[str, Tensor],
        linear: bool = False,
    ) -> Float[Tensor, "example edge"]:
        like = next(iter(pulled.values()))
        made = like.new_zeros(len(like), len(self))
        for site, target in self._site_target.items():
            for route in self._routes[target]:
                read = self._source_site[route.path.source]
                route.add_products(made, clean[read], other[read], pulled[site])
        return made

    @property
    def pull_reads(self) -> tuple[str, ...]:
        return ()  # gradients at targets are those at sites

    # --- baselines -------------------------------------------------------------------------------

    def weight_norms(self) -> Float[np.ndarray, " edge"]:
        if self._by_offset:
            return super().weight_norms()  # which refuses
        found = np.zeros(len(self))
        for maps, _, targets, sources, edges in self._tables():
            norms = maps.norms(targets)[:, sources].numpy()
            found[edges[edges >= 0]] = norms[edges >= 0]
        return found

    def sizes(
        self, clean: Mapping[str, Tensor], counted: Bool[Tensor, "example position"] | None
    ) -> Float[Tensor, "example edge"]:
        if self._by_offset:
            return super().sizes(clean, counted)  # which refuses
        n = len(clean[self.input_sites[0]])
        found = torch.zeros(n, len(self), dtype=torch.float64)
        for maps, read, targets, sources, edges in self._tables():
            sizes = maps.sizes(clean[read], sources)[:, targets].double()
            found[:, edges[edges >= 0]] = sizes.cpu()[:, torch.from_numpy(edges >= 0)]
        return found

    def _tables(self) -> Iterator[tuple[CarriedMaps, str, list[int], list[int], np.ndarray]]:
        """For each target and each source of it: what the source's channels add, and the site where it is read;
        then the channels of both, and the number of the edge between any two of them, -1 where there is none.
        """
        for target, (start, stop) in self._span.items():
            ends = self.ends[start:stop]
            rows = np.unique(ends[:, 1])
            targets = [self._target_at[t][1] for t in rows]
            value_of = np.array([self._place_of[self._source_at[s][0]] for s in ends[:, 0]])
            for source in dict.fromkeys(route.path.source for route in self._routes[target]):
                own = value_of == self._place_of[source]
                columns = np.unique(ends[own, 0])
                edges = np.full((len(rows), len(columns)), -1)
                at = np.searchsorted(rows, ends[own, 1]), np.searchsorted(columns, ends[own, 0])
                edges[at] = start + np.flatnonzero(own)
                paths = [p for p in self._flow.paths(target) if p.source == source]
                maps = CarriedMaps.between(self._flow, paths)
                sources = [self._source_at[s][1] for s in columns]
                yield maps, self._source_site[source], targets, sources, edges

    @cached_property
    def _place_of(self) -> dict[Value, int]:
        """A number for each source value."""
        return {v: i for i, v in enumerate(self._kept.sources)}


_OFFSET = re.compile(r"@y[+-][0-9]+x[+-][0-9]+$")


def _without_offset(name: str) -> tuple[str, str]:
    """The name of a target without the offset behind it, and the offset."""
    found = _OFFSET.search(name)
    return (name, "") if found is None else (name[: found.start()], found[0])


def _units(given: str | Units) -> Units:
    if isinstance(given, Units):
        return given
    return Units.parse(given) if ":" in given else Units(given, None)


def _numbered(kept: Mapping[Value, Tensor], flow: ChannelFlow) -> list[tuple[Value, int]]:
    ordered = sorted(kept, key=flow.order)
    return [(v, c) for v in ordered for c in kept[v].nonzero()[:, 0].tolist()]


def _columns(numbered: Sequence[tuple[Value, int]], value: Value, flow: ChannelFlow) -> Tensor:
    """The number of each channel of a value; -1 for those that are not in the graph."""
    found = torch.full((flow.n_channels(value),), -1)
    for i, (v, c) in enumerate(numbered):
        if v == value:
            found[c] = i
    return found


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    found = tuple(names)
    assert len(set(found)) == len(found), "a channel has a name of its own"
    return found


def _noting(live: dict[str, Tensor], site: str) -> Change:
    def note(value: Tensor) -> Tensor:
        live[site] = value
        return value

    return note
