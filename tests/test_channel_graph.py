"""Edges between channels against passes that are written out by hand, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from circuits.call_points import Address
from circuits.discovery.channels import ChannelGraph
from circuits.discovery.runs import Ablation, Pair, Runs
from circuits.discovery.scoring import Method, exact, score_edges
from circuits.experiments.patched_runs import Direction
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import read_image
from circuits.tasks.builtin import task_from_pairs
from circuits.tasks.images import ImagePairs
from circuits.tasks.metrics import UnitActivation
from circuits.tasks.task import Task
from circuits.units import Unit, Units
from tests.conftest import seeded

Sources = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """What a target is given, from what sources put out, and what is made of it and other sources."""

    target: str
    given: Callable[[Sources], Tensor]
    source: str = ""
    put_out: Callable[[Tensor, Sources], Tensor] = lambda x, _: F.relu(x)


class Plain(nn.Module):
    """Convolutions with strides and padding, pooling, a flattened map and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 4, 3, 2, padding=1), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(4, 5, 3, dilation=2, padding="same"), nn.ReLU()
        self.fc1, self.relu3 = nn.Linear(5 * 4 * 4, 6), nn.Tanh()
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.pool(self.relu1(self.conv1(x)))))
        return self.fc2(self.relu3(self.fc1(x.view(x.shape[0], -1))))

    def parts(self) -> list[Part]:
        return [
            Part("relu1", lambda s: self.conv1(s["input"]), "relu1"),
            Part("relu2", lambda s: self.conv2(F.max_pool2d(s["relu1"], 2)), "relu2"),
            Part(
                "relu3",
                lambda s: self.fc1(s["relu2"].flatten(1)),
                "relu3",
                lambda x, _: torch.tanh(x),
            ),
            Part("fc2", lambda s: self.fc2(s["relu3"])),
        ]


class Residual(nn.Module):
    """Batch norm, shortcuts around one and two layers, all as functions; the mean over a map before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 6, 3, 2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn0(self.conv0(x)), inplace=True)
        b = F.relu(self.bn1(self.conv1(a)))
        c = self.bn2(self.conv2(b))
        c += a
        c = F.relu(c, inplace=True)
        d = self.bn3(self.conv3(c))
        d = F.relu(d + F.pad(c[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))
        return self.fc(F.adaptive_avg_pool2d(d, 1).flatten(1))

    def parts(self) -> list[Part]:
        def wide(x: Tensor) -> Tensor:
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))

        return [
            Part("bn0", lambda s: self.bn0(self.conv0(s["input"])), "bn0"),
            Part("bn1", lambda s: self.bn1(self.conv1(s["bn0"])), "bn1"),
            Part("relu@2", lambda s: self.bn2(self.conv2(s["bn1"])) + s["bn0"], "relu@2"),
            Part(
                "relu@3", lambda s: self.bn3(self.conv3(s["relu@2"])) + wide(s["relu@2"]), "relu@3"
            ),
            Part("fc", lambda s: self.fc(s["relu@3"].mean((2, 3)))),
        ]


class Branched(nn.Module):
    """Concatenated branches, pooling of two kinds, local response normalisation, and a sum after a layer's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.relu0 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.lrn = nn.LocalResponseNorm(3, alpha=0.5)
        self.narrow, self.relu_narrow = nn.Conv2d(6, 2, 1), nn.ReLU()
        self.wide, self.relu_wide = nn.Conv2d(2, 3, 5, padding=2), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.pooled, self.relu_pooled = nn.Conv2d(6, 2, 1), nn.ReLU()
        self.last = nn.Conv2d(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lrn(self.relu0(self.conv0(x)))
        x = F.max_pool2d(x, 2)
        wide = self.relu_wide(self.wide(self.relu_narrow(self.narrow(x))))
        pooled = self.relu_pooled(self.pooled(self.pool(x)))
        y = torch.cat([wide, pooled], 1)
        return 0.5 * self.last(F.avg_pool2d(y, 2) - 1).mean((2, 3))

    def parts(self) -> list[Part]:
        def last(s: Sources) -> Tensor:
            y = torch.cat([s["relu_wide"], s["relu_pooled"]], 1)
            return 0.5 * self.last(F.avg_pool2d(y, 2) - 1).mean((2, 3))

        return [
            Part(
                "relu0", lambda s: self.conv0(s["input"]), "lrn", lambda x, _: self.lrn(F.relu(x))
            ),
            Part("relu_narrow", lambda s: self.narrow(F.max_pool2d(s["lrn"], 2)), "relu_narrow"),
            Part("relu_wide", lambda s: self.wide(s["relu_narrow"]), "relu_wide"),
            Part(
                "relu_pooled",
                lambda s: self.pooled(self.pool(F.max_pool2d(s["lrn"], 2))),
                "relu_pooled",
            ),
            Part("output", last),
        ]


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, a layer that another reads without a nonlinearity, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.relu0 = nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.ReLU6()
        self.deep, self.relu1 = nn.Conv2d(6, 6, 3, 2, padding=1, groups=6), nn.ReLU6()
        self.project = nn.Conv2d(6, 4, 1)
        self.expand, self.act = nn.Conv2d(4, 6, 1, groups=2), nn.SiLU()
        self.gate = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.relu1(self.deep(self.relu0(self.conv0(x)))))
        x = self.act(self.expand(x))
        gate = torch.sigmoid(self.gate(x.mean((2, 3))))
        return self.fc((x * gate[:, :, None, None]).mean((2, 3)))

    def gated(self, x: Tensor, s: Sources) -> Tensor:
        return s["act"] * x.sigmoid()[:, :, None, None]

    def parts(self) -> list[Part]:
        return [
            Part("relu0", lambda s: self.conv0(s["input"]), "relu0", lambda x, _: F.relu6(x)),
            Part("relu1", lambda s: self.deep(s["relu0"]), "relu1", lambda x, _: F.relu6(x)),
            Part("project", lambda s: self.project(s["relu1"]), "project", lambda x, _: x),
            Part("act", lambda s: self.expand(s["project"]), "act", lambda x, _: F.silu(x)),
            Part("gate", lambda s: self.gate(s["act"].mean((2, 3))), "mul@0", self.gated),
            Part("fc", lambda s: self.fc(s["mul@0"].mean((2, 3)))),
        ]


class Dense(nn.Module):
    """Each layer reads the concatenation of all before it, under a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(2))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.fc(F.relu(self.norms[2](x)).mean((2, 3)))


class Inverted(nn.Module):
    """Bottlenecks without nonlinearity that are added up, depthwise convolutions in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
                nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
                nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4),
            )
            for _ in range(2)
        )  # fmt: skip
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


class Both(nn.Module):
    """A shortcut to the end of a network that halves its map: padding that wraps around, interpolation, a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.b, self.c = nn.Conv2d(4, 4, 3, 2, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(2 * x - 1))
        up = F.interpolate(F.leaky_relu(self.b(a)), scale_factor=2, mode="bilinear")
        return self.c(torch.cat([up, a[:, 1:3]], 1)).amax((2, 3))


class Computed(nn.Module):
    """Weights that are computed, an image that is normalised, constants and squeezed axes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.b, self.drop, self.fc = nn.Conv2d(4, 5, 3), nn.Dropout(), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a((x - self.mean) / 0.5))
        x = self.drop(F.hardswish(self.b(x))) * torch.tensor(2.0)
        return self.fc(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


NETS: dict[str, tuple[type[nn.Module], tuple[int, int, int]]] = {
    "plain": (Plain, (3, 16, 16)),
    "residual": (Residual, (3, 8, 8)),
    "branched": (Branched, (3, 12, 12)),
    "grouped": (Grouped, (3, 8, 8)),
}


def net(name: str) -> HookedModel:
    kind, shape = NETS[name]
    return HookedModel(seeded(kind()).double(), shape, name)


def task_of(model: HookedModel, n: int = 3) -> Task:
    generator = torch.Generator().manual_seed(1)
    shape = (n, *NETS[model.name][1])
    clean, other = (torch.rand(shape, generator=generator) for _ in range(2))
    pairs = ImagePairs("random", clean, other, tuple(f"image {i}" for i in range(n)), "another")
    task = task_from_pairs(model, pairs)
    return task.with_metric(UnitActivation.named(model, f"{model.sites[-1].name}:1"))


@torch.no_grad()
def by_hand(
    parts: list[Part],
    image: Tensor,
    off: Mapping[tuple[str, str], float],
    other: Sources | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """What sources put out, and the model's output, in a pass with some edges off."""
    found = {"input": image}
    given = image
    for part in parts:
        given = part.given(found)
        patched = given.clone()
        for (source, target), share in off.items():
            (a, i), (b, j) = source.rsplit(":", 1), target.rsplit(":", 1)
            if b == part.target and share:
                assert other is not None
                instead = found[a].clone()
                instead[:, int(i)] = other[a][:, int(i)]
                change = part.given({**found, a: instead}) - given
                patched[:, int(j)] += share * change[:, int(j)]
        given = patched
        if part.source:
            found[part.source] = part.put_out(given, found)
    return found, given


def runs_by_hand(model: HookedModel, task: Task) -> tuple[list[Part], Tensor, Tensor]:
    (batch,) = task.batches(99)
    assert batch.counterparts is not None
    module = model.module
    assert isinstance(module, Plain | Residual | Branched | Grouped)
    return module.parts(), batch.inputs.double(), batch.counterparts.double()


# --- against passes by hand --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_every_edge_is_there_and_no_other(name: str) -> None:
    model = net(name)
    graph, (parts, image, _) = ChannelGraph(model), runs_by_hand(model, task_of(model))
    # Any numbers, since channels that are silent on both images show no edges.
    clean = {name: torch.randn_like(x) for name, x in by_hand(parts, image, {})[0].items()}
    corrupted = {name: torch.randn_like(x) for name, x in clean.items()}
    found = set()
    for part in parts:
        base = part.given(clean)
        for source in clean:
            for i in range(clean[source].shape[1]):
                instead = clean[source].clone()
                instead[:, i] = corrupted[source][:, i]
                try:
                    change = part.given({**clean, source: instead}) - base
                except KeyError:  # computed later
                    continue
                moved = change.transpose(0, 1).flatten(1).abs().amax(1) > 0
                found |= {
                    (f"{source}:{i}", f"{part.target}:{j}") for j in moved.nonzero()[:, 0].tolist()
                }
    assert set(graph.edges) == found
    assert len(graph.edges) == len(found)
    assert graph.connected(np.ones(len(graph), bool)).all()
    assert graph.complete.all()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", NETS)
def test_one_edge_is_patched_exactly(name: str, direction: Direction) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    scores = score_edges(graph, task, "exact", direction=direction)
    parts, image, other = runs_by_hand(model, task)
    if direction == "denoising":
        image, other = other, image
    corrupted = by_hand(parts, other, {})[0]
    base = by_hand(parts, image, {})[1][:, 1]
    for e, edge in enumerate(graph.edges):
        made = by_hand(parts, image, {edge: 1.0}, corrupted)[1][:, 1]
        expected = (made - base).numpy()
        np.testing.assert_allclose(scores.values[:, e], expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", NETS)
def test_sets_of_edges_in_part_off(name: str) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    off = torch.rand(4, len(graph), generator=torch.Generator().manual_seed(2)).double()
    off[0] = 0
    off[1] = (off[1] > 0.5).double()
    off[2, off[2] > 0.5] = 1
    made = runs.patched(pair, off)
    parts, image, other = runs_by_hand(model, task)
    corrupted = by_hand(parts, other, {})[0]
    for row, values in zip(off.tolist(), made, strict=True):
        expected = by_hand(parts, image, dict(zip(graph.edges, row, strict=True)), corrupted)[1][
            :, 1
        ]
        torch.testing.assert_close(values, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(
    "kind", [Dense, Inverted, Both, Computed, *(kind for kind, _ in NETS.values())]
)
def test_the_edges_of_a_target_carry_all_that_it_is_given(kind: type[nn.Module]) -> None:
    model = HookedModel(seeded(kind()).double(), NETS["plain"][1], "plain")
    graph, task = ChannelGraph(model), task_of(model)
    assert graph.connected(np.ones(len(graph), bool)).all()
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    almost = torch.full((1, len(graph)), 1 - 1e-12, dtype=torch.float64)
    made = runs.patched(pair, almost)[0]
    torch.testing.assert_close(made, pair.other[runs.end.name][:, 1], rtol=1e-8, atol=1e-9)
    one = exact(runs, pair)
    assert bool((one.abs().amax(0) > 0).any())
    # A pass from the model's input, with every target's own change: nothing is known, nothing is put in.
    changes = graph.changes(almost, pair.other)
    whole = graph.model.run(pair.part.inputs, edits=changes, read=[runs.end])[runs.end][:, 1]
    torch.testing.assert_close(whole, made, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_none_off_is_the_clean_run_and_all_off_the_other_to_the_bit(name: str) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    twice = model.run(pair.part.inputs.repeat(2, 1, 1, 1)).output[:3, 1]
    off = torch.stack([torch.zeros(len(graph)), torch.ones(len(graph))])
    made = runs.patched(pair, off)
    assert torch.equal(made[0], twice)
    end = runs.end.name
    assert torch.equal(made[1], pair.other[end][:, 1])
    # With gradients, too.
    made = runs.patched(pair, off.requires_grad_())
    assert torch.equal(made[1].detach(), pair.other[end][:, 1])


@pytest.mark.parametrize("name", NETS)
def test_eap_is_the_derivative_by_off_at_none_off(name: str) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    scores = score_edges(graph, task, "eap")
    parts, image, other = runs_by_hand(model, task)
    corrupted = by_hand(parts, other, {})[0]
    step = 1e-6
    for e, edge in enumerate(graph.edges[:: 1 + len(graph) // 40]):
        e *= 1 + len(graph) // 40
        up, down = (
            by_hand(parts, image, {edge: share}, corrupted)[1][:, 1] for share in (step, -step)
        )
        expected = ((up - down) / (2 * step)).numpy()
        np.testing.assert_allclose(scores.values[:, e], expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_what_is_patched_is_differentiable_by_off(name: str) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    off = torch.zeros(1, len(graph), dtype=torch.float64, requires_grad=True)
    value = _differentiable(runs, pair, off)
    (slope,) = torch.autograd.grad(value.sum(), off)
    expected = score_edges(graph, task, "eap").values.sum(0)
    np.testing.assert_allclose(slope[0].numpy(), expected, atol=1e-10, rtol=1e-8)


def _differentiable(runs: Runs, pair: Pair, off: Tensor) -> Tensor:
    changes = runs.graph.changes(off, pair.other, {})
    end = runs.end.name
    inputs = pair.part.inputs.repeat(len(off), 1, 1, 1)
    return runs.model.run(inputs, read=[end], edits=changes, grad=True)[end][:, 1]


# --- scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"])
@pytest.mark.parametrize("name", NETS)
def test_all_methods_are_exact_where_what_follows_is_linear(name: str, method: Method) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    last = [e for e, (_, target) in enumerate(graph.edges) if target == f"{model.sites[-1].name}:1"]
    expected = score_edges(graph, task, "exact").values
    made = score_edges(graph, task, method).values
    assert last
    np.testing.assert_allclose(made[:, last], expected[:, last], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_integrated_gradients_add_up_to_the_whole_effect(name: str) -> None:
    model = net(name)
    scores = score_edges(ChannelGraph(model), task_of(model), "eap-ig", steps=400)
    assert scores.input_edges
    assert scores.completeness < 0.01


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("name", NETS)
def test_edges_that_carry_means_or_nothing(name: str, ablation: Ablation) -> None:
    model = net(name)
    graph, task = ChannelGraph(model), task_of(model)
    runs = Runs(graph, task, ablation=ablation)
    (pair,) = runs.pairs()
    parts, image, _ = runs_by_hand(model, task)
    clean = by_hand(parts, image, {})[0]
    carried = {
        s: torch.zeros_like(x) if ablation == "zero" else _mean(x).expand_as(x)
        for s, x in clean.items()
    }
    off = torch.ones(2, len(graph))
    off[0, ::3] = 0
    for row, values in zip(off.tolist(), runs.patched(pair, off), strict=True):
        edges = dict(zip(graph.edges, row, strict=True))
        expected = by_hand(parts, image, edges, carried)[1][:, 1]
        torch.testing.assert_close(values, expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(runs.corrupted(pair), runs.patched(pair, off)[1])


def _mean(x: Tensor) -> Tensor:
    return x.mean([a for a in range(x.ndim) if a != 1], keepdim=True)


def test_a_pass_starts_with_what_a_changed_site_does_not_reach() -> None:
    graph = ChannelGraph(net("branched"))
    cut = graph.cut(["narrow"])
    assert cut is not None
    assert cut.given == ("narrow", "relu_pooled")
    assert {"relu_narrow", "wide", "relu_wide", "output"} <= cut.reached
    assert cut.reached.isdisjoint({"lrn", "pooled", "relu_pooled", "conv0"})
    both = graph.cut(["narrow", "wide", "pooled"])
    assert both is not None
    assert both.given == ("narrow", "pooled")
    # What a shortcut carries is put in, too.
    inner = ChannelGraph(net("residual")).cut(["bn1"])
    assert inner is not None
    assert inner.given == ("bn1", "relu@0")


# --- which channels ----------------------------------------------------------------------------------


def ends_of(graph: ChannelGraph) -> tuple[set[str], set[str]]:
    """The sites of sources and of targets."""
    sources, targets = (
        {n.rpartition(":")[0] for n in some} for some in (graph.sources, graph.targets)
    )
    return sources, targets


def test_sites_between_named_ones_belong_to_the_graph() -> None:
    model = net("branched")
    graph = ChannelGraph(model, ["relu0", "relu_wide:1"])
    # What the normalisation puts out is read by layers; each of its channels mixes three.
    assert ends_of(graph) == ({"lrn", "relu_narrow"}, {"relu_narrow", "relu_wide"})
    assert len(graph) == 2 + 2 * 6
    assert not graph.feeds[graph.targets.index("relu_wide:1")]
    assert graph.input_sites == ("lrn",)
    assert not graph.whole
    whole = ChannelGraph(model, ["input", "relu0", "relu_wide:1"])
    assert {whole.sources[s] for s in whole.feeds[whole.targets.index("relu0:2")]} == {
        "lrn:1", "lrn:2", "lrn:3",
    }  # fmt: skip


def test_channels_are_called_by_the_site_that_was_named() -> None:
    model = net("branched")
    assert ("relu_narrow:1", "relu_wide:0") in ChannelGraph(model, ["lrn", "relu_wide"]).edges
    named = ChannelGraph(model, [Units("narrow", (1,)), "wide"])
    assert named.edges == tuple(("narrow:1", f"wide:{i}") for i in range(3))
    # A pooled channel is that of the source.
    pooled = ChannelGraph(model, ["pool:4", "relu_pooled:0"])
    assert pooled.edges == (("pool:4", "relu_pooled:0"),)
    assert not pooled.complete.any()


def test_only_named_units_are_patched() -> None:
    model = net("residual")
    task = task_of(model)
    graph = ChannelGraph(model, ["bn0:0,2", "bn1", "fc:1"])
    assert {s for s, t in graph.edges if t == "relu@2:2"} == {
        "bn0:2",
        *(f"bn1:{i}" for i in range(4)),
    }
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    parts, image, other = runs_by_hand(model, task)
    corrupted = by_hand(parts, other, {})[0]
    expected = by_hand(parts, image, dict.fromkeys(graph.edges, 1.0), corrupted)[1][:, 1]
    torch.testing.assert_close(runs.corrupted(pair), expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["relu_wid"], "unknown site of branched 'relu_wid': did you mean relu_wide"),
        (["relu0", "relu_wide:7"], "unit relu_wide:7 does not exist: relu_wide has units 0 to 2"),
        (
            ["last", "relu_wide"],
            "site last of branched is neither what a nonlinearity is given nor",
        ),
        (["relu_wide", "relu_pooled"], "site relu_wide of branched: no path leads from it"),
    ],
)
def test_sites_that_make_no_graph(sites: list[str], message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        ChannelGraph(net("branched"), sites)


def test_too_many_edges_are_refused_before_they_are_listed() -> None:
    message = (
        r"sites of residual have 90 edges between their channels, more than 40; most have relu@2 -> relu@3 with 24, "
        r"relu@3 -> fc with 18, .*: with 2 units a layer all these sites would fit"
    )
    with pytest.raises(ValueError, match=message):
        ChannelGraph(net("residual"), limit=40)


def test_operations_that_are_not_followed_are_named() -> None:
    class Turned(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv2(F.channel_shuffle(self.pool(self.relu1(self.conv1(x))), 2))
            return self.fc2(self.relu3(self.fc1(self.relu2(x).flatten(1))))

    model = HookedModel(seeded(Turned()), (3, 16, 16), "turned")
    with pytest.raises(
        ValueError, match="operation channel_shuffle@0 of model turned is not followed"
    ):
        ChannelGraph(model)


def test_a_layer_in_one_dimension_is_not_followed() -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv1d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x.flatten(2))).mean(2)

    with pytest.raises(ValueError, match="operation a/conv1d@0 of model line is not followed"):
        ChannelGraph(HookedModel(seeded(Line()), (3, 8, 8), "line"))


def test_no_sites_are_not_all_sites() -> None:
    with pytest.raises(ValueError, match="sites are an empty list: expected names of sites"):
        ChannelGraph(net("plain"), [])


def test_a_graph_needs_images() -> None:
    tokens = HookedModel(seeded(nn.Embedding(5, 4)), TokenInput(5, 3), "words")
    with pytest.raises(ValueError, match="model words takes tokens: a graph of channels needs"):
        ChannelGraph(tokens)


def test_a_sum_inside_a_function_is_shown_as_a_site() -> None:
    model = net("residual")
    graph = ChannelGraph(model)
    shown, names = graph.model, [s.name for s in graph.model.sites]
    assert {"add_@0", "add@0", "conv0/conv2d@0.input"} <= set(names) - {s.name for s in model.sites}
    assert names.index("bn2") < names.index("add_@0") < names.index("conv3") < names.index("add@0")
    x = model.input.example(2)
    values = shown.run(x, read=["add_@0", "relu@2"])
    torch.testing.assert_close(F.relu(values["add_@0"]), values["relu@2"])
    halved = shown.run(x, read=["relu@2"], edits={"add_@0": lambda v: v / 2})["relu@2"]
    torch.testing.assert_close(halved, values["relu@2"] / 2)
    assert torch.equal(model.run(x).output, shown.run(x).output)
    site, address = shown.site("add@0"), Address("", 0, "torch.Tensor.add", 0)
    with pytest.raises(ValueError, match="site add@0 is one of residual already"):
        shown.showing([(site, address, "")])


# --- a real network ----------------------------------------------------------------------------------


@pytest.mark.models
def test_googlenets_edges_into_a_curve_detector_are_its_kernels(assets: Path) -> None:
    model = load_model("googlenet")
    size = model.input.example(1).shape[-2:]
    paths = sorted((assets / "images" / "imagenet500").glob("*.jpg"))[:2]
    images = torch.stack([_tensor(read_image(p).resize((size[1], size[0]))) for p in paths])
    pairs = ImagePairs("photographs", images, images, ("a", "b"), "").with_counterparts("turned")
    task = task_from_pairs(model, pairs)
    task = task.with_metric(UnitActivation.named(model, "mixed3b:335"))
    graph = ChannelGraph(model, ["mixed3a", "mixed3b:335"])
    assert len(graph) == 32 + 32 * 256
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    into = graph.edges_into[graph.targets.index("mixed3b:335")]
    made = exact(runs, pair, into.tolist())
    name, layer = "mixed3b_5x5_bottleneck", model.module.get_submodule("mixed3b_5x5_pre_relu")
    assert isinstance(layer, nn.Conv2d)
    weight = layer.weight[15:16].detach()
    change = pair.other[name] - pair.clean[name]
    given = pair.clean["mixed3b_5x5_pre_relu"][:, 15]
    place = given.flatten(1).argmax(1)
    for column, edge in enumerate(into.tolist()):
        source = Unit.parse(graph.edges[edge][0])
        assert source.site == name
        i = source.index
        added = F.conv2d(change[:, i : i + 1], weight[:, i : i + 1], padding=2)[:, 0]
        effect = (F.relu(given + added) - F.relu(given)).flatten(1)
        expected = effect.gather(1, place[:, None])[:, 0].double()
        torch.testing.assert_close(made[:, column], expected, rtol=1e-5, atol=2e-4)


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255
