"""Latents against labels: sparse probes, and features that others absorb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from circuits.concepts.naming import auroc_table


@dataclass(frozen=True)
class Probe:
    """A label read from latents.

    Attributes:
        label: which.
        best: the latent with the highest AUROC on the half that chooses.
        auroc: of it, on the other half.
        base: of the best single unit of the site itself, chosen and measured likewise.
        random: of the best latent for shuffled labels.
        few: balanced accuracy of a logistic regression on `k` latents, chosen by their means' difference.
        dense: the same on all units of the site itself.
        absorbed: share of the examples of the label, found by the dense probe, on which none of the latents that
            the label raises most is active though another latent that writes along the probe is (after Chanin et
            al. 2024). Active: above its mean on examples without the label.
        n: examples of the label in the half that is measured.
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
        """As JSON has it."""
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
    """Read labels from latents: from one, from a few, and how often others take over.

    Args:
        codes: latents, an example (or a token) each.
        units: the rows that were encoded.
        W_dec: what each latent writes.
        members: which example has which label.
        labels: their names.
        k: how many latents a sparse probe may read.
        seed: of the halves and shuffles.

    Raises:
        ValueError: if numbers do not fit, or a label has fewer than four examples, or too few without it.
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
        _, random = _single(codes, generator.permutation(own), first)
        difference = codes[first & own].mean(0) - codes[first & ~own].mean(0)
        chosen = np.argsort(-np.abs(difference), kind="stable")[:k]
        few, _, _ = _fitted(codes[:, chosen], own, first)
        dense, direction, right = _fitted(units, own, first)
        hits = ~first & own & right
        spread = codes[first].std(0)
        raised = np.argsort(-difference / np.where(spread > 0, spread, np.inf), kind="stable")[:k]
        active = codes > codes[first & ~own].mean(0)
        silent = hits & ~active[:, raised].any(1)
        cosine = (
            W_dec @ direction / (np.linalg.norm(W_dec, axis=1) * np.linalg.norm(direction) + 1e-12)
        )
        along = np.flatnonzero(cosine > 0.25)
        absorbed = silent & active[:, np.setdiff1d(along, raised)].any(1)
        found.append(
            Probe(
                label, best, auroc, base, random, few, dense, float(absorbed.sum() / max(1, hits.sum())),
                int((~first & own).sum()),
            )
        )  # fmt: skip
    return found


def _half(own: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    first = np.zeros(len(own), bool)
    for value in (True, False):
        here = generator.permutation(np.flatnonzero(own == value))
        first[here[: len(here) // 2]] = True
    return first


def _single(x: np.ndarray, own: np.ndarray, first: np.ndarray) -> tuple[int, float]:
    if own[first].all() or not own[first].any() or own[~first].all() or not own[~first].any():
        return 0, float("nan")
    best = int(auroc_table(x[first], own[first, None])[0][:, 0].argmax())
    return best, float(auroc_table(x[~first][:, [best]], own[~first, None])[0][0, 0])


def _fitted(
    x: np.ndarray, own: np.ndarray, first: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Balanced accuracy on the other half, the direction in the rows' own scale, and which are found."""
    from sklearn.linear_model import LogisticRegression

    scale = x[first].std(0)
    scale[scale == 0] = 1
    fitted = LogisticRegression(max_iter=2000, class_weight="balanced").fit(
        x[first] / scale, own[first]
    )
    said = fitted.predict(x / scale).astype(bool)
    rest = ~first
    accuracy = (said[rest & own].mean() + (~said[rest & ~own]).mean()) / 2
    return float(accuracy), fitted.coef_[0] / scale, said
