"""The graph of a computation: which parts of a model write, which read, and along which edges.

An edge leads from a source, what a part puts out, to a target, what a part is given, along one direct path: through
sums, concatenations, pooling and normalisations, but through no other part. To patch an edge is to give its target
what the source put out in another run along this path, with everything else as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.circuit import UnitGroup, WholeSite
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.restarting import restart_candidates
from circuits.tasks.task import Task, TaskBatch
from circuits.units import Site, Unit, unknown

PlacedNode = Unit | UnitGroup | WholeSite

Edge = tuple[str, str]
"""The names of a source and a target."""

Mask = Bool[np.ndarray, " edge"]
"""Which edges of a graph are meant, such as those that a circuit keeps."""

LIMIT = 2**18
"""The most edges that a graph has unless a caller allows more: that is 2 MB of scores an example. Of larger graphs no
list of names is made, and scores lie in files (`discovery.stored`)."""


class EdgeNames(Sequence[Edge]):
    """The names of the edges of a large graph: each is made when it is asked for.

    Args:
        sources: the names of all sources.
        targets: the names of all targets.
        ends: for each edge the numbers of its source and its target.
    """

    def __init__(
        self, sources: Sequence[str], targets: Sequence[str], ends: Int[np.ndarray, "edge end"]
    ) -> None:
        self.sources, self.targets, self.ends = sources, targets, ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> Edge: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Edge, ...]: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return tuple((self.sources[s], self.targets[t]) for s, t in self.ends[place].tolist())
        source, target = self.ends[place].tolist()
        return self.sources[source], self.targets[target]

    def __iter__(self) -> Iterator[Edge]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self[start : start + _AT_ONCE]

    def __eq__(self, other: object) -> bool:
        """Whether another graph's edges are the same, by number."""
        return (
            isinstance(other, EdgeNames)
            and (self.sources, self.targets) == (other.sources, other.targets)
            and np.array_equal(self.ends, other.ends)
        )

    __hash__ = None  # type: ignore[assignment]


_AT_ONCE = 4096

_PIECE = 2**24
"""How many scores of a large graph are computed at once."""


class _Ranges(Sequence["Int[np.ndarray, ' edge']"]):
    """The numbers from each bound to the next, made when they are asked for."""

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        at = range(len(self))[place]
        return np.arange(self.bounds[at], self.bounds[at + 1])


@dataclass(frozen=True)
class Cut:
    """Where a pass can start that changes some sites and depends on more than one tensor from before.

    Attributes:
        given: the sites whose tensors are put in; the first of them is one that is changed.
        reached: the sites whose tensors depend on those that are changed.
    """

    given: tuple[str, ...]
    reached: frozenset[str]


class EdgeGraph(ABC):
    """The edges between parts of a model.

    Attributes:
        model: the model.
        grain: what the parts are, in words.
        sources: the names of what parts put out, in order of execution.
        targets: the names of what parts are given, in order of execution.
        ends: for each edge the numbers of its source and its target, sorted by target.
        feeds: for each target the numbers of the sources that are computed from it; none for the model's output.
        input_sites: the sites at which the model's input enters the graph; between the input of two runs, gradients are
            integrated there.
        whole: whether the run with every edge patched is the other run.
        choices: what `edge_graph` was asked for besides the model, as it takes it; it makes the same graph again.
    """

    model: HookedModel
    grain: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ends: Int[np.ndarray, "edge end"]
    feeds: tuple[tuple[int, ...], ...]
    input_sites: tuple[str, ...]
    whole: bool = True
    choices: Mapping[str, Any] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.ends)

    # --- names -----------------------------------------------------------------------------------

    @cached_property
    def edges(self) -> Sequence[Edge]:
        """Every edge by its names; of more than `LIMIT` edges no list is made."""
        names = EdgeNames(self.sources, self.targets, self.ends)
        return names if len(self) > LIMIT else tuple(names)

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        """The numbers of sources and of targets, by their names."""
        return tuple(
            {name: i for i, name in enumerate(all_)} for all_ in (self.sources, self.targets)
        )  # type: ignore[return-value]

    def index(self, edge: Edge | str) -> int:
        """The number of an edge, given by its names or written `source -> target`.

        Raises:
            KeyError: if there is no such edge; the message offers the nearest names.
        """
        if isinstance(edge, str):
            source, _, target = edge.partition("->")
            edge = source.strip(), target.strip()
        (source, target), (sources, targets) = edge, self._numbers
        if source in sources and target in targets:
            start, stop = self.bounds[targets[target]], self.bounds[targets[target] + 1]
            found = np.flatnonzero(self.ends[start:stop, 0] == sources[source])
            if len(found):
                return start + int(found[0])
        raise self._unknown(source, target)

    def _unknown(self, source: str, target: str) -> KeyError:
        """That there is no such edge, with the nearest names."""
        what, name = f"edge of {self.model.name}", f"{source} -> {target}"
        if len(self) <= LIMIT:
            return unknown(what, name, [f"{a} -> {b}" for a, b in self.edges])
        sources, targets = self._numbers
        if source not in sources:
            return unknown(f"source of {self.model.name}", source, self.sources)
        if target not in targets:
            return unknown(f"target of {self.model.name}", target, self.targets)
        there = [
            f"{self.sources[s]} -> {target}" for s in self.ends[self.edges_into[targets[target]], 0]
        ]
        return unknown(what, name, there)

    def mask(self, edges: Sequence[Edge | str]) -> Mask:
        """Which edges are among some.

        Raises:
            KeyError: if there is no such edge.
        """
        return mask_of(len(self), [self.index(edge) for edge in edges])

    def kind(self, name: str) -> str:
        """What a source or target is, and in which layer: random circuits have as many edges between any two kinds."""
        return name.rpartition(":")[0] or name

    def node(self, name: str) -> PlacedNode:
        """What a source is on the canvas: a unit, or a whole site."""
        return Unit.parse(name)

    def nodes_of(self, target: int, among: Collection[int] | None = None) -> tuple[PlacedNode, ...]:
        """What a target is on the canvas: the parts that it feeds, or the model's output.

        Args:
            target: its number.
            among: the sources that are there; if it feeds any of these, no others are named.
        """
        fed = self.feeds[target]
        here = fed if among is None else [s for s in fed if s in among]
        return tuple(self.node(self.sources[s]) for s in here or fed) or (
            self.node(self.targets[target]),
        )

    def way(self, target: int) -> str:
        """What tells a target's edges apart from others between the same nodes: `q`, `k` or `v` of a head; else ``."""
        letter = self.targets[target].rpartition(".")[2]
        return letter if letter in ("q", "k", "v") else ""

    @cached_property
    def classes(self) -> Int[np.ndarray, " edge"]:
        """A number for each edge, shared by those between sources of one kind and targets of one kind."""
        (sources, _), (targets, n) = (
            _numbered(map(self.kind, self.sources)),
            _numbered(map(self.kind, self.targets)),
        )
        pairs = sources[self.ends[:, 0]] * n + targets[self.ends[:, 1]]
        # Numbered by their first edge.
        first = np.full(int(pairs.max(initial=0)) + 1, len(pairs))
        np.minimum.at(first, pairs, np.arange(len(pairs)))
        number = np.empty(len(first), np.int32)
        number[np.argsort(first, kind="stable")] = np.arange(len(first))
        return number[pairs]

    # --- structure -------------------------------------------------------------------------------

    @cached_property
    def inputs(self) -> frozenset[int]:
        """The numbers of the sources that are the model's input."""
        computed = {source for sources in self.feeds for source in sources}
        return frozenset(range(len(self.sources))) - computed

    @cached_property
    def bounds(self) -> Sequence[int]:
        """The number of the first edge into each target, and the number of all edges."""
        return np.searchsorted(self.ends[:, 1], np.arange(len(self.targets) + 1)).tolist()

    @cached_property
    def edges_into(self) -> Sequence[Int[np.ndarray, " edge"]]:
        """For each target the numbers of its edges."""
        return _Ranges(self.bounds)

    def connected(self, kept: Mask) -> Mask:
        """The edges among some that lie on a path of them from the model's input to its output."""
        return kept & self._reached(kept) & self._reaching(kept)

    def attachable(self, kept: Mask) -> Mask:
        """The edges that are not among some and would, each added alone, lie on a path of them from input to output."""
        return ~kept & self._reached(kept) & self._reaching(kept)

    def _reached(self, kept: Mask) -> Mask:
        """The edges whose source is the input, or computed from a target that a kept edge from such a source feeds."""
        live = np.zeros(len(self.sources), bool)
        live[list(self.inputs)] = True
        # The sources of a target come before what it feeds.
        for target, (start, stop) in enumerate(pairwise(self.bounds)):
            if live[self.ends[start:stop, 0][kept[start:stop]]].any():
                live[list(self.feeds[target])] = True
        return live[self.ends[:, 0]]

    def _reaching(self, kept: Mask) -> Mask:
        """The edges whose target is the output, or feeds a source from which a kept edge leads to such a target."""
        useful = np.zeros(len(self.sources), bool)
        ok = np.zeros(len(self.targets), bool)
        for target in reversed(range(len(self.targets))):
            ok[target] = not self.feeds[target] or useful[list(self.feeds[target])].any()
            if ok[target]:
                start, stop = self.bounds[target : target + 2]
                useful[self.ends[start:stop, 0][kept[start:stop]]] = True
        return ok[self.ends[:, 1]]

    # --- what is computed ------------------------------------------------------------------------

    def placed(self, task: Task, part: TaskBatch) -> dict[str, Tensor]:
        """What the graph needs of a batch besides the tensors of sites, by names that no site has.

        It is found among the tensors of both runs.

        Raises:
            ValueError: if the batch does not have it.
        """
        return {}

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The sites that patching and scoring need of both runs."""

    @property
    @abstractmethod
    def slopes(self) -> tuple[str, ...]:
        """The sites at which scoring needs the metric's gradient."""

    @property
    def pull_reads(self) -> tuple[str, ...]:
        """The sites that `pulled` needs of the run of the gradient."""
        return self.reads

    @abstractmethod
    def source_sites(self) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        """Sites at which sources put out what they put out together, each with the numbers of these sources."""

    @abstractmethod
    def first_site(self, target: int) -> str:
        """The first site of the model that patching an edge into a target changes."""

    def starts(self, site: str) -> list[Site]:
        """Sites at which a pass that changes a site, and later ones, might start, the nearest first."""
        return restart_candidates(self.model, self.model.site(site))

    def cut(self, sites: Sequence[str]) -> Cut | None:
        """Where a pass that changes some sites can start if what they reach is known; None if it is not."""
        return None

    def rows(self, sites: Iterable[str]) -> int:
        """How many rows of a pass each set of edges takes if it changes some sites.

        More than one where targets that can be changed apart share a tensor; `joined` makes the rows alike again.
        """
        return 1

    def joined(self, sites: Iterable[str], n_sets: int) -> dict[str, Change]:
        """The changes that make the rows of each set alike again, in a pass that changes some sites."""
        return {}

    @property
    def behind(self) -> tuple[str, ...]:
        """Sites behind those of `slopes` at which targets share a tensor: `separated` needs the gradient there."""
        return ()

    def separated(
        self,
        read: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        leaves: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The gradients at sites of `slopes` at which targets share a tensor, with an entry for each target.

        Args:
            read: the tensors of `behind`, with their autograd history.
            gradients: the gradients there.
            leaves: what has been added at each of `slopes`.
        """
        return {}

    @abstractmethod
    def changes(
        self,
        off: Float[Tensor, "set edge"],
        other: Mapping[str, Tensor],
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Change]:
        """Patched edges as changes at sites, for a batch that stacks all examples once for each set of edges.

        Args:
            off: for each set and edge 1 if it carries what it carried in the other run, 0 if it does not; each set as
                often as `rows` says.
            other: the tensors of `reads` in the other run, of one set's examples or of all sets'. A target all of
                whose edges are patched is given to the bit what it was given there.
            known: the tensors of sites that patching leaves as they are, of one set's examples: they are not read
                from the pass.
        """

    @abstractmethod
    def pulled(
        self, cache: Mapping[str, Tensor], gradients: Mapping[str, Tensor], linear: bool = False
    ) -> dict[str, Tensor]:
        """The gradient at what each target reads, by site, from that at `slopes`.

        Args:
            cache: the tensors of `pull_reads` in the run of the gradient.
            gradients: the gradient at each of `slopes`.
            linear: normalisations count with their scale held, as the rules of relevance have it.
        """

    @abstractmethod
    def contracted(
        self,
        clean: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        pulled: Mapping[str, Tensor],
        linear: bool = False,
    ) -> Float[Tensor, "example edge"]:
        """The change that each edge carries times the gradient at its target, summed over positions and dimensions.

        Args:
            clean: the tensors of `reads` in the intact run.
            other: those in the run that patched edges carry.
            pulled: what `pulled` returns.
            linear: see `pulled`; of normalisations that sources pass before they are added up.
        """

    def pieces(
        self,
        clean: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        slopes: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        linear: bool = False,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """`contracted` of the mean of `pulled` over some runs, for graphs of which it is too large for one tensor.

        Args:
            clean: the tensors of `reads` in the intact run.
            other: those in the run that patched edges carry.
            slopes: of each run in which the gradient was taken, what `pulled` is given.
            linear: see `pulled`.

        Yields:
            Some examples, some edges, and the scores of these, example x edge; together all of them.
        """
        pulled = dict[str, Tensor]()
        for cache, gradients in slopes:
            for site, value in self.pulled(cache, gradients, linear).items():
                pulled[site] = pulled[site].add_(value) if site in pulled else value
        pulled = {site: value / len(slopes) for site, value in pulled.items()}
        n, size = len(next(iter(pulled.values()))), max(1, _PIECE // len(self))
        for start in range(0, n, size):
            at = slice(start, min(start + size, n))
            one, two, three = (
                {name: v[at] for name, v in of.items()} for of in (clean, other, pulled)
            )
            yield at, slice(0, len(self)), self.contracted(one, two, three, linear)

    # --- baselines -------------------------------------------------------------------------------

    def weight_norms(self) -> Float[np.ndarray, " edge"]:
        """The norm of each edge's weight matrix, from what its source is made with to what its target is given.

        Raises:
            ValueError: if the weights of some part cannot be had.
        """
        raise _no_baseline(self, "weights")

    def sizes(
        self, clean: Mapping[str, Tensor], counted: Bool[Tensor, "example position"] | None
    ) -> Float[Tensor, "example edge"]:
        """How large what each source adds to what its target is given is: the root mean square over positions.

        Args:
            clean: the tensors of `reads` in the intact run.
            counted: the positions that count; all if None.

        Raises:
            ValueError: if it is not known how to compute it.
        """
        raise _no_baseline(self, "activations")


def _numbered(names: Iterable[str]) -> tuple[Int[np.ndarray, " name"], int]:
    """A number for each name, shared by equal ones, and how many there are."""
    known: dict[str, int] = {}
    numbers = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
    return numbers, len(known)


def _no_baseline(graph: EdgeGraph, method: str) -> ValueError:
    return ValueError(
        f"method {method}: not known for edges between {graph.grain} of {graph.model.name}; expected another method"
    )


def mask_of(n_edges: int, numbers: Sequence[int] | Int[np.ndarray, " some"]) -> Mask:
    """The mask of the edges with some numbers.

    >>> mask_of(3, [2]).tolist()
    [False, False, True]
    """
    found = np.zeros(n_edges, bool)
    found[np.asarray(numbers, int)] = True
    return found


def as_off(graph: EdgeGraph, kept: Sequence[Mask]) -> Float[Tensor, "set edge"]:
    """Circuits, as which edges each keeps, as what `EdgeGraph.changes` takes: the other edges are off."""
    rows = np.stack([~np.asarray(circuit, bool) for circuit in kept])
    return torch.from_numpy(rows).float()
