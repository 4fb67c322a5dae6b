"""Whether the weights between two families turn with them.

Olah et al. 2020, "Naturally Occurring Equivariance in Neural Networks": W[i + k, j + k] = R(theta) W[i, j].
Turned back by the target's angle, a kernel should depend on the angle between source and target alone.
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
    """How far the weights between two rotational families turn with them.

    Attributes:
        explained: the share of the kernels' squares, turned back by the target's angle, that a smooth
            function of the angle between source and target explains (two harmonics, fitted).
        explained_p: how often it explains as much when angles are given to units at random.
        explained_null: the mean of that.
        correlation: of the kernels' sums with the cosine of the angle between source and target (times 2
            where one of the families is itself again after half a turn).
        correlation_p: how often angles given at random correlate as much, either way.
        correlation_null: the standard deviation of that.
        multiple: by which the angle is multiplied.
        n_null: how many times chance was tried.
        seed: of the permutations.
        targets: units of the rows, by angle.
        sources: units of the columns, by angle.
        sums: kernels' sums, target x source, in that order.
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
    """Measure W[i + k, j + k] = R(theta) W[i, j] between two rotational families.

    Args:
        expanded: weights that hold the units of both families, of mode linear or mean.
        targets: of the site that is built.
        sources: of the site that is read.
        permutations: how often angles are given to units at random.
        seed: of that.

    Raises:
        ValueError: if a family is not rotational, of another site, or too small, or weights lack a unit.
    """
    for family, site, units in (
        (targets, expanded.target, expanded.units),
        (sources, expanded.source, expanded.sources),
    ):
        if family.transformation != "rotation":
            raise ValueError(
                f"family {family.name!r} is of {family.transformation}: expected rotation"
            )
        if family.site != site:
            raise ValueError(f"family {family.name!r} is of {family.site}: expected one of {site}")
        if len(family.members) < 4:
            raise ValueError(f"family {family.name!r} has fewer than 4 units")
        missing = [str(u) for u in family.units if u.index not in units]
        if missing:
            raise ValueError(f"weights lack {', '.join(missing[:5])} of family {family.name!r}")
    if expanded.mode == "example":
        raise ValueError("weights of each example: expected mode linear or mean")
    if permutations < 1:
        raise ValueError(f"permutations {permutations} must be at least 1")
    rows = [expanded.units.index(u.index) for u in targets.units]
    columns = [expanded.sources.index(u.index) for u in sources.units]
    kernels = expanded.weight.cpu().double().numpy()[rows][:, columns]
    if kernels.ndim != 4:
        raise ValueError(f"kernels from {expanded.source} to {expanded.target} are no maps to turn")
    at = np.array([m.phase for m in targets.members])
    of = np.array([m.phase for m in sources.members])
    multiple = 2 if 180.0 in (targets.period, sources.period) else 1
    sums = kernels.sum((2, 3))
    # every target's kernels turned back by every target's angle, so that angles can be exchanged
    turned = np.stack(
        [rotate(kernels, -angle, axes=(3, 2), reshape=False, order=1) for angle in at], axis=1
    )
    generator = np.random.default_rng(seed)
    own = np.arange(len(at))
    explained = _explained(turned, own, own, at, of, np.arange(len(of)), multiple)
    correlation = _correlation(sums, at, of, multiple)
    by_chance, aligned = [], []
    for _ in range(permutations):
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
    """Share of the squares that harmonics of the angle between explain, with angles as given."""
    kernels = turned[own, given]  # target x source x y x x, turned back by the angle given to it
    between = np.deg2rad(multiple * (of[order][None] - at[given][:, None])).ravel()
    waves = [np.ones_like(between)]
    for k in range(1, _HARMONICS + 1):
        waves += [np.cos(k * between), np.sin(k * between)]
    design = np.stack(waves, 1)
    flat = kernels.reshape(len(between), -1)
    fitted = design @ np.linalg.lstsq(design, flat, rcond=None)[0]
    return float(np.square(fitted).sum() / max(np.square(flat).sum(), 1e-300))
