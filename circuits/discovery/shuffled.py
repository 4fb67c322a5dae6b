"""The same search in the same model with shuffled weights: what a method finds where nothing was learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.discovery.found import Discovery
from circuits.discovery.results import ranked
from circuits.files import finite
from circuits.tables import Table, with_interval

Row = tuple[str, float | str, float | str]


@dataclass(frozen=True, eq=False)
class BesideShuffled:
    """A circuit that was found, and what the same search finds in the model with shuffled weights.

    Attributes:
        found: in the model itself.
        shuffled: in the model of which each tensor's numbers were permuted (`models.paths.randomizing`), for the same
            task with examples chosen by the same rule.
    """

    found: Discovery
    shuffled: Discovery

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: what was found, and under `shuffled` the other."""
        return finite(self.found.to_dict() | {"shuffled": self.shuffled.to_dict()})

    def tables(self, top: int) -> Iterator[Table | str]:
        """What was found, and a table of both."""
        yield from self.found.tables(top)
        yield from self.compared()

    def compared(self) -> Iterator[Table | str]:
        """The table of both."""
        name = self.shuffled.scores.record.model
        yield Table(("what", "model", "shuffled weights"), self._rows(), f"the model and {name}")
        if not self.shuffled.evaluation.defined:
            yield f"shuffled weights: {self.shuffled.evaluation.undefined}"

    def _rows(self) -> list[Row]:
        columns = [dict(_facts(one)) for one in (self.found, self.shuffled)]
        return [(name, columns[0][name], columns[1][name]) for name in columns[0]]


def concentration(found: Discovery) -> float:
    """The share of the sum of all scores that the largest have, as many as the circuit has edges; NaN if all are 0."""
    sizes = np.abs(found.scores.mean)
    n = len(found.evaluation.edges)
    return float(sizes[ranked(sizes)[:n]].sum() / sizes.sum()) if sizes.any() else float("nan")


def _facts(found: Discovery) -> Iterator[tuple[str, float | str]]:
    """What is compared, by name; the same names in the same order of every discovery by one method."""
    scores, made = found.scores, found.evaluation
    yield f"{scores.metric}, intact", float(scores.clean.mean())
    yield f"{scores.metric}, every edge removed", float(scores.corrupted.mean())
    yield "share of the circuit's number of largest scores", concentration(found)
    if found.checked is not None:
        yield "completeness residual", found.checked.completeness
        for way in ("noising", "denoising"):
            agreed = getattr(found.checked, way)
            if agreed is not None:
                r = agreed.spearman
                yield f"Spearman with exact {way}", with_interval(r.value, r.low, r.high)
    f = made.faithfulness
    yield "faithfulness of the circuit", with_interval(f.value, f.low, f.high)
    yield (
        "smallest size with f >= 0.9",
        made.smallest if made.smallest is not None and made.defined else float("nan"),
    )
    yield "CMD_log", made.cmd_log
    if found.stability is not None:
        yield "Jaccard index of bootstraps", found.stability.jaccard
