"""Groups of channels as single nodes: against passes by hand with all of their channels' edges off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits.discovery import Runs, discover, edge_graph, score_edges
from circuits.discovery.channels import ChannelGraph
from circuits.discovery.found import edges_of, graph_of
from circuits.discovery.groups import GroupedGraph, parse_groups
from circuits.discovery.scoring import exact
from circuits.families import Family, Member
from circuits.graph.circuit import UnitGroup
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks.builtin import task_from_pairs
from circuits.tasks.images import ImagePairs
from circuits.tasks.metrics import UnitActivation
from circuits.units import Unit, Units
from tests.conftest import seeded
from tests.edge_checks import both_ends
from tests.test_channel_graph import Part, by_hand, net, runs_by_hand, task_of

GROUPS = {
    "plain": {"first": "relu1:0,2", "second": "relu2:1-3"},
    "residual": {"first": "bn0:0,1", "middle": "relu@2:1,3"},
}
NAMES = ["plain", "residual"]


def grouped(name: str) -> tuple[GroupedGraph, ChannelGraph]:
    model = net(name)
    graph = edge_graph(model, groups=GROUPS[name])
    assert isinstance(graph, GroupedGraph)
    return graph, graph.inner


@pytest.mark.parametrize("name", NAMES)
def test_a_groups_edge_is_those_of_its_channels_off_together(name: str) -> None:
    graph, inner = grouped(name)
    task = task_of(graph.model)
    parts, clean, corrupted = runs_by_hand(graph.model, task)
    other = by_hand(parts, corrupted, {})[0]
    runs = Runs(graph, task)
    (pair,) = runs.pairs()
    found = exact(runs, pair)
    base = by_hand(parts, clean, {})[1][:, 1]
    several = 0
    for edge in range(len(graph)):
        own = [inner.edges[i] for i in np.flatnonzero(graph.members(edge))]
        several += len(own) > 1
        moved = by_hand(parts, clean, dict.fromkeys(own, 1.0), other)[1][:, 1] - base
        torch.testing.assert_close(found[:, edge], moved, rtol=1e-9, atol=1e-10)
    assert several > 10
    # Every edge between channels is in one of these.
    assert sum(int(graph.members(e).sum()) for e in range(len(graph))) == len(inner)


def check_runs(runs: Runs) -> None:
    """Every edge patched is the corrupted run of images, and none the clean one, up to rounding.

    Passes of other sizes round differently on some processors.
    """
    (pair,) = runs.pairs()
    none, full = both_ends(runs)
    assert pair.corrupted is not None
    for found, run in ((full, pair.intact), (none, pair.corrupted)):
        wanted = runs.value(run, pair.intact)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_none_off_is_the_clean_run_and_all_off_the_other(name: str) -> None:
    graph, _ = grouped(name)
    check_runs(Runs(graph, task_of(graph.model)))


@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_scores_of_a_group_are_the_sums_of_its_channels(name: str, method: str) -> None:
    graph, inner = grouped(name)
    task = task_of(graph.model)
    found = score_edges(graph, task, method).values  # type: ignore[arg-type]
    single = score_edges(inner, task, method).values  # type: ignore[arg-type]
    for edge in range(len(graph)):
        wanted = single[:, graph.members(edge)].sum(1)
        np.testing.assert_allclose(found[:, edge], wanted, rtol=1e-6, atol=1e-9)


def test_weights_of_a_group_are_all_weights_together() -> None:
    graph, inner = grouped("plain")
    norms, single = graph.weight_norms(), inner.weight_norms()
    for edge in range(len(graph)):
        assert norms[edge] == pytest.approx(np.sqrt((single[graph.members(edge)] ** 2).sum()))
    with pytest.raises(ValueError, match="method activations: not known"):
        score_edges(graph, task_of(graph.model), "activations")


class Joined(nn.Module):
    """Two branches, one of two layers, and a layer behind their concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.first = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.second, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 4, 3)
        self.join = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        between = self.first(x).relu()
        y = self.join(torch.cat([self.short(x).relu(), self.second(between).relu()], 1))
        return self.last(y).relu().mean((2, 3))


def test_a_group_of_channels_from_several_branches_is_one_node() -> None:
    model = HookedModel(seeded(Joined()).double(), (3, 8, 8), "joined")
    graph = edge_graph(model, ["input", "join", model.sites[-1].name], groups={"all": "join:*"})
    assert isinstance(graph, GroupedGraph)
    assert "join:all" in graph.sources
    assert "join:all" in graph.targets
    clean, other = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = ImagePairs("random", clean, other, ("a", "b", "c"), "another")
    task = task_from_pairs(model, images).with_metric(
        UnitActivation.named(model, f"{model.sites[-1].name}:1")
    )
    (pair,) = (runs := Runs(graph, task)).pairs()
    found = exact(runs, pair)
    alone = Runs(graph.inner, task)
    (inner,) = alone.pairs()
    for edge in range(len(graph)):
        off = torch.from_numpy(np.stack([graph.members(edge), np.zeros(len(graph.inner), bool)]))
        values = alone.patched(inner, off.double())
        torch.testing.assert_close(found[:, edge], values[0] - values[1])
    into = [i for i, edge in enumerate(graph.edges) if edge[1] == "join:all"]
    assert {graph.edges[i][0].split(":")[0] for i in into} > {
        "input"
    }  # and what the second branch reads
    assert bool((found[:, into].abs().amax(0) > 1e-4).any())
    for method in ("eap", "eap-ig-activations"):
        single = score_edges(graph.inner, task, method)  # type: ignore[arg-type]
        several = score_edges(graph, task, method)  # type: ignore[arg-type]
        if method == "eap":
            wanted = np.stack(
                [single.values[:, graph.members(e)].sum(1) for e in range(len(graph))], 1
            )
            np.testing.assert_allclose(several.values, wanted, rtol=1e-6, atol=1e-9)


def test_a_circuit_with_groups_is_found_saved_and_made_again() -> None:
    model = net("plain")
    graph, task = edge_graph(model, groups=GROUPS["plain"]), task_of(model, 8)
    found = discover(graph, task, "eap", size=20, n_random=2, seed=0)
    circuit = found.circuit
    again = graph_of(circuit, model)
    assert isinstance(again, GroupedGraph)
    assert again.edges == graph.edges
    node = graph.node("relu1:first")
    assert node == UnitGroup("first", (Unit("relu1", 0), Unit("relu1", 2)))
    assert any("relu1:first" in edge for edge in edges_of(circuit))
    assert node in circuit.nodes
    assert graph.kind("relu1:first") != graph.kind("relu1:1")


def test_groups_are_read_from_text_and_from_a_file_of_families(tmp_path: Path) -> None:
    found = parse_groups("curves=mixed3a:1,2,5-6;lines=mixed3a:7")
    assert found == {"curves": Units("mixed3a", (1, 2, 5, 6)), "lines": Units("mixed3a", (7,))}
    members = tuple(Member(45.0 * i, Unit("mixed3a", i), 0.9) for i in (3, 4))
    family = Family("a b", "mixed3a", "rotation", 360.0, members, 0.9, 0.01, "", 1, "", "", 0)
    path = tmp_path / "found.json"
    path.write_text(json.dumps([family.to_dict()]))
    assert parse_groups(str(path)) == {"a_b": Units("mixed3a", (3, 4))}
    for text, said in (("mixed3a:1", "expected NAME=SITE"), ("a=x:1;a=x:2", "there twice")):
        with pytest.raises(ValueError, match=said):
            parse_groups(text)
    for text, said in (("{}", "it has no 'families'"), ("", "is not JSON"), ("x", "is not JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            parse_groups(str(path))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"1": "relu1:0"}, "group '1': expected a name"),
        ({"a": "relu1:0,1", "b": "relu1:1"}, "channel relu1:1 is in the groups a and b"),
        ({"a": "relu1:9"}, "unknown channel of group a"),
        ({"a": "nowhere:1"}, "unknown channel of group a"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: dict[str, str], said: str) -> None:
    with pytest.raises((KeyError, ValueError), match=said):
        edge_graph(net("plain"), groups=groups)


class Dense(nn.Module):
    """A layer behind a concatenation of a channel and what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(4, 2, 1)
        self.join = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        return self.c(self.join(torch.cat([a, self.b(a).relu()], 1))).amax((2, 3))


def test_channels_that_are_made_of_each_other_are_no_group() -> None:
    model = HookedModel(seeded(Dense()), (3, 4, 4), "dense")
    sites = ["input", "join", model.sites[-1].name]
    assert "join:2" in edge_graph(model, sites).sources
    assert edge_graph(model, sites, groups={"one": "join:0,1"}).sources
    with pytest.raises(ValueError, match="some of its channels are made of others"):
        edge_graph(model, sites, groups={"all": "join:*"})


# --- offsets of kernels ------------------------------------------------------------------------------


def kernel_of(model: HookedModel, target: str) -> nn.Conv2d | None:
    """The layer whose kernel leads into a target of these networks."""
    layers = {
        "relu1": "conv1",
        "relu2": "conv2",
        "bn0": "conv0",
        "bn1": "conv1",
        "relu@2": "conv2",
        "relu@3": "conv3",
    }
    found = getattr(model.module, layers.get(target, ""), None)
    return found if isinstance(found, nn.Conv2d) else None


@pytest.mark.parametrize("name", NAMES)
def test_an_offsets_edge_is_that_part_of_the_kernel(name: str) -> None:
    """In a network whose kernel is zero elsewhere, its edge is what the source then adds."""
    model = net(name)
    graph, whole = edge_graph(model, offsets=True), edge_graph(model)
    task = task_of(model)
    (pair,) = (runs := Runs(graph, task)).pairs()
    found = exact(runs, pair)
    parts, clean, corrupted = runs_by_hand(model, task)
    live, other = by_hand(parts, clean, {})[0], by_hand(parts, corrupted, {})[0]
    base = by_hand(parts, clean, {})[1][:, 1]
    generator, seen = torch.Generator().manual_seed(0), 0
    for number in torch.randperm(len(graph), generator=generator)[:60].tolist():
        source, target = graph.edges[number]
        into, _, offset = target.rpartition("@")
        site, channel = into.rsplit(":", 1)
        layer = kernel_of(model, site)
        if layer is None:
            assert offset == "y+0x+0"
            moved = by_hand(parts, clean, {(source, into): 1.0}, other)[1][:, 1] - base
        else:
            moved = (
                moved_through(layer, offset, (source, site, channel), parts, live, other, clean)
                - base
            )
            seen += 1
        torch.testing.assert_close(found[:, number], moved, rtol=1e-9, atol=1e-10)
    assert seen > 20
    kernel = {e[1].rpartition("@")[0] for e in graph.edges}
    assert kernel == set(whole.targets)


def moved_through(
    layer: nn.Conv2d, offset: str, edge: tuple[str, str, str], parts: list[Part],
    live: dict[str, Tensor], other: dict[str, Tensor], clean: Tensor,
) -> Tensor:  # fmt: skip
    """The output where a target gets what one place of a kernel (or a shortcut, at the middle) makes of a source."""
    source, site, channel = edge
    y, x = (int(v) for v in offset.removeprefix("y").split("x"))
    kept = layer.weight.detach().clone()
    step, (high, wide) = layer.dilation, kept.shape[2:]
    at = y // step[0] + high // 2, x // step[1] + wide // 2
    part = next(p for p in parts if p.target == site)
    a, i = source.rsplit(":", 1)
    instead = dict(live) | {a: live[a].clone()}
    instead[a][:, int(i)] = other[a][:, int(i)]

    def given(sources: dict[str, Tensor]) -> Tensor:
        return part.given(sources)

    with torch.no_grad():
        # All of the kernel, less all but one place of it: shortcuts stay in both.
        rest = kept.clone()
        rest[..., at[0], at[1]] = 0
        added = given(instead) - given(live)
        layer.weight.copy_(rest)
        others = given(instead) - given(live)
        layer.weight.copy_(torch.zeros_like(kept))
        shortcut = given(instead) - given(live)
        layer.weight.copy_(kept)
        change = added - others + (shortcut if (y, x) == (0, 0) else 0)
    found = {"input": clean}
    made = clean
    for step_part in parts:
        made = step_part.given(found)
        if step_part.target == site:
            made = made.clone()
            made[:, int(channel)] += change[:, int(channel)]
        if step_part.source:
            found[step_part.source] = step_part.put_out(made, found)
    return made[:, 1].detach()


@pytest.mark.parametrize("name", [*NAMES, "branched", "grouped"])
def test_offsets_add_up_to_the_kernel(name: str) -> None:
    model = net(name)
    graph, whole = edge_graph(model, offsets=True), edge_graph(model)
    task = task_of(model)
    (pair,) = (runs := Runs(graph, task)).pairs()
    check_runs(runs)
    # All offsets of an edge off are the edge off.
    at = [whole.index((s, t.rpartition("@")[0])) for s, t in graph.edges]
    single = Runs(whole, task)
    (other,) = single.pairs()
    off = (torch.rand(4, len(whole), generator=torch.Generator().manual_seed(3)) < 0.3).double()
    wanted = single.patched(other, off)
    torch.testing.assert_close(runs.patched(pair, off[:, at]), wanted, rtol=1e-9, atol=1e-10)
    # Gradient scores add up.
    scores, sums = score_edges(graph, task, "eap").values, np.zeros((len(pair.part), len(whole)))
    for number, edge in enumerate(at):
        sums[:, edge] += scores[:, number]
    np.testing.assert_allclose(sums, score_edges(whole, task, "eap").values, rtol=1e-6, atol=1e-9)


def test_offsets_are_edges_of_a_circuit_and_no_baseline() -> None:
    model = net("plain")
    graph = edge_graph(model, ["input", "relu1", "relu2:1"], offsets=True)
    assert {graph.way(t) for t in range(len(graph.targets))} >= {"@y-1x+0", "@y+2x-2"}
    assert graph.kind("relu2:1@y-2x+0") == "relu2@y-2x+0"
    assert str(graph.node("relu2:1@y-2x+0")) == "relu2:1"
    again = edge_graph(model, **graph.choices)
    assert again.edges == graph.edges
    with pytest.raises(ValueError, match="method weights: not known"):
        score_edges(edge_graph(model, offsets=True), task_of(model), "weights")
    with pytest.raises(ValueError, match="offsets of kernels do not go with groups"):
        edge_graph(model, groups=GROUPS["plain"], offsets=True)
    with pytest.raises(ValueError, match="more than 300 edges through offsets"):
        edge_graph(model, offsets=True, limit=300)
