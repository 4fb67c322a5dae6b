"""Runs of other pairs: patches from these carry no information about the pair itself, which makes them a null."""

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
    """For each example the run of another example, drawn at random.

    The other example has equally many tokens and belongs to another template instance. Which one it is depends on the
    seed and on the task, not on the batches.

    Args:
        model: the model.
        task: the task.
        source: the task's examples or its counterparts, whose runs are taken.
        sites: the sites to read.
        n: the number of draws.
        seed: seed of the draws.

    Attributes:
        partners: for each draw the other example of each example; -1 where there is none.
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
        self.partners = [
            _drawn_partners(task, source, np.random.default_rng([seed, k])) for k in range(n)
        ]
        self._held: dict[int, tuple[TaskBatch, Mapping[str, Tensor]]] = {}

    def there(self, draw: int) -> np.ndarray:
        """Which examples have a partner in a draw."""
        return np.array([partner >= 0 for partner in self.partners[draw]])

    def tensors(self, draw: int, part: TaskBatch) -> Mapping[str, Tensor]:
        """The sites' tensors on the partners of a batch's examples, row by row; each batch is run once."""
        held = self._held.get(draw)
        if held is None or held[0] is not part:
            inputs = self._inputs(draw, part)
            cache = self.model.run(
                inputs, mask=part.mask, read=self.sites, until=self.model.last(self.sites)
            )
            held = self._held[draw] = part, {s.name: cache[s] for s in self.sites}
        return held[1]

    def _inputs(self, draw: int, part: TaskBatch) -> Tensor:
        """The inputs of the partners of a batch's examples; examples without a partner keep their own."""
        # The batch's own padding is kept, so that every position of the partner is at the example's own position.
        partners = [self.partners[draw][k] for k in part.which]
        chosen = [k if p < 0 else p for k, p in zip(part.which, partners, strict=True)]
        if not isinstance(self.model.input, TokenInput):
            return self.source.batch(chosen).inputs
        made = part.inputs.clone()
        first = [0] * len(made) if part.mask is None else part.mask.int().argmax(1).tolist()
        for row, example in enumerate(part.rows.tolist()):
            n = length_of(
                self.task, part.which[example]
            )  # tokens after the prompt are a fed answer and stay
            text = self.source.load(chosen[example])[:n]
            made[row, first[row] : first[row] + len(text)] = text.to(made.device)
        return made


def _drawn_partners(task: Task, source: Examples, generator: np.random.Generator) -> list[int]:
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
