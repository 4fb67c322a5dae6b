from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from circuits.effects import Prediction
from circuits.experiments import Effect
from circuits.plots import (
    effects_chart,
    histogram_html,
    kernels_html,
    layers_chart,
    losses_chart,
    map_chart,
    matrix_chart,
    pattern_chart,
    predictions_chart,
)
from circuits.store import TailFit, UnitStatistics
from circuits.units import Unit
from circuits.weights import Connection


def connection(kernel: torch.Tensor) -> Connection:
    return Connection(Unit("a", 1), Unit("b", 2), kernel, "conv", (), 1.0)


def parsed(html: str) -> ElementTree.Element:
    """As a browser would: one element, all of it closed."""
    return ElementTree.fromstring(html.replace("<br>", "<br/>"))


def style(element: ElementTree.Element) -> dict[str, str]:
    return dict(part.split(":", 1) for part in element.get("style", "").split(";") if part)


def test_kernels_share_one_scale_with_zero_in_the_middle() -> None:
    first, second = torch.tensor([[0.0, 1.0], [2.0, -3.0]]), torch.tensor([[0.5, 0.0], [0.0, 3.0]])
    html = parsed(kernels_html([connection(first), connection(second)], "source"))
    cells = [e for e in html.iter("div") if "title" in e.attrib]
    assert [float(e.attrib["title"]) for e in cells] == [0, 1, 2, -3, 0.5, 0, 0, 3], "row by row"
    color = {float(e.attrib["title"]): style(e)["background"] for e in cells}
    assert color[0] == "#f7f7f7", "the middle of RdBu"
    assert (color[-3], color[3]) == ("#053061", "#67001f"), "its ends"
    assert [e.text for e in html.iter("span")] == ["weight", "-3", None, "3"]
    assert "a" in [e.text for e in html.iter("div")]
    with pytest.raises(ValueError, match="nothing to draw"):
        kernels_html([], "source")


def test_names_in_html_are_text() -> None:
    odd = Connection(Unit("<b>a", 1), Unit("b", 2), torch.ones(2, 2), "conv", (), 1.0)
    assert "<b>" not in kernels_html([odd], "source")


def statistics(edges: list[float], counts: list[int], tail: TailFit) -> UnitStatistics:
    return UnitStatistics(
        mean=0.0, std=1.0, skewness=0.0, kurtosis=3.0, minimum=-1.0, maximum=3.0, density=0.5, count=8,
        nonfinite=0, edges=np.array(edges), histogram=np.array(counts), tail=tail,
    )  # fmt: skip


def test_histogram_shows_every_count() -> None:
    tail = TailFit(1.0, 2.0, 0.1, 0.05, 100, 0.1)
    html = parsed(histogram_html(statistics([0.0, 1.0, 2.0], [1, 5, 0, 1000], tail)))
    marks = {e.attrib["title"]: style(e) for e in html.iter("div") if "title" in e.attrib}
    expected = 100 * (1 - np.exp(-2.0))
    assert list(marks) == [
        "activation below 0: 1 positions",
        "activation 0 to 1: 5 positions",
        "activation above 2: 1,000 positions",
        f"exponential tail: {expected:.3g} positions",
    ]
    low, middle, high, line = marks.values()
    assert [float(m["left"].rstrip("%")) for m in (low, middle, high, line)] == [0, 25, 75, 50]
    tall = [float(m["height"].rstrip("%")) for m in (low, middle, high)]
    steps = np.log10([1 / 0.5, 5 / 0.5, 1000 / 0.5])
    assert tall == pytest.approx(100 * steps / (1.05 * steps[-1]), abs=0.01), "a log scale"
    assert float(line["bottom"].rstrip("%")) == pytest.approx(
        100 * np.log10(expected / 0.5) / (1.05 * steps[-1]), abs=0.01
    )
    words = [e.text for e in html.iter("span")]
    assert words[:4] == ["1", "10", "100", "1k"]
    assert words[4:] == ["-1", "0", "1", "2", "3", "activation", "positions"]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_histogram_of_any_scale(scale: float) -> None:
    """And where nothing was counted, and no tail could be fitted."""
    none = TailFit(*[float("nan")] * 4, 0, 0.1)
    html = parsed(histogram_html(statistics([0.0, scale, 2 * scale], [0, 0, 0, 0], none)))
    ticks = [float(e.text or "") for e in html.iter("span") if (e.text or "x")[-1].isdecimal()]
    assert 3 <= len(ticks) <= 12


def test_predictions_are_side_by_side() -> None:
    before, after = [Prediction(3, "cat", 0.75)], [Prediction(3, "cat", 0.25)]
    figure = predictions_chart({"intact": before, "a:1 removed": after})
    assert [(bar.name, bar.x[0]) for bar in figure.data] == [
        ("intact", 0.75),
        ("a:1 removed", 0.25),
    ]


def test_signed_maps_have_zero_in_the_middle() -> None:
    values = np.array([[0.5, -2.0], [0.0, 1.0]])
    for figure in (map_chart(values), matrix_chart(values, "weight")):
        assert (figure.data[0].zmin, figure.data[0].zmax) == (-2.0, 2.0)
        assert figure.layout.yaxis.autorange == "reversed", "the first row is drawn on top"


def test_attention_is_on_one_scale_and_tokens_are_named_where_they_can_be_read() -> None:
    few = pattern_chart(np.eye(3), ["a", "b", "c"])
    assert (few.data[0].zmin, few.data[0].zmax) == (0, 1)
    assert few.layout.xaxis.ticktext == ("a", "b", "c")
    assert few.data[0].customdata[2][0] == "c → a", "a row looks at columns"
    many = pattern_chart(np.eye(40), ["x"] * 40)
    assert many.layout.xaxis.ticktext is None


def test_effects_stand_beside_their_twins() -> None:
    effect = Effect(
        "kl", "nats", 1.0, 3.0, 2.0, 1.5, 2.75, (0.1, -0.2), "2 groups", 0.25, 1 / 3, 9, 9
    )
    null, own = effects_chart({"kl": effect}).data
    assert list(null.x) == [0.1, -0.2]
    assert list(own.x) == [2.0]
    assert list(own.error_x.array) == [0.75]
    assert list(own.error_x.arrayminus) == [0.5]


def test_layers_are_drawn_by_angle() -> None:
    family = ("line", np.array([90.0, 0.0, 45.0]), np.array([3.0, 1.0, 2.0]))
    figure = layers_chart({"one": [family], "two": [family]}, at=400.0)
    assert list(figure.data[0].x) == [0.0, 45.0, 90.0]
    assert list(figure.data[0].y) == [1.0, 2.0, 3.0]
    assert {shape.x0 for shape in figure.layout.shapes} == {40.0}


def test_losses_are_in_nats_by_token() -> None:
    figure = losses_chart(
        {"intact": np.array([1.0, 2.0]), "edited": np.array([3.0, 4.0])}, ["b", "c"]
    )
    assert figure.layout.yaxis.title.text == "loss, nats"
    assert [list(d.y) for d in figure.data] == [[1.0, 2.0], [3.0, 4.0]]
    assert figure.layout.xaxis.ticktext == ("b", "c")
