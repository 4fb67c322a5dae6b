"""What a model does with a reconstruction in the place of its own tensor (layer 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.counting import Counted, checked_labels, interval, labels_of
from circuits.attribution.targets import output_site
from circuits.autoencoders import Autoencoder
from circuits.hooks import Change
from circuits.models.adapter import HookedModel
from circuits.models.attaching import PREFIX, from_rows, rows_of
from circuits.models.normalisation import FastNormalisation
from circuits.models.sites import unit_activations
from circuits.sae.metrics import random_dictionary, rule_of
from circuits.units import Site

_TINY = {"loss": 0.1, "kl": 0.1, "top1": 0.02, "top5": 0.02}
"""Below this a baseline's damage is too small to divide by."""

_RESAMPLES = 1000

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
        of_zero_interval: 2.5th and 97.5th percentile over resampled examples.
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
        measures: `loss` (cross-entropy in nats, of labels or next tokens), `top1`, `top5`, `kl` (from the intact
            prediction): by name, those that can be had.
        change: of `top1` with the reconstruction, and its interval (paired bootstrap); None without labels.
        n_examples: on how many.
        kept_positions: of texts: the first so many keep their own tensor in all variants.
        data: on what.
        model: its name.
        model_hash: of its weights.
        seed: of everything random.
    """

    measures: dict[str, Recovered]
    change: tuple[float, float, float] | None
    n_examples: int
    kept_positions: int
    data: str
    model: str
    model_hash: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def behaviour(
    model: HookedModel,
    code: Autoencoder,
    batches: Sequence[Tensor],
    *,
    labels: Sequence[int] | None = None,
    keep_positions: int | None = None,
    data: str = "",
    seed: int = 0,
) -> Behaviour:
    """What a model does with an autoencoder's reconstruction, beside zero, the mean and a random dictionary.

    Args:
        model: the model, without the autoencoder.
        code: the autoencoder.
        batches: examples, as the model takes them.
        labels: the class of each; of tokens the next token is the label.
        keep_positions: of texts: the first so many keep their own tensor; as in the training's rule if None.
        data: where the examples come from, for the record.
        seed: of the bootstrap and the random dictionary.

    Raises:
        KeyError: if the autoencoder's site is none of the model's.
        ValueError: if it does not fit, there is no example, or labels do not fit.
    """
    about = code.about
    if keep_positions is None:
        keep_positions = rule_of(code).positions
    target = about.target if about.target != about.site else None
    own = model.attach(code, "own", about.site, target)
    place = model.site(about.target or about.site)
    n, mean, rows = _seen(model, model.site(about.site), place, batches, keep_positions)
    checked_labels(model, labels, n, output_site(model).n_units)
    null = random_dictionary(code, rows, torch.Generator().manual_seed(seed))
    random = model.attach(null, "null", about.site, target)
    variants: list[tuple[HookedModel, dict[str, Change]]] = [
        (model, {}),
        (own, {f"{PREFIX}own.error": _held(keep_positions, place, _zero)}),
        (model, {place.name: _held(keep_positions, place, _zero)}),
        (model, {place.name: _held(keep_positions, place, _constant(place, mean))}),
        (random, {f"{PREFIX}null.error": _held(keep_positions, place, _zero)}),
    ]
    numbers: dict[str, list[np.ndarray]] = {}
    done = 0
    for x in batches:
        given = None if labels is None else torch.tensor(labels[done : done + len(x)])
        done += len(x)
        for name, values in _of_batch(model, x, given, variants).items():
            numbers.setdefault(name, []).append(values)
    joined = {name: np.concatenate(parts, 1) for name, parts in numbers.items()}
    generator = np.random.default_rng(seed)
    measures = {
        name: _recovered(name, values[:, ~np.isnan(values[0])], generator)
        for name, values in joined.items()
        if name in _TINY and not np.isnan(values[0]).all()
    }
    change = None
    if "top1" in joined:
        values = joined["top1"][:, ~np.isnan(joined["top1"][0])]
        difference = values[1] - values[0]
        change = (float(difference.mean()), *interval(difference, generator))
    return Behaviour(measures, change, n, keep_positions, data, model.name, model.hash, seed)


def _of_batch(
    model: HookedModel,
    x: Tensor,
    labels: Tensor | None,
    variants: Iterable[tuple[HookedModel, dict[str, Change]]],
) -> dict[str, np.ndarray]:
    end = output_site(model)
    counted: Counted | None = None
    found: list[dict[str, np.ndarray]] = []
    for changed, edits in variants:
        with FastNormalisation():
            value = changed.run(x, read=[end], edits=edits)[end]
        logits = unit_activations(end, value).movedim(1, 2).double()
        if counted is None:
            counted = Counted(logits, labels_of(model, x, labels))
        found.append(counted.of(logits))
    return {name: np.stack([f[name] for f in found]) for name in found[0]}


def _recovered(name: str, values: np.ndarray, generator: np.random.Generator) -> Recovered:
    """Values: variant (intact, own, zero, mean, random) x example."""
    means = values.mean(1)
    n = values.shape[1]
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
    resampled = drawn @ values.T
    shares = [_share(means, base) for base in (2, 3)]
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = [
            np.nanquantile(
                1 - (resampled[:, 1] - resampled[:, 0]) / (resampled[:, b] - resampled[:, 0]),
                [0.025, 0.975],
            )
            for b in (2, 3)
        ]
    worse = 1 if name in ("loss", "kl") else -1  # which way damage goes
    small = [
        f"{what} ({worse * (means[b] - means[0]):.3g})"
        for what, b in (("zero", 2), ("the mean", 3))
        if worse * (means[b] - means[0]) < _TINY[name]
    ]
    warning = (
        f"damage done by {' and by '.join(small)} is tiny, or none: the share of it means little"
        if small
        else ""
    )
    low, high = ((float(s[0]), float(s[1])) for s in spread)
    intact, own, zero, mean, random = means.tolist()
    return Recovered(intact, own, zero, mean, random, shares[0], shares[1], low, high, warning)


def _share(means: np.ndarray, base: int) -> float:
    damage = means[base] - means[0]
    return float(1 - (means[1] - means[0]) / damage) if damage else float("nan")


def _seen(
    model: HookedModel, source: Site, place: Site, batches: Iterable[Tensor], positions: int
) -> tuple[int, Tensor, Tensor]:
    """How many examples there are, the mean row of a site, and some rows that are encoded; without first positions."""
    total, n, examples, some = torch.zeros(()), 0, 0, []
    for x in batches:
        examples += len(x)
        read = list(dict.fromkeys((source, place)))
        cache = model.run(x, read=read, until=model.last(read))
        here, there = (_without_first(s, cache[s], positions) for s in (source, place))
        total, n = total + there.double().sum(0).cpu(), n + len(there)
        if sum(map(len, some)) < _ROWS:
            some.append(here.float().cpu())
    if not examples:
        raise ValueError("batches hold no example")
    if not n:
        raise ValueError(f"keep_positions {positions}: no text has a position beyond")
    return examples, total / n, torch.cat(some)


def _without_first(site: Site, value: Tensor, positions: int) -> Tensor:
    rows = rows_of(site, value)
    return (rows[:, positions:] if "position" in site.axes else rows).flatten(0, -2)


def _zero(value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def _constant(place: Site, mean: Tensor) -> Change:
    def change(value: Tensor) -> Tensor:
        rows = rows_of(place, value)
        return from_rows(place, mean.to(rows).expand_as(rows), value)

    return change


def _held(positions: int, place: Site, change: Change) -> Change:
    """A change that leaves the first positions of texts as they are."""
    if not positions or "position" not in place.axes:
        return change
    axis = place.axes.index("position")

    def held(value: Tensor) -> Tensor:
        kept = value.narrow(axis, 0, min(positions, value.shape[axis]))
        rest = change(value).narrow(axis, kept.shape[axis], value.shape[axis] - kept.shape[axis])
        return torch.cat([kept, rest], axis)

    return held
