"""What a sample says of a claim: p-values and intervals by hand, and how often they are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from circuits.claims.evidence import (
    Auroc,
    Evidence,
    Known,
    Loss,
    Mean,
    Ratio,
    Region,
    Share,
    p_inside,
    p_outside,
)
from circuits.claims.hypotheses import blind_below, hsic_p, shi_equivalence_p
from circuits.claims.verdicts import Level, Measured, Quantity, Verdict, exit_code, quantity

DRAWS = 1000
MOST = 73
"""Of 1,000 tests at the level .05 more than this many are wrong with the chance .0005, if they keep their level."""


def test_a_mean_is_tested_by_students_t():
    x = np.array([0.3, 1.2, 0.4, 0.9, 1.7, 0.2])
    found = Mean(x, range(6))
    theirs: Any = stats.ttest_1samp(x, 0.5, alternative="greater")
    assert found.above(0.5) == pytest.approx(theirs.pvalue)
    assert found.below(0.5) == pytest.approx(1 - theirs.pvalue)
    ends = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    assert found.interval(0.9) == pytest.approx((ends.low, ends.high))


def test_clusters_count_once():
    x = np.array([0.3, 1.2, 0.4, 0.9])
    twice = Mean(np.repeat(x, 5), np.repeat(range(4), 5).tolist())
    once = Mean(x, range(4))
    assert twice.above(0.2) == pytest.approx(once.above(0.2))
    assert twice.interval(0.95) == pytest.approx(once.interval(0.95))


def test_a_ratio_is_fiellers():
    rng = np.random.default_rng(0)
    bottom = rng.normal(2, 0.5, 30)
    top = 0.9 * bottom + rng.normal(0, 0.3, 30)
    low, high = Ratio(top, bottom, range(30)).interval(0.95)
    # Fieller (1954): the roots of (mean_top - f mean_bottom)^2 = t^2 var(mean_top - f mean_bottom).
    t2 = stats.t.ppf(0.975, 29) ** 2
    (a, c), (_, b) = np.cov(top, bottom) / 30
    x, y = top.mean(), bottom.mean()
    roots = sorted(np.roots([y**2 - t2 * b, -2 * (x * y - t2 * c), x**2 - t2 * a]).real)
    assert (low, high) == pytest.approx(tuple(roots), abs=1e-6)
    assert all(math.isnan(v) for v in Ratio(top, bottom - 2, range(30)).interval(0.95))


def test_a_ratio_of_negative_effects_keeps_its_sides():
    rng = np.random.default_rng(1)
    bottom = -rng.normal(2, 0.5, 30)
    top = 0.5 * bottom
    found = Ratio(top + rng.normal(0, 0.01, 30), bottom, range(30))
    assert found.below(0.6) < 1e-6
    assert found.above(0.4) < 1e-6
    assert found.above(0.6) > 0.99


def test_a_share_is_tested_by_the_binomial():
    wins = np.array([1.0] * 18 + [0.0] * 2)
    found = Share(wins, range(20))
    assert found.above(0.5) == pytest.approx(stats.binomtest(18, 20, 0.5, "greater").pvalue)
    ends = stats.binomtest(18, 20).proportion_ci(0.95, "exact")
    assert found.interval(0.95) == pytest.approx((ends.low, ends.high))
    ties = Share(np.full(20, 0.5), range(20))
    assert ties.value == 0.5
    assert ties.above(0.4) == pytest.approx(stats.binom.sf(9, 20, 0.4))


@pytest.mark.parametrize("level", [0.9, 0.99])
def test_a_claim_holds_exactly_where_the_interval_lies_inside(level: float):
    rng = np.random.default_rng(2)
    for _ in range(100):
        x = rng.normal(1, 0.3, 12)
        ratio = Ratio(x, rng.normal(1, 0.1, 12), range(12))
        samples: list[Evidence] = [Mean(x, range(12)), ratio, Share((x > 1) * 1.0, range(12))]
        for sample in samples:
            low, high = sample.interval(level)
            region = Region(*sorted(rng.uniform(0, 2, 2)))
            assert (p_inside(sample, region) < 1 - level) == (
                region.low < low and high < region.high
            )
            assert (p_outside(sample, region) < 1 - level) == (
                high < region.low or low > region.high
            )


def test_a_number_that_is_known_needs_no_sample():
    assert p_inside(Known(1.0), Region(1, 2)) == 0
    assert p_outside(Known(0.99), Region(1, 2)) == 0
    assert p_inside(Known(0.99), Region(1, 2)) == 1


def test_the_area_under_the_curve_counts_pairs():
    one, other = np.array([1.0, 2, 3, 3]), np.array([0.0, 2, 3])
    pairs = [(a > b) + 0.5 * (a == b) for a in one for b in other]
    assert Auroc(one, other).value == pytest.approx(np.mean(pairs))
    assert Auroc(one, other).value == pytest.approx(stats.mannwhitneyu(one, other).statistic / 12)


def test_a_sample_without_spread_is_no_certainty():
    alike = Mean(np.zeros(2), range(2))
    assert p_inside(alike, Region(-1, 1)) == 0.5
    assert all(math.isnan(end) for end in alike.interval(0.95))
    assert p_inside(Mean(np.zeros(20), range(20)), Region(-1, 1)) < 1e-5
    # None of 16 got worse: as likely as not if one in twenty does.
    assert Loss(np.zeros(16), range(16)).below(0.05) == pytest.approx(0.95**16)


# --- levels ------------------------------------------------------------------------------------------


def _mean(rng: np.random.Generator) -> Evidence:
    """Skewed values whose mean lies on the bound 1, four a cluster."""
    shared = rng.exponential(1, 15)
    return Mean(
        (shared[:, None] * 0.5 + rng.exponential(0.5, (15, 4))).ravel(),
        np.repeat(range(15), 4).tolist(),
    )


def _ratio(rng: np.random.Generator) -> Evidence:
    effect = rng.gamma(4, 0.5, 40)
    return Ratio(effect + rng.normal(0, 0.6, 40) * effect, effect, range(40))


def _share(rng: np.random.Generator) -> Evidence:
    return Share(rng.choice([0, 0.5, 1], 50, p=[0.4, 0.2, 0.4]), range(50))


def _loss(rng: np.random.Generator) -> Evidence:
    """Right or wrong, and one in twenty gets worse: most samples of 16 have no spread."""
    return Loss((rng.random(16) < 0.05).astype(float), range(16))


def _auroc(rng: np.random.Generator) -> Evidence:
    """Scores a standard normal quantile of .75 times the square root of two apart: an area of .75."""
    apart = stats.norm.ppf(0.75) * np.sqrt(2)
    return Auroc(rng.normal(apart, 1, 12), rng.normal(0, 1, 15))


NULLS: dict[str, tuple[Callable[[np.random.Generator], Evidence], float]] = {
    "mean": (_mean, 1.0), "ratio": (_ratio, 1.0), "share": (_share, 0.5), "loss": (_loss, 0.05),
    "auroc": (_auroc, 0.75),
}  # fmt: skip


@pytest.mark.parametrize("name", NULLS)
def test_wrong_verdicts_are_as_rare_as_they_claim_to_be(name: str):
    make, truth = NULLS[name]
    rng = np.random.default_rng(7)
    samples = [make(rng) for _ in range(DRAWS)]
    # On the edge of the region neither verdict may come out more often than the level says.
    for region in (Region(low=truth), Region(high=truth)):
        assert sum(p_inside(s, region) < 0.05 for s in samples) <= MOST
        assert sum(p_outside(s, region) < 0.05 for s in samples) <= MOST


def test_power_is_there_where_the_truth_is_clear():
    rng = np.random.default_rng(8)
    assert np.mean([p_inside(_ratio(rng), Region(0.5, 1.5)) < 0.05 for _ in range(200)]) > 0.9
    assert np.mean([p_outside(_ratio(rng), Region(1.5, 2)) < 0.05 for _ in range(200)]) > 0.9


def test_independence_keeps_its_level_and_sees_dependence():
    rng = np.random.default_rng(3)
    wrong = [
        hsic_p(rng.normal(size=20), rng.exponential(size=20), range(20), 99, 0)[1]
        for _ in range(DRAWS)
    ]
    assert sum(p <= 0.05 for p in wrong) <= MOST
    x = rng.normal(size=60)
    # a dependence that no correlation sees
    assert hsic_p(x, x**2 + 0.1 * rng.normal(size=60), range(60), 199, 0)[1] <= 0.01


def test_the_smallest_dependence_that_is_seen_falls_with_the_sample():
    rng = np.random.default_rng(4)
    few, many = (blind_below(rng.normal(size=n), range(n), 0.05, 0) for n in (12, 100))
    assert many < 0.5 < few


def test_the_published_equivalence_test_passes_anything_with_little_data():
    five_of_five = np.ones(5)
    assert shi_equivalence_p(five_of_five, range(5), 0.1) > 0.05
    assert Share(five_of_five, range(5)).interval(0.95)[0] < 0.6
    assert p_inside(Share(five_of_five, range(5)), Region(0.4, 0.6)) == 1
    assert shi_equivalence_p(np.array([1.0, 0.0] * 100), range(200), 0.1) > 0.9


# --- verdicts ----------------------------------------------------------------------------------------


def _measured(*values: float, spread: float = 0.01) -> Measured:
    level, x = Level(0.05, 2), spread * np.array([-1.0, 1, -1, 1, -1, 1])
    return Measured(
        tuple(
            quantity(f"q{v}", Mean(v + x, range(6)), Region(0.9, 1.1), level, parts=len(values))
            for v in values
        )
    )


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (_measured(1.0), "holds"),
        (_measured(1.0, 1.05), "holds"),
        (_measured(1.0, 0.5), "refuted"),
        (_measured(1.0, 1.099), "undecided"),
        (_measured(1.0, spread=1), "undecided"),
        (Measured((), untestable="no effect"), "could not be tested"),
        (Measured(()), "could not be tested"),
        (Measured(_measured(1.0).quantities, cannot_hold="not all were tried"), "undecided"),
        (Measured(_measured(0.5).quantities, cannot_hold="not all were tried"), "refuted"),
        (Measured((quantity("one", Mean(np.ones(3), [0, 0, 0]), Region(0, 2), Level()),)), "could not be tested"),
    ],
)  # fmt: skip
def test_verdicts(measured: Measured, verdict: Verdict):
    assert measured.verdict(0.05)[0] == verdict
    again = Measured.from_dict(measured.to_dict())
    assert again.verdict(0.05) == measured.verdict(0.05)


def test_more_tests_need_more_evidence():
    x = np.array([0.95, 1.0, 1.05, 1.0, 0.93, 1.07])
    one, many = (
        quantity("f", Mean(x, range(6)), Region(0.9, 1.1), Level(0.05, m)) for m in (1, 1000)
    )
    assert one.p_holds < 0.05 < many.p_holds
    assert many.low < one.low
    assert isinstance(one, Quantity)


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([("holds", "holds"), ("refuted", "refuted")], 0),
        ([("holds", "holds"), ("refuted", "holds")], 1),
        ([("holds", "refuted")], 1),
        ([("holds", "holds"), ("undecided", "holds")], 3),
        ([("could not be tested", "refuted")], 3),
        ([("undecided", "holds"), ("refuted", "holds")], 1),
        ([("stale", "holds"), ("stale", "refuted")], 4),
    ],
)
def test_exit_codes(verdicts: list[tuple[Verdict, str]], code: int):
    assert exit_code(verdicts) == code  # type: ignore[arg-type]
