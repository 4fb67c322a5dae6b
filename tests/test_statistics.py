"""Statistics against slow computations from their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from circuits.experiments.statistics import (
    corrected,
    interval,
    least_p,
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
    np.testing.assert_allclose(found, np.quantile(slow, [0.025, 0.975]), atol=0.03)
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
