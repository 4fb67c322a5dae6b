"""How far a circuit is from the model, as one number that can be learned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.runs import Pair, Runs, spread_out
from circuits.tasks.metrics import kl


@dataclass(frozen=True, eq=False)
class Distance:
    """The mean over examples of (m(C) - m(N))^2, as a share of what it is for no edges; for KL divergence KL itself.

    This is what faithfulness is about, example by example, and it is defined for every metric; a divergence between
    predictions would need a prediction, which a unit's activation is not.

    Attributes:
        runs: the task's runs.
        whole: the distance of the circuit of no edges, in the metric's units.
    """

    runs: Runs
    whole: float

    @classmethod
    def of(cls, runs: Runs) -> Distance:
        """The distance on a task.

        Raises:
            ValueError: if removing every edge changes the metric on no example.
        """
        with torch.no_grad():
            parts = [_apart(runs, pair, runs.corrupted(pair)[None]).sum() for pair in runs.pairs()]
        whole = float(torch.stack(parts).sum()) / len(runs.task)
        if not whole > 0:
            raise ValueError(
                f"{runs.metric.name} of task {runs.task.name} is the same with every edge removed, on every example: "
                "there is nothing that a circuit could be learned from"
            )
        return cls(runs, whole)

    def at(
        self,
        pair: Pair,
        off: Float[Tensor, "set edge"],
        constants: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, ""]:
        """The distance on a batch, averaged over its examples and over sets of patched edges.

        Args:
            pair: the batch.
            off: for each set and edge the share that is patched.
            constants: what patched edges carry, in the place of what they carry in the pair's other run.
        """
        if constants is not None:
            names = [name for name in pair.other if name in constants]
            given = spread_out(constants, pair.clean, names)
            pair = replace(pair, other={**pair.other, **given})
        apart = _apart(self.runs, pair, self.runs.patched(pair, off))
        return apart.mean() / self.whole


def _apart(runs: Runs, pair: Pair, values: Float[Tensor, "set example"]) -> Tensor:
    if runs.metric.name == kl.name:
        return values
    return (values - runs.value(pair.intact, pair.intact)).square()
