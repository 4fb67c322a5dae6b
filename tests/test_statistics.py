"""Statistics against slow computations from their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from circuits.experiments.statistics import (
    Interval,
    corrected,
    ends,
    interval,
    least_p,
    mean_ps,
    p_value,
    paired_p,
    paired_ps,
    percentiles,
    resampled,
)


def test_the_interval_is_that_of_a_bootstrap_over_clusters() -> None:
    generator = np.random.default_rng(3)
    values = generator.normal(size=60)
    clusters = generator.integers(0, 12, 60)
    slow = []
    for _ in range(4000):
        drawn = generator.integers(0, 12, 12)
        slow.append(np.concatenate([values[clusters == c] for c in drawn]).mean())
    found = interval(values, clusters=clusters.tolist(), resamples=4000)
    # 12 clusters: t(11) = 2.201 instead of 1.960, and a variance that is divided by 11 instead of 12
    mean, wide = values.mean(), 2.201 / 1.960 * (12 / 11) ** 0.5
    expected = mean + wide * (np.quantile(slow, [0.025, 0.975]) - mean)
    np.testing.assert_allclose(found, expected, atol=0.03)
    # copies of each example in its own cluster say nothing new
    twice = interval(np.repeat(values, 2), clusters=np.repeat(np.arange(60), 2).tolist(), seed=5)
    np.testing.assert_allclose(twice, interval(values, seed=5), atol=1e-12)


def test_weights_count_as_often() -> None:
    values, weights = np.array([1.0, 2.0, 5.0]), np.array([1.0, 3.0, 2.0])
    drawn = resampled(values[None], weights=weights, resamples=20_000)
    assert abs(drawn.mean() - (1 + 6 + 10) / 6) < 0.15
    assert set(np.round(drawn[:, 0], 9)) <= {
        round(float(np.average(values[list(c)], weights=weights[list(c)])), 9)
        for c in itertools.product(range(3), repeat=3)
    }


def test_an_interval_of_one_cluster_is_not_a_number() -> None:
    assert all(np.isnan(interval(np.array([1.0, 2.0]), clusters=[4, 4])))
    assert interval(np.array([2.0, 2.0, 2.0])) == (2.0, 2.0)


@pytest.mark.parametrize("n", [4, 6, 10, 30])
def test_intervals_of_few_clusters_hold_the_true_ratio_of_means(n: int) -> None:
    """500 samples of a ratio of means over skewed (log-normal) clusters, whose true value is 0.9."""
    rng, held, alone = np.random.default_rng(n), 0, 0
    for _ in range(500):
        empty, skewed = rng.normal(0, 0.5, n), rng.lognormal(0, 1, (2, n))
        rows = np.stack([empty + 0.7 * skewed[0] + 0.2 * skewed[1], empty, empty + skewed[0]])
        own, none, whole = resampled(rows, resamples=400).T
        drawn, (a, b, c) = (own - none) / (whole - none), rows.mean(1)
        found, few = Interval.of((a - b) / (c - b), drawn, n), percentiles(drawn)
        held += found.low <= 0.9 <= found.high
        alone += few[0] <= 0.9 <= few[1]
    assert held / 500 >= 0.9
    assert alone < held
    assert alone / 500 < 0.85 or n > 6, "without the expansion they are too short"


def test_many_clusters_leave_percentiles_nearly_as_they_are() -> None:
    drawn = np.random.default_rng(0).normal(2, 1, 2000)
    low, high = percentiles(drawn)
    found = Interval.of(2.0, drawn, 1000)
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)


def test_expanded_intervals_end_where_values_do() -> None:
    right = np.array([1.0, 1.0, 1.0, 0.0])
    assert interval(right)[1] > 1
    assert interval(right, within=(0, 1)) == (0, 1)
    low, high = ends(np.array([2.0, 2.0]), np.full((5, 2), np.nan), 4)
    assert np.isnan([*low, *high]).all(), "no resample has a value"


def test_t_tests_of_means_by_cluster() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(0.3, 1, (5, 8))
    assert mean_ps(rows) == pytest.approx(stats.ttest_1samp(rows, 0, axis=1)[1])
    # copies in a cluster say nothing new
    twice = mean_ps(np.repeat(rows, 2, axis=1), np.repeat(np.arange(8), 2).tolist())
    assert twice == pytest.approx(mean_ps(rows))
    assert mean_ps(np.array([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])).tolist() == [0, 1]
    assert np.isnan(mean_ps(rows, [0] * 8)).all()


def test_p_values_count_the_change_itself_and_ties() -> None:
    assert p_value(-2.0, [2.0, 1.0, 0.5]) == 0.5
    assert p_value(5.0, np.zeros(99)) == least_p(99) == 0.01
    assert p_value(5.0, [float("nan"), 1.0]) == pytest.approx(2 / 3)
    assert np.isnan(p_value(1.0, []))


def test_the_paired_test_is_exact_where_all_signs_can_be_tried() -> None:
    differences = np.array([0.3, -0.1, 0.5, 0.2, 0.0, 0.4])
    some = differences[differences != 0]
    sums = [abs((some * s).sum()) for s in itertools.product((-1, 1), repeat=len(some))]
    exact = np.mean(np.array(sums) >= abs(some.sum()) - 1e-12)
    assert paired_p(differences) == pytest.approx(exact)
    assert paired_p(np.zeros(4)) == 1.0


def test_holm_and_benjamini_hochberg_by_hand() -> None:
    assert corrected([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert corrected([0.01, 0.04, 0.03], "benjamini-hochberg") == pytest.approx((0.03, 0.04, 0.04))


def flipped(differences: np.ndarray, clusters: list[int]) -> float:
    """The share of all sign flips of whole clusters whose sum is as far from 0 as the observed one."""
    names = sorted(set(clusters))
    sums = [sum(d for d, c in zip(differences, clusters, strict=True) if c == k) for k in names]
    flips = [
        sum(s * t for s, t in zip(sums, signs, strict=True))
        for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    return sum(abs(f) >= abs(sum(sums)) - 1e-9 for f in flips) / len(flips)


def test_paired_tests_of_many_rows_equal_the_sum_over_all_flips() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 4, (6, 9)).astype(float)
    rows[2, 3] = rows[4, 0] = np.nan  # those rows lack an example
    clusters = [0, 0, 1, 2, 2, 3, 4, 5, 5]
    found = paired_ps(rows, clusters)
    assert found == pytest.approx([flipped(np.nan_to_num(row), clusters) for row in rows])
    alone = paired_ps(rows)
    assert alone == pytest.approx([flipped(np.nan_to_num(row), list(range(9))) for row in rows])
    assert np.isnan(paired_ps(np.full((1, 3), np.nan))).all()


def test_paired_tests_of_many_clusters_draw_flips() -> None:
    rows = np.random.default_rng(1).normal(0.5, 1, (3, 12))
    exact, drawn = paired_ps(rows), paired_ps(rows, resamples=4095, seed=3)
    assert paired_ps(rows, resamples=4096).tolist() == exact.tolist()  # 2 ** 12
    assert drawn.tolist() != exact.tolist()
    assert drawn == pytest.approx(exact, abs=0.03)
    assert drawn.tolist() == paired_ps(rows, resamples=4095, seed=3).tolist()
    far = paired_ps(np.ones((1, 40)), resamples=999)
    assert far.tolist() == [1 / 1000], "no draw is as far: the observed one counts itself"


def test_percentiles_hold_the_share_that_is_asked_for() -> None:
    drawn = np.append(np.arange(101.0), np.nan)
    assert percentiles(drawn, 0.9) == pytest.approx((5, 95))
    assert percentiles(drawn, 0.5) == pytest.approx((25, 75))
    assert corrected([]) == ()
