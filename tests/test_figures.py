from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from circuits.attribution import attribute
from circuits.equivariance import Equivariance
from circuits.experiments.ablation import ablate
from circuits.figures import (
    ablation_figure,
    attribution_figure,
    circuit_figure,
    family_figure,
    kernels_figure,
    saliency_figure,
    save_figure,
    tuning_figure,
)
from circuits.figures.tunings import overlaid
from circuits.graph import CircuitGraph, UnitGroup, collapse
from circuits.models.adapter.hooked_model import HookedModel
from circuits.saliency import saliency_map
from circuits.units import Unit
from circuits.weights import incoming
from circuits.weights.graphs import build_graph


def colours(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)


def test_kernels_share_a_scale_with_zero_in_the_middle(
    branches: HookedModel, tmp_path: Path
) -> None:
    connections = incoming(branches, "cat:1", top=5)
    figure = kernels_figure(connections, "source", "cat:1")
    images = [axis.images[0] for axis in figure.axes if axis.images]
    limits = {image.get_clim() for image in images}
    largest = max(c.kernel.abs().max().item() for c in connections)
    assert limits == {(-largest, largest)}
    for image, connection in zip(images, connections, strict=False):
        np.testing.assert_array_equal(image.get_array(), connection.kernel.numpy())
    save_figure(figure, tmp_path / "k.png")
    assert len(np.unique(colours(tmp_path / "k.png"), axis=0)) > 50
    with pytest.raises(ValueError, match="nothing to draw"):
        kernels_figure([], "source")
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
        save_figure(figure, tmp_path / "k.pdf")
    assert not (tmp_path / "k.pdf").exists()


def test_a_circuit_is_drawn_from_the_bottom_up(branches: HookedModel, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "green.png")
    with build_graph(branches, tmp_path) as store:
        graph = store.neighbourhood("cat:1", hops=1, top=3)
    figure = circuit_figure(graph, {Unit("cat", 1): tmp_path / "green.png"}, "cat:1")
    texts = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert {"stem_relu", "cat", "out_relu", ":1"} <= set(texts)
    assert texts["stem_relu"][1] < texts["cat"][1] < texts["out_relu"][1]
    save_figure(figure, tmp_path / "c.png")
    green = np.abs(colours(tmp_path / "c.png") - [10, 200, 30]).sum(1) < 12
    assert green.sum() > 500, "the unit's picture is on its node"
    save_figure(figure, tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text().count("<image") >= graph.number_of_edges() - 3
    family = UnitGroup("stem", tuple(n for n in graph if n.site == "stem_relu"))
    together = circuit_figure(collapse(graph, [family]))
    assert any("stem\n(" in text.get_text() for text in together.axes[0].texts)
    with pytest.raises(ValueError, match="circuit is empty"):
        circuit_figure(CircuitGraph())


def test_a_family_matrix_shows_chance_beside_it() -> None:
    sums = np.array([[1.0, -2.0], [0.5, 0.25]])
    found = Equivariance(0.5, 0.01, 0.1, 0.75, 0.02, 0.2, 1, 99, 0, (3, 4), (5, 6), sums)
    figure = family_figure(found, "a from b")
    assert figure.axes[0].images[0].get_clim() == (-2.0, 2.0)
    title = figure.get_suptitle()
    assert "correlation with cos(angle between) 0.75, by chance 0 ± 0.20, p 0.02" in title
    assert "explained 0.50, by chance 0.10, p 0.01 (seed 0)" in title


def test_ablations_attributions_and_tunings_are_drawn(
    branches: HookedModel, tmp_path: Path
) -> None:
    x = branches.input.example(4)
    report = ablate(branches, ["cat:1"], x, labels=[0, 1, 2, 0], n_random=3)
    figure = ablation_figure(report)
    assert len(figure.axes) == len(report.effects)
    kl = figure.axes[list(report.effects).index("kl")]
    drawn = [c for c in kl.collections if len(c.get_offsets()) == 3]
    np.testing.assert_allclose(np.asarray(drawn[0].get_offsets())[:, 1], report.effects["kl"].null)
    made = attribute(branches, x, "top", "cat", check=0)
    bars = attribution_figure(made, torch.rand(4, 3, 8, 10), top=3)
    heights = [patch.get_height() for patch in bars.axes[0].patches]
    np.testing.assert_allclose(heights, [v for _, v in made.top(0, 3)], rtol=1e-5)
    heats = {m: saliency_map(branches, x, "top", m).heat() for m in ("gradient", "occlusion")}
    save_figure(saliency_figure(torch.rand(4, 3, 8, 10), heats), tmp_path / "s.png")
    assert len(np.unique(colours(tmp_path / "s.png"), axis=0)) > 50
    with pytest.raises(ValueError, match="nothing to draw"):
        tuning_figure([])


def test_overlays_are_red_for_and_blue_against() -> None:
    heat = np.zeros((4, 4))
    heat[0, 0], heat[3, 3] = 2.0, -2.0
    made = overlaid(np.full((4, 4, 3), 0.5), heat, limit=2.0)
    red, blue, rest = made[0, 0], made[3, 3], made[1, 1]
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    assert rest[0] == rest[1] == rest[2]
