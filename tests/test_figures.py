from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from circuits.equivariance import Equivariance
from circuits.figures import circuit_figure, family_figure, kernels_figure, save_figure
from circuits.graph import CircuitGraph, UnitGroup, collapse
from circuits.models.adapter import HookedModel
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
