"""What removed edges carry: each ablation against a slow pass that is given it edge by edge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits.discovery import Runs, edge_graph, score_edges
from circuits.discovery.ablations import resampled
from circuits.discovery.channels import ChannelGraph
from circuits.discovery.searching import values_of
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks import Question, Task, as_metric
from tests.edge_checks import check_circuits
from tests.edge_oracle import Oracle, TransformerEdges, last_logits
from tests.gates import first_less_second
from tests.plain_transformer import Plain
from tests.test_discovery import LAST, weighed
from tests.test_paths import drawn, gpt2_like, llama_like, pairs

TEMPLATES = ("A", "A", "B", "B", "B", "A")


@pytest.fixture(scope="module", params=[gpt2_like, llama_like])
def case(request: pytest.FixtureRequest) -> tuple[HookedModel, Plain, Task]:
    model, plain = request.param()
    clean, corrupted = drawn(6)
    task = pairs(model, clean, corrupted, weighed)
    asked = tuple(replace(q, template=t) for q, t in zip(task.questions, TEMPLATES, strict=True))
    return model, plain, replace(task, questions=asked, counterparts=None)


def by_template(value: Tensor) -> Tensor:
    made = torch.empty_like(value)
    for template in set(TEMPLATES):
        own = [i for i, t in enumerate(TEMPLATES) if t == template]
        made[own] = value[own].mean(0)
    return made


MEANS: dict[Any, Callable[[Tensor], Tensor]] = {
    "mean": lambda value: value.mean((0, 1)).expand_as(value),
    "mean-by-position": lambda value: value.mean(0).expand_as(value),
    "mean-by-template": by_template,
    "zero": torch.zeros_like,
}


def compare(runs: Runs, oracle: Oracle) -> None:
    """The metric of random circuits, on each example."""
    some = np.random.default_rng(0).random((4, len(runs.graph))) < 0.5
    some[0] = False
    check_circuits(runs, oracle, some)


@pytest.mark.parametrize("ablation", list(MEANS))
def test_edges_carry_the_means_that_they_are_said_to(
    case: tuple[HookedModel, Plain, Task], ablation: Any
) -> None:
    model, plain, task = case
    graph, (clean, _) = edge_graph(model), drawn(6)
    oracle = Oracle(TransformerEdges(plain, graph.edges), last_logits(LAST), clean, clean)
    oracle.other = {name: MEANS[ablation](value) for name, value in oracle.live.items()}
    # In batches smaller than the groups that are averaged.
    compare(Runs(graph, task, ablation=ablation, batch=4), oracle)


def test_edges_carry_what_they_carry_on_another_example(
    case: tuple[HookedModel, Plain, Task],
) -> None:
    model, plain, task = case
    graph, (clean, _) = edge_graph(model), drawn(6)
    given = resampled(task, 3).counterparts
    assert given is not None
    others = torch.stack([given.load(i) for i in range(6)])
    assert all(row.tolist() in clean.tolist() for row in others)
    assert not (others == clean).all(1).any()
    oracle = Oracle(TransformerEdges(plain, graph.edges), last_logits(LAST), clean, others)
    runs = Runs(graph, task, ablation="resample", seed=3)
    compare(runs, oracle)
    # The circuit of no edges is that run to the bit, and so is the metric with all edges removed.
    (pair,) = runs.pairs()
    none = runs.patched(pair, torch.ones(1, len(graph)))[0]
    assert torch.equal(none, weighed(model.logits(others)).double())
    assert torch.equal(none, runs.corrupted(pair))
    # Both directions of exact patching are there.
    found = score_edges(graph, task, "exact", direction="denoising", ablation="resample", seed=3)
    torch.testing.assert_close(
        torch.from_numpy(found.values), oracle.denoising(), rtol=1e-3, atol=1e-4
    )


def test_other_examples_are_drawn_by_seed_among_those_of_the_same_length() -> None:
    model, _ = gpt2_like()
    rows = [[1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8], [9, 1], [2, 2]]
    examples = Examples.texts(model, rows)
    asked = tuple(Question((len(row) - 1,)) for row in rows)
    task = Task("lengths", examples, asked, as_metric(weighed))
    drawn_ = set()
    for seed in range(20):
        made, again = (resampled(task, seed).counterparts for _ in range(2))
        assert made is not None
        assert again is not None
        tokens = [tuple(made.tokens(i)) for i in range(6)]
        assert tokens == [tuple(again.tokens(i)) for i in range(6)]
        assert all(len(a) == len(b) and list(a) != b for a, b in zip(tokens, rows, strict=True))
        drawn_.add(tuple(tokens))
    assert len(drawn_) > 5
    assert all(len({draw[i] for draw in drawn_}) == 2 for i in (3, 4, 5))
    # Padded batches: each is the metric of the example alone.
    graph = edge_graph(model)
    runs = Runs(graph, task.with_metric(as_metric("logit_of_first")), ablation="resample")
    none, full = values_of(runs, [np.zeros(len(graph), bool), np.ones(len(graph), bool)])
    others = resampled(task, 0).counterparts
    assert others is not None
    for i in range(6):
        first = model.logits(examples.load(i)[None])[0, -1].argmax()
        for found, source in ((none, others), (full, examples)):
            alone = model.logits(source.load(i)[None])[0, -1, first]
            assert found[i] == pytest.approx(float(alone), abs=1e-4)


# --- images ------------------------------------------------------------------------------------------


def image_task() -> tuple[ChannelGraph, Task, nn.Sequential]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 4)).double().eval()
    net.add_module("flat", nn.Flatten())
    model = HookedModel(net, (2, 6, 6), "net")
    images = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    task = Task(
        "images", Examples.given(model, images), (Question(),) * 5, as_metric(first_less_second)
    )
    return ChannelGraph(model), task, net


def test_pixels_carry_their_mean_over_images_or_another_image() -> None:
    graph, task, net = image_task()
    images = torch.stack([task.examples.load(i) for i in range(5)])
    for ablation in ("mean-by-position", "resample"):
        runs = Runs(graph, task, ablation=ablation, batch=3, seed=2)  # type: ignore[arg-type]
        if ablation == "resample":
            given = resampled(task, 2).counterparts
            assert given is not None
            other = torch.stack([given.load(i) for i in range(5)])
            carried = net[1](net[0](other))
            assert not (other == images).flatten(1).all(1).any()
        else:
            other = images.mean(0).expand_as(images)
            carried = net[1](net[0](images)).mean(0).expand(5, -1, -1, -1)
        # Edges of the image are kept, then those behind the nonlinearity, then none.
        first = np.array([graph.sources[s].startswith("input") for s, _ in graph.ends.tolist()])
        values = torch.from_numpy(values_of(runs, [first, ~first, np.zeros_like(first)]))
        own = [net[2](carried), net[2](net[1](net[0](other))), net[2](carried)]
        wanted = torch.stack([first_less_second(made.flatten(1)).detach() for made in own])
        torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-8)


# --- refused -----------------------------------------------------------------------------------------


def task_of(model: HookedModel, rows: list[list[int]], templates: Mapping[int, str]) -> Task:
    asked = tuple(
        Question((len(r) - 1,), template=templates.get(i, "")) for i, r in enumerate(rows)
    )
    return Task("rows", Examples.texts(model, rows), asked, as_metric(weighed))


def test_texts_that_do_not_fit_an_ablation_are_refused_in_one_line() -> None:
    model, _ = gpt2_like()
    graph = edge_graph(model)
    uneven = task_of(model, [[1, 2, 3], [4, 5], [6, 7]], {0: "A", 1: "A", 2: "A"})
    for task, ablation, said in (
        (uneven, "mean-by-position", "needs texts of one length: those of task rows have 2 to 3 tokens"),
        (uneven, "mean-by-template", "has a single example of template 'A' with 3 tokens, whose mean is"),
        (task_of(model, [[1, 2], [3, 4]], {0: "A"}), "mean-by-template", "'text 1' of task rows has no template"),
        (task_of(model, [[1, 2]], {}), "mean-by-position", "has a single example with 2 tokens"),
        (uneven, "resample", r"no other example of task rows is as long as 'text 0' \(3 tokens\)"),
        (uneven, "counterpart", "choose the ablation resample, mean or zero"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said) as caught:
            Runs(graph, task, ablation=ablation)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("ablation" if ablation != "counterpart" else "task")
