"""A model's behaviour with an autoencoder's reconstruction in the place of its own activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.autoencoders import Autoencoder
from circuits.examples import BATCH, Examples, counted
from circuits.experiments.ablation import Labels, as_task
from circuits.experiments.outcomes import Effect, Outcomes, Record
from circuits.experiments.running import run
from circuits.experiments.statistics import Interval
from circuits.experiments.variants import INTACT, Context, Variant
from circuits.files import finite
from circuits.hooks import Change
from circuits.means import counted_rows, site_mean
from circuits.models.adapter.attaching import PREFIX
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.sae.metrics import random_dictionary, rule_of
from circuits.tables import Table, with_interval
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task
from circuits.units import Site

VARIANTS = ("reconstruction", "zero", "mean", "random")

_TINY = {"nats": 0.1, "logits": 0.1, "share": 0.02, "probability": 0.02}
"""A baseline that does less damage than this, in the measure's unit, is too weak to divide by."""

_ROWS = 4096
"""Rows on which the L0 of the random dictionary is matched."""


@dataclass(frozen=True)
class Recovered:
    """One measure of a model's behaviour, with the share that the reconstruction recovers ("loss recovered").

    Attributes:
        intact: the measure for the model as it is.
        reconstruction: with the site replaced by the autoencoder's reconstruction.
        zero: with the site replaced by zero.
        mean: with the site replaced by its mean.
        random: with the site replaced by the reconstruction of a random dictionary of the same size.
        of_zero: 1 - (reconstruction - intact) / (zero - intact): the share of the damage done by zero ablation that
            the reconstruction avoids.
        of_mean: the same with mean ablation.
        of_zero_interval: the 95 % interval of `of_zero`, by bootstrap over examples.
        of_mean_interval: the 95 % interval of `of_mean`.
        warning: a warning if a baseline does so little damage that the share means little; else empty.
    """

    intact: float
    reconstruction: float
    zero: float
    mean: float
    random: float
    of_zero: float
    of_mean: float
    of_zero_interval: tuple[float, float]
    of_mean_interval: tuple[float, float]
    warning: str


@dataclass(frozen=True)
class Behaviour:
    """A model's behaviour with an autoencoder in it.

    Attributes:
        measures: every measure that the task has, by name.
        change: the change of accuracy with the reconstruction; None without answers.
        kept_positions: for texts, how many positions at the start keep their own activations in all variants.
        record: model, task, examples and seed.
    """

    measures: dict[str, Recovered]
    change: Effect | None
    kept_positions: int
    record: Record

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON; numbers that are not finite become None."""
        return finite(asdict(self))

    def tables(self, which: str) -> Iterator[Table]:
        """Each measure with codes, with zero, with the mean and with a random dictionary; `which` examples."""
        rows = []
        for name, m in self.measures.items():
            shares = [
                with_interval(m.of_zero, *m.of_zero_interval),
                with_interval(m.of_mean, *m.of_mean_interval),
            ]
            rows.append((name, m.intact, m.reconstruction, m.zero, m.mean, m.random, *shares))
        columns = (
            "the model's", "intact", "with codes", "zero", "mean", "random dictionary", "recovered of zero",
            "of the mean",
        )  # fmt: skip
        examples, c = self.record.task["examples"], self.change
        note = f"accuracy with codes: {c.change:+.4f} ({c.low:+.4f} to {c.high:+.4f})" if c else ""
        yield Table(
            columns,
            rows,
            ", ".join(filter(None, (f"{examples['data']}: {examples['chosen']}", which))),
            note,
        )


def behaviour(
    model: HookedModel,
    code: Autoencoder,
    task: Task | Examples | Tensor | Iterable[Tensor] | str,
    *,
    labels: Labels | None = None,
    keep_positions: int | None = None,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> Behaviour:
    """Measure a model with an autoencoder's reconstruction at its site, against zero, the mean and a random dictionary.

    Args:
        model: the model, without the autoencoder.
        code: the autoencoder.
        task: the task; examples alone stand for the task that they define (see `as_task`).
        labels: see `ablate`.
        keep_positions: for texts, how many positions at the start keep their own activations; as many as training
            left out if None.
        batch: examples in a batch.
        seed: the seed of the intervals and the random dictionary.
        progress: called with what is done and what there is in all, in examples times variants.

    Raises:
        KeyError: if the model does not have the autoencoder's site.
        ValueError: if the autoencoder or the labels do not fit, or no text is longer than what is kept.
    """
    asked = as_task(model, task, labels)
    keep = rule_of(code).positions if keep_positions is None else keep_positions
    variants = _variants(model, code, asked.examples, keep, batch, seed)
    outcomes = run(model, variants, asked, batch=batch, seed=seed, progress=progress)
    known = [m for m in outcomes.measures if not np.isnan(outcomes.mean(m.name))]
    change = None
    if any(m.name == "accuracy" for m in known):
        change = outcomes.effect("accuracy", "reconstruction")
    return Behaviour(
        {m.name: _recovered(outcomes, m) for m in known}, change, keep, outcomes.record
    )


def _variants(
    model: HookedModel, code: Autoencoder, examples: Examples, keep: int, batch: int, seed: int
) -> list[Variant]:
    """The reconstruction and its baselines, in the order of `VARIANTS`."""
    about = code.about
    target = about.target if about.target != about.site else None
    source, place = model.site(about.site), model.site(about.target or about.site)
    rows = _some_rows(model, source, examples, keep, batch)
    null = random_dictionary(code, rows, torch.Generator().manual_seed(seed))
    # The mean to ablate with leaves out the positions that are not ablated.
    first = range(keep if place.position_axes == ("position",) else 0)
    mean = site_mean(model, place, examples, leave_out=first, batch=batch).values

    def constant(value: Tensor) -> Tensor:
        return place.spread(mean).to(value).expand_as(value)

    def changed(name: str, site: str, change: Change, other: HookedModel | None = None) -> Variant:
        def live(context: Context) -> dict[str, Change]:
            return {site: _keeping_positions(place, change, context, keep)}

        return Variant(name, live=live, sites=(site,), model=other)

    def written(name: str, by: Autoencoder) -> Variant:
        # With its error set to zero, an attached autoencoder replaces the site by its reconstruction.
        attached = model.attach(by, name, about.site, target)
        return changed(name, f"{PREFIX}{name}.error", torch.zeros_like, attached)

    return [
        written("reconstruction", code), changed("zero", place.name, torch.zeros_like),
        changed("mean", place.name, constant), written("random", null),
    ]  # fmt: skip


def _some_rows(
    model: HookedModel, site: Site, examples: Examples, keep: int, batch: int
) -> Float[Tensor, "row width"]:
    """Rows of the first batches, without the positions of texts that are kept."""
    found, n = [], 0
    for part in examples.batches(batch):
        value = model.run(part.inputs, mask=part.mask, read=[site], until=site)[site]
        mask = part.mask
        if "position" in site.axes:
            mask = counted(part.inputs, part.mask, keep)
        found.append(counted_rows(site, value, mask).flatten(1).float().cpu())
        n += len(found[-1])
        if n >= _ROWS:
            break
    if not n:
        raise ValueError(f"keep_positions {keep}: no text has more positions than that")
    return torch.cat(found)


def _keeping_positions(place: Site, change: Change, context: Context, keep: int) -> Change:
    """Make a change leave the first positions of texts as they are."""
    if not keep or place.position_axes != ("position",):
        return change
    assert context.batch is not None, "texts are run in batches"
    where = counted(context.batch.inputs, context.batch.mask, keep)[..., None]

    def held(value: Tensor) -> Tensor:
        own, made = place.rows(value), place.rows(change(value))
        return place.from_rows(torch.where(where.to(value.device), made, own))

    return held


def _recovered(outcomes: Outcomes, metric: Metric) -> Recovered:
    """One measure with its shares recovered."""
    # Rows: intact, reconstruction, zero, mean, random; `drawn` has a column for each bootstrap sample of examples.
    means = [outcomes.mean(metric.name, v) for v in (INTACT, *VARIANTS)]
    drawn = outcomes.resampled(metric.name, [INTACT, *VARIANTS]).T
    shares, spread, small = [], [], []
    for base, what in ((2, "zero"), (3, "the mean")):
        with np.errstate(divide="ignore", invalid="ignore"):
            shares.append(float(_share(np.array(means), base)))
            ends = Interval.of(shares[-1], _share(drawn, base), outcomes.n_clusters(metric.name))
            spread.append((ends.low, ends.high))
        damage = -(metric.better or 1) * (means[base] - means[0])
        if damage < _TINY.get(metric.unit, 0.0):
            small.append(f"{what} ({damage:.3g})")
    warning = (
        f"damage done by {' and by '.join(small)} is tiny or none: the share recovered means little"
        if small
        else ""
    )
    intact, own, zero, mean, random = means
    return Recovered(
        intact, own, zero, mean, random, shares[0], shares[1], spread[0], spread[1], warning
    )


def _share(means: Float[np.ndarray, "variant *draw"], base: int) -> Float[np.ndarray, "*draw"]:
    """The share of a baseline's damage that the reconstruction avoids; NaN where the baseline does none."""
    damage = means[base] - means[0]
    return np.asarray(1 - (means[1] - means[0]) / np.where(damage == 0, np.nan, damage))
