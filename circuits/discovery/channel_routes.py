"""Which channels and edges a graph of channels has, and what single paths between them carry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.channel_names import ChannelMask, ChannelMasks, ChannelNames
from circuits.models.adapter.program import Value
from circuits.models.paths.channels import ChannelFlow, ChannelPath, Layer, followed
from circuits.units import Units

# --- which channels ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Kept:
    """The channels of a graph.

    Attributes:
        targets: for each target value which of its channels are in the graph, in order of execution.
        sources: the same for sources.
        tables: for each target value and each source value which channels are connected.
        complete: for each target value whether all that a channel reads is in the graph.
    """

    targets: ChannelMasks = field(default_factory=dict)
    sources: ChannelMasks = field(default_factory=dict)
    tables: dict[Value, dict[Value, Bool[Tensor, "_ _"]]] = field(default_factory=dict)
    complete: ChannelMasks = field(default_factory=dict)

    @property
    def n_edges(self) -> int:
        """The number of edges."""
        return sum(int(t.sum()) for tables in self.tables.values() for t in tables.values())


def chosen_channels(
    flow: ChannelFlow, names: ChannelNames, asked: Sequence[Units] | None, limit: int
) -> Kept:
    """The channels of named sites, of all if there are none, and those in between, with their edges.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if nothing connects a site to any other, or there are more edges than `limit`.
    """
    if asked is None:
        kept = Kept(targets={v: _full(flow, v) for v in flow.targets})
        for target in flow.targets:
            kept.sources.update((p.source, _full(flow, p.source)) for p in flow.paths(target))
        wanted = dict(kept.targets)
    else:
        kept = Kept()
        for units in asked:
            targets, sources = names.resolve(units)
            _join(kept.targets, targets)
            _join(kept.sources, sources)
        wanted = {v: mask.clone() for v, mask in kept.targets.items()}
        _fill_between(flow, kept)
    kept.targets = {v: kept.targets[v] for v in sorted(kept.targets, key=flow.order)}
    _connect(flow, kept)
    _prune(flow, kept, wanted)
    if kept.n_edges > limit:
        raise ValueError(_too_many(flow, names, kept, limit))
    if asked is not None:
        _check_connected(flow, names, kept, asked)
    if not kept.tables:
        flow.computed_from(flow.places[flow.output][0])  # names an operation that is not followed
        raise ValueError(f"model {flow.model.name} has no direct path between channels")
    return kept


def _join(found: ChannelMasks, more: Mapping[Value, ChannelMask]) -> None:
    for value, mask in more.items():
        found[value] = found[value] | mask if value in found else mask


def _full(flow: ChannelFlow, value: Value) -> ChannelMask:
    return torch.ones(flow.n_channels(value), dtype=torch.bool)


def _fill_between(flow: ChannelFlow, kept: Kept) -> None:
    """Add what lies on the ways from named sources to named targets."""
    named, known = set(kept.sources), dict[Value, bool]()

    def below(source: Value) -> bool:
        """Whether a source is computed from a named one."""
        if source not in known:
            before = (p.source for t in flow.computed_from(source) for p in flow.paths(t))
            known[source] = any(s in named or below(s) for s in dict.fromkeys(before))
        return known[source]

    waiting = list(kept.targets)
    while waiting:
        target = waiting.pop()
        for source in dict.fromkeys(p.source for p in flow.paths(target)):
            if source in kept.sources or not below(source):
                continue
            kept.sources[source] = _full(flow, source)
            for before, table in flow.computed_from(source).items():
                if before not in kept.targets:
                    kept.targets[before] = torch.zeros_like(_full(flow, before))
                    waiting.append(before)
                kept.targets[before] = kept.targets[before] | table.any(0)


def _connect(flow: ChannelFlow, kept: Kept) -> None:
    for target, rows in kept.targets.items():
        complete = rows.clone()
        tables: dict[Value, Tensor] = {}
        for path in flow.paths(target):
            table = connected_channels(path, flow, target)
            own = kept.sources.get(path.source, torch.zeros_like(_full(flow, path.source)))
            complete &= ~(table & ~own).any(1)
            table = table & own & rows[:, None]
            if bool(table.any()):
                tables[path.source] = tables.get(path.source, False) | table
        if tables:
            kept.tables[target], kept.complete[target] = tables, complete


def connected_channels(
    path: ChannelPath, flow: ChannelFlow, target: Value
) -> Bool[Tensor, "target source"]:
    """Which channels of a target read which of a source along a path."""
    out, layer_in = _ends(path, flow)
    table = torch.zeros(flow.n_channels(target), flow.n_channels(path.source), dtype=torch.bool)
    if path.layer is None:
        rows = (layer_in >= 0).nonzero()[:, 0]
        table[rows, layer_in[rows]] = True
        return table
    groups = path.layer.groups
    per_out = len(path.layer.weight) // groups
    for group, own in enumerate(layer_in.chunk(groups)):
        rows = (out >= 0) & (out // per_out == group)
        table[rows.nonzero(), own[own >= 0][None]] = True
    return table


def by_offset(path: ChannelPath) -> Iterator[tuple[tuple[int, int], ChannelPath]]:
    """A path through each offset of its layer's kernel alone, by how far below and right of the middle that reads.

    What passes no kernel reads the middle.
    """
    layer = path.layer
    if layer is None or layer.weight.ndim != 4:
        yield (0, 0), path
        return
    (high, wide), steps = layer.weight.shape[2:], layer.settings.get("dilation", 1)
    down, right = (steps, steps) if isinstance(steps, int) else steps
    for y in range(high):
        for x in range(wide):
            weight = torch.zeros_like(layer.weight)
            weight[..., y, x] = layer.weight[..., y, x]
            at = (y - high // 2) * down, (x - wide // 2) * right
            yield at, replace(path, layer=replace(layer, weight=weight))


def _ends(path: ChannelPath, flow: ChannelFlow) -> tuple[Tensor, Tensor]:
    """For each target channel the layer's output channel, and for each of its input channels the source's."""
    layer_in = followed(path.before, flow.n_channels(path.source))
    if path.layer is None:
        return torch.arange(len(layer_in)), layer_in
    return followed(path.after, len(path.layer.weight)), layer_in


def _prune(flow: ChannelFlow, kept: Kept, wanted: Mapping[Value, ChannelMask]) -> None:
    """Leave out channels without edges, and those in between that lead nowhere."""
    used = {v: torch.zeros_like(mask) for v, mask in kept.sources.items()}
    useful = {v: mask.clone() for v, mask in wanted.items()}
    for target in reversed(list(kept.targets)):
        for source in (s for s in used if bool(used[s].any())):
            table = flow.computed_from(source).get(target)
            if table is not None:
                own = useful.get(target, torch.zeros_like(kept.targets[target]))
                useful[target] = own | table[used[source]].any(0)
        for source, table in kept.tables.get(target, {}).items():
            table &= useful.get(target, torch.zeros_like(kept.targets[target]))[:, None]
            used[source] |= table.any(0)
    for target in list(kept.tables):
        own = {s: t for s, t in kept.tables[target].items() if bool(t.any())}
        if own:
            kept.tables[target] = own
        else:
            del kept.tables[target]
    kept.targets = {
        v: torch.stack([t.any(1) for t in tables.values()]).any(0)
        for v, tables in kept.tables.items()
    }
    kept.sources = {v: mask for v, mask in used.items() if bool(mask.any())}


def _check_connected(
    flow: ChannelFlow, names: ChannelNames, kept: Kept, asked: Sequence[Units]
) -> None:
    for units in asked:
        targets, sources = names.resolve(units)
        pairs = [(targets, kept.targets), (sources, kept.sources)]
        if not any(
            bool((m & there[v]).any()) for own, there in pairs for v, m in own.items() if v in there
        ):
            raise ValueError(
                f"site {units.site} of {flow.model.name}: no path leads from it to another of the named sites, or to it"
            )


def _too_many(flow: ChannelFlow, names: ChannelNames, kept: Kept, limit: int) -> str:
    """What to say where there are too many edges."""
    counts: dict[str, int] = {}
    for target, tables in kept.tables.items():
        for source, table in tables.items():
            c, t = int(kept.sources[source].nonzero()[0]), int(kept.targets[target].nonzero()[0])
            pair = f"{_site(names.source(source, c))} -> {_site(names.target(target, t))}"
            counts[pair] = counts.get(pair, 0) + int(table.sum())
    largest = sorted(counts, key=counts.__getitem__, reverse=True)[:3]
    # A table of n sources and n targets has n * n edges at most.
    fits = max(1, math.isqrt(limit // sum(map(len, kept.tables.values()))))
    listed = ", ".join(f"{pair} with {counts[pair]}" for pair in largest)
    return (
        f"sites of {flow.model.name} have {kept.n_edges} edges between their channels, more than {limit}; most have "
        f"{listed}. Name fewer sites, or units of them (SITE:1,2,5-9): with {fits} units a layer all these sites would "
        "fit"
    )


def _site(name: str) -> str:
    return name.rpartition(":")[0]


# --- what a path carries -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ChannelRoute:
    """A path with the edges of a graph that run along it.

    Attributes:
        path: the path.
        edges: the number of an edge, for each weight of the layer (summed over its kernel) that lies on one; without a
            layer for each channel of the target.
        out: for each of these the layer's output channel; without a layer the target's channel.
        into: for each the layer's input channel within its group; without a layer the same as `out`.
        reach: for each channel of the layer's output that of the target, or -1.
    """

    path: ChannelPath
    edges: Int[Tensor, " weight"]
    out: Int[Tensor, " weight"]
    into: Int[Tensor, " weight"]
    reach: Int[Tensor, " channel_out"]

    @classmethod
    def of(
        cls, path: ChannelPath, places: Int[Tensor, "target source"], flow: ChannelFlow
    ) -> ChannelRoute:
        """A path with the edges of a table of their numbers, -1 where there is none.

        Raises:
            ValueError: if two channels of the target are one of the layer's.
        """
        out, layer_in = _ends(path, flow)
        layer = path.layer
        if layer is None:
            edges = torch.where(layer_in >= 0, places[out, layer_in.clamp_min(0)], -1)
            rows = (edges >= 0).nonzero()[:, 0]
            return cls(path, edges[rows], rows, rows, out)
        n, per_in = layer.weight.shape[:2]
        first = out.clamp_min(0) // (n // layer.groups) * per_in
        inputs = layer_in[first[:, None] + torch.arange(per_in)]
        edges = places.gather(1, inputs.clamp_min(0))
        edges = torch.where((inputs >= 0) & (out >= 0)[:, None], edges, -1)
        row, column = (edges >= 0).nonzero().T
        reach = torch.full((n,), -1)
        reach[out[out >= 0]] = (out >= 0).nonzero()[:, 0]
        if int((reach >= 0).sum()) != int((out >= 0).sum()):
            raise ValueError(
                f"model {flow.model.name} repeats channels of a layer before their nonlinearity: edges along such a "
                "path cannot be told apart"
            )
        return cls(path, edges[row, column], out[row], column, reach)

    # --- patching --------------------------------------------------------------------------------

    def patched(
        self,
        made: Float[Tensor, "set example target *pos"],
        off: Float[Tensor, "set edge"],
        touched: Bool[Tensor, " edge"],
        live: Float[Tensor, "some example source *place"],
        other: Float[Tensor, "others example source *place"],
    ) -> Float[Tensor, "set example target *pos"]:
        """What a target is given, with what edges carry replaced by what they carry in another run.

        Args:
            made: what it is given.
            off: for each set and edge the share that is replaced.
            touched: the edges that are replaced in some set.
            live: what the source puts out, in each set or in all of them (one set).
            other: the same in the other run.
        """
        some = touched[self.edges].nonzero()[:, 0]
        change = self._change(live, other).to(made)
        if self.path.layer is None:
            out = self.out[some]
            shares = off[:, self.edges[some]].to(made)
            added = change[:, :, out] * _wide(shares[:, None], made.ndim)
            return made.index_add(2, out.to(made.device), added)
        out, added = self._through_layer(self.path.layer, change, off, some)
        if not self.path.after:
            return made.index_add(2, self.reach[out].to(made.device), added)
        whole = added.new_zeros(*added.shape[:2], len(self.reach), *added.shape[3:])
        whole = self.path.ended(whole.index_copy(2, out.to(made.device), added).flatten(0, 1))
        return made + whole.unflatten(0, added.shape[:2])

    def _change(self, live: Tensor, other: Tensor) -> Tensor:
        """What reaches the layer in the other run less what reaches it, in as many sets as the two have."""
        before, after = (
            self.path.pooled(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (live, other)
        )
        return after - before

    def _through_layer(
        self, layer: Layer, change: Tensor, off: Tensor, some: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output channels that change, and by how much in each set: set x example x channel x positions."""
        layer, outs, ins, (out, into) = self._restricted(layer, some)
        weight, groups = layer.weight.to(change), layer.groups
        shares = off[:, self.edges[some]].to(change)
        table = shares.new_zeros(len(off), weight.shape[0] * weight.shape[1])
        place = out * weight.shape[1] + into
        table = table.index_copy(1, place.to(table.device), shares)
        weights = weight * _wide(table.unflatten(1, weight.shape[:2]), weight.ndim + 1)
        given = change[:, :, ins]
        n_sets, per = len(off), len(outs) // groups
        if len(given) == 1:
            # One convolution with the filters of all sets, group by group.
            filters = weights.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)
            made = layer.apply(given[0], filters, groups).unflatten(1, (groups, n_sets, per))
            return outs, made.movedim(2, 0).flatten(2, 3)
        given = given.transpose(0, 1).flatten(1, 2)
        made = layer.apply(given, weights.flatten(0, 1), groups * n_sets)
        return outs, made.unflatten(1, (n_sets, -1)).transpose(0, 1)

    def _restricted(
        self, layer: Layer, some: Tensor
    ) -> tuple[Layer, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """A layer with the channels that some weights connect alone: them, and the weights' places among them."""
        out, into = self.out[some], self.into[some]
        n, per_in = layer.weight.shape[:2]
        if layer.groups > 1:
            return layer, torch.arange(n), torch.arange(per_in * layer.groups), (out, into)
        (outs, row), (ins, column) = (torch.unique(x, return_inverse=True) for x in (out, into))
        weight = layer.weight[outs][:, ins]
        return replace(layer, weight=weight), outs, ins, (row, column)

    # --- scores ----------------------------------------------------------------------------------

    def add_products(
        self,
        made: Float[Tensor, "example edge"],
        clean: Float[Tensor, "example source *place"],
        other: Float[Tensor, "example source *place"],
        gradient: Float[Tensor, "example target *pos"],
    ) -> None:
        """Add the change that each edge carries times the gradient at its target, summed over positions, in place."""
        change = self._change(clean[None], other[None])[0]
        layer = self.path.layer
        if layer is None:
            products = (
                (change * gradient).flatten(2).sum(2) if change.ndim > 2 else change * gradient
            )
            made.index_add_(1, self.edges.to(made.device), products[:, self.out])
            return
        every = torch.arange(len(self.edges))
        small, outs, ins, (row, column) = self._restricted(layer, every)
        small = replace(small, weight=small.weight.to(change))
        given = change[:, ins]
        slope = self._pulled(gradient, layer, change)[:, outs]
        edges = self.edges.to(made.device)
        for one in range(
            len(change)
        ):  # a kernel's places are unfolded example by example, to save memory
            products = small.products(given[one : one + 1], slope[one : one + 1])
            made[one].index_add_(0, edges, products[0][row, column])

    def _pulled(self, gradient: Tensor, layer: Layer, change: Tensor) -> Tensor:
        """The gradient at the layer's output."""
        if not self.path.after:
            found = gradient[:, self.reach.clamp_min(0)]
            return found * _wide((self.reach >= 0).to(found)[None], found.ndim)
        # The size of the output's map is that of any one channel.
        one = layer.apply(change[:1, : layer.weight.shape[1]], layer.weight[:1].to(change), 1)
        with torch.enable_grad():
            shape = (len(change), len(layer.weight), *one.shape[2:])
            zeros = one.new_zeros(shape, requires_grad=True)
            made = self.path.ended(zeros)
            return torch.autograd.grad(made, zeros, gradient.to(made))[0]


def _wide(value: Tensor, n: int) -> Tensor:
    """A tensor with axes of length 1 behind, `n` axes in all."""
    return value.reshape(*value.shape, *(1,) * (n - value.ndim))
