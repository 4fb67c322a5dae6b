"""Whether approximate scores agree with exact patching, on a sample of edges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits.discovery.results import EdgeScores
from circuits.discovery.runs import Runs
from circuits.discovery.scoring import exact
from circuits.experiments.statistics import UNKNOWN, Interval, mean_ps, percentiles
from circuits.files import finite
from circuits.progress import Progress

SAMPLE = 60
"""How many edges are patched exactly."""

RESIDUAL = 0.05
"""The completeness residual above which scores count as unreliable."""

CORRELATION = 0.9
"""The rank correlation with exact patching below which scores count as unreliable."""

SIGNS = 0.9
"""The share of equal signs below which scores count as unreliable."""

NOISE = 0.05
"""The p-value, not corrected, below which an edge counts as above the noise: as many of those without effect do."""

_FEWEST = 5
"""With edges above the noise that are worth fewer than this, nothing is said of agreement."""

_OVER_CHANCE = 2
"""With at most this many times as many edges above the noise as are expected by chance, nothing is said either."""

_LEAST = 3
"""With fewer edges above the noise no correlation is computed."""

_DRAWS = 1000
_TOP = 10
_FLAT = 0.01
"""A score below this share of the exact effect is that of a saturated path."""


@dataclass(frozen=True)
class Agreement:
    """How far scores agree with exact patching in one direction.

    Attributes:
        direction: `noising` or `denoising`; a denoising effect has the opposite sign of the score that it agrees with.
        n: the number of edges in the sample whose exact effect can be told from 0.
        by_chance: how many would if none had one, at most; NaN for one independent example.
        effective: what they are worth as a sample of all such edges: a few that stand for many count little more than
            one (Kish 1965: the square of the sum of weights over the sum of their squares).
        spearman: the rank correlation among these, each weighted by how rarely its like was drawn.
        signs: the share of these with the same sign.
        overlap: the share of the largest by score that are among as many largest by exact effect.
        largest: how many these are: ten, or as many as have an effect.
        saturated: the share of these whose score is nearly 0 although the exact effect is not.
    """

    direction: str
    n: int
    by_chance: float
    effective: float
    spearman: Interval
    signs: Interval
    overlap: float
    largest: int
    saturated: float

    @property
    def known(self) -> bool:
        """Whether enough edges are above the noise to say something of all, and more than chance explains."""
        return self.effective >= _FEWEST and not self.n <= _OVER_CHANCE * self.by_chance

    @property
    def chance(self) -> str:
        """How many edges chance explains, in words."""
        return "" if np.isnan(self.by_chance) else f", {self.by_chance:.2g} expected by chance"


@dataclass(frozen=True)
class Checked:
    """What a check of approximate scores by exact patching has found.

    Attributes:
        sampled: the numbers of the edges that were patched.
        noising: the agreement with patching the intact run.
        denoising: the agreement with patching the corrupted run; None if the ablation has no corrupted run.
        both: the rank correlation of the two exact effects with each other.
        completeness: the completeness residual of the scores.
        causes: why the scores are unreliable; empty if nothing speaks against them.
        half: which half of the examples was patched.
    """

    sampled: tuple[int, ...]
    noising: Agreement
    denoising: Agreement | None
    both: float
    completeness: float
    causes: tuple[str, ...]
    half: str = "find"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite(asdict(self))

    def lines(self) -> Iterator[str]:
        """What was found, in words."""
        where = ", other examples" if self.half == "test" else ""
        for found in (self.noising, self.denoising):
            if found is None:
                continue
            way = found.direction + where
            if found.n < _FEWEST:
                yield (
                    f"agreement with exact {way}: {found.n} of {len(self.sampled)} edges have an effect "
                    f"that can be told from 0{found.chance}"
                )
                continue
            r, s = found.spearman, found.signs
            yield (
                f"agreement with exact {way} on {len(self.sampled)} edges ({found.n} above the "
                f"noise{found.chance}, worth {found.effective:.2g} drawn evenly): "
                f"Spearman {r.value:.2f} ({r.low:.2f} to {r.high:.2f}), same sign {s.value:.0%} ({s.low:.0%} to "
                f"{s.high:.0%}), {found.overlap:.0%} of the {found.largest} largest in common"
            )
        yield self.verdict

    @property
    def verdict(self) -> str:
        """Whether the scores can be trusted, in words."""
        if self.causes:
            return f"unreliable here: {'; '.join(self.causes)}"
        if not self.noising.known:
            return (
                f"cannot be judged: the edges of the sample with an effect that can be told from 0 are worth fewer "
                f"than {_FEWEST} drawn evenly, or hardly more than by chance; take more examples, or check more edges"
            )
        return "nothing speaks against these scores"


def check_scores(
    runs: Runs, scores: EdgeScores, n: int = SAMPLE, seed: int = 0, progress: Progress | None = None
) -> Checked:
    """Compare scores with exact patching on a sample of edges, half drawn uniformly, half by the size of their score.

    Args:
        runs: the runs of the task that was scored, or of its other half.
        scores: what is checked.
        n: how many edges are patched exactly.
        seed: of the sample and of intervals.
        progress: called with the number of examples done and the total.
    """
    chosen, weights = _sample(np.abs(scores.mean), n, np.random.default_rng(seed))
    effects: dict[str, list[np.ndarray]] = {"noising": [], "denoising": []}
    done, order = 0, []
    for pair in runs.pairs():
        effects["noising"].append(exact(runs, pair, chosen.tolist()).numpy())
        if pair.corrupted is not None:
            effects["denoising"].append(exact(runs, pair.exchanged(), chosen.tolist()).numpy())
        order += pair.part.which
        done += len(pair.part)
        if progress is not None:
            progress(done, len(runs.task))
    back = np.argsort(order)
    clusters = runs.task.clusters
    own = scores.mean[chosen]
    found = {
        way: _compared(way, own, np.concatenate(rows)[back], weights, clusters, seed)
        for way, rows in effects.items()
        if rows
    }
    both = float("nan")
    if "denoising" in found:
        noised, denoised = (np.concatenate(effects[w]).mean(0) for w in ("noising", "denoising"))
        both = _spearman(noised, -denoised, weights)
    return Checked(
        tuple(chosen.tolist()), found["noising"], found.get("denoising"), both, scores.completeness,
        tuple(_causes(scores, found, both)), runs.task.half,
    )  # fmt: skip


def _sample(
    sizes: Float[np.ndarray, " edge"], n: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " chosen"], Float[np.ndarray, " chosen"]]:
    """Some edges, and for each one over its chance of being drawn."""
    total = len(sizes)
    if n >= total:
        return np.arange(total), np.ones(total)
    uniform = rng.choice(total, n // 2, replace=False)
    share = sizes / sizes.sum() if sizes.sum() else np.full(total, 1 / total)
    chance = _chances(share, n - len(uniform))
    # Systematic sampling: points one apart along the sum of the chances, in an order drawn at random, so that each edge
    # is drawn with its chance exactly.
    order = rng.permutation(total)
    ends = np.cumsum(chance[order])
    points = rng.random() + np.arange(round(float(ends[-1])))
    by_size = order[
        np.minimum(np.searchsorted(ends, points[points < ends[-1]], "right"), total - 1)
    ]
    chosen = np.unique(np.concatenate([uniform, by_size]))
    either = 1 - (1 - len(uniform) / total) * (1 - chance)
    return chosen, 1 / np.maximum(either[chosen], 1e-12)


def _chances(share: Float[np.ndarray, " edge"], n: int) -> Float[np.ndarray, " edge"]:
    """Chances of being drawn in proportion to shares, at most 1, that add up to n (or to the shares above 0)."""
    chance = np.minimum(1, n * share)
    for _ in range(len(share)):  # what is over 1 is given to the others
        free = (chance < 1) & (share > 0)
        missing = n - float(chance.sum())
        if missing < 1e-9 or not free.any():
            break
        chance[free] = np.minimum(1, chance[free] * (1 + missing / chance[free].sum()))
    return chance


def _compared(
    way: str,
    own: Float[np.ndarray, " edge"],
    effects: Float[np.ndarray, "example edge"],
    weights: Float[np.ndarray, " edge"],
    clusters: tuple[int, ...],
    seed: int,
) -> Agreement:
    mean = effects.mean(0) if way == "noising" else -effects.mean(0)
    clear, by_chance = _clear(effects, clusters)
    effective = (
        float(weights[clear].sum() ** 2 / (weights[clear] ** 2).sum()) if clear.any() else 0.0
    )
    if clear.sum() < _LEAST:
        return Agreement(
            way,
            int(clear.sum()),
            by_chance,
            effective,
            UNKNOWN,
            UNKNOWN,
            float("nan"),
            0,
            float("nan"),
        )
    a, b, w = own[clear], mean[clear], weights[clear]
    same = np.sign(a) == np.sign(b)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, len(a), len(a)) for _ in range(_DRAWS)]
    ranks = np.array([_spearman(a[i], b[i], w[i]) for i in drawn])
    signs = np.array([np.average(same[i], weights=w[i]) for i in drawn])
    k = min(_TOP, int(clear.sum()))
    top = [set(np.argsort(-np.abs(x), kind="stable")[:k].tolist()) for x in (own, mean)]
    return Agreement(
        way, int(clear.sum()), by_chance, effective,
        Interval(_spearman(a, b, w), *percentiles(ranks[np.isfinite(ranks)])),
        Interval(float(np.average(same, weights=w)), *percentiles(signs)), len(top[0] & top[1]) / k, k,
        float((np.abs(a) < _FLAT * np.abs(b)).mean()),
    )  # fmt: skip


def _clear(
    effects: Float[np.ndarray, "example edge"], clusters: tuple[int, ...]
) -> tuple[Bool[np.ndarray, " edge"], float]:
    """The edges whose exact effect can be told from 0 by a t-test, and how many can by chance, at most.

    One by one, not corrected for their number: with few examples a correction leaves hardly an edge to compare.
    """
    ps = mean_ps(effects.T, clusters)
    if np.isnan(ps).any():  # one example: any effect is clear
        return effects.mean(0) != 0, float("nan")
    return ps <= NOISE, NOISE * int(effects.any(0).sum())


def _spearman(
    a: Float[np.ndarray, " edge"],
    b: Float[np.ndarray, " edge"],
    weights: Float[np.ndarray, " edge"],
) -> float:
    """The weighted correlation of ranks."""
    x, y = _ranks(a, weights), _ranks(b, weights)
    x, y = x - np.average(x, weights=weights), y - np.average(y, weights=weights)
    size = np.sqrt(np.average(x * x, weights=weights) * np.average(y * y, weights=weights))
    return float(np.average(x * y, weights=weights) / size) if size else float("nan")


def _ranks(
    values: Float[np.ndarray, " edge"], weights: Float[np.ndarray, " edge"]
) -> Float[np.ndarray, " edge"]:
    """Ranks among all edges that the sample stands for: the weight of what is smaller, and half of that of equals."""
    found, places = np.unique(values, return_inverse=True)
    each = np.bincount(places, weights, len(found))
    return (np.cumsum(each) - each / 2)[places]


def _causes(scores: EdgeScores, found: dict[str, Agreement], both: float) -> Iterator[str]:
    if scores.method != "exact" and not scores.completeness <= RESIDUAL:
        yield f"the completeness residual is {scores.completeness:.2g} (expected at most {RESIDUAL})"
    for way, agreement in found.items():
        if not agreement.known:
            continue
        r, signs = agreement.spearman.value, agreement.signs.value
        if r < CORRELATION:
            yield f"the rank correlation with exact {way} is {r:.2f} (expected at least {CORRELATION})"
        if signs < SIGNS:
            yield f"{signs:.0%} of the signs are those of exact {way} (expected at least {SIGNS:.0%})"
    saturated = found["noising"].saturated
    if saturated > 0.05:
        yield f"{saturated:.0%} of the edges are saturated: their score is nearly 0, their exact effect is not"
    if both < CORRELATION and all(a.known for a in found.values()):
        yield (
            f"noising and denoising disagree (rank correlation {both:.2f}): parts are redundant, or work only together"
        )
