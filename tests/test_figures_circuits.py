"""The figure of a found circuit shows the numbers that it is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from circuits.cli.main import run
from circuits.discovery import EdgeGraph, edge_graph
from circuits.figures import faithfulness_figure, save_figure
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks import Task
from circuits.tasks.builtin import load_task
from tests import canned
from tests.commands import output
from tests.specs import svg_texts, unlabelled, views


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model("induction")


@pytest.fixture(scope="module")
def graph(model: HookedModel) -> EdgeGraph:
    return edge_graph(model)


@pytest.fixture(scope="module")
def task(model: HookedModel) -> Task:
    return load_task(model, "repeats", n=16).test


def first(graph: EdgeGraph, n: int) -> np.ndarray:
    return np.arange(len(graph)) < n


def test_the_circuit_stands_among_random_ones_and_rankings(
    graph: EdgeGraph, task: Task, tmp_path: Path
) -> None:
    made = canned.evaluation(graph, task, first(graph, 12))
    figure = faithfulness_figure(made)
    levels, interval = views(figure, "rule")
    assert levels.values("f") == [0.0, 1.0]
    assert interval.rows[0]["low"] < interval.rows[0]["high"]
    random, own = views(figure, "line")
    assert [(r["edges"], r["connected"], r["f"]) for r in own.rows] == [
        row[:3] for row in made.by_size()
    ]
    for i, curve in enumerate(zip(*(row[3] for row in made.by_size()), strict=True)):
        assert tuple(r["f"] for r in random.rows if r["ranking"] == i) == curve
    _, others, circuit = views(figure, "point")
    assert tuple(others.values("f")) == made.random_faithfulness == pytest.approx((0.1, 0.2, 0.3))
    assert set(others.values("edges")) == {12}
    (point,) = circuit.rows
    f = made.faithfulness
    assert (point["edges"], point["f"]) == (12, pytest.approx(0.8))
    assert (point["low"], point["high"]) == (f.low, f.high)
    for view in views(figure)[1:]:
        scale = view.encoding["x"]["scale"]
        assert (scale["type"], scale["domain"]) == ("log", [1, len(graph)])
    assert not unlabelled(figure)
    words = " ".join(text for *_, text in svg_texts(figure))
    for said in (
        "repeats (test half)",
        "counterpart ablation, seed 0",
        "random rankings",
        "the circuit",
    ):
        assert said in words
    save_figure(figure, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_without_a_ranking_there_are_only_points(graph: EdgeGraph, task: Task) -> None:
    made = canned.evaluation(graph, task, first(graph, 12), curves=0)
    alone = replace(made, random=made.random[:0])
    assert not views(faithfulness_figure(made), "line")
    assert [len(v.rows) for v in views(faithfulness_figure(made), "point")] == [3, 1]
    assert [len(v.rows) for v in views(faithfulness_figure(alone), "point")] == [1]


def test_an_effect_of_nothing_is_not_drawn(graph: EdgeGraph, task: Task) -> None:
    made = canned.evaluation(graph, task, first(graph, 12), effect=0.0)
    with pytest.raises(ValueError, match=r"^faithfulness is undefined: removing every edge moves"):
        faithfulness_figure(made)


def test_commands_draw_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = ["--workspace", str(tmp_path / "ws")]
    few = ["--limit", "8", "--random", "2"]
    svg = tmp_path / "found.svg"
    output(capsys, "discover", "induction", *few, "--method", "eap", "--check", "0", "--size", "30", "--save", "it",
           "--figure", str(svg), *own)  # fmt: skip
    assert "random rankings" in svg.read_text()
    svg = tmp_path / "measured.svg"
    output(capsys, "evaluate", "induction", "it", *few, "--figure", str(svg), *own)
    assert "the circuit" in svg.read_text()
    assert "random rankings" not in svg.read_text(), "a circuit by itself ranks nothing"
    assert run(["discover", "induction", "--figure", "found.pdf"]) == 2
    assert "must end in .png or .svg" in capsys.readouterr().err
