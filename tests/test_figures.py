"""Figures show the numbers that they are made of, say what their axes are, and take text as text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from circuits.attribution import attribute
from circuits.effects import Prediction
from circuits.equivariance import Equivariance
from circuits.experiments.ablation import ablate
from circuits.faces import Face
from circuits.families import Family, Member
from circuits.figures import (
    ablation_figure,
    attribution_figure,
    charts,
    circuit_figure,
    families_figure,
    family_figure,
    figure_bytes,
    heat_map_figure,
    histogram_figure,
    invariance_figure,
    kernels_figure,
    layers_figure,
    losses_figure,
    map_picture,
    matrix_figure,
    predictions_figure,
    saliency_figure,
    sanity_figure,
    save_figure,
    spectrum_figure,
    tuning_figure,
)
from circuits.figures.tunings import overlaid
from circuits.graph import CircuitGraph, UnitGroup, collapse
from circuits.models.adapter.hooked_model import HookedModel
from circuits.saliency import saliency_map
from circuits.saliency.cards import MethodCard
from circuits.saliency.faithfulness import Curve, RoadResult, Sensitivity
from circuits.saliency.sanity import RandomizationTest, Stage
from circuits.store import TailFit, UnitStatistics
from circuits.store.spectra import Bin, Spectrum
from circuits.tuning import HeatMap, RadialTuning
from circuits.tuning.invariances import Invariance
from circuits.tuning.measures import measure_tuning
from circuits.units import Unit
from circuits.weights import Connection, incoming
from circuits.weights.graphs import build_graph
from tests.conftest import examples
from tests.specs import svg_texts, unlabelled, views

ODD = "<a href='http://a.example'>b</a> $x$ &amp;"


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


# --- kernels and families ------------------------------------------------------------------------


def test_kernels_share_a_scale_with_zero_in_the_middle(
    branches: HookedModel, tmp_path: Path
) -> None:
    connections = incoming(branches, "cat:1", top=5)
    figure = kernels_figure(connections, "source", "cat:1")
    drawn = views(figure, "rect")
    largest = max(c.kernel.abs().max().item() for c in connections)
    for view, connection in zip(drawn, connections, strict=True):
        scale = view.encoding["color"]["condition"]["scale"]["domain"]
        assert (scale[0], scale[5], scale[10]) == (-largest, 0, largest)
        assert view.values("value") == pytest.approx(connection.kernel.flatten().tolist())
    assert not unlabelled(figure)
    save_figure(figure, tmp_path / "k.png")
    assert len(np.unique(picture(tmp_path / "k.png"), axis=0)) > 50
    with pytest.raises(ValueError, match="nothing to draw"):
        kernels_figure([], "source")
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
        save_figure(figure, tmp_path / "k.pdf")
    assert not (tmp_path / "k.pdf").exists()


def test_names_above_kernels_do_not_run_into_each_other() -> None:
    site = "mixed4a_3x3_bottleneck_pre_relu"
    some = [
        Connection(Unit(site, 100 + i), Unit("b", 1), torch.ones(3, 3), "conv", (), 1.0)
        for i in range(8)
    ]
    lines = svg_texts(kernels_figure(some, "source"), "role-title")
    assert "".join(text for *_, text in lines[: len(lines) // 8]) == f"{site}:100"
    boxes = [(x, x + 6.6 * len(text), y) for x, y, text in lines]  # of a font 11 pixels high
    for i, (left, right, y) in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert abs(y - other[2]) > 9 or right <= other[0] or other[1] <= left


def test_a_matrix_has_its_first_row_on_top_and_a_map_is_a_picture() -> None:
    values = np.array([[0.5, -2.0], [0.0, 1.0]])
    (view,) = views(matrix_figure(values, "weight"))
    assert [(r["i"], r["j"], r["value"]) for r in view.rows][:2] == [(0, 0, 0.5), (0, 1, -2.0)]
    made = map_picture(values)
    assert made[1, 0].tolist() == [247, 247, 247], "zero is white"
    assert made[0, 1].tolist() == [5, 48, 97], "the largest of all is the end of its side"
    assert made[1, 1][0] > 180 > made[1, 1][2], "red above zero"


def test_a_family_matrix_shows_chance_next_to_it() -> None:
    sums = np.array([[1.0, -2.0], [0.5, 0.25]])
    found = Equivariance(0.5, 0.01, 0.1, 0.75, 0.02, 0.2, 1, 99, 0, (3, 4), (5, 6), sums)
    figure = family_figure(found, "a from b")
    (view,) = views(figure)
    assert view.values("value") == [1.0, -2.0, 0.5, 0.25]
    assert [(r["row"], r["column"]) for r in view.rows][1] == ("3", "6")
    title = " ".join(figure.to_dict()["title"]["text"])
    assert "correlation with cos(angle between) 0.75, by chance 0 ± 0.20, p 0.02" in title
    assert "explained 0.50, by chance 0.10, p 0.01 (seed 0)" in title


def test_families_are_drawn_by_phase() -> None:
    members = tuple(Member(90.0 * i, Unit("curve", i), 0.9) for i in range(4))
    family = Family(
        "", "curve", "rotation", 360.0, members, 0.9, 0.01, "shuffled", 99, "h", "photos", 0
    )
    figure = families_figure([family, replace(family, name=ODD)], "t")
    dots, names = views(figure)
    assert dots.values("phase") == [0.0, 90.0, 180.0, 270.0] * 2
    assert set(dots.values("family")) == {"curve 0", ODD}
    assert names.values("index") == [0, 1, 2, 3] * 2
    assert dots.encoding["x"]["title"] == "preferred angle, degrees"
    with pytest.raises(ValueError, match="nothing to draw"):
        families_figure([])


# --- circuits ------------------------------------------------------------------------------------


def test_a_circuit_is_drawn_from_the_bottom_up(branches: HookedModel, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "green.png")
    with build_graph(branches, tmp_path) as store:
        graph = store.neighbourhood("cat:1", hops=1, top=3)
    figure = circuit_figure(
        graph, {Unit("cat", 1): Face("visualization", "green", tmp_path / "green.png")}, "cat:1"
    )
    texts = [v for v in views(figure, "text") if "site" in v.rows[0]]
    height = {r["site"]: r["y"] for r in texts[0].rows}
    assert height["stem_relu"] < height["cat"] < height["out_relu"]
    save_figure(figure, tmp_path / "c.png")
    green = np.abs(picture(tmp_path / "c.png") - [10, 200, 30]).sum(1) < 12
    assert green.sum() > 500, "the unit's picture is on its node"
    assert figure_bytes(figure, "svg").count(b"<image") >= graph.number_of_edges() - 3
    family = UnitGroup("stem $<b>", tuple(n for n in graph if n.site == "stem_relu"))
    shown = views(circuit_figure(collapse(graph, [family])), "text")
    assert any(
        f"stem $<b>\n({len(family.units)} units)" in v.values("label")
        for v in shown
        if "label" in v.rows[0]
    )
    with pytest.raises(ValueError, match="circuit is empty"):
        circuit_figure(CircuitGraph())


def test_layers_are_in_the_models_order(branches: HookedModel, tmp_path: Path) -> None:
    with build_graph(branches, tmp_path) as store:
        known = list(store.sites)
        units = [Unit(site, 0) for site in known]
        graph = store.subgraph(units[::-1])
    graph.remove_edges_from(list(graph.edges(keys=True)))
    assert graph.sites() == known, "also where no edge says so"
    (names,) = (v for v in views(circuit_figure(graph), "text") if "site" in v.rows[0])
    assert [r["site"] for r in sorted(names.rows, key=lambda r: r["y"])] == known
    loose = CircuitGraph()
    loose.add_nodes_from([Unit("blocks.10", 0), Unit("blocks.2", 0)])
    assert loose.sites() == ["blocks.2", "blocks.10"], (
        "by number where the model's order is unknown"
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [("weight", ("excites", "inhibits")), ("attribution", ("adds to the target", "takes from the target"))],
)  # fmt: skip
def test_a_legend_says_what_edges_mean(kind: str, words: tuple[str, str]) -> None:
    graph = CircuitGraph()
    graph.connect(Unit("a", 0), Unit("b", 0), kind, sum=2.0)
    graph.connect(Unit("a", 1), Unit("b", 0), kind, sum=-1.0)
    graph.connect(Unit("a", 2), Unit("b", 0), kind, sum=0.0)
    (edges,) = views(circuit_figure(graph), "line")
    assert edges.encoding["color"]["scale"]["domain"] == [*words, "sums to zero"]
    assert {r["sum"]: r["sign"] for r in edges.rows} == {
        2.0: words[0],
        -1.0: words[1],
        0.0: "sums to zero",
    }
    assert {r["sum"]: r["width"] for r in edges.rows} == {2.0: 1.0, -1.0: 0.5, 0.0: 0.0}
    texts = [text for *_, text in svg_texts(circuit_figure(graph))]
    assert set(words) <= set(texts)


@settings(max_examples=examples(40))
@given(st.integers(0, 10**6))
def test_no_edge_runs_through_a_node(seed: int) -> None:
    """Sampled along each edge: no point is in the square of a node that the edge does not belong to."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 9, generator.integers(2, 6))
    nodes = [Unit(f"s{layer}", int(i)) for layer, n in enumerate(sizes) for i in range(n)]
    graph = CircuitGraph()
    graph.add_nodes_from(nodes)
    for _ in range(12):
        a, b = sorted(generator.choice(len(nodes), 2, replace=False).tolist())
        graph.connect(nodes[a], nodes[b], "weight", sum=float(generator.normal()))
    drawn = views(circuit_figure(graph))
    places = {r["name"]: (r["x"], r["y"]) for v in drawn if v.mark == "point" for r in v.rows}
    assert len(places) == len(nodes)
    (edges,) = (v for v in drawn if v.mark == "line")
    for number in {r["edge"] for r in edges.rows}:
        way = [r for r in edges.rows if r["edge"] == number]
        points = np.array([(r["x"], r["y"]) for r in way])
        ends = way[0]["between"].split(" → ")
        assert points[0].tolist() == list(places[ends[0]])
        assert points[-1].tolist() == list(places[ends[1]])
        t = np.linspace(0, 1, 60)[:, None]
        along = np.concatenate([p + t * (q - p) for p, q in pairwise(points)])
        for name, place in places.items():
            if name not in ends:
                assert (np.abs(along - place).max(1) > 0.31 - 1e-9).all(), (
                    f"{ends} runs through {name}"
                )


# --- tuning --------------------------------------------------------------------------------------


def tuning(unit: int, scale: float = 1.0) -> RadialTuning:
    angles = np.arange(0, 360, 30.0)
    curves = scale * np.stack([np.exp(np.cos(np.radians(angles - 90))), np.ones(12)])
    measures = measure_tuning(angles, curves)
    return RadialTuning(
        Unit("a", unit), "curve", angles, curves, 10.0, measures, float("nan"), 64, "m", "h", "", 0
    )


def test_tuning_has_a_panel_for_each_unit_and_a_line_for_each_run() -> None:
    one = tuning(1)
    figure = tuning_figure({"intact": [one], "edited": [tuning(1, 2.0)]})
    area, line = views(figure, "area")[0], views(figure, "line")[0]
    assert line.values("response") == pytest.approx([*one.mean, *(2 * one.mean)])
    assert area.values("low")[:12] == pytest.approx(one.curves.min(0))
    assert line.encoding["color"]["scale"]["domain"] == ["intact", "edited"]
    assert not unlabelled(figure)
    several = tuning_figure([tuning(1), tuning(2), tuning(3)], "t")
    assert len({v.panel for v in views(several)}) == 4, "all of them together at the end"
    assert not unlabelled(several)
    with pytest.raises(ValueError, match="nothing to draw"):
        tuning_figure([])


def test_what_is_compared_has_the_same_axes() -> None:
    pair = [tuning(1), tuning(2, 5.0)]
    scales = [
        views(tuning_figure([t], compared_with=pair), "line")[0].encoding["y"]["scale"]
        for t in pair
    ]
    assert scales[0] == scales[1]
    assert scales[0]["domain"][1] == pytest.approx(pair[1].curves.max())
    some = [
        statistics([0.0, 1.0, 2.0], [1, 5, 0, 10]),
        statistics([-4.0, 0.0, 4.0], [1, 5, 0, 1000]),
    ]
    axes = []
    for s in some:
        bars = views(histogram_figure(s, some), "bar")[0]
        axes.append([bars.encoding[c]["scale"]["domain"] for c in ("x", "y")])
    assert axes[0] == axes[1] == [[-8.0, 8.0], [0.5, 1200.0]]


def test_heat_maps_have_the_smallest_curve_on_top_and_their_unit() -> None:
    found = HeatMap(
        Unit("a", 1), np.array([0.0, 90.0]), np.array([0.0, 0.1]), np.array([[1.0, 2.0], [3.0, 4.0]]), float("nan"),
        float("nan"), 64, "m", "h", "",
    )  # fmt: skip
    (view,) = views(heat_map_figure([found]))
    assert view.values("value") == [3.0, 4.0, 1.0, 2.0]
    assert view.values("row") == ["10", "10", "line", "line"]
    figure = heat_map_figure([found, replace(found, deviation=0.5, mean=2.0)])
    assert [v.encoding["tooltip"][2]["title"] for v in views(figure)] == [
        "activation",
        "standard deviations from the mean",
    ]
    assert views(figure)[1].values("value") == [2.0, 4.0, -2.0, 0.0]
    assert not unlabelled(figure)


def test_the_aspects_of_a_unit_have_one_scale() -> None:
    some = [
        Invariance(Unit("a", 1), "contrast", (-1.0, 1.0), np.array([1.0, 8.0]), np.array([0.0, 0.5]), 0.1, "h"),
        Invariance(Unit("a", 1), "colour", (0.0, 120.0), np.array([2.0, 3.0]), np.array([0.0, 0.0]), 0.1, "h"),
    ]  # fmt: skip
    figure = invariance_figure(some)
    drawn = views(figure, "line")
    assert [v.encoding["y"]["scale"]["domain"] for v in drawn] == [[0.0, 8.0]] * 2
    assert [v.encoding["x"]["title"] for v in drawn][1] == "hue, degrees"
    assert drawn[0].values("response") == [1.0, 8.0, 0.0, 0.5]


def test_layers_are_drawn_by_angle() -> None:
    family = ("line", np.array([90.0, 0.0, 45.0]), np.array([3.0, 1.0, 2.0]))
    figure = layers_figure({"one": [family, (ODD, *family[1:])], "two": [family]}, at=400.0)
    line = views(figure, "line")[0]
    assert line.values("angle")[:3] == [0.0, 45.0, 90.0]
    assert line.values("response")[:3] == [1.0, 2.0, 3.0]
    assert line.encoding["strokeDash"]["scale"]["domain"] == ["line", ODD]
    assert {r["angle"] for v in views(figure, "rule") for r in v.rows} == {40.0}
    assert not unlabelled(figure)


# --- activations ---------------------------------------------------------------------------------


def statistics(edges: list[float], counts: list[int], rate: float = float("nan")) -> UnitStatistics:
    tail = TailFit(1.0, rate, 0.1, 0.05, 100, 0.1)
    return UnitStatistics(
        mean=0.0, std=1.0, skewness=0.0, kurtosis=3.0, minimum=-1.0, maximum=3.0, density=0.5, count=8,
        nonfinite=0, edges=np.array(edges), histogram=np.array(counts), tail=tail,
    )  # fmt: skip


def test_a_histogram_shows_every_count() -> None:
    figure = histogram_figure(statistics([0.0, 1.0, 2.0], [1, 5, 0, 1000], 2.0))
    bars, tail, zero = views(figure)
    assert [(r["low"], r["high"], r["positions"], r["activation"]) for r in bars.rows] == [
        (-1.0, 0.0, 1, "below 0"), (0.0, 1.0, 5, "0 to 1"), (2.0, 3.0, 1000, "above 2"),
    ]  # fmt: skip
    assert bars.encoding["y"]["scale"]["type"] == "log"
    assert [(r["low"], r["positions"]) for r in tail.rows] == [
        (1.0, pytest.approx(100 * (1 - np.exp(-2.0))))
    ]
    assert zero.values("low") == [0]
    assert not unlabelled(figure)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_histogram_of_any_scale(scale: float) -> None:
    """And where nothing was counted, and no tail could be fitted."""
    drawn = figure_bytes(histogram_figure(statistics([0.0, scale, 2 * scale], [0, 0, 0, 0])), "svg")
    assert b"NaN" not in drawn


def test_a_spectrum_has_its_examples_below_their_bins() -> None:
    bins = tuple(Bin(float(a), a + 1.0, 0.5 / (a + 1), 2, 0.1, 1, ()) for a in range(3))
    found = Spectrum(
        Unit("a", 1), statistics([0.0, 1.0, 2.0], [1, 5, 0, 10], 2.0), bins, 0.4, "d", "h", 0
    )
    crop = Image.new("RGB", (4, 4), (1, 2, 3))
    figure = spectrum_figure(found, {2: [crop, crop]})
    (images,) = views(figure, "image")
    assert images.values("middle") == [2.5, 2.5]
    assert pixels(images.rows[0]["url"])[0, 0].tolist() == [1, 2, 3]
    domains = {
        tuple(v.encoding["x"]["scale"]["domain"])
        for v in views(figure)
        if "scale" in v.encoding["x"]
    }
    assert domains == {(0.0, 3.0)}, "all share the axis"
    assert views(figure, "bar")[0].values("density") == [0.5, 0.25, pytest.approx(0.5 / 3)]
    assert not unlabelled(figure)


# --- predictions, edits, attributions ------------------------------------------------------------


def test_predictions_are_side_by_side_and_names_are_text() -> None:
    before, after = [Prediction(3, ODD, 0.75)], [Prediction(3, ODD, 0.25)]
    figure = predictions_figure({"intact": before, "a:1 removed": after})
    (bars,) = views(figure)
    assert [(r["run"], r["probability"]) for r in bars.rows] == [
        ("intact", 0.75),
        ("a:1 removed", 0.25),
    ]
    assert set(bars.values("output")) == {ODD}
    assert any(text.startswith("<a href=") for *_, text in svg_texts(figure)), "as it is written"
    assert b"<a " not in figure_bytes(figure, "svg")
    cranes = predictions_figure(
        {"intact": [Prediction(1, "crane", 0.5), Prediction(2, "crane", 0.25)]}
    )
    assert views(cranes)[0].values("output") == ["crane (1)", "crane (2)"]


def test_losses_are_in_nats_by_token_also_where_a_token_comes_twice() -> None:
    words = ["<s>", "b", "<s>"]
    figure = losses_figure(
        {"intact": np.array([1.0, 2.0, 3.0]), "edited": np.array([3.0, 4.0, 5.0])}, words
    )
    line = views(figure, "line")[0]
    assert line.encoding["y"]["title"] == "loss, nats"
    assert line.values("loss") == [1.0, 2.0, 3.0, 3.0, 4.0, 5.0]
    assert [text for *_, text in svg_texts(figure) if text in ("<s>", "b")] == words


def test_ablations_attributions_and_overlays_are_drawn(
    branches: HookedModel, tmp_path: Path
) -> None:
    x = branches.input.example(4)
    report = ablate(branches, ["cat:1"], x, labels=[0, 1, 2, 0], n_random=3)
    figure = ablation_figure(report)
    assert len({v.panel for v in views(figure)}) == len(report.effects)
    assert not unlabelled(figure)
    at = list(report.effects).index("kl")
    points = {v.rows[0]["what"]: v for v in views(figure, "point") if v.panel == at}
    own, null = points["changed"], points["random"]
    effect = report.effects["kl"]
    assert null.values("change") == pytest.approx(list(effect.null))
    assert (own.rows[0]["change"], own.rows[0]["low"]) == pytest.approx((effect.change, effect.low))
    assert own.encoding["x"]["title"] == "change, nats"
    made = attribute(branches, x, "top", "cat", check=0)
    bars = attribution_figure(made, torch.rand(4, 3, 8, 10), top=3)
    assert views(bars, "bar")[0].values("share") == pytest.approx(
        [v for _, v in made.top(0, 3)], rel=1e-5
    )
    assert len(views(bars, "image")) == 4
    assert not unlabelled(bars)
    heats = {m: saliency_map(branches, x, "top", m).heat() for m in ("gradient", "occlusion")}
    grid = saliency_figure(torch.rand(4, 3, 8, 10), heats, [ODD, "b", "c", "d"])
    (images,) = views(grid)
    assert len(images.rows) == 12
    assert not unlabelled(grid)
    save_figure(grid, tmp_path / "s.png")
    assert len(np.unique(picture(tmp_path / "s.png"), axis=0)) > 50


def card() -> MethodCard:
    stage = Stage(1, "conv", 0.5, 0.4, 0.3)
    test = RandomizationTest("gradient", "cascading", (stage,), stage, 0.2, True, "h", {}, 0)
    curves = tuple(
        Curve(kind, "zero", (0.0, 1.0), values, (0.5, 0.5), 1.0, 0.5, 0.1, 0.2)
        for kind, values in (("insertion", (0.0, 9.0)), ("deletion", (7.0, -1.0)))
    )
    verdicts: Mapping[str, str] = {
        "randomisation": "passes",
        "insertion": "passes",
        "deletion": "unclear",
    }
    road, sensitivity = object.__new__(RoadResult), object.__new__(Sensitivity)
    return MethodCard(
        "gradient",
        {},
        test,
        curves,
        road,
        sensitivity,
        (0.1, 0.2),
        verdicts,
        "top",
        "m",
        "h",
        {},
        0,
    )


def test_insertion_and_deletion_have_the_same_axis() -> None:
    figure = sanity_figure([card()])
    likeness, insertion, deletion = views(figure, "line")
    assert (
        insertion.encoding["y"]["scale"]["domain"]
        == deletion.encoding["y"]["scale"]["domain"]
        == [-1.0, 9.0]
    )
    assert [r["likeness"] for r in likeness.rows if r["run"] == "SSIM" and r["kind"] == "maps"] == [
        1.0,
        0.3,
    ]
    assert not unlabelled(figure)
    with pytest.raises(ValueError, match="nothing to draw"):
        sanity_figure([])


def test_overlays_are_red_for_and_blue_against() -> None:
    heat = np.zeros((4, 4))
    heat[0, 0], heat[3, 3] = 2.0, -2.0
    made = overlaid(np.full((4, 4, 3), 0.5), heat, limit=2.0)
    red, blue, rest = made[0, 0], made[3, 3], made[1, 1]
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    assert rest[0] == rest[1] == rest[2]


# --- parts ---------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    shares = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("colour", [*charts.PALETTE, charts.GREY])
@pytest.mark.parametrize("page", ["#ffffff", "#0e1117"])
def test_colours_are_seen_in_light_and_dark(colour: str, page: str) -> None:
    """The contrast that WCAG defines; 2.8 is near the 3 that it asks of graphics, and all colours are told apart."""
    light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 2.8


def test_a_large_matrix_is_one_image_on_the_same_axes() -> None:
    matrix = np.random.default_rng(0).random((150, 150))
    matrix[0, 0] = np.nan
    drawn = charts.cells(
        matrix, charts.rising("share"), rows=["r"] * 150, columns=["c"] * 150, y="rows", x="columns"
    )
    image, axes = views(drawn)
    paint = pixels(image.rows[0]["url"])
    assert paint.shape == (150, 150, 3)
    assert paint[0, 0].tolist() == [136, 136, 136], "no number: grey"
    blues = [247, 222, 198, 158, 107, 66, 33, 8, 8]
    red = np.interp(matrix[3, 7], np.linspace(0, 1, 9), blues)
    assert paint[3, 7, 0] == pytest.approx(red, abs=1)
    assert {r["i"] for r in axes.rows} == set(range(150))
    assert not unlabelled(drawn)
