"""`circuits tune`, `examples`, `ablate`, `attribute`, `saliency` and `sanity`."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from circuits.attribution import Attribution
from circuits.cli.choosing import units_of
from circuits.cli.main import run
from circuits.graph.store import GraphStore
from circuits.models.zoo.loading import load_model
from circuits.tuning import CurveUnit, RadialTuning
from circuits.workspace import Workspace
from tests.commands import given, is_picture, output, put, refused, said


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "ws"))
    return tmp_path / "ws"


def test_units_are_listed_in_short() -> None:
    model = load_model("shapes")
    found = units_of(model, "mixed3b:1,5-7 conv2d0:2")
    assert [str(u) for u in found] == [
        "mixed3b:1", "mixed3b:5", "mixed3b:6", "mixed3b:7", "conv2d0:2"
    ]  # fmt: skip
    assert len(units_of(model, "conv2d0")) == model.site("conv2d0").n_units
    for text, message in (
        ("mixed3b:9-5", "runs backwards"),
        ("mixed3b:x", "SITE:1,2,5-9"),
        ("", "name none"),
        ("mixed3b:99999", "does not exist"),
        ("mixed3b:0-99999999999", "more than 1000000 units"),
    ):
        with pytest.raises(ValueError, match=message):
            units_of(model, text)


# --- tune and examples -----------------------------------------------------------------------------

COARSE = ("--step", "30", "--radius", "8", "--size", "48")


def test_tune(capsys, workspace: Path, tmp_path: Path) -> None:
    figure = tmp_path / "t.png"
    found = output(capsys, "tune", "shapes", "mixed3b:200,201", *COARSE, "--figure", str(figure))
    assert [t["unit"] for t in found] == ["mixed3b:200", "mixed3b:201"]
    assert len(found[0]["angles"]) == 12
    assert is_picture(figure)


def test_what_tune_asks_for() -> None:
    common = ("tune", "shapes", "mixed3b:200,201")
    plain = given("tuning.tuning.radial_tuning", *common, "--shape", "line", *COARSE, "--seed", "3")
    assert [str(u) for u in plain["units"]] == ["mixed3b:200", "mixed3b:201"]
    asked = {
        "shape": "line",
        "step": 30.0,
        "radii": [8.0],
        "size": 48,
        "seed": 3,
        "deviations": None,
    }
    assert {k: plain[k] for k in asked} == asked
    assert given("tuning.tuning.radial_tuning", *common)["step"] == 1.0
    heat = given("tuning.tuning.heat_map", *common, "--heat-map")
    assert (heat["step"], heat["size"], heat["statistics"]) == (10.0, None, None)
    assert given("tuning.tuning.radial_tuning", *common, "--aspects")["step"] == 1.0
    found = given("tuning.tuning.find_curve_units", *common, "--find")
    assert (found["site"], found["units"], found["step"]) == ("mixed3b", [200, 201], 5.0)


@pytest.fixture(scope="module")
def tunings() -> list[RadialTuning]:
    """Of two units, as the library makes them."""
    from circuits.tuning import radial_tuning

    model = load_model("shapes")
    return radial_tuning(model, ["mixed3b:200", "mixed3b:201"], step=45.0, radii=[8.0], size=48)


def test_tunings_are_shown(
    capsys, workspace: Path, monkeypatch: pytest.MonkeyPatch, tunings: list[RadialTuning]
) -> None:
    put(monkeypatch, "tuning.tuning.radial_tuning", lambda *a, **k: tunings)
    told = said(capsys, "tune", "shapes", "mixed3b:200,201")
    assert "mixed3b:201" in told
    assert "no harvest of this site" in told
    assert "together: at every angle" in told
    known = [replace(t, deviation=2.0, data="shapes") for t in tunings]
    put(monkeypatch, "tuning.tuning.radial_tuning", lambda *a, **k: known)
    assert "standard deviations are of shapes" in said(capsys, "tune", "shapes", "mixed3b:200")


def test_curve_units_are_shown_compared_with_shuffled_weights(
    capsys, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tunings: list[RadialTuning]
) -> None:  # fmt: skip
    good, bad = (
        CurveUnit(tunings[0], 1.0, 1.0, True, ""),
        CurveUnit(tunings[1], 1.0, 1.0, False, "too weak"),
    )
    answers = iter([[good, bad], [bad, bad]] * 2)
    put(monkeypatch, "tuning.tuning.find_curve_units", lambda *a, **k: next(answers))
    figure = tmp_path / "f.png"
    told = said(capsys, "tune", "shapes", "mixed3b:200,201", "--find", "--figure", str(figure))
    assert "1 curve units among 2 of mixed3b" in told
    assert "not: 1 too weak" in told
    assert "with shuffled weights: 0" in told
    assert is_picture(figure)
    found = output(capsys, "tune", "shapes", "mixed3b:200,201", "--find")
    assert (len(found["units"]), found["in_shuffled_weights"]) == (2, 0)
    assert found["largest_gap"] == pytest.approx(360)


def test_heat_maps_and_aspects_are_shown(capsys, workspace: Path, tmp_path: Path) -> None:
    figure, unit = tmp_path / "h.png", "mixed3b:200"
    size = ("--size", "32")
    heat = output(
        capsys, "tune", "shapes", unit, "--heat-map", "--step", "90", *size, "--figure", str(figure)
    )
    assert len(heat[0]["responses"][0]) == 4
    assert is_picture(figure)
    aspects = output(
        capsys, "tune", "shapes", unit, "--aspects", "--step", "90", "--radius", "8", *size
    )
    assert {a["aspect"] for a in aspects} == {"contrast", "colour", "fill", "thickness", "corner"}
    told = said(capsys, "tune", "shapes", unit, "--aspects", "--step", "90", "--radius", "8", *size)
    assert "at the opposite angle" in told
    assert "--figure PATH draws" in said(
        capsys, "tune", "shapes", unit, "--heat-map", "--step", "90", *size
    )


def test_examples_and_deviations_from_a_harvest(capsys, workspace: Path, tmp_path: Path) -> None:
    refused(capsys, "run `circuits harvest shapes", "examples", "shapes", "mixed3b:200")
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(images / f"{i}.png")
    data = f"folder:{images}"
    output(capsys, "harvest", "shapes", "--data", data, "--sites", "mixed3b")
    figure = tmp_path / "s.png"
    common = ("examples", "shapes", "mixed3b:200")
    found = output(
        capsys, *common, "--bins", "32", "--each", "1", "--overlay", "--figure", str(figure)
    )
    assert 2 <= len(found["bins"]) <= 32
    assert all(a["high"] == b["low"] for a, b in pairwise(found["bins"]))
    assert is_picture(figure)
    assert "tail falls by" in said(capsys, *common)
    asked = given("tuning.tuning.radial_tuning", "tune", "shapes", "mixed3b:200")
    assert asked["data"] == data
    assert len(asked["deviations"]) == 1
    refused(capsys, "no finished harvest", "tune", "shapes", "mixed3b:200", "--data", "photos")


# --- ablate ----------------------------------------------------------------------------------------


def test_what_ablate_asks_for() -> None:
    asked = given(
        "ablating.ablation.ablate", "ablate", "shapes", "mixed3a:1-4", "--data", "shapes", "--labels", "names",
        "--limit", "40", "--how", "mean", "--random", "3", "--pool", "mixed3a:10-12", "--later", "mixed3b",
        "--seed", "2",
    )  # fmt: skip
    assert [u.index for u in asked["units"]] == [1, 2, 3, 4]
    assert [u.index for u in asked["pool"]] == [10, 11, 12]
    expected = {"how": "mean", "n_random": 3, "later": "mixed3b", "seed": 2}
    assert {k: asked[k] for k in expected} == expected
    assert asked["task"].describe()["examples"]["chosen"] == "40 of 400, spread evenly (seed 2)"
    assert given("ablating.ablation.ablate", "ablate", "shapes", "mixed3a:1")["n_random"] == 99


def test_ablate(capsys, workspace: Path, tmp_path: Path) -> None:
    figure = tmp_path / "a.png"
    command = (
        "ablate",
        "induction-by-hand",
        "blocks.1.attn.hook_z:0",
        "--limit",
        "8",
        "--random",
        "19",
    )
    found = output(capsys, *command, "--how", "mean", "--figure", str(figure))
    assert len(found["effects"]["accuracy"]["null"]) == 19
    assert is_picture(figure)
    told = said(capsys, *command, "--how", "mean")
    assert "repeats: 8" in told
    assert "null: 19 " in told
    assert "smallest possible p: 0.05" in told


# --- attribute, saliency, sanity -------------------------------------------------------------------


def test_what_attribute_asks_for() -> None:
    asked = given(
        "attributing.attribution.attribute", "attribute", "shapes", "mixed3b", "--data", "shapes", "--limit", "2",
        "--target", "class:circle", "--method", "integrated_gradients", "--baseline", "mean", "--steps", "7",
        "--rule", "gamma", "--check", "3", "--batch", "5", "--seed", "1",
    )  # fmt: skip
    expected = {
        "site": "mixed3b", "method": "integrated_gradients", "baseline": "mean", "steps": 7, "rule": "gamma",
        "check": 3, "batch": 5, "seed": 1, "size": "keep",
    }  # fmt: skip
    assert {k: asked[k] for k in expected} == expected
    assert str(asked["target"]).startswith("logits:")
    assert len(asked["examples"]) == 2


def test_attribute(capsys, workspace: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "a.safetensors", tmp_path / "a.svg"
    assert run(["graph", "build", "shapes"]) == 0
    capsys.readouterr()
    found = output(
        capsys, "attribute", "shapes", "mixed3b", "--data", "shapes", "--limit", "2", "--target", "class:circle",
        "--method", "relevance", "--groups", "2", "--save", "circle", "--out", str(out), "--figure", str(figure),
    )  # fmt: skip
    assert found["check"]["correlation"] > 0.5
    assert max(map(abs, found["residual"])) < 1e-3
    assert [len(example["groups"]) for example in found["groups"]] == [2, 2]
    assert figure.read_text().startswith("<svg")
    model = load_model("shapes")
    assert Attribution.load(out).units().shape == (2, model.site("mixed3b").n_units)
    with GraphStore(Workspace(workspace).model_folder(model.hash)) as graph:
        assert "attribution" in {block.kind for block in graph.blocks}


def test_attributions_are_shown(capsys) -> None:
    parts = output(capsys, "attribute", "induction", "--direct", "--limit", "2")
    for example in parts["by_example"]:
        assert sum(example["values"]) == pytest.approx(example["logit"], abs=1e-3)
    assert "and 1 more examples" in said(
        capsys, "attribute", "induction", "--direct", "--limit", "9"
    )
    told = said(
        capsys, "attribute", "induction", "blocks.1.attn.hook_z", "--text", "0 1 2 3 1 2", "--limit", "1"
    )  # fmt: skip
    assert "rank correlation with ablation" in told


def test_what_saliency_asks_for() -> None:
    common = ("saliency", "shapes", "--data", "shapes", "--limit", "1")
    asked = given(
        "saliency.methods.saliency_map",
        *common,
        "--method",
        "smoothgrad",
        "--option",
        "samples=4",
        "--seed",
        "5",
    )
    expected = {
        "method": "smoothgrad",
        "options": {"samples": 4},
        "seed": 5,
        "batch": 32,
        "size": "keep",
    }
    assert {k: asked[k] for k in expected} == expected
    assert "site" not in asked
    cam = given(
        "saliency.methods.saliency_map", *common, "--method", "grad_cam", "--site", "mixed3a"
    )
    assert cam["site"] == "mixed3a"


def test_saliency(capsys, workspace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (90, 70), "red").save(picture)
    figure, out = tmp_path / "f.png", tmp_path / "o.safetensors"
    found = output(
        capsys, "saliency", "shapes", "--image", str(picture), "--method", "gradient", "--method", "grad_cam",
        "--figure", str(figure),
    )  # fmt: skip
    assert found["agreement"]["methods"] == ["gradient", "grad_cam"]
    assert is_picture(figure)
    made = output(
        capsys, "saliency", "shapes", "--data", "shapes", "--limit", "1", "--target", "mixed3b:200@3,3",
        "--method", "smoothgrad", "--option", "samples=2", "--out", str(out),
    )  # fmt: skip
    assert made["methods"][0]["settings"] == {"samples": 2, "noise": 0.15}
    assert Attribution.load(out).target == "mixed3b:200@3,3"
    masks = output(
        capsys,
        "saliency",
        "shapes",
        "--data",
        "shapes",
        "--limit",
        "1",
        "--method",
        "extremal",
        "--option",
        "steps=2",
    )
    assert masks["methods"][0]["examples"][0]["found"]["area"] > 0
    told = said(
        capsys, "saliency", "shapes", "--data", "shapes", "--limit", "1", "--method", "gradient"
    )
    assert "--figure PATH draws the maps" in told


def test_what_sanity_asks_for() -> None:
    asked = given(
        "saliency.methods.card", "sanity", "shapes", "--data", "shapes", "--limit", "4", "--method", "smoothgrad",
        "--stages", "2", "--faithful", "2", "--target", "class:circle", "--option", "samples=3",
    )  # fmt: skip
    expected = {
        "method": "smoothgrad",
        "stages": 2,
        "faithful": 2,
        "options": {"samples": 3},
        "target": "class:circle",
    }
    assert {k: asked[k] for k in expected} == expected


def test_cards_are_shown_and_saved(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = tuple(
        SimpleNamespace(kind=kind, area=0.5, area_random=0.25) for kind in ("insertion", "deletion")
    )
    made = SimpleNamespace(
        method="gradient", verdicts={"randomisation": "passes"}, randomization=SimpleNamespace(kept=0.1), curves=curves,
        road=SimpleNamespace(score=0.2), sensitivity=SimpleNamespace(correlations=(0.1, 0.3), random=(0.0, 0.05)),
        infidelity=(0.5, 1.0), to_dict=lambda: {"method": "gradient"},
    )  # fmt: skip
    put(monkeypatch, "saliency.methods.card", lambda *a, **k: made)
    out = tmp_path / "cards.json"
    assert run(["sanity", "shapes", "--limit", "4", "--method", "gradient", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "0.5 (0.25)" in captured.out
    assert "0.30 (0.05)" in captured.out
    assert "verdicts are steadier on thirty or more" in captured.err
    assert json.loads(out.read_text()) == [{"method": "gradient"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "shapes", "mixed3b:9999"], "unit mixed3b:9999 does not exist"),
        (["tune", "shapes", "mixed3b:1", "--step", "7"], "step 7.0 must divide 360"),
        (["tune", "shapes", "mixed3b:1", "--find", "--heat-map"], "expected one of them"),
        (["tune", "induction", "hook_embed:1"], "takes no photographs"),
        (["examples", "shapes", "nowhere:1"], "unknown site"),
        (["ablate", "shapes", "mixed3b:1", "--data", "shapes", "--labels", "/nowhere.json"], "does not exist"),
        (["ablate", "shapes", "mixed3b:1", "--labels", "names"], "--labels 'names' goes with --data"),
        (["ablate", "shapes", "mixed3b:1", "--task", "shapes", "--data", "photos"], "has its own examples"),
        (["ablate", "shapes", "mixed3b:1", "--metric", "beauty"], "unknown metric 'beauty'"),
        (["ablate", "induction", "blocks.0.attn.hook_z:0", "--data", "repeats", "--labels", "names"], "next token"),
        (["ablate", "shapes", "mixed3b:1", "--data", "photos", "--text", "a"], "does not go with --text"),
        (["ablate", "shapes", "mixed3b:1,1"], "is listed twice"),
        (["ablate", "shapes", "mixed3b:1", "--limit", "0"], "'--limit': 0 must be 1 to 1000000"),
        (["attribute", "shapes"], "site '' is missing"),
        (["attribute", "shapes", "mixed3b", "--target", "class:elephant"], "unknown class of shapes 'elephant'"),
        (["attribute", "shapes", "mixed3b", "--target", "class:999"], "out of range"),
        (["attribute", "shapes", "mixed3b", "--target", "conv2d0:1"], "no gradient leads"),
        (["attribute", "shapes", "mixed3b", "--text", "a"], "takes images"),
        (["attribute", "shapes", "mixed3b", "--out", "a.npz"], "must end in .safetensors"),
        (["attribute", "shapes", "mixed3b", "--limit", "1", "--target", "class:0", "--save", "x"], "graph build"),
        (["attribute", "shapes", "--direct"], "has no residual stream"),
        (["saliency", "shapes", "--image", "/nowhere.png"], "does not exist"),
        (["saliency", "shapes", "--method", "magic"], "method 'magic' is not one of"),
        (["saliency", "shapes", "--option", "samples"], "NAME=VALUE"),
        (["saliency", "shapes", "--option", "colour=3"], "has no option 'colour'"),
        (["saliency", "shapes", "--method", "occlusion", "--option", "window=999"], "window 999 must be"),
        (["saliency", "induction"], "takes tokens"),
        (["sanity", "shapes", "--stages", "3"], "stages 3 must be even"),
        (["sanity", "shapes", "--limit", "1"], "expected at least two"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(capsys, workspace: Path, arguments: list[str], message: str) -> None:
    refused(capsys, message, *arguments)
    assert not workspace.exists()
