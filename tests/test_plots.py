from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits.effects import Prediction
from circuits.plots import histogram_figure, kernels_figure, predictions_figure
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
