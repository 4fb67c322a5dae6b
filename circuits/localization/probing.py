"""Where it can be read off linearly whether an example is clean or corrupted, or any other label.

A direction or a probe is fitted on a task's `find` half and judged on its `test` half, next to random directions of
equal norm and to control tasks in which each template instance has a random label (Hewitt and Liang 2019, "Designing
and Interpreting Probes with Control Tasks"). That something can be read off does not say that the model uses it:
`steering_grid` asks that.
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
"""What is read off: whether it is the example or its counterpart; which answer is right; which template it is of."""

N_CONTROL = 3
"""How many control tasks stand next to each readout."""


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
    """Mean differences by site and position: of the examples from their counterparts, or of one class from another.

    Args and errors are those of `linear_probes`; there must be two classes.
    """
    return _readouts(
        model, task, sites, positions, _Way("mean_difference", labels, n_random, n_control, 1.0, seed), batch, progress
    )  # fmt: skip


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
    """Logistic regressions by site and position, fitted on the task's `find` half and judged on its `test` half.

    Args:
        model: the model.
        task: a whole task: it is split here, template instances together.
        sites: see `select_sites`; the residual stream before each layer of a transformer if None.
        labels: what is read off: `pair`, whether it is the example (1) or its counterpart (0); `answer` or `template`;
            or a class for each of the task's examples.
        positions: of texts, see `keys_of`; every position if None. Of images the mean over the map is read.
        strength: C of the regression on standardised rows: the larger, the weaker its penalty.
        n_random: how many random directions.
        n_control: how many control tasks.
        batch: examples together.
        seed: of random directions, control tasks and intervals.
        progress: called with the readouts that are done, and all there are.

    Raises:
        KeyError: if there is no such site.
        ValueError: if the task is one half of another or too small to split; has no counterparts, or the same texts on
            both sides, where pairs are to be told apart; has not at least two labels in each half; labels are not one
            for each example; or a position is past the end of every text.
    """
    if strength <= 0:
        raise ValueError(f"strength {strength} must be above 0")
    return _readouts(
        model, task, sites, positions, _Way("logistic", labels, n_random, n_control, strength, seed), batch, progress
    )  # fmt: skip


# --- fitting and judging -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """Labelled rows of one half.

    Attributes:
        rows: what is seen.
        labels: of each.
        example: which example each belongs to.
        clusters: of each example of the half.
        paired: whether rows are examples (first half of them) and their counterparts.
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
        """A control task's labels: random, the same for all of a cluster; of pairs one of the two ways round."""
        groups = self.clusters[self.example]
        ids, place = np.unique(groups, return_inverse=True)
        if self.paired:
            return self.labels ^ generator.integers(2, size=len(ids))[place]
        return generator.choice(self.labels, len(ids))[place]

    def interval(self, right: Bool[np.ndarray, " row"], seed: int) -> tuple[float, float]:
        """Of the share that is right."""
        n = len(self.clusters)
        total = np.bincount(self.example, right, n)
        count = np.bincount(self.example, minlength=n)
        there = count > 0
        return interval(
            total[there] / count[there], weights=count[there].astype(float),
            clusters=self.clusters[there].tolist(), seed=seed,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Way:
    """How readouts are fitted and what they are compared with: see `linear_probes`."""

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
        """What is read off."""
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
                    f"labels: {len(self.labels)} for {len(task)} examples of task {task.name}"
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
                f"labels {self.labels!r}: all examples of task {task.name} have the same"
            )
        return np.array([known[key] for key in keys])


def _check_pairs(task: Task) -> None:
    if task.counterparts is None:
        raise ValueError(
            f"task {task.name} has no counterparts: labels 'pair' needs them (name labels of the examples)"
        )
    clean, other = (
        sorted(side.identity(i) for i in range(len(task)))
        for side in (task.examples, task.counterparts)
    )
    if clean == other:
        raise ValueError(
            f"task {task.name} has each pair both ways round, so that its counterparts are its examples: name other "
            "labels than 'pair' (answer, template, or one for each example)"
        )


def _readouts(
    model: HookedModel,
    task: Task,
    sites: str | Site | Sequence[str | Site] | None,
    positions: str | Sequence[Key] | None,
    way: _Way,
    batch: int,
    progress: Progress | None,
) -> Readouts:
    labels, find, test = way.of(task), task.find, task.test
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
            f"labels {way.named}: none in the test half occurs in the find half, so that nothing can be learned "
            f"({len(task)} examples with {len(set(labels.tolist()))} labels)"
        )
    found, total = [], len(chosen) * len(columns)
    for s, c in itertools.product(range(len(chosen)), range(len(columns))):
        fitting, judging = (
            _Rows.of(features[chosen[s].name, c], half, own) for half, features, own in each
        )
        if len(fitting.rows) and len(judging.rows):
            column = columns[c] or (None, "all")
            generator = np.random.default_rng([way.seed, s, c])
            found.append(_judged(way, chosen[s], column, fitting, judging, generator))
        if progress is not None:
            progress(len(columns) * s + c + 1, total)
    return Readouts(
        way.method, way.named, tuple(found), Record.of(model, test, way.seed), len(find)
    )


def _columns(
    model: HookedModel, task: Task, sites: Sequence[Site], positions: str | Sequence[Key] | None
) -> list[tuple[Key, str] | None]:
    """Positions with their names; None where sites are looked at as a whole."""
    by_position = [s.position_axes == ("position",) for s in sites]
    if not isinstance(model.input, TokenInput) or not all(by_position):
        if positions is not None:
            lacking = (
                sites[by_position.index(False)].name if False in by_position else sites[0].name
            )
            raise ValueError(f"positions: site {lacking} holds nothing by position of a text")
        return [None]
    return [(key, column_of(task, key).name) for key in keys_of(task, positions)]


def _judged(
    way: _Way,
    site: Site,
    column: tuple[Key | None, str],
    fitting: _Rows,
    judging: _Rows,
    generator: np.random.Generator,
) -> Readout:
    if len(set(fitting.labels.tolist())) < 2:
        raise ValueError(
            f"labels: all examples of the find half at {site.name}, position {column[1]}, have the same"
        )
    made = fit(way.method, fitting.rows, fitting.labels, way.strength)
    right = made.right(judging.rows, judging.labels)
    two = len(made.weights) == 1
    random = tuple(_random(fitting, judging, way.n_random, generator)) if two else ()
    control, control_fitted = [], []
    for _ in range(way.n_control):
        own, other = fitting.shuffled(generator), judging.shuffled(generator)
        shuffled = fit(way.method, fitting.rows, own, way.strength)
        control.append(float(shuffled.right(judging.rows, other).mean()))
        control_fitted.append(float(shuffled.right(fitting.rows, own).mean()))
    accuracy, vector = float(right.mean()), torch.from_numpy(made.weights[0].copy())
    norm = float(vector.norm()) if two else float("nan")
    return Readout(
        site.name, column[1], column[0], vector if two else None, norm, accuracy,
        *judging.interval(right, way.seed), float(made.right(fitting.rows, fitting.labels).mean()), random,
        tuple(control), tuple(control_fitted), p_value(accuracy, random if two else control), len(judging.rows),
    )  # fmt: skip


def _random(
    fitting: _Rows, judging: _Rows, n: int, generator: np.random.Generator
) -> Iterator[float]:
    """The accuracy along random directions, each with its sign and boundary fitted; their length changes nothing."""
    for direction in generator.standard_normal((n, fitting.rows.shape[1])):
        made = along(direction, fitting.rows, fitting.labels)
        yield float(made.right(judging.rows, judging.labels).mean())
