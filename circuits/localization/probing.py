"""Linear probes: where it can be read off whether an example is clean or corrupted, or any other label.

A direction or a probe is fitted on a task's `find` half and tested on its `test` half, and compared with random
directions of equal norm and with control tasks in which each template instance has a random label (Hewitt and Liang
2019, "Designing and Interpreting Probes with Control Tasks"). That a label can be read off does not show that the model
uses it; `steering_grid` tests that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from circuits.examples import BATCH
from circuits.experiments import N_RANDOM, Record
from circuits.experiments.statistics import interval, p_value
from circuits.localization.cells import Key, column_of, keys_of, sites_of
from circuits.localization.classifiers import Method, along, fit
from circuits.localization.features import Features, features_of
from circuits.localization.readouts import Readout, Readouts
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.progress import Progress
from circuits.tasks.task import Task
from circuits.units import Site

Labels = Literal["pair", "answer", "template"]
"""What is read off: whether it is the example or its counterpart; which answer is right; or which template it is
from."""

N_CONTROL = 3
"""The number of control tasks that each readout is compared with."""


def contrastive_directions(
    model: HookedModel,
    task: Task,
    sites: str | Site | Sequence[str | Site] | None = None,
    *,
    labels: Labels | Sequence[int] = "pair",
    positions: str | Sequence[Key] | None = None,
    n_random: int = N_RANDOM,
    n_control: int = N_CONTROL,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> Readouts:
    """Mean differences by site and position, between examples and counterparts or between two classes.

    Args and errors are those of `linear_probes`; there must be two classes.
    """
    plan = _ReadoutPlan("mean_difference", labels, n_random, n_control, 1.0, seed)
    return _readouts(model, task, sites, positions, plan, batch, progress)


def linear_probes(
    model: HookedModel,
    task: Task,
    sites: str | Site | Sequence[str | Site] | None = None,
    *,
    labels: Labels | Sequence[int] = "pair",
    positions: str | Sequence[Key] | None = None,
    strength: float = 1.0,
    n_random: int = N_RANDOM,
    n_control: int = N_CONTROL,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> Readouts:
    """Logistic regressions by site and position, fitted on the task's `find` half and tested on its `test` half.

    Args:
        model: the model.
        task: a whole task; it is split here, and template instances stay together.
        sites: see `select_sites`; by default the residual stream before each layer of a transformer.
        labels: what is read off: `pair`, whether it is the example (1) or its counterpart (0); `answer` or `template`;
            or a class for each of the task's examples.
        positions: for texts, see `keys_of`; every position if None. For images the mean over the map is read.
        strength: C of the regression on standardised rows: the larger it is, the weaker the L2 penalty.
        n_random: the number of random directions.
        n_control: the number of control tasks.
        batch: examples per batch.
        seed: seed of random directions, control tasks and intervals.
        progress: called with the number of readouts done and the total.

    Raises:
        KeyError: if there is no such site.
        ValueError: if the task is one half of another or too small to split; if for `pair` it has no counterparts or
            these are its own examples; if a half has fewer than two labels; if there is not one label for each
            example; or if a position is outside every text.
    """
    if strength <= 0:
        raise ValueError(f"strength {strength:g} must be above 0")
    plan = _ReadoutPlan("logistic", labels, n_random, n_control, strength, seed)
    return _readouts(model, task, sites, positions, plan, batch, progress)


# --- fitting and testing -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """Labelled activations of one half of a task.

    Attributes:
        rows: the activations.
        labels: the label of each row.
        example: the example that each row belongs to.
        clusters: the cluster of each example of the half.
        paired: whether rows are examples (the first half of them) and their counterparts.
    """

    rows: Float[np.ndarray, "row width"]
    labels: Int[np.ndarray, " row"]
    example: Int[np.ndarray, " row"]
    clusters: Int[np.ndarray, " example"]
    paired: bool

    @classmethod
    def of(cls, features: Features, half: Task, labels: np.ndarray | None) -> _Rows:
        n = len(half)
        clusters = np.array(half.clusters)
        if labels is not None:
            found = cls(features.clean, labels, np.arange(n), clusters, False)
        else:
            assert features.corrupted is not None, "checked before"
            found = cls(
                np.concatenate([features.clean, features.corrupted]), np.repeat([1, 0], n),
                np.tile(np.arange(n), 2), clusters, True,
            )  # fmt: skip
        there = ~np.isnan(found.rows).any(1)
        return cls(
            found.rows[there], found.labels[there], found.example[there], clusters, found.paired
        )

    def shuffled(self, generator: np.random.Generator) -> Int[np.ndarray, " row"]:
        """A control task's labels: random, but the same for all examples of a cluster."""
        # Pairs keep their two labels and only swap them at random (label XOR coin): a control task for pairs must
        # still tell two texts apart.
        groups = self.clusters[self.example]
        ids, place = np.unique(groups, return_inverse=True)
        if self.paired:
            return self.labels ^ generator.integers(2, size=len(ids))[place]
        return generator.choice(self.labels, len(ids))[place]

    def interval(self, right: Bool[np.ndarray, " row"], seed: int) -> tuple[float, float]:
        """The interval of the share of rows that are right, by cluster."""
        n = len(self.clusters)
        total = np.bincount(self.example, right, n)
        count = np.bincount(self.example, minlength=n)
        there = count > 0
        return interval(
            total[there] / count[there], weights=count[there].astype(float),
            clusters=self.clusters[there].tolist(), seed=seed, within=(0, 1),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _ReadoutPlan:
    """How readouts are fitted and what they are compared with; see `linear_probes`."""

    method: Method
    labels: Labels | Sequence[int]
    n_random: int
    n_control: int
    strength: float
    seed: int

    def __post_init__(self) -> None:
        for name, value in (("n_random", self.n_random), ("n_control", self.n_control)):
            if value < 0:
                raise ValueError(f"{name} {value} must be 0 or more")

    @property
    def named(self) -> str:
        """What is read off, in words."""
        words = {
            "pair": "clean or corrupted",
            "answer": "which answer",
            "template": "which template",
        }
        return words[self.labels] if isinstance(self.labels, str) else "the given labels"

    def of(self, task: Task) -> np.ndarray | None:
        """The label of each example; None for pairs."""
        if not isinstance(self.labels, str):
            if len(self.labels) != len(task):
                raise ValueError(
                    f"labels: {len(self.labels)} for {len(task)} examples of task {task.name}, expected one each"
                )
            return np.asarray(self.labels, int)
        if self.labels not in get_args(Labels):
            raise ValueError(f"labels {self.labels!r} is not one of {', '.join(get_args(Labels))}")
        if self.labels == "pair":
            _check_pairs(task)
            return None
        keys = [str(q.answers) if self.labels == "answer" else q.template for q in task.questions]
        known = {key: i for i, key in enumerate(sorted(set(keys)))}
        if len(known) < 2:
            raise ValueError(
                f"labels {self.labels!r}: all examples of task {task.name} have the same one, expected at least two"
            )
        return np.array([known[key] for key in keys])


def _check_pairs(task: Task) -> None:
    if task.counterparts is None:
        raise ValueError(
            f"labels 'pair': task {task.name} has no counterparts, so give labels for the examples"
        )
    clean, other = (
        sorted(side.identity(i) for i in range(len(task)))
        for side in (task.examples, task.counterparts)
    )
    if clean == other:
        raise ValueError(
            f"labels 'pair': task {task.name} has each pair in both directions, so that its counterparts are its own "
            "examples; expected answer, template, or a label for each example"
        )


def _readouts(
    model: HookedModel,
    task: Task,
    sites: str | Site | Sequence[str | Site] | None,
    positions: str | Sequence[Key] | None,
    plan: _ReadoutPlan,
    batch: int,
    progress: Progress | None,
) -> Readouts:
    labels, find, test = plan.of(task), task.find, task.test
    chosen = sites_of(model, sites, "position" if sites is None else "site")
    columns = _columns(model, task, chosen, positions)
    place = {number: i for i, number in enumerate(task.examples.numbers)}
    each = []
    for half in (find, test):
        at = [None if c is None else column_of(half, c[0]) for c in columns]
        own = None if labels is None else labels[[place[n] for n in half.examples.numbers]]
        each.append((half, features_of(model, half, chosen, at, batch), own))
    if labels is not None and not set(each[0][2].tolist()) & set(each[1][2].tolist()):
        raise ValueError(
            f"labels ({plan.named}): no label of the test half occurs in the find half, so nothing can be learned from "
            f"{len(task)} examples with {len(set(labels.tolist()))} labels"
        )
    found, total = [], len(chosen) * len(columns)
    for s, c in itertools.product(range(len(chosen)), range(len(columns))):
        fitting, testing = (
            _Rows.of(features[chosen[s].name, c], half, own) for half, features, own in each
        )
        if len(fitting.rows) and len(testing.rows):
            column = columns[c] or (None, "all")
            generator = np.random.default_rng([plan.seed, s, c])
            found.append(_tested_readout(plan, chosen[s], column, fitting, testing, generator))
        if progress is not None:
            progress(len(columns) * s + c + 1, total)
    return Readouts(
        plan.method, plan.named, tuple(found), Record.of(model, test, plan.seed), len(find)
    )


def _columns(
    model: HookedModel, task: Task, sites: Sequence[Site], positions: str | Sequence[Key] | None
) -> list[tuple[Key, str] | None]:
    """The positions with their names; a single None if the sites are read as a whole."""
    by_position = [s.position_axes == ("position",) for s in sites]
    if not isinstance(model.input, TokenInput) or not all(by_position):
        if positions is not None:
            lacking = (
                sites[by_position.index(False)].name if False in by_position else sites[0].name
            )
            raise ValueError(
                f"positions {positions!r}: site {lacking} has no text positions, so leave them out"
            )
        return [None]
    return [(key, column_of(task, key).name) for key in keys_of(task, positions)]


def _tested_readout(
    plan: _ReadoutPlan,
    site: Site,
    column: tuple[Key | None, str],
    fitting: _Rows,
    testing: _Rows,
    generator: np.random.Generator,
) -> Readout:
    if len(set(fitting.labels.tolist())) < 2:
        raise ValueError(
            f"labels: all examples of the find half at {site.name}, position {column[1]}, have the same one, expected "
            "at least two"
        )
    made = fit(plan.method, fitting.rows, fitting.labels, plan.strength)
    right = made.right(testing.rows, testing.labels)
    two = len(made.weights) == 1
    random = tuple(_random_accuracies(fitting, testing, plan.n_random, generator)) if two else ()
    control, control_fitted = [], []
    for _ in range(plan.n_control):
        own, other = fitting.shuffled(generator), testing.shuffled(generator)
        shuffled = fit(plan.method, fitting.rows, own, plan.strength)
        control.append(float(shuffled.right(testing.rows, other).mean()))
        control_fitted.append(float(shuffled.right(fitting.rows, own).mean()))
    accuracy, vector = float(right.mean()), torch.from_numpy(made.weights[0].copy())
    norm = float(vector.norm()) if two else float("nan")
    return Readout(
        site.name, column[1], column[0], vector if two else None, norm, accuracy,
        *testing.interval(right, plan.seed), float(made.right(fitting.rows, fitting.labels).mean()), random,
        tuple(control), tuple(control_fitted), p_value(accuracy, random if two else control), len(testing.rows),
    )  # fmt: skip


def _random_accuracies(
    fitting: _Rows, testing: _Rows, n: int, generator: np.random.Generator
) -> Iterator[float]:
    """The accuracy along random directions, each with its sign and boundary fitted."""
    # Their lengths do not matter: the sign of the score does not depend on the direction's norm.
    for direction in generator.standard_normal((n, fitting.rows.shape[1])):
        made = along(direction, fitting.rows, fitting.labels)
        yield float(made.right(testing.rows, testing.labels).mean())
