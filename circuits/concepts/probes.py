"""Sparse probes on latents, and feature absorption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from circuits.concepts.naming import auroc_table


@dataclass(frozen=True)
class Probe:
    """How well a label can be read from latents, measured on the half of the examples that did not choose.

    Attributes:
        label: the label.
        best: the latent with the highest AUROC on the half that chooses.
        auroc: that latent's AUROC.
        base: the AUROC of the best single unit of the site itself, chosen and measured in the same way.
        random: the AUROC of the best latent for shuffled labels.
        few: the balanced accuracy of a logistic regression on the `k` latents with the largest differences of means.
        dense: the balanced accuracy of a logistic regression on all units of the site itself.
        absorbed: the share of the label's examples that the dense probe finds, on which none of the latents that the
            label raises most is active although another latent that writes along the probe's direction is: feature
            absorption, after Chanin et al. 2024. A latent is active above its mean on examples without the label.
        n: the number of examples with the label in the half that is measured.
    """

    label: str
    best: int
    auroc: float
    base: float
    random: float
    few: float
    dense: float
    absorbed: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        return asdict(self)


def probe(
    codes: Float[np.ndarray, "example latent"],
    units: Float[np.ndarray, "example unit"],
    W_dec: Float[np.ndarray, "latent unit"],
    members: Bool[np.ndarray, "example label"],
    labels: Sequence[str],
    *,
    k: int = 5,
    seed: int = 0,
) -> list[Probe]:
    """Probe latents for labels: with one latent, with a few, and with a test for feature absorption.

    Args:
        codes: the latents' activations, one row for each example (or token).
        units: the rows that were encoded.
        W_dec: the direction that each latent writes.
        members: which example has which label.
        labels: the names of the labels.
        k: how many latents a sparse probe may read.
        seed: the seed of the halves and shuffles.

    Raises:
        ValueError: if shapes do not fit each other, or fewer than four examples have a label or do not have it.
    """
    n = len(codes)
    if not (len(units) == len(members) == n) or members.shape[1] != len(labels):
        raise ValueError(f"codes of {n} examples, units of {len(units)}, labels of {len(members)}")
    if k < 1:
        raise ValueError(f"k {k} must be at least 1")
    generator = np.random.default_rng(seed)
    found = []
    for c, label in enumerate(labels):
        own = members[:, c]
        if own.sum() < 4 or (~own).sum() < 4:
            raise ValueError(
                f"label {label!r} has {int(own.sum())} of {n} examples: expected at least 4 with and without"
            )
        first = _half(own, generator)
        best, auroc = _single(codes, own, first)
        _, base = _single(units, own, first)
        # Shuffled labels, chosen and measured in the same way: what the best of equally many latents reaches by
        # chance.
        _, random = _single(codes, generator.permutation(own), first)
        # Everything is chosen on `first` and measured on the other half.
        difference = codes[first & own].mean(0) - codes[first & ~own].mean(0)
        chosen = np.argsort(-np.abs(difference), kind="stable")[:k]
        few, _, _ = _fitted(codes[:, chosen], own, first)
        dense, direction, right = _fitted(units, own, first)
        hits = ~first & own & right
        # The latents that should fire: those that the label raises most, in units of their spread.
        spread = codes[first].std(0)
        raised = np.argsort(-difference / np.where(spread > 0, spread, np.inf), kind="stable")[:k]
        active = codes > codes[first & ~own].mean(0)
        absorbed = _absorbed(hits, active, raised, W_dec, direction)
        measured = int((~first & own).sum())
        found.append(Probe(label, best, auroc, base, random, few, dense, absorbed, measured))
    return found


def _absorbed(
    hits: np.ndarray, active: np.ndarray, raised: np.ndarray, W_dec: np.ndarray, direction: np.ndarray
) -> float:  # fmt: skip
    """The share of hits on which other latents along the probe's direction fire instead of those raised most.

    Args:
        hits: the examples with the label that the dense probe finds.
        active: which latents are active, example x latent.
        raised: the latents that should be active.
        W_dec: the direction that each latent writes.
        direction: the direction of the dense probe.
    """
    # Absorption: the probe finds the label, the latents that stand for it are silent, and another one that points the
    # same way (cosine above 0.25) has taken its place.
    silent = hits & ~active[:, raised].any(1)
    lengths = np.linalg.norm(W_dec, axis=1) * np.linalg.norm(direction)
    along = np.flatnonzero(W_dec @ direction / (lengths + 1e-12) > 0.25)
    instead = silent & active[:, np.setdiff1d(along, raised)].any(1)
    return float(instead.sum() / max(1, hits.sum()))


def _half(own: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Choose half of the examples with a label and half of those without."""
    first = np.zeros(len(own), bool)
    for value in (True, False):
        here = generator.permutation(np.flatnonzero(own == value))
        first[here[: len(here) // 2]] = True
    return first


def _single(x: np.ndarray, own: np.ndarray, first: np.ndarray) -> tuple[int, float]:
    """The column with the highest AUROC on the first half, and its AUROC on the other; NaN if a half has one class
    only.
    """
    if own[first].all() or not own[first].any() or own[~first].all() or not own[~first].any():
        return 0, float("nan")
    best = int(auroc_table(x[first], own[first, None])[0][:, 0].argmax())
    return best, float(auroc_table(x[~first][:, [best]], own[~first, None])[0][0, 0])


def _fitted(
    x: np.ndarray, own: np.ndarray, first: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Fit a logistic regression on the first half: balanced accuracy on the other half, weights for columns that are
    not scaled, and the predictions.
    """
    from sklearn.linear_model import LogisticRegression

    scale = x[first].std(0)
    scale[scale == 0] = 1
    # Balanced, because most labels are rare: without weights, "never" would be nearly always right.
    fitted = LogisticRegression(max_iter=2000, class_weight="balanced").fit(
        x[first] / scale, own[first]
    )
    said = fitted.predict(x / scale).astype(bool)
    rest = ~first
    accuracy = (said[rest & own].mean() + (~said[rest & ~own]).mean()) / 2
    return float(accuracy), fitted.coef_[0] / scale, said
