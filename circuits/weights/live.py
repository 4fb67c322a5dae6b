"""Weights between units as a graph that is read from the model when it is asked for.

A language model has billions of weights between neurons and tokens (SmolLM2-135M 3.3 · 10^9, of which a graph on disk
would take 26 GB). Of a unit and its neighbours a few are wanted, which the model's own weights give in a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from circuits.graph.circuit import CircuitGraph
from circuits.graph.surroundings import AllUnits
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import INPUT
from circuits.units import Unit
from circuits.weights.connections import Connection, both_ways
from circuits.weights.raw import Pair, connected_pairs

_KEPT = 1024
"""Units whose connections are kept."""


class LiveGraph(AllUnits):
    """The weights between the units of a model, with the questions that `GraphStore` answers of a unit's surroundings.

    Args:
        model: the model, without edits in force. Its weights must not change.

    Raises:
        ValueError: if the model is edited, or none of its sites are connected by weights.
    """

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self.model, self.model_hash = model.name, model.hash
        self._known: dict[tuple[Unit, int], list[Connection]] = {}
        self.blocks: list[Pair] = list(connected_pairs(model))
        if not self.blocks:
            raise ValueError(f"model {model.name} has no weights between its sites")
        used = {site for pair in self.blocks for site in (pair.source, pair.target)}
        names = [INPUT, *(s.name for s in model.sites)]
        self.sites = {name: model.n_units(name) for name in names if name in used}

    @cached_property
    def n_edges(self) -> int:
        """How many edges there are."""
        return sum(len(pair.units) * self.sites[pair.source] for pair in self.blocks)

    def neighbourhood(self, unit: str | Unit, hops: int = 1, top: int = 10) -> CircuitGraph:
        """What builds a unit and what it builds, and so on for those.

        Args:
            unit: where to start.
            hops: how many steps to go.
            top: of each unit, how many edges in and how many out to follow, the strongest.

        Raises:
            KeyError: if the unit's site is unknown.
            ValueError: if the unit does not exist, or a number is not positive.
        """
        start, graph = self._begun(unit, hops, top)
        frontier, seen = [start], {start}
        for _ in range(hops):
            found: dict[Unit, None] = {}
            for here in (u for u in frontier if u.site != INPUT):
                for connection in self._around(here, top):
                    _connect(graph, connection)
                    found |= dict.fromkeys((connection.source, connection.target))
            frontier = [other for other in found if other not in seen]
            seen.update(frontier)
        return graph

    def _around(self, unit: Unit, top: int) -> list[Connection]:
        """A unit's strongest connections on both sides, kept, since a second passes until they are found."""
        key = (unit, top)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)), None)
            self._known[key] = [c for side in both_ways(self._model, unit, top) for c in side]
        return self._known[key]

    def subgraph(self, units: Sequence[str | Unit]) -> CircuitGraph:
        """Some units with all edges between them.

        Raises:
            KeyError: if a site is unknown.
            ValueError: if a unit does not exist.
        """
        wanted = list(dict.fromkeys(self.check(unit) for unit in units))
        graph = self._new({"subgraph": [str(unit) for unit in wanted]})
        graph.add_nodes_from(wanted)
        by_site: dict[str, list[int]] = {}
        for unit in wanted:
            by_site.setdefault(unit.site, []).append(unit.index)
        for pair in self.blocks:
            sources = by_site.get(pair.source, [])
            written = set(pair.units.tolist())
            targets = [t for t in by_site.get(pair.target, []) if t in written]
            if sources and targets:
                self._add(graph, pair, sources, targets)
        return graph

    def _add(
        self, graph: CircuitGraph, pair: Pair, sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """Add the edges between some units of two sites; typical are those into the same target."""
        kernels = pair.kernels(torch.tensor(targets), self.sites[pair.source]).detach()
        for target, row in zip(targets, kernels, strict=True):
            norms = row.reshape(len(row), -1).norm(dim=1)
            for source in (s for s in sources if norms[s] > 0):
                ends = Unit(pair.source, source), Unit(pair.target, target)
                typical = norms[norms > 0].median().item()
                kernel = row[source].cpu()
                _connect(graph, Connection(*ends, kernel, pair.layer.name, pair.through, typical))


def _connect(graph: CircuitGraph, found: Connection) -> None:
    more = {"kernel": found.kernel.tolist()} if found.kernel.ndim else {}
    graph.connect(
        found.source, found.target, "weight", sum=found.total, norm=found.norm, typical=found.typical,
        layer=found.layer, through=found.through, **more,
    )  # fmt: skip
