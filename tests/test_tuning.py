from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.randomizing import randomized
from circuits.models.zoo.loading import load_model
from circuits.stimuli.patterns import arcs
from circuits.tuning import (
    find_curve_units,
    heat_map,
    invariance,
    joint_tuning,
    measure_tuning,
    radial_tuning,
)
from circuits.tuning.measures import echo, fwhm, preferred
from tests.conftest import examples

TURN = np.arange(360.0)


def bump(center: float, width: float, opposite: float = 0.0) -> np.ndarray:
    """A triangle that is half as high `width / 2` from its middle."""
    away = np.abs((TURN - center + 180) % 360 - 180)
    back = np.abs((TURN - center) % 360 - 180)
    return np.maximum(0, 1 - away / width) + opposite * np.maximum(0, 1 - back / width)


@settings(max_examples=examples(30))
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@given(st.integers(0, 359), st.integers(10, 80), st.floats(0, 0.9))
def test_measures_of_a_known_curve(center: int, width: int, opposite: float) -> None:
    found = measure_tuning(TURN, bump(center, width, opposite))
    assert found.preferred.value == center
    assert found.fwhm.value == pytest.approx(width)
    assert found.echo.value == pytest.approx(opposite)
    away = abs((found.direction.value - center + 180) % 360 - 180)
    assert away < 1
    assert found.peak.value == pytest.approx(1)


def test_measures_by_hand() -> None:
    angles = np.arange(0, 360, 60.0)
    curve = np.array([0.0, 2.0, 4.0, 2.0, 1.0, 0.0])
    assert preferred(angles, curve) == 120
    assert fwhm(angles, curve) == 120  # half of 4 is reached one step of 60 degrees either way
    assert echo(angles, curve) == 0.0  # 300 degrees alone is within 45 of the opposite
    found = measure_tuning(angles, curve)
    way = (curve * np.exp(1j * np.deg2rad(angles))).sum() / curve.sum()
    assert found.circular_variance.value == pytest.approx(1 - abs(way))
    silent = measure_tuning(angles, np.zeros(6))
    assert np.isnan(silent.fwhm.value)
    assert np.isnan(silent.circular_variance.value)
    even = measure_tuning(angles, np.ones(6))
    assert even.fwhm.value == 360
    with pytest.raises(ValueError, match="a full turn in equal steps"):
        measure_tuning(np.arange(0, 180, 60.0), np.zeros(3))
    with pytest.raises(ValueError, match="expected a finite response at each of 6"):
        measure_tuning(angles, np.full(6, np.nan))


def test_what_is_itself_after_half_a_turn_has_a_direction_and_no_echo() -> None:
    curve = bump(70, 30, 1.0)
    found = measure_tuning(TURN, curve, period=180)
    assert found.direction.value == pytest.approx(70, abs=0.5)
    assert found.circular_variance.value < 0.2
    assert np.isnan(found.echo.value)
    wide = np.ones(36)
    wide[3:5] = 0.1
    # From 1 to 0.1 a line is at 0.5 after five ninths of a step; the dip is two steps and two such remainders wide.
    assert fwhm(np.arange(0, 360, 10.0), wide) == pytest.approx(360 - 10 - 2 * 10 * 4 / 9)


@pytest.mark.parametrize(("step", "tolerance"), [(1, 0.02), (10, 1.1), (15, 2.5)])
@pytest.mark.parametrize("center", [0.0, 100.0, 104.0])
def test_widths_hardly_depend_on_the_steps(step: int, tolerance: float, center: float) -> None:
    angles = np.arange(0.0, 360.0, step)
    away = np.deg2rad(angles - center)
    # von Mises, less its value opposite: exp(k cos a) - exp(-k); half of the peak where cos a is as below.
    k = 6.0
    curve = np.exp(k * np.cos(away)) - np.exp(-k)
    half = np.degrees(np.arccos(np.log((np.exp(k) + np.exp(-k)) / 2) / k))
    assert fwhm(angles, curve) == pytest.approx(2 * half, abs=tolerance)


def test_intervals_of_widths_do_not_collapse_at_coarse_steps() -> None:
    widths = np.random.default_rng(1).normal(50, 4, 24)
    coarse, fine = (
        measure_tuning(a, np.exp(-((((a - 100) / widths[:, None]) * 2) ** 2) * np.log(2))).fwhm
        for a in (np.arange(0.0, 360.0, 10.0), TURN)
    )
    assert fine.low < widths.mean() < fine.high
    assert coarse.value == pytest.approx(fine.value, abs=0.6)
    assert coarse.high - coarse.low == pytest.approx(fine.high - fine.low, rel=0.25)


def test_intervals_hold_what_replicates_differ_by() -> None:
    generator = np.random.default_rng(0)
    curves = np.stack([bump(c, 40) for c in generator.normal(100, 6, 24).round()])
    found = measure_tuning(TURN, curves)
    assert found.direction.low < 100 < found.direction.high
    assert 1 < found.direction.high - found.direction.low < 8
    once = measure_tuning(TURN, curves[0])
    assert once.peak.low == once.peak.high == once.peak.value


def test_published_curves_have_their_published_measures(assets: Path) -> None:
    published = json.loads((assets / "published/curve_tuning.json").read_text())
    found = [measure_tuning(TURN, np.array(c)) for c in published["mixed3b"].values()]
    assert np.median([m.fwhm.value for m in found]) == pytest.approx(50, abs=1)
    assert max(m.echo.value for m in found) <= 0.03
    early = [measure_tuning(TURN, np.array(c)) for c in published["mixed3a"].values()]
    assert np.median([m.echo.value for m in early]) == pytest.approx(0.22, abs=0.01)


class Templates(nn.Module):
    """Four curve detectors made of what they look for, one line detector, one that is always on."""

    def __init__(self) -> None:
        super().__init__()
        looked_for = arcs(torch.arange(4) * 90.0 + 20, 9.0, 31, thickness=3.0, length=18.0)
        line = arcs(torch.tensor([20.0]), 1e5, 31, thickness=3.0, length=18.0)
        ink = 1 - torch.cat([looked_for, line]).mean(1, keepdim=True)
        kernels = ink - 1.6 * torch.nn.functional.avg_pool2d(ink, 5, 1, 2)
        kernels = kernels - kernels.mean((2, 3), keepdim=True)
        self.conv = nn.Conv2d(1, 6, 31, padding=15)
        with torch.no_grad():
            self.conv.weight[:5] = kernels / (kernels * ink).sum((2, 3), keepdim=True)
            self.conv.weight[5] = 0
            self.conv.bias[:] = torch.tensor([0.0] * 5 + [1.0])
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x).abs() - 0.25)


@pytest.fixture(scope="module")
def templates() -> HookedModel:
    return HookedModel(Templates(), (1, 48, 48), "templates")


def test_units_are_tuned_to_what_they_are_made_of(templates: HookedModel) -> None:
    found = radial_tuning(
        templates, [f"relu:{i}" for i in range(4)], step=5.0, size=48, radii=[9.0]
    )
    for i, tuning in enumerate(found):
        want = 90 * i + 20
        assert abs((tuning.measures.direction.value - want + 180) % 360 - 180) < 12
        assert tuning.curves.shape == (6, 72)
    joint = joint_tuning(found)
    assert joint.largest_gap == pytest.approx(90, abs=12)
    line = radial_tuning(templates, ["relu:4"], "line", step=15.0, size=48)[0]
    peaks = line.angles[line.mean >= 0.99 * line.mean.max()]
    assert {round(float(p)) % 180 for p in peaks} <= {15, 30}
    assert np.isinf(line.radius)


def test_heat_maps_peak_at_a_units_angle_and_curvature(templates: HookedModel) -> None:
    made = heat_map(
        templates, ["relu:1"], size=48, step=10, curvatures=[0.0, 1 / 18, 1 / 9, 1 / 5],
        statistics=[(1.0, 2.0)], data="made up",
    )[0]  # fmt: skip
    angle, curvature = made.best
    assert curvature == pytest.approx(1 / 9)
    assert abs(angle - 110) <= 10
    np.testing.assert_allclose(made.in_deviations, (made.responses - 1) / 2)
    assert json.loads(json.dumps(made.to_dict()))["best_curvature"] == pytest.approx(1 / 9)


def test_invariances_of_a_template(templates: HookedModel) -> None:
    tuning = radial_tuning(templates, ["relu:0"], step=15.0, size=48, radii=[9.0])
    found = {i.aspect: i for i in invariance(templates, tuning)}
    contrast = found["contrast"]
    assert contrast.responses.argmax() in (0, len(contrast.values) - 1)
    assert found["corner"].values[0] == 0
    assert found["corner"].responses[0] > found["corner"].opposite[0]


def test_bad_input_is_named(templates: HookedModel, bridge: HookedModel) -> None:
    with pytest.raises(ValueError, match=r"^step 7 must divide 360"):
        radial_tuning(templates, ["relu:0"], step=7)
    with pytest.raises(ValueError, match="expected units of one site"):
        radial_tuning(templates, ["relu:0", "conv:1"])
    with pytest.raises(ValueError, match="expected units of one site"):
        heat_map(templates, [])
    with pytest.raises(ValueError, match="takes no photographs"):
        radial_tuning(bridge, ["hook_embed:0"])
    with pytest.raises(ValueError, match=r"^size 4 must be at least 8"):
        find_curve_units(templates, "relu", size=4)
    with pytest.raises(ValueError, match="unit relu:6 does not exist"):
        find_curve_units(templates, "relu", [6])
    with pytest.raises(
        ValueError, match=r"tunings .0. are empty or at different angles: expected at least one"
    ):
        joint_tuning([])


@pytest.mark.nightly
def test_googlenets_curve_units_are_found_by_tuning_alone(assets: Path) -> None:
    model = load_model("googlenet")
    found = find_curve_units(model, "mixed3b", range(320, 416), step=10)
    good = [c for c in found if c.is_curve_unit]
    assert 10 <= len(good) <= 30
    assert {c.unit.index for c in good} >= {336, 408, 326, 398, 386, 394, 413, 321, 358, 335}
    widths = [c.tuning.measures.fwhm.value for c in good]
    assert 40 <= np.median(widths) <= 75
    assert np.median([c.tuning.measures.echo.value for c in good]) <= 0.03
    joint = joint_tuning([c.tuning for c in good])
    assert joint.coverage > 0.5
    assert joint.largest_gap < 60
    beside = find_curve_units(randomized(model), "mixed3b", range(320, 416), step=15)
    assert sum(c.is_curve_unit for c in beside) <= 3
