"""Other pairs' runs: what takes a cell's place where it is to say nothing about the pair itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from circuits.examples import Examples
from circuits.localization.cells import length_of
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.task import Task, TaskBatch
from circuits.units import Site


class OtherPairs:
    """Runs of other examples in the place of each example's own, drawn at random.

    Another example has as many tokens (the same size, of images) and belongs to another template instance. It depends
    on the seed and on the task, not on how examples are batched.

    Args:
        model: the model.
        task: the task.
        source: its examples or its counterparts: whose runs are wanted.
        sites: whose tensors are read.
        n: how many draws.
        seed: of the draws.

    Attributes:
        partners: the other example of each, draw by draw; -1 where there is none.
    """

    def __init__(
        self,
        model: HookedModel,
        task: Task,
        source: Examples,
        sites: Sequence[Site],
        n: int,
        seed: int,
    ) -> None:
        self.model, self.task, self.source, self.sites = model, task, source, sites
        self.partners = [_drawn(task, source, np.random.default_rng([seed, k])) for k in range(n)]
        self._held: dict[int, tuple[TaskBatch, Mapping[str, Tensor]]] = {}

    def there(self, draw: int) -> np.ndarray:
        """Which examples have another one."""
        return np.array([partner >= 0 for partner in self.partners[draw]])

    def tensors(self, draw: int, part: TaskBatch) -> Mapping[str, Tensor]:
        """The sites' tensors of a batch's other examples, in the places of its own; run once a batch."""
        held = self._held.get(draw)
        if held is None or held[0] is not part:
            inputs = self._inputs(draw, part)
            cache = self.model.run(
                inputs, mask=part.mask, read=self.sites, until=self.model.last(self.sites)
            )
            held = self._held[draw] = part, {s.name: cache[s] for s in self.sites}
        return held[1]

    def _inputs(self, draw: int, part: TaskBatch) -> Tensor:
        """A batch's inputs with the other examples' in their places; examples without another keep their own."""
        partners = [self.partners[draw][k] for k in part.which]
        chosen = [k if p < 0 else p for k, p in zip(part.which, partners, strict=True)]
        if not isinstance(self.model.input, TokenInput):
            return self.source.batch(chosen).inputs
        made = part.inputs.clone()
        first = [0] * len(made) if part.mask is None else part.mask.int().argmax(1).tolist()
        for row, example in enumerate(part.rows.tolist()):
            n = length_of(self.task, part.which[example])  # what follows is an answer, which stays
            text = self.source.load(chosen[example])[:n]
            made[row, first[row] : first[row] + len(text)] = text.to(made.device)
        return made


def _drawn(task: Task, source: Examples, generator: np.random.Generator) -> list[int]:
    tokens = isinstance(task.model.input, TokenInput)
    keys = [length_of(task, i) if tokens else 0 for i in range(len(source))]
    groups: dict[int, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    clusters, found = task.clusters, []
    for i, key in enumerate(keys):
        others = [j for j in groups[key] if clusters[j] != clusters[i]]
        found.append(others[int(generator.integers(len(others)))] if others else -1)
    return found
