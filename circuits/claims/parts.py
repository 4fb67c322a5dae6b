"""What a circuit is made of, edges or units, and the metric with some of them kept and all others ablated.

Tests of claims about a circuit work with sets of parts and do not ask which kind of part they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits.discovery.graphs import EdgeGraph
from circuits.discovery.nulls import random_circuit
from circuits.discovery.runs import Runs
from circuits.discovery.searching import values_of
from circuits.examples import BATCH
from circuits.experiments import Variant, run
from circuits.experiments.patched_runs import Direction
from circuits.experiments.running import MEMORY
from circuits.localization.subsets import Outside, keep_only, keeping_sites, units_kept
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.progress import Progress
from circuits.tasks.task import Task
from circuits.units import Unit

Mask = Bool[np.ndarray, " part"]

Ablation = Literal[
    "counterpart", "resample", "mean", "mean-by-position", "mean-by-template", "zero"
]
"""What parts outside a circuit carry. Learned constants are left out: they belong to one circuit."""

ABLATIONS: tuple[str, ...] = get_args(Ablation)


@runtime_checkable
class Parts(Protocol):
    """The parts of a model that circuits are chosen from.

    Attributes:
        model: the model.
        word: what parts are called, in the plural.
        ablations: the ways in which such parts can be ablated.
    """

    model: HookedModel
    word: str
    ablations: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each part."""
        ...

    @property
    def classes(self) -> Int[np.ndarray, " part"]:
        """A number for each part, shared by those of one kind in one layer."""
        ...

    def mask(self, names: Sequence[str]) -> Mask:
        """Which parts are named; KeyError if one is unknown."""
        ...

    def connected(self, kept: Mask) -> Mask:
        """The parts that can have an effect with all others ablated; all, unless a class says otherwise."""
        return kept

    def restorable(self, kept: Mask) -> bool:
        """Whether restoring a circuit in the corrupted run says something: not if it holds the model's whole input.

        Always, unless a class says otherwise.
        """
        return True

    def like(self, kept: Mask, rng: np.random.Generator) -> Mask:
        """A random circuit with as many parts of each class, connected where possible."""
        return drawn_like(self.classes, kept, rng)

    def values(
        self,
        circuits: Sequence[Mask],
        task: Task,
        ablation: Ablation,
        direction: Direction,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "circuit example"]:
        """The metric with only the parts of each circuit kept (noising), or with all others restored (denoising).

        With `noising` the clean run is changed: parts outside the circuit carry what the ablation gives them. With
        `denoising` the corrupted run is changed: parts outside the circuit carry what they carry in the clean run, so
        that the empty circuit is the clean run.

        Raises:
            ValueError: if such parts cannot be ablated in this way.
        """
        ...


class EdgeParts(Parts):
    """Edges of a graph. All circuits are restorable: of an input that is restored only their own edges carry on."""

    word = "edges"
    ablations: tuple[str, ...] = ABLATIONS

    def __init__(
        self, graph: EdgeGraph, *, shift: int = 0, batch: int = BATCH, memory: int = MEMORY, seed: int = 0
    ) -> None:  # fmt: skip
        self.graph, self.model = graph, graph.model
        self._settings: dict[str, Any] = {"batch": batch, "memory": memory, "seed": seed}
        self._shift = shift
        self._runs: dict[tuple[str, ...], Runs] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every edge, written `source -> target`."""
        return tuple(" -> ".join(edge) for edge in self.graph.edges)

    @property
    def classes(self) -> Int[np.ndarray, " part"]:
        return self.graph.classes

    def mask(self, names: Sequence[str]) -> Mask:
        return self.graph.mask(names)

    def connected(self, kept: Mask) -> Mask:
        return self.graph.connected(kept)

    def like(self, kept: Mask, rng: np.random.Generator) -> Mask:
        return random_circuit(self.graph, kept, rng)

    def values(
        self,
        circuits: Sequence[Mask],
        task: Task,
        ablation: Ablation,
        direction: Direction,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "circuit example"]:
        key = (task.hash, task.half, ablation)
        if key not in self._runs:
            shift = self._shift if ablation == "counterpart" else 0
            self._runs[key] = Runs(
                self.graph, task, ablation=ablation, shift=shift, **self._settings
            )
        return values_of(self._runs[key], circuits, progress, direction=direction)


_OUTSIDE: Mapping[str, Outside] = {
    "counterpart": "counterpart", "mean": "mean", "mean-by-position": "position_mean", "zero": "zero",
}  # fmt: skip


class UnitParts(Parts):
    """Units at some sites. All are connected: a unit's input and output are never cut off.

    Without sites these are a transformer's heads, and its embedding and MLPs as one part each; of sites that are named
    every unit is a part.
    """

    word = "units"
    ablations: tuple[str, ...] = tuple(_OUTSIDE)

    def __init__(
        self, model: HookedModel, sites: Sequence[str] = (), *, batch: int = BATCH, seed: int = 0
    ) -> None:
        self.model = model
        self.sites = keeping_sites(model, list(sites) or None)
        self._parts: dict[str, tuple[Unit, ...]] = {}
        self._site_of: list[int] = []
        for number, site in enumerate(self.sites):
            units = tuple(map(site.unit, range(site.n_units)))
            one = not sites and site.kind != "head"
            found = {site.name: units} if one else {str(unit): (unit,) for unit in units}
            self._parts |= found
            self._site_of += [number] * len(found)
        self._batch, self._seed = batch, seed

    @property
    def names(self) -> tuple[str, ...]:
        """Every part: a unit, written `SITE:INDEX`, or a site."""
        return tuple(self._parts)

    @property
    def classes(self) -> Int[np.ndarray, " part"]:
        """A number for each site."""
        return np.array(self._site_of)

    def mask(self, names: Sequence[str]) -> Mask:
        """Which parts are named; a name may be `SITE:1,2,5-9`, or a site with all of its units.

        Raises:
            ValueError: if only some units are named of a site that is one part.
        """
        kept = set(units_kept(self.model, list(names), self.sites))
        found = [sum(unit in kept for unit in units) for units in self._parts.values()]
        for n, (name, units) in zip(found, self._parts.items(), strict=True):
            if 0 < n < len(units):
                raise ValueError(
                    f"units of {name}: {n} of {len(units)} are named, and the site is one part; name it as a whole, or "
                    "give `sites` to take every unit as a part"
                )
        return np.array(found) > 0

    def restorable(self, kept: Mask) -> bool:
        # Where the whole embedding is restored, all that is computed from it follows.
        first = self.model.embedding.name if isinstance(self.model.input, TokenInput) else ""
        own = [
            k
            for k, number in zip(kept, self._site_of, strict=True)
            if self.sites[number].name == first
        ]
        return not own or not all(own)

    def values(
        self,
        circuits: Sequence[Mask],
        task: Task,
        ablation: Ablation,
        direction: Direction,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "circuit example"]:
        if ablation not in _OUTSIDE:
            raise ValueError(
                f"ablation {ablation}: units take one of {', '.join(_OUTSIDE)}; edges take all"
            )
        if direction == "denoising" and ablation != "counterpart":
            raise ValueError(f"ablation {ablation}: denoising needs a run on counterparts")
        # Whole sites in short: a variant of a network with thousands of units would else name each.
        variants = [
            self._variant(kept, f"circuit {i}", ablation, task) for i, kept in enumerate(circuits)
        ]
        outcomes = run(
            self.model, variants, task, measures=[task.metric], corrupted=direction == "denoising", batch=self._batch,
            seed=self._seed, progress=progress,
        )  # fmt: skip
        return outcomes.values[task.metric.name][1:]

    def _variant(self, kept: Mask, name: str, ablation: str, task: Task) -> Variant:
        units = [
            u for own, part in zip(kept, self._parts.values(), strict=True) if own for u in part
        ]
        return keep_only(
            self.model, units, self.sites, how=_OUTSIDE[ablation], examples=task.examples, name=name
        )


def drawn_like(
    classes: Int[np.ndarray, " part"],
    kept: Mask,
    rng: np.random.Generator,
    among: Mask | None = None,
) -> Mask:
    """A random set with as many parts of each class as another.

    Args:
        classes: a number for each part.
        kept: the other set.
        rng: draws them.
        among: the parts that may be drawn, all of a class where it has fewer; every part if None.
    """
    found = np.zeros(len(kept), bool)
    for c in np.unique(classes[kept]).tolist():
        own = np.flatnonzero((classes == c) & (True if among is None else among))
        n = min(int((kept & (classes == c)).sum()), len(own))
        found[rng.choice(own, n, replace=False)] = True
    return found
