"""Whether scores can be trusted, and the figures of an evaluation, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from circuits.discovery import Evaluation, check_scores, edge_graph, evaluate, score_edges
from circuits.discovery.agreement import (  # pyright: ignore[reportPrivateUsage]
    Agreement,
    Checked,
    _clear,
    _ranks,
    _sample,
)
from circuits.discovery.evaluating import Curve
from circuits.discovery.runs import Runs
from circuits.experiments.statistics import Interval
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task
from tests import canned

# --- agreement -----------------------------------------------------------------------------------


def test_each_edge_is_drawn_with_the_chance_that_its_weight_says() -> None:
    sizes = 1 / np.arange(1, 101.0) ** 2  # the first few are nearly all
    hits, chance, n = np.zeros(100), np.zeros(100), 3000
    for seed in range(n):
        chosen, weights = _sample(sizes, 20, np.random.default_rng(seed))
        hits[chosen] += 1
        chance[chosen] = 1 / weights
    assert np.abs(hits / n - chance).max() < 5 * 0.5 / np.sqrt(n)
    assert chance[0] == 1
    chosen, weights = _sample(sizes, 100, np.random.default_rng(0))
    assert (len(chosen), set(weights)) == (100, {1.0})


def test_ranks_count_what_the_sample_stands_for() -> None:
    found = _ranks(np.array([3.0, 1.0, 1.0, 2.0]), np.array([1.0, 2.0, 4.0, 10.0]))
    # Below 1 is nothing, of the two equals half: 3; below 2 are 6, and half of 10: 11; below 3 are 16.
    assert found.tolist() == [16.5, 3.0, 3.0, 11.0]


def test_scores_with_the_wrong_sign_or_of_other_edges_are_called_unreliable() -> None:
    model = load_model("induction")
    graph, task = edge_graph(model), load_task(model, n=24).find
    runs = Runs(graph, task)
    scores = score_edges(graph, task, "exact")
    right = check_scores(runs, replace(scores, method="eap"), n=40)
    assert right.noising.spearman.value == pytest.approx(1)
    assert right.noising.signs.value == 1
    assert right.noising.overlap == 1
    assert right.denoising is not None
    assert right.denoising.signs.value > 0.7
    turned = check_scores(runs, replace(scores, method="eap", values=-scores.values), n=40)
    assert turned.noising.spearman.value == pytest.approx(-1)
    assert turned.noising.signs.value == 0
    assert turned.denoising is not None
    assert turned.denoising.signs.value < 0.3
    assert any(cause.startswith("0% of the signs") for cause in turned.causes)
    restored = score_edges(graph, task, "exact", direction="denoising")
    agreed = check_scores(runs, replace(restored, values=-restored.values), n=40).denoising
    assert agreed is not None
    assert agreed.spearman.value == pytest.approx(1)
    flat = check_scores(runs, replace(scores, method="eap", values=scores.values * 1e-6), n=40)
    assert flat.noising.saturated == 1


def test_where_nearly_no_edge_has_an_effect_nothing_is_judged() -> None:
    model = load_model("addition-by-hand")
    graph, task = edge_graph(model), load_task(model, n=16).find
    checked = check_scores(Runs(graph, task), score_edges(graph, task, "eap-ig", steps=40), n=21)
    assert checked.noising.n == 3
    assert not any("correlation" in cause for cause in checked.causes)
    assert replace(checked, causes=()).verdict.startswith("cannot be judged")
    assert checked.noising.effective == 3


# --- an evaluation's figures ----------------------------------------------------------------------


@pytest.fixture
def made() -> Evaluation:
    """Ten edges; the metric is 0 without any and 2 with all, on two examples of two clusters each."""
    model = load_model("induction")
    graph, task = edge_graph(model), load_task(model, "repeats", n=16)
    whole = canned.discovery(graph, task).evaluation
    values = np.array([[0.0] * 4, [1.0] * 4, [3.0] * 4, [2.0] * 4])  # f 0, .5, 1.5, 1
    curve = Curve((1, 2, 5, 10), (1, 2, 5, 10), values)
    return replace(
        whole, n_edges=10, empty=np.zeros(4), full=np.full(4, 2.0), own=np.array([1.0, 1, 2, 2]),
        complement=np.zeros(4), others={}, curve=curve,
        random=np.array([[1.5] * 4, [0.0] * 4, [2.4] * 4]), random_curves=(), clusters=(0, 0, 1, 1),
    )  # fmt: skip


def test_figures_of_an_evaluation_are_those_of_their_definitions(made: Evaluation) -> None:
    assert made.faithfulness.value == 0.75
    # Two clusters, of f .5 and 1: resamples have one, the other, or both; the denominator is the same. Of two clusters
    # distances from the mean are expanded by t(1) sqrt(2) / z = 12.706 * 1.414 / 1.960 = 9.168.
    assert made.faithfulness.low == pytest.approx(0.75 - 0.25 * 9.168, abs=1e-3)
    assert made.faithfulness.high == pytest.approx(0.75 + 0.25 * 9.168, abs=1e-3)
    # |1 - f| of the circuit is .25, of the random ones .25, 1 and .2: two of three are as good.
    assert made.p_value == (1 + 2) / (1 + 3)
    # |1 - f| is 1 at 0 edges, then 1, .5, .5, 0; linear in the share of edges.
    assert made.cmd == pytest.approx(0.1 * 1 + 0.1 * 0.75 + 0.3 * 0.5 + 0.5 * 0.25)
    # f capped at 1: 0, 0, .5, 1, 1.
    assert made.cpr == pytest.approx(0.1 * 0 + 0.1 * 0.25 + 0.3 * 0.75 + 0.5 * 1)
    logs = np.log([1, 2, 5, 10])
    area = (logs[1] - logs[0]) * 0.75 + (logs[2] - logs[1]) * 0.5 + (logs[3] - logs[2]) * 0.25
    assert made.cmd_log == pytest.approx(area / logs[3])
    assert made.errors == {q: pytest.approx(np.quantile([-1, -1, 0, 0], q)) for q in made.errors}


def test_what_is_undefined_is_not_told(made: Evaluation) -> None:
    nothing = replace(made, full=np.array([1.0, 1, -1, -1]), smallest=3)
    assert not nothing.defined
    said = nothing.to_dict()
    assert said["smallest_faithful"] is None
    assert said["faithfulness_on_find"] is None
    assert said["faithfulness"]["value"] is None
    moved = replace(made, full=np.array([1.0, 3, -1, -1]))
    assert "moves cross_entropy by -0.5" in moved.undefined


def test_the_smallest_size_lies_between_the_sizes_of_the_curve() -> None:
    """In a graph of 106 edges sizes are tried ten in a factor of ten; the smallest is found among all."""
    model = load_model("induction")
    graph, task = edge_graph(model), load_task(model, n=16)
    scores = score_edges(graph, task.find, "exact", direction="denoising")
    made = evaluate(
        graph, task.test, graph.mask([graph.edges[0]]), scores=scores, find=task.find, n_random=0
    )
    f = {}
    for size in range(1, 30):
        kept = np.zeros(len(graph), bool)
        kept[scores.order()[:size]] = True
        own = evaluate(graph, task.test, graph.connected(kept), n_random=0, n_curves=0)
        f[size] = own.faithfulness.value
    rungs = [size for size, _, _, _ in made.by_size()]
    above = next(size for size in rungs if f[size] >= 0.9)
    below = max(size for size in rungs if size < above)
    assert made.smallest == next(size for size in range(below + 1, above + 1) if f[size] >= 0.9)
    # The find half has its own figure.
    find = evaluate(graph, task.find, graph.mask([graph.edges[0]]), n_random=0)
    assert made.on_find == pytest.approx(find.faithfulness.value, abs=1e-5)


def test_edges_without_effect_are_as_often_above_the_noise_as_is_said() -> None:
    """Of 60 edges 20 have an effect, and 10 of the others are dead; 200 experiments with six pairs of examples."""
    rng, false, found = np.random.default_rng(0), 0, 0
    clusters = tuple(np.repeat(np.arange(6), 2).tolist())
    for _ in range(200):
        effects = np.repeat(rng.normal(0, 1, (6, 60)), 2, axis=0)
        effects[:, :20] += 12
        effects[:, 50:] = 0
        clear, by_chance = _clear(effects, clusters)
        assert by_chance == pytest.approx(50 / 20)
        false += int(clear[20:].sum())
        found += int(clear[:20].sum())
    assert found == 20 * 200
    assert false / 200 == pytest.approx(30 / 20, abs=0.25), "1.5 of the 30 in each"
    clear, by_chance = _clear(np.array([[2.0, 0.0]]), (0,))
    assert clear.tolist() == [True, False], "one example"
    assert np.isnan(by_chance)


def test_as_many_edges_as_by_chance_say_nothing() -> None:
    f = Interval(0.5, 0.4, 0.6)
    few, enough = (Agreement("noising", n, 3.0, 6.0, f, f, 0.5, 5, 0.0) for n in (6, 7))
    assert not few.known
    assert enough.known
    said = Checked((1, 2), few, None, float("nan"), 0.0, ()).lines()
    assert any("6 above the noise, 3 expected by chance" in line for line in said)
