"""Equivariance: whether the weights between two rotational families rotate with them.

Olah et al. 2020, "Naturally Occurring Equivariance in Neural Networks": W[i + k, j + k] = R(theta) W[i, j]. A kernel
that is rotated back by the target's angle should therefore depend only on the angle between source and target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.ndimage import rotate

from circuits.experiments.statistics import p_value
from circuits.families import Family
from circuits.tables import Table
from circuits.weights.expanded import ExpandedWeights

_HARMONICS = 2


@dataclass(frozen=True, eq=False)
class Equivariance:
    """How closely the weights between two rotational families rotate with them.

    Attributes:
        explained: the share of the squared kernels, rotated back by the target's angle, that a smooth function of the
            angle between source and target explains (two harmonics, fitted).
        explained_p: the p-value of `explained`, against angles assigned to units at random.
        explained_null: the mean of `explained` under random angles.
        correlation: the correlation of the kernels' sums with the cosine of the angle between source and target (of
            twice that angle if one of the families has a period of 180 degrees).
        correlation_p: the two-sided p-value of `correlation`, against random angles.
        correlation_null: the standard deviation of `correlation` under random angles.
        multiple: the factor of the angle, 1 or 2.
        n_null: the number of random assignments.
        seed: seed of the random assignments.
        targets: the units of the rows, by angle.
        sources: the units of the columns, by angle.
        sums: the kernels' sums, target x source.
    """

    explained: float
    explained_p: float
    explained_null: float
    correlation: float
    correlation_p: float
    correlation_null: float
    multiple: int
    n_null: int
    seed: int
    targets: tuple[int, ...]
    sources: tuple[int, ...]
    sums: Float[np.ndarray, "target source"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return vars(self) | {"sums": self.sums.tolist()}

    def tables(self, title: str) -> Iterator[Table]:
        """Both measures compared with chance."""
        between = "the angle between" if self.multiple == 1 else "twice the angle between"
        rows = [
            (f"sum of kernels with cos({between})", self.correlation, f"0 ± {self.correlation_null:.2g}",
             self.correlation_p),
            ("turned kernels explained by the angle", self.explained, f"{self.explained_null:.2g}",
             self.explained_p),
        ]  # fmt: skip
        note = f"chance: angles given to units at random, {self.n_null} times, seed {self.seed}"
        yield Table(("weights in linear mode", "measured", "by chance", "p"), rows, title, note)


def measure_equivariance(
    expanded: ExpandedWeights,
    targets: Family,
    sources: Family,
    permutations: int = 999,
    seed: int = 0,
) -> Equivariance:
    """Measure how well W[i + k, j + k] = R(theta) W[i, j] holds between two rotational families.

    Args:
        expanded: weights between the units of both families, of mode linear or mean.
        targets: a family of the target site.
        sources: a family of the source site.
        permutations: how often angles are assigned to units at random.
        seed: seed of these assignments.

    Raises:
        ValueError: if a family is not rotational, of another site, or too small, or weights lack a unit.
    """
    _check_family(targets, expanded.target, expanded.units)
    _check_family(sources, expanded.source, expanded.sources)
    if expanded.mode == "example":
        raise ValueError("expanded: weights have mode example, expected linear or mean")
    if permutations < 1:
        raise ValueError(f"permutations {permutations} must be at least 1")
    rows = [expanded.units.index(u.index) for u in targets.units]
    columns = [expanded.sources.index(u.index) for u in sources.units]
    kernels = expanded.weight.cpu().double().numpy()[rows][:, columns]
    if kernels.ndim != 4:
        raise ValueError(f"kernels from {expanded.source} to {expanded.target} are no maps to turn")
    at = np.array([m.phase for m in targets.members])
    of = np.array([m.phase for m in sources.members])
    # A line turned by 180 degrees is itself: weights depend on twice the angle.
    multiple = 2 if 180.0 in (targets.period, sources.period) else 1
    sums = kernels.sum((2, 3))
    # Each target's kernels rotated back by every target's angle: a permutation of angles then only selects from this
    # table, instead of rotating all kernels again.
    # Axes x and y in this order: counter-clockwise by -angle as seen, that is back by the angle.
    turned = np.stack(
        [rotate(kernels, -angle, axes=(3, 2), reshape=False, order=1) for angle in at], axis=1
    )
    generator = np.random.default_rng(seed)
    own = np.arange(len(at))
    explained = _explained(turned, own, own, at, of, np.arange(len(of)), multiple)
    correlation = _correlation(sums, at, of, multiple)
    by_chance, aligned = [], []
    for _ in range(permutations):
        # Only who has which angle is drawn again; the angles that occur stay the same.
        i, j = generator.permutation(len(at)), generator.permutation(len(of))
        by_chance.append(_explained(turned, own, i, at, of, j, multiple))
        aligned.append(_correlation(sums, at[i], of[j], multiple))
    return Equivariance(
        explained=explained,
        explained_p=p_value(explained, by_chance, "greater"),
        explained_null=float(np.mean(by_chance)),
        correlation=correlation,
        correlation_p=p_value(correlation, aligned),
        correlation_null=float(np.std(aligned)),
        multiple=multiple,
        n_null=permutations,
        seed=seed,
        targets=tuple(u.index for u in targets.units),
        sources=tuple(u.index for u in sources.units),
        sums=sums,
    )


def _check_family(family: Family, site: str, units: tuple[int, ...]) -> None:
    """Raise ValueError unless a family is rotational, large enough, and among the weights' units of a site."""
    if family.transformation != "rotation":
        raise ValueError(f"family {family.name!r} is of {family.transformation}: expected rotation")
    if family.site != site:
        raise ValueError(f"family {family.name!r} is of {family.site}: expected one of {site}")
    if len(family.members) < 4:
        raise ValueError(
            f"family {family.name!r} has {len(family.members)} units: expected at least 4"
        )
    missing = [str(u) for u in family.units if u.index not in units]
    if missing:
        raise ValueError(f"weights lack {', '.join(missing[:5])} of family {family.name!r}")


def _correlation(sums: np.ndarray, at: np.ndarray, of: np.ndarray, multiple: int) -> float:
    cosine = np.cos(np.deg2rad(multiple * (at[:, None] - of[None])))
    return float(np.corrcoef(sums.ravel(), cosine.ravel())[0, 1])


def _explained(
    turned: np.ndarray,
    own: np.ndarray,
    given: np.ndarray,
    at: np.ndarray,
    of: np.ndarray,
    order: np.ndarray,
    multiple: int,
) -> float:
    """The share of the squares that harmonics of the angle between source and target explain, for assigned angles."""
    # Least squares of every kernel entry on 1, cos(k d), sin(k d) with d the angle between source and target.
    kernels = turned[own, given]  # target x source x y x x, rotated back by the assigned angle
    between = np.deg2rad(multiple * (of[order][None] - at[given][:, None])).ravel()
    waves = [np.ones_like(between)]
    for k in range(1, _HARMONICS + 1):
        waves += [np.cos(k * between), np.sin(k * between)]
    design = np.stack(waves, 1)
    flat = kernels.reshape(len(between), -1)
    fitted = design @ np.linalg.lstsq(design, flat, rcond=None)[0]
    return float(np.square(fitted).sum() / max(np.square(flat).sum(), 1e-300))
