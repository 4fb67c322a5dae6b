"""What a transplant does, beside the intact network, zeros, constants and random controls (layer 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.attribution.counting import Counted
from circuits.files import finite
from circuits.hooks import Change
from circuits.models.adapter import HookedModel
from circuits.transplant.grafts import (
    Graft,
    Match,
    Runs,
    Variant,
    nearest,
    put_in,
    shuffled,
    with_random_weights,
)
from circuits.tuning.measures import Interval

Progress = Callable[[int, int], object]

LEVELS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Of the best constant, in means of the units."""
TRANSPLANT = "transplant"
_RESAMPLES = 1000
_SIGNS = 10_000


@dataclass(frozen=True)
class Condition:
    """What a network does with something else in the places of the family's units.

    Attributes:
        name: what stands there.
        top1: share of images whose label is the first answer.
        top5: or among the first five.
        kl: from the intact network's answers to these, in nats, the mean over images.
        recovered_kl: 1 - kl / kl of zeroing the units. Intervals of all four are over resampled images.
        p_kl: how often the signs of the images' differences from the transplant, drawn at random, give one as
            large in sum (paired); NaN for the transplant itself.
        p_top1: the same of top-1.
        repeats: how many random ones are averaged, image by image; 1 where nothing is random.
    """

    name: str
    top1: Interval
    top5: Interval
    kl: Interval
    recovered_kl: Interval
    p_kl: float
    p_top1: float
    repeats: int


@dataclass(frozen=True)
class TransplantReport:
    """A transplant beside what stands in its place, and beside nothing.

    Attributes:
        conditions: "intact", "zero", "mean", "best constant" (a multiple of the means, chosen on calibration images:
            what a change of bias does), "transplant", "shuffled orientations", "random weights".
        matches: the transplant's.
        host: the network's name.
        host_hash: of its weights.
        donor: the other's name.
        donor_hash: of its weights.
        calibration: what gains, offsets and shifts were fitted on.
        evaluation: what everything was measured on.
        labels: whose they are.
        n_calibration: how many images.
        n_evaluation: likewise.
        seed: of shuffles, random weights and bootstrap.
    """

    conditions: tuple[Condition, ...]
    matches: tuple[Match, ...]
    host: str
    host_hash: str
    donor: str
    donor_hash: str
    calibration: str
    evaluation: str
    labels: str
    n_calibration: int
    n_evaluation: int
    seed: int

    def condition(self, name: str) -> Condition:
        """The condition of that name."""
        return next(c for c in self.conditions if c.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it (NaN as null)."""
        matches = [asdict(m) | {"host": str(m.host), "donor": str(m.donor)} for m in self.matches]
        return finite(asdict(self) | {"matches": matches})


def measure_transplant(
    host: HookedModel,
    graft: Graft,
    calibration: Sequence[Tensor],
    evaluation: Sequence[Tensor],
    labels: Sequence[int] | None = None,
    *,
    n_random: int = 3,
    calibrated_on: str = "",
    evaluated_on: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> TransplantReport:
    """Measure a transplant beside the intact network, zeros, means, and two random controls.

    Args:
        host: the network; afterwards it is what it was.
        graft: what is put in.
        calibration: images that the graft was fitted on, as the host takes them; means and controls are too.
        evaluation: others.
        labels: the class of each evaluation image; without any the intact network's own answers.
        n_random: how many shuffles, and how many networks of random weights.
        calibrated_on: where the images are from, for the record.
        evaluated_on: likewise.
        seed: of shuffles, random weights, bootstrap and tests.
        progress: called with controls fitted and passes done, and all there are.

    Raises:
        ValueError: if there is no image, labels do not fit, or n_random is below 1.
    """
    n = sum(map(len, evaluation))
    if not n or not sum(map(len, calibration)):
        raise ValueError(f"{n} evaluation images: expected at least one, and one to calibrate on")
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels: {len(labels)} for {n} evaluation images")
    if n_random < 1:
        raise ValueError(f"n_random {n_random} must be at least 1")
    generator = Generator().manual_seed(seed)
    done, total = 0, 2 * n_random + (5 + 2 * n_random) * len(evaluation)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    variants = _variants(host, graft, calibration, n_random, generator, tick)
    numbers, at = np.zeros((len(variants), 3, n)), 0
    for x in evaluation:
        here = slice(at, at + len(x))
        batch = Runs(host, graft.site, x)
        intact = batch.logits(None)
        right = (
            intact.argmax(-1)
            if labels is None
            else torch.tensor(labels[here], device=intact.device)
        )
        counted = Counted(intact[:, None], right[:, None])
        for k, (_, change) in enumerate(variants):
            value = counted.of(batch.logits(change)[:, None])
            five = value.get("top5", np.ones(len(x)))  # of at most ten classes nobody counts five
            numbers[k, :, here] = np.stack([value["top1"], five, value["kl"]], 1).T
            tick()
        at += len(x)
    by_name: dict[str, list[np.ndarray]] = {}
    for (name, _), row in zip(variants, numbers, strict=True):
        by_name.setdefault(name, []).append(row)
    return TransplantReport(
        _conditions({name: np.stack(rows) for name, rows in by_name.items()}, seed), graft.matches, host.name,
        host.hash, graft.donor.name, graft.donor.hash, calibrated_on, evaluated_on,
        "the intact network's answers" if labels is None else "the images' own", sum(map(len, calibration)), n,
        seed,
    )  # fmt: skip


def _variants(
    host: HookedModel,
    graft: Graft,
    calibration: Sequence[Tensor],
    n_random: int,
    generator: Generator,
    tick: Callable[[], None],
) -> list[tuple[str, Variant]]:
    """All conditions, by name; random ones several times."""
    site, units = graft.site, [m.host.index for m in graft.matches]
    sums = [
        host.run(x, read=[site], until=site)[site][:, units].mean((2, 3)).sum(0)
        for x in calibration
    ]
    mean = torch.stack(sums).sum(0) / sum(map(len, calibration))

    def held(values: Float[Tensor, " unit"]) -> Change:
        return lambda value: put_in(value, graft, values[None, :, None, None])

    shuffles, noise = [], []
    for control in shuffled(host, graft, calibration, generator, n_random):
        shuffles.append(control)
        tick()
    for _ in range(n_random):
        noise.append(with_random_weights(host, graft, calibration, generator))
        tick()
    level = nearest(host, site, [held(level * mean) for level in LEVELS], calibration)
    return [
        ("intact", None), ("zero", held(torch.zeros_like(mean))), ("mean", held(mean)),
        ("best constant", held(LEVELS[level] * mean)), (TRANSPLANT, graft),
        *(("shuffled orientations", g) for g in shuffles), *(("random weights", g) for g in noise),
    ]  # fmt: skip


def _conditions(
    numbers: dict[str, Float[np.ndarray, "repeat 3 image"]], seed: int
) -> tuple[Condition, ...]:
    """In numbers with intervals; images are drawn again together for all of them."""
    generator = np.random.default_rng(seed)
    means = {name: rows.mean(0) for name, rows in numbers.items()}
    n = means["zero"].shape[1]
    drawn = generator.multinomial(n, np.full(n, 1 / n), _RESAMPLES) / n

    def measured(values: np.ndarray) -> Interval:
        return _interval(float(values.mean()), drawn @ values)

    zero = means["zero"][2]
    made = []
    for name, (top1, top5, kl) in means.items():
        lost = zero.mean()
        recovered = _interval(
            float(1 - kl.mean() / lost) if lost > 0 else float("nan"),
            1 - (drawn @ kl) / np.where(drawn @ zero > 0, drawn @ zero, np.nan),
        )
        itself = name == TRANSPLANT
        p_kl, p_top1 = (
            float("nan") if itself else paired_p(values - means[TRANSPLANT][k], generator)
            for k, values in ((2, kl), (0, top1))
        )
        made.append(
            Condition(
                name,
                measured(top1),
                measured(top5),
                measured(kl),
                recovered,
                p_kl,
                p_top1,
                len(numbers[name]),
            )
        )
    return tuple(made)


def _interval(value: float, drawn: Float[np.ndarray, " resample"]) -> Interval:
    if np.isnan(drawn).all():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def paired_p(differences: Float[np.ndarray, " image"], generator: np.random.Generator) -> float:
    """How often differences with random signs have a sum as large, either way, themselves counted.

    Of differences that are 0 or 1 either way this is McNemar's test, by simulation.
    """
    some = differences[differences != 0]
    if not len(some):
        return 1.0
    sums = np.array(
        [(some * generator.choice((-1.0, 1.0), len(some))).sum() for _ in range(_SIGNS)]
    )
    return float((1 + (np.abs(sums) >= abs(some.sum()) - 1e-12).sum()) / (1 + _SIGNS))
