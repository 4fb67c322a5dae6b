"""Measures a transplant, compared with the intact network, zeros, constants and random controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from circuits.edits.activations import Set, zero
from circuits.examples import BATCH, Examples, as_examples
from circuits.experiments.ablation import as_task
from circuits.experiments.outcomes import Outcomes, Record
from circuits.experiments.running import run
from circuits.experiments.statistics import Interval, paired_p
from circuits.experiments.variants import INTACT, Variant
from circuits.files import Keep, finite, make_now
from circuits.means import activities
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.tasks.metrics import accuracy, kl, top5
from circuits.tasks.task import Task
from circuits.transplant.grafts import (
    Donors,
    Graft,
    UnitMatch,
    nearest,
    shuffled,
    with_random_weights,
)
from circuits.units import Units

LEVELS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""The levels tried first for the best constant, in multiples of the units' means."""
_BETWEEN = 17  # levels tried then, from the one below the best of them to the one above
TRANSPLANT = "transplant"
_CONTROL = 100
"""How many passes the fitting of a control counts as in the reported progress."""


@dataclass(frozen=True)
class Condition:
    """The performance of a network whose family of units is replaced by something.

    Attributes:
        name: what replaces the units.
        accuracy: the share of images whose label is the first choice.
        top5: the share of images whose label is among the first five choices.
        kl: the KL divergence of the predictions from the intact network's, in nats, averaged over images.
        recovered_kl: 1 - kl / (kl with the units at zero). Intervals of all four are bootstraps over images.
        p_kl: a paired test of the difference in KL from the transplant; NaN for the transplant itself.
        p_accuracy: the same for accuracy.
        repeats: the number of random repetitions that are averaged, image by image; 1 if nothing is random.
    """

    name: str
    accuracy: Interval
    top5: Interval
    kl: Interval
    recovered_kl: Interval
    p_kl: float
    p_accuracy: float
    repeats: int


@dataclass(frozen=True)
class TransplantReport:
    """A transplant, compared with the intact network and with controls.

    Attributes:
        conditions: "intact", "zero", "mean", "best constant" (a multiple of the means, chosen on calibration images; it
            shows what a mere change of bias achieves), "transplant", "shuffled orientations", "random weights".
        matches: which donor unit replaces which unit of the host.
        donor: the donor network's name.
        donor_hash: the hash of its weights.
        calibration: the images that gains, offsets and shifts were fitted on, as `Examples.describe` gives them.
        labels: where the labels come from.
        record: the host, the images that everything was measured on, and the seed.
    """

    conditions: tuple[Condition, ...]
    matches: tuple[UnitMatch, ...]
    donor: str
    donor_hash: str
    calibration: Mapping[str, Any]
    labels: str
    record: Record

    def condition(self, name: str) -> Condition:
        """The condition of that name."""
        return next(c for c in self.conditions if c.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it (NaN as null)."""
        return finite(asdict(self) | {"matches": [m.to_dict() for m in self.matches]})


def measure_transplant(
    host: HookedModel,
    graft: Graft,
    calibration: Examples | Tensor | Iterable[Tensor] | str,
    evaluation: Task | Examples | Tensor | Iterable[Tensor] | str,
    labels: Sequence[int] | None = None,
    *,
    n_random: int = 3,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
    keep: Keep = make_now,
) -> TransplantReport:
    """Measure a transplant, compared with the intact network, zeros, means, and two random controls.

    Args:
        host: the network; it is unchanged afterwards.
        graft: the donor's units, fitted to the host.
        calibration: the images that the graft was fitted on; means and controls are fitted on them too.
        evaluation: other images, to measure on.
        labels: the class of each evaluation image; without labels the intact network's own predictions.
        n_random: the number of shuffles, and of networks with random weights.
        batch: images per batch.
        seed: seed of shuffles, random weights, intervals and tests.
        progress: called with the work done and the total.
        keep: keeps each control and each batch, so that the same call goes on after it was killed.

    Raises:
        ValueError: if there is no image, labels do not fit, or n_random is below 1.
    """
    if n_random < 1:
        raise ValueError(f"n_random {n_random} must be at least 1")
    fitted, task = as_examples(host, calibration), as_task(host, evaluation, labels)
    whose = "the images' own" if task.answered else "the intact network's answers"
    # Without labels the intact model's own answers are what is to be kept.
    if not task.answered:
        task = as_task(
            host, task.examples, keep("answers", partial(_answers, host, task.examples, batch))
        )
    controls = 2 * n_random * _CONTROL
    total = controls + len(task) * (5 + 2 * n_random)

    def note(done: int, _: int = 0) -> None:
        if progress is not None:
            progress(done, total)

    groups = _variants(host, graft, fitted, n_random, Generator().manual_seed(seed), note, keep)
    outcomes = run(
        host, [v for some in groups.values() for v in some], task, measures=[accuracy, top5, kl], batch=batch,
        seed=seed, progress=lambda done, _: note(controls + done), keep=keep,
    )  # fmt: skip
    return TransplantReport(
        _conditions(outcomes, groups), graft.matches, graft.donor.name, graft.donor.hash, fitted.describe(), whose,
        outcomes.record,
    )  # fmt: skip


def _answers(host: HookedModel, examples: Examples, batch: int) -> list[int]:
    """The intact network's first choices."""
    return [
        i for part in examples.batches(batch) for i in host.logits(part.inputs).argmax(-1).tolist()
    ]


def _variants(
    host: HookedModel,
    graft: Graft,
    calibration: Examples,
    n_random: int,
    generator: Generator,
    note: Progress,
    keep: Keep,
) -> dict[str, list[Variant]]:
    """The variants of every condition but the intact network; random conditions have several."""
    name, indices = graft.site.name, [m.host.index for m in graft.matches]
    units = Units(name, tuple(indices))
    donors = Donors(host)
    # On the calibration images: the constant must not know those that it is measured on.
    means = keep(
        "means", lambda: activities(host, [name], calibration)[name].mean[indices].tolist()
    )
    mean = torch.tensor(means, dtype=torch.float64)

    def constant(title: str, level: float) -> Variant:
        return Variant(title, (Set(units, values=level * mean, origin="mean"),))

    def best_of(levels: Sequence[float]) -> int:
        return nearest(host, [constant(f"level {x}", x) for x in levels], calibration)

    def best_level() -> float:
        k = best_of(LEVELS)
        low, high = LEVELS[max(k - 1, 0)], LEVELS[min(k + 1, len(LEVELS) - 1)]
        between = np.linspace(low, high, _BETWEEN).tolist()
        return between[best_of(between)]

    def numbered(k: int) -> Keep:
        return lambda name, make: keep(f"{name} {k}", make)

    controls = {
        "shuffled orientations": shuffled(host, graft, calibration, generator, n_random, keep),
        "random weights": (
            with_random_weights(host, graft, calibration, generator, numbered(k))
            for k in range(1, n_random + 1)
        ),
    }
    random: dict[str, list[Variant]] = {title: [] for title in controls}
    for title, each in controls.items():
        for k, control in enumerate(each, 1):
            random[title].append(donors.variant(f"{title} {k}", control))
            note(_CONTROL * sum(map(len, random.values())), 0)
    # The best constant is chosen as the transplant's strength is, on the same images.
    best = keep("best level", best_level)
    return {
        "zero": [Variant("zero", (zero(units),))],
        "mean": [constant("mean", 1.0)],
        "best constant": [constant("best constant", best)],
        TRANSPLANT: [donors.variant(TRANSPLANT, graft)],
    } | random


def _conditions(
    outcomes: Outcomes, groups: Mapping[str, Sequence[Variant]]
) -> tuple[Condition, ...]:
    """Each condition's numbers with intervals, over the same bootstrap resamples of images."""
    # Random repetitions are averaged image by image first: they are controls, not further images.
    repeats = {INTACT: [INTACT]} | {name: [v.name for v in some] for name, some in groups.items()}
    each = replace(
        outcomes, variants=tuple(repeats),
        values={
            m: np.stack([np.mean([outcomes.of(m, v) for v in some], 0) for some in repeats.values()])
            for m in outcomes.values
        },
    )  # fmt: skip
    drawn = {m: each.resampled(m, each.variants).T for m in each.values}
    # Recovered is 1 - KL(condition) / KL(zeros): 0 as bad as without the units, 1 as good as intact. Numerator and
    # denominator come from the same resamples.
    zero_, drawn_zero = each.mean("kl", "zero"), drawn["kl"][each.variants.index("zero")]
    made = []
    for k, name in enumerate(each.variants):
        found = {
            m: Interval.of(
                each.mean(m, name),
                drawn[m][k],
                each.n_clusters(m),
                (0, np.inf if m == "kl" else 1),
            )
            for m in each.values
        }
        with np.errstate(divide="ignore", invalid="ignore"):
            share = 1 - drawn["kl"][k] / np.where(drawn_zero > 0, drawn_zero, np.nan)
        recovered = 1 - each.mean("kl", name) / zero_ if zero_ > 0 else float("nan")
        p_kl, p_accuracy = (
            float("nan") if name == TRANSPLANT
            # Image by image, as conditions are measured on the same images.
            else paired_p(each.of(m, name) - each.of(m, TRANSPLANT), seed=outcomes.record.seed)
            for m in ("kl", "accuracy")
        )  # fmt: skip
        made.append(
            Condition(
                name, found["accuracy"], found["top5"], found["kl"],
                Interval.of(recovered, share, each.n_clusters("kl")), p_kl, p_accuracy, len(repeats[name]),
            )
        )  # fmt: skip
    return tuple(made)
