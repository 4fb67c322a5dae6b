from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits.effects import Effect, Prediction
from circuits.plots import (
    effects_figure,
    histogram_figure,
    kernels_figure,
    layers_figure,
    losses_figure,
    map_figure,
    matrix_figure,
    pattern_figure,
    predictions_figure,
)
from circuits.store import TailFit, UnitStatistics
from circuits.units import Unit
from circuits.weights import Connection


def connection(kernel: torch.Tensor) -> Connection:
    return Connection(Unit("a", 1), Unit("b", 2), kernel, "conv", (), 1.0)


def test_kernels_share_one_scale_with_zero_in_the_middle() -> None:
    first, second = torch.tensor([[0.0, 1.0], [2.0, -3.0]]), torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    figure = kernels_figure([connection(first), connection(second)], "source")
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-3.0, 3.0)
    drawn = np.array(figure.data[0].z)
    assert np.array_equal(drawn[::-1], first.numpy()), "the first row is drawn on top"
    assert figure.layout.annotations[0].text == "a<br>:1"
    with pytest.raises(ValueError, match="nothing to draw"):
        kernels_figure([], "source")


def test_histogram_shows_every_count() -> None:
    counts = np.array([1, 5, 0, 2])
    tail = TailFit(1.0, 2.0, 0.1, 0.05, 100, 0.1)
    statistics = UnitStatistics(
        mean=0.0, std=1.0, skewness=0.0, kurtosis=3.0, minimum=-1.0, maximum=3.0, density=0.5, count=8,
        nonfinite=0, edges=np.array([0.0, 1.0, 2.0]), histogram=counts, tail=tail,
    )  # fmt: skip
    bars, line = histogram_figure(statistics).data
    assert list(line.x) == [1.5]
    assert line.y[0] == pytest.approx(100 * (1 - np.exp(-2.0)))
    assert list(bars.x) == [-0.5, 0.5, 1.5, 2.5]
    assert [0 if np.isnan(y) else y for y in bars.y] == counts.tolist()


def test_predictions_are_side_by_side() -> None:
    before, after = [Prediction(3, "cat", 0.75)], [Prediction(3, "cat", 0.25)]
    figure = predictions_figure({"intact": before, "a:1 removed": after})
    assert [(bar.name, bar.x[0]) for bar in figure.data] == [
        ("intact", 0.75),
        ("a:1 removed", 0.25),
    ]


def test_signed_maps_have_zero_in_the_middle() -> None:
    values = np.array([[0.5, -2.0], [0.0, 1.0]])
    for figure in (map_figure(values), matrix_figure(values, "weight")):
        assert (figure.data[0].zmin, figure.data[0].zmax) == (-2.0, 2.0)
        assert figure.layout.yaxis.autorange == "reversed", "the first row is drawn on top"


def test_attention_is_on_one_scale_and_tokens_are_named_where_they_can_be_read() -> None:
    few = pattern_figure(np.eye(3), ["a", "b", "c"])
    assert (few.data[0].zmin, few.data[0].zmax) == (0, 1)
    assert few.layout.xaxis.ticktext == ("a", "b", "c")
    assert few.data[0].customdata[2][0] == "c → a", "a row looks at columns"
    many = pattern_figure(np.eye(40), ["x"] * 40)
    assert many.layout.xaxis.ticktext is None


def test_effects_stand_beside_their_twins() -> None:
    effect = Effect(1.0, 3.0, 2.0, 1.5, 2.75, (0.1, -0.2), (0.3,), 0.25)
    twins, noise, own = effects_figure({"kl": effect}).data
    assert list(twins.x) == [0.1, -0.2]
    assert list(noise.x) == [0.3]
    assert list(own.x) == [2.0]
    assert list(own.error_x.array) == [0.75]
    assert list(own.error_x.arrayminus) == [0.5]


def test_layers_are_drawn_by_angle() -> None:
    family = ("line", np.array([90.0, 0.0, 45.0]), np.array([3.0, 1.0, 2.0]))
    figure = layers_figure({"one": [family], "two": [family]}, at=400.0)
    assert list(figure.data[0].x) == [0.0, 45.0, 90.0]
    assert list(figure.data[0].y) == [1.0, 2.0, 3.0]
    assert {shape.x0 for shape in figure.layout.shapes} == {40.0}


def test_losses_are_in_nats_by_token() -> None:
    figure = losses_figure(
        {"intact": np.array([1.0, 2.0]), "edited": np.array([3.0, 4.0])}, ["b", "c"]
    )
    assert figure.layout.yaxis.title.text == "loss, nats"
    assert [list(d.y) for d in figure.data] == [[1.0, 2.0], [3.0, 4.0]]
    assert figure.layout.xaxis.ticktext == ("b", "c")
