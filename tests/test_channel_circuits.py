"""Circuits between channels: of a curve unit, of two classes, and with shuffled weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuits.cli.main import run
from circuits.discovery import discover, edge_graph
from circuits.discovery.shuffled import BesideShuffled, concentration
from circuits.models.paths.randomizing import randomized
from circuits.models.zoo.loading import load_model
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import open_source
from circuits.tasks import Task
from circuits.tasks.builtin import load_task, with_counterparts
from circuits.tasks.contrasts import class_against_class, most_active
from tests.test_channel_graph import net, task_of

QUICK: dict[str, Any] = {"n_random": 0, "n_curves": 0}


def test_the_same_search_is_shown_with_shuffled_weights() -> None:
    model = net("branched")
    graph, task = edge_graph(model), task_of(model, 8)
    found, null = (discover(graph, task, "eap-ig", size=size, **QUICK) for size in (9, 20))
    both = BesideShuffled(found, null)
    said = both.to_dict()
    assert said["scores"] == found.to_dict()["scores"]
    assert said["shuffled"]["evaluation"] == null.to_dict()["evaluation"]
    (table,) = [t for t in both.tables(5) if not isinstance(t, str) and "the model and" in t.title]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["output:1, intact"] == (found.scores.clean.mean(),) * 2
    sizes = np.sort(np.abs(found.scores.mean))[::-1]
    n = len(found.evaluation.edges)
    assert n < len(null.evaluation.edges)
    assert concentration(found) == pytest.approx(sizes[:n].sum() / sizes.sum())


def test_scores_are_checked_on_other_examples() -> None:
    model = net("residual")
    graph, task = edge_graph(model), task_of(model, 10)
    found = {
        half: discover(graph, task, "eap", size=9, check=12, check_on=half, **QUICK).checked
        for half in ("find", "test")
    }
    own, other = found["find"], found["test"]
    assert own is not None
    assert other is not None
    assert own.sampled == other.sampled
    assert own.noising != other.noising
    assert any("other examples" in line for line in other.lines())
    assert not any("other examples" in line for line in own.lines())


def test_discover_finds_what_decides_between_two_classes(capsys: Any, tmp_path: Path) -> None:
    words = [
        "discover", "shapes", "--weights", "untrained", "--workspace", str(tmp_path), "--data", "shapes", "--labels",
        "names", "--class", "curve 90°", "--other-class", "curve 270°", "--limit", "12", "--sites",
        "mixed3b:0-7,logits", "--method", "eap", "--check", "0", "--random", "2", "--random-rankings", "0", "--size",
        "20", "--shuffled", "--json",
    ]  # fmt: skip
    assert run(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["scores"]["metric"] == "logit_difference"
    assert said["scores"]["record"]["task"]["task"] == "curve 90° against curve 270°"
    assert said["shuffled"]["scores"]["record"]["model"].endswith("randomized (seed 0)")
    for extra, message in (
        (["--most-active", "3"], "--most-active 3 does not go with --class and --other-class"),
        (["--most-edges", "5"], "more than 5"),
    ):
        assert run([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    assert run(["discover", "shapes", "--class", "curve 90°"]) == 2
    assert "expected both classes, and --data with images of them" in capsys.readouterr().err


# --- real networks -----------------------------------------------------------------------------------


def curve_task(assets: Path, model: Any, n: int) -> Task:
    """The photographs, of 24, that activate a curve unit most, and the same turned by 180 degrees."""
    data = f"folder:{assets / 'images' / 'imagenet500'}"
    task = load_task(model, n=24, data=data, metric="mixed3b_5x5_pre_relu:15")
    return with_counterparts(most_active(task, n), "turned")


@pytest.mark.models
def test_what_builds_a_curve_unit_of_googlenet(assets: Path) -> None:
    model = load_model("googlenet")
    sites = ["conv2d2", "mixed3a", "mixed3b_5x5_pre_relu:15"]
    graph, task = edge_graph(model, sites), curve_task(assets, model, 8)
    found = discover(graph, task, "eap-ig", size=200, check=24, check_on="test", **QUICK)
    assert len(graph) == 60960
    assert found.checked is not None
    assert found.checked.completeness < 0.05
    assert found.checked.half == "test"
    said = [c for c in found.checked.causes if "rank correlation with exact noising" in c]
    assert bool(said) == (found.checked.noising.spearman.value < 0.9)
    strongest = [found.scores.edges[i] for i in found.scores.order()[:5].tolist()]
    assert ("mixed3b_5x5_bottleneck:1", "mixed3b_5x5_pre_relu:15") in strongest
    assert found.evaluation.defined
    twin = randomized(model, 0)
    null = discover(
        edge_graph(twin, sites), curve_task(assets, twin, 8), "eap-ig", size=200, check=0, **QUICK
    )
    # Without training the unit is hardly driven by what it is shown.
    assert abs(null.scores.clean.mean()) < 0.05 * found.scores.clean.mean()
    assert null.evaluation.record.model != found.evaluation.record.model


@pytest.mark.models
def test_what_decides_between_two_classes_of_resnet20(assets: Path) -> None:
    model = load_model("cifar10-resnet20")
    path = assets / "images" / "cifar10_test_3000.npz"
    source = open_source(f"npz:{path}")
    labels = read_labels(source, model.classes, str(path))
    task = class_against_class(model, source, labels, "airplane", "bird", n=16)
    graph = edge_graph(model)
    assert len(graph) == 30672
    found = discover(graph, task, "eap-ig", size=3000, check=0, n_random=3, n_curves=1)
    made = found.evaluation
    assert made.faithfulness.value > max(made.random_faithfulness)
    assert made.cmd_log < min(made.random_cmd_log)
    assert made.smallest is not None
