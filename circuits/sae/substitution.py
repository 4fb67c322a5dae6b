"""What a model does with a reconstruction in the place of its own tensor."""

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
from circuits.experiments.statistics import percentiles
from circuits.experiments.variants import INTACT, Context, Variant
from circuits.files import finite
from circuits.hooks import Change
from circuits.means import counted_rows, site_mean
from circuits.models.adapter.attaching import PREFIX
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.sae.metrics import random_dictionary, rule_of
from circuits.tables import Table
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task
from circuits.units import Site

VARIANTS = ("reconstruction", "zero", "mean", "random")

_TINY = {"nats": 0.1, "logits": 0.1, "share": 0.02, "probability": 0.02}
"""Below this a baseline's damage, in the measure's unit, is too small to divide by."""

_ROWS = 4096
"""So many rows tell how many random directions are to be active."""


@dataclass(frozen=True)
class Recovered:
    """One measure of a model's behaviour.

    Attributes:
        intact: of the model as it is.
        reconstruction: with what the autoencoder writes instead.
        zero: with zero instead.
        mean: with the mean instead.
        random: with what a random dictionary of the same size writes instead.
        of_zero: the share of the damage done by zero that the autoencoder does not do.
        of_mean: likewise of the damage done by the mean.
        of_zero_interval: its 95 % interval, by bootstrap over examples.
        of_mean_interval: likewise.
        warning: if a baseline does so little damage that the share means little.
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
        measures: what the task allows to measure, by name.
        change: of accuracy with the reconstruction; None without answers.
        kept_positions: of texts: the first so many keep their own tensor in all variants.
        record: model, task, examples and seed.
    """

    measures: dict[str, Recovered]
    change: Effect | None
    kept_positions: int
    record: Record

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite(asdict(self))

    def tables(self, which: str) -> Iterator[Table]:
        """Each measure with codes, with zero, with the mean and with a random dictionary; `which` examples."""
        rows = []
        for name, m in self.measures.items():
            shares = [
                f"{share:.3f} ({low:.3f} to {high:.3f})"
                for share, (low, high) in ((m.of_zero, m.of_zero_interval), (m.of_mean, m.of_mean_interval))
            ]  # fmt: skip
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
    """What a model does with an autoencoder's reconstruction, compared with zero, the mean and a random dictionary.

    Args:
        model: the model, without the autoencoder.
        code: the autoencoder.
        task: what is measured on; examples stand for the task that they state by themselves.
        labels: as `ablate` takes them.
        keep_positions: of texts: the first so many keep their own tensor; as in the training's rule if None.
        batch: examples together.
        seed: of the intervals and the random dictionary.
        progress: called with what is done and all there is, in examples times variants.

    Raises:
        KeyError: if the autoencoder's site is none of the model's.
        ValueError: if it does not fit, no text is longer than what is kept, or labels do not fit.
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
    about = code.about
    target = about.target if about.target != about.site else None
    source, place = model.site(about.site), model.site(about.target or about.site)
    rows = _some_rows(model, source, examples, keep, batch)
    null = random_dictionary(code, rows, torch.Generator().manual_seed(seed))
    first = range(keep if place.position_axes == ("position",) else 0)
    mean = site_mean(model, place, examples, leave_out=first, batch=batch).values

    def constant(value: Tensor) -> Tensor:
        return place.spread(mean).to(value).expand_as(value)

    def changed(name: str, site: str, change: Change, other: HookedModel | None = None) -> Variant:
        def live(context: Context) -> dict[str, Change]:
            return {site: _held(place, change, context, keep)}

        return Variant(name, live=live, sites=(site,), model=other)

    def written(name: str, by: Autoencoder) -> Variant:
        # an autoencoder whose error is zero writes all of the tensor
        attached = model.attach(by, name, about.site, target)
        return changed(name, f"{PREFIX}{name}.error", torch.zeros_like, attached)

    return [
        written("reconstruction", code), changed("zero", place.name, torch.zeros_like),
        changed("mean", place.name, constant), written("random", null),
    ]  # fmt: skip


def _some_rows(
    model: HookedModel, site: Site, examples: Examples, keep: int, batch: int
) -> Float[Tensor, "row width"]:
    """The first rows that are encoded, without the first positions of texts."""
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
        raise ValueError(f"keep_positions {keep}: no text has a position beyond")
    return torch.cat(found)


def _held(place: Site, change: Change, context: Context, keep: int) -> Change:
    """A change that leaves the first positions of texts as they are."""
    if not keep or place.position_axes != ("position",):
        return change
    assert context.batch is not None, "texts are run in batches"
    where = counted(context.batch.inputs, context.batch.mask, keep)[..., None]

    def held(value: Tensor) -> Tensor:
        own, made = place.rows(value), place.rows(change(value))
        return place.from_rows(torch.where(where.to(value.device), made, own))

    return held


def _recovered(outcomes: Outcomes, metric: Metric) -> Recovered:
    means = [outcomes.mean(metric.name, v) for v in (INTACT, *VARIANTS)]
    drawn = outcomes.resampled(metric.name, [INTACT, *VARIANTS]).T
    shares, spread, small = [], [], []
    for base, what in ((2, "zero"), (3, "the mean")):
        with np.errstate(divide="ignore", invalid="ignore"):
            shares.append(float(_share(np.array(means), base)))
            spread.append(percentiles(_share(drawn, base)))
        damage = -(metric.better or 1) * (means[base] - means[0])
        if damage < _TINY.get(metric.unit, 0.0):
            small.append(f"{what} ({damage:.3g})")
    warning = (
        f"damage done by {' and by '.join(small)} is tiny, or none: the share of it means little"
        if small
        else ""
    )
    intact, own, zero, mean, random = means
    return Recovered(
        intact, own, zero, mean, random, shares[0], shares[1], spread[0], spread[1], warning
    )


def _share(means: Float[np.ndarray, "variant *draw"], base: int) -> Float[np.ndarray, "*draw"]:
    """The share of a baseline's damage that is not done; not finite where it does none."""
    damage = means[base] - means[0]
    return np.asarray(1 - (means[1] - means[0]) / np.where(damage == 0, np.nan, damage))
