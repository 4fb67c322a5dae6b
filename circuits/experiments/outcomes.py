"""Results of experiments: every measure of every variant on every example, and the effects computed from them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from circuits.experiments.statistics import interval, least_p, n_clusters, p_value, resampled
from circuits.experiments.variants import INTACT
from circuits.files import finite
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table, between, spread
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

Over = Literal["examples", "tokens"]
"""What a mean is over: examples, each with the mean over its counted positions, or all counted positions, each with the
same weight."""


@dataclass(frozen=True)
class Record:
    """Where a number comes from.

    Attributes:
        model: the model's name.
        model_hash: the hash of the model.
        task: the task, as `Task.describe` gives it.
        seed: seed of everything random.
        threads: torch's number of threads, on which the last bits of sums depend.
        dtype: the dtype of the parameters.
        device: the device that the experiment ran on.
        versions: the versions of Python and torch.
    """

    model: str
    model_hash: str
    task: Mapping[str, Any]
    seed: int
    threads: int
    dtype: str
    device: str
    versions: Mapping[str, str]

    @property
    def measured_on(self) -> str:
        """The task and the choice of examples in words, for titles."""
        examples, half = self.task["examples"], self.task["half"]
        data = "" if examples["how"] == "given" else f" on {examples['data']}"
        part = "" if half == "all" else f" ({half} half)"
        return f"{self.task['task']}{part}{data}: {examples['chosen']}"

    @classmethod
    def of(cls, model: HookedModel, task: Task, seed: int) -> Record:
        """The record of an experiment that runs now, in this process."""
        # The first parameter speaks for all: a model in two precisions is not refused, but only one is noted.
        kinds = (str(p.dtype) for p in model.module.parameters() if p.is_floating_point())
        dtype = next(kinds, "torch.float32").removeprefix("torch.")
        return cls(
            model.name, model.intact_hash, task.describe(), seed, torch.get_num_threads(), dtype, str(model.device),
            {"python": platform.python_version(), "torch": str(torch.__version__)},
        )  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """The effect of a change on one measure, compared with random changes.

    Attributes:
        measure: the measure's name.
        unit: the measure's unit.
        intact: its mean in the intact model.
        changed: its mean in the changed model.
        change: the difference of the two.
        low: lower end of the 95 % interval of the change: paired bootstrap over examples, by cluster where examples
            share a template instance; NaN with fewer than two.
        high: upper end of the interval.
        null: the change that each random variant makes.
        null_is: what the random variants are.
        p_value: (1 + k) / (1 + n) for k of n random variants that change the measure at least as much in either
            direction; NaN without a null.
        least_p: the smallest p-value that this number of random variants can give.
        n: the number of examples.
        n_clusters: the number of independent examples.
        over: what the means are over.
    """

    measure: str
    unit: str
    intact: float
    changed: float
    change: float
    low: float
    high: float
    null: tuple[float, ...]
    null_is: str
    p_value: float
    least_p: float
    n: int
    n_clusters: int
    over: Over = "examples"

    @property
    def null_range(self) -> tuple[float, float]:
        """The smallest and the largest change among the random variants; NaN without any."""
        return (min(self.null), max(self.null)) if self.null else (float("nan"), float("nan"))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite(asdict(self))


def effects_table(groups: Mapping[str, Mapping[str, Effect]], title: str) -> Table:
    """Effects by measure, each under the words of its group, compared with what its null does."""
    each = [
        (f"{words} {name}".strip(), e) for words, effects in groups.items() for name, e in effects.items()
    ]  # fmt: skip
    rows = [
        (name, e.intact, e.changed, e.change, between(e.low, e.high), spread(e.null), e.p_value)
        for name, e in each
    ]
    # The largest of several: what is said of the table holds for all of its rows.
    least = max((e.least_p for _, e in each if e.null), default=float("nan"))
    note = "null: " + "; ".join(dict.fromkeys(e.null_is for _, e in each))
    note += "" if np.isnan(least) else f"; smallest possible p: {least:.2g}"
    return Table(
        ("measure", "intact", "changed", "change", "95 % interval", "null", "p"), rows, title, note
    )


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The values of all measures, for each variant and example.

    Attributes:
        measures: what was measured.
        variants: the variants' names; the first is the intact model.
        values: by measure, variant x example; NaN where an example has no value.
        counts: the number of counted positions of each example.
        clusters: a number for each example, shared by those of one template instance.
        labels: the class of each example; None if there are none.
        record: where the numbers come from.
    """

    measures: tuple[Metric, ...]
    variants: tuple[str, ...]
    values: Mapping[str, Float[np.ndarray, "variant example"]]
    counts: Float[np.ndarray, " example"]
    clusters: tuple[int, ...]
    labels: tuple[int, ...] | None
    record: Record

    def __len__(self) -> int:
        return len(self.counts)

    def of(self, measure: str, variant: str = INTACT) -> Float[np.ndarray, " example"]:
        """The value of a measure on each example, in one variant.

        Raises:
            KeyError: if there is no such measure or variant.
        """
        if measure not in self.values:
            raise KeyError(f"measure {measure!r}: expected one of {', '.join(self.values)}")
        if variant not in self.variants:
            raise KeyError(f"variant {variant!r}: expected one of {', '.join(self.variants[:8])}")
        return self.values[measure][self.variants.index(variant)]

    def weights(self, over: Over) -> Float[np.ndarray, " example"]:
        """The weight of each example in a mean."""
        return np.ones(len(self)) if over == "examples" else self.counts

    def mean(self, measure: str, variant: str = INTACT, over: Over = "examples") -> float:
        """The mean of a measure in a variant; NaN if no example has a value."""
        # Which examples have a value is taken from the intact model (row 0): a variant in which a measure becomes NaN
        # then has a mean of NaN instead of one over fewer examples.
        values, weights = self.of(measure, variant), self.weights(over)
        known = ~np.isnan(self.values[measure][0])
        return (
            float(np.average(values[known], weights=weights[known]))
            if known.any()
            else float("nan")
        )

    def effect(
        self,
        measure: str,
        variant: str,
        null: Sequence[str] = (),
        null_is: str = "",
        over: Over = "examples",
    ) -> Effect:
        """The effect of a variant on a measure, compared with random variants.

        Raises:
            KeyError: if there is no such measure or variant.
        """
        metric = next((m for m in self.measures if m.name == measure), None)
        intact = self.of(measure)
        assert metric is not None, "there are values of it"
        known = ~np.isnan(intact)
        return effect_of(
            metric, intact[known], self.of(measure, variant)[known],
            [self.of(measure, name)[known] for name in null], null_is, weights=self.weights(over)[known],
            clusters=np.array(self.clusters)[known].tolist(), over=over, seed=self.record.seed,
        )  # fmt: skip

    def with_measure(
        self, metric: Metric, values: Float[np.ndarray, "variant example"]
    ) -> Outcomes:
        """The same outcomes with one more measure, which a caller computed from the readings."""
        return replace(
            self,
            measures=(*self.measures, metric),
            values=dict(self.values) | {metric.name: values},
        )

    def n_clusters(self, measure: str) -> int:
        """The number of independent examples that have a measure."""
        known = ~np.isnan(self.values[measure][0])
        return n_clusters(np.array(self.clusters)[known].tolist())

    def resampled(
        self, measure: str, variants: Sequence[str], over: Over = "examples"
    ) -> Float[np.ndarray, "resample variant"]:
        """The means of a measure in some variants, over the same bootstrap resamples of clusters."""
        known = ~np.isnan(self.values[measure][0])
        rows = np.stack([self.of(measure, v)[known] for v in variants])
        clusters = np.array(self.clusters)[known].tolist()
        return resampled(
            rows, weights=self.weights(over)[known], clusters=clusters, seed=self.record.seed
        )


def effect_of(
    metric: Metric,
    intact: Float[np.ndarray, " example"],
    changed: Float[np.ndarray, " example"],
    null: Sequence[Float[np.ndarray, " example"]] = (),
    null_is: str = "",
    *,
    weights: Float[np.ndarray, " example"] | None = None,
    clusters: Sequence[int] | None = None,
    over: Over = "examples",
    seed: int = 0,
) -> Effect:
    """An effect, from a measure's values on the same examples in different models.

    Args:
        metric: what was measured.
        intact: the values in the intact model.
        changed: the values in the changed model.
        null: the values with each random change.
        null_is: what the random changes are.
        weights: the weight of each example in means; all equal if None.
        clusters: a number for each example, shared by those that are not independent.
        over: what the means are over, for the record.
        seed: seed of the interval.
    """
    nan = float("nan")
    if not len(intact):
        return Effect(
            metric.name, metric.unit, nan, nan, nan, nan, nan, (), null_is, nan, nan, 0, 0, over
        )
    # By example, so that the interval is that of the paired difference: how much examples differ from each other does
    # not widen it.
    own = changed - intact
    low, high = interval(own, weights=weights, clusters=clusters, seed=seed)
    before, mean = (float(np.average(x, weights=weights)) for x in (intact, own))
    beside = tuple(float(np.average(x - intact, weights=weights)) for x in null)
    return Effect(
        metric.name, metric.unit, before, before + mean, mean, low, high, beside, null_is,
        p_value(mean, beside), least_p(len(beside)) if beside else nan, len(own),
        len(own) if clusters is None else n_clusters(clusters), over,
    )  # fmt: skip
