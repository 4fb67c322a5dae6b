from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from circuits.attribution import Attribution
from circuits.cli.choosing import units_of
from circuits.cli.main import run
from circuits.graph.store import GraphStore
from circuits.models.zoo.loading import load_model
from circuits.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "ws"))
    return tmp_path / "ws"


def output(capsys, *arguments: str):
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return min(image.size) > 100


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


def test_tune(capsys, workspace: Path, tmp_path: Path) -> None:
    figure = tmp_path / "t.png"
    found = output(
        capsys, "tune", "shapes", "mixed3b:200,201", "--step", "15", "--figure", str(figure)
    )
    assert [t["unit"] for t in found] == ["mixed3b:200", "mixed3b:201"]
    assert len(found[0]["angles"]) == 24
    assert is_picture(figure)
    heat = output(
        capsys,
        "tune",
        "shapes",
        "mixed3b:200",
        "--heat-map",
        "--step",
        "30",
        "--figure",
        str(figure),
    )
    assert len(heat[0]["responses"][0]) == 12
    aspects = output(
        capsys,
        "tune",
        "shapes",
        "mixed3b:200",
        "--aspects",
        "--step",
        "30",
        "--figure",
        str(figure),
    )
    assert {a["aspect"] for a in aspects} == {"contrast", "colour", "fill", "thickness", "corner"}
    found = output(
        capsys,
        "tune",
        "shapes",
        "mixed3b:195-205",
        "--find",
        "--step",
        "15",
        "--figure",
        str(figure),
    )
    assert len(found["units"]) == 11
    assert found["in_shuffled_weights"] <= 11
    assert run(["tune", "shapes", "mixed3b:200,201", "--step", "30"]) == 0
    assert "no harvest of this site" in capsys.readouterr().out


def test_examples_and_deviations_from_a_harvest(capsys, workspace: Path, tmp_path: Path) -> None:
    assert run(["examples", "shapes", "mixed3b:200"]) == 2
    assert "run `circuits harvest shapes" in capsys.readouterr().err
    output(capsys, "harvest", "shapes", "--data", "shapes", "--sites", "mixed3b")
    figure = tmp_path / "s.png"
    found = output(
        capsys,
        "examples",
        "shapes",
        "mixed3b:200",
        "--bins",
        "4",
        "--overlay",
        "--figure",
        str(figure),
    )
    assert len(found["bins"]) == 4
    assert is_picture(figure)
    assert run(["examples", "shapes", "mixed3b:200"]) == 0
    assert "tail falls by" in capsys.readouterr().out
    assert run(["tune", "shapes", "mixed3b:200", "--step", "30"]) == 0
    assert "standard deviations are of shapes" in capsys.readouterr().out
    assert run(["tune", "shapes", "mixed3b:200", "--data", "photos"]) == 2


def test_ablate(capsys, workspace: Path, tmp_path: Path) -> None:
    figure = tmp_path / "a.png"
    found = output(
        capsys, "ablate", "shapes", "mixed3a:1-4", "--data", "shapes", "--labels", "names", "--limit", "40",
        "--random", "3", "--pool", "mixed3a:10-60", "--later", "mixed3b", "--figure", str(figure),
    )  # fmt: skip
    assert len(found["null_units"]) == 3
    assert found["effects"]["accuracy"]["intact"] > 0.5
    assert found["record"]["task"]["examples"]["chosen"] == "40 of 400, spread evenly (seed 0)"
    assert len(found["downstream"]) == 10
    assert is_picture(figure)
    assert (
        run(
            [
                "ablate",
                "induction-by-hand",
                "blocks.1.attn.hook_z:0",
                "--how",
                "mean",
                "--limit",
                "8",
                "--random",
                "19",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "repeats: 8" in said
    assert "null: 19 " in said
    assert "smallest possible p: 0.05" in said


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
    assert len(found["groups"]) == 2
    assert figure.read_text().startswith("<?xml")
    saved = Attribution.load(out)
    assert saved.units().shape == (2, load_model("shapes").site("mixed3b").n_units)
    model = load_model("shapes")
    with GraphStore(Workspace(workspace).model_folder(model.hash)) as graph:
        kinds = {block.kind for block in graph.blocks}
    assert "attribution" in kinds
    parts = output(capsys, "attribute", "induction", "--direct", "--limit", "2")
    for example in parts["by_example"]:
        assert sum(example["values"]) == pytest.approx(example["logit"], abs=1e-3)
    assert (
        run(
            [
                "attribute",
                "induction",
                "blocks.1.attn.hook_z",
                "--limit",
                "1",
                "--text",
                "0 1 2 3 1 2",
            ]
        )
        == 0
    )
    assert "rank correlation with ablation" in capsys.readouterr().out


def test_saliency_map(capsys, workspace: Path, tmp_path: Path) -> None:
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
        capsys, "saliency", "shapes", "--data", "shapes", "--limit", "2", "--target", "mixed3b:200@3,3",
        "--method", "smoothgrad", "--option", "samples=4", "--out", str(out),
    )  # fmt: skip
    assert made["methods"][0]["settings"] == {"samples": 4, "noise": 0.15}
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
        "steps=10",
    )
    assert masks["examples"]["n"] == 1
    assert masks["methods"][0]["examples"][0]["found"]["area"] > 0
    assert run(["saliency", "shapes", "--data", "shapes", "--limit", "1"]) == 0
    assert "--figure PATH draws the maps" in capsys.readouterr().out


def test_sanity(capsys, workspace: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "cards.json", tmp_path / "c.png"
    found = output(
        capsys, "sanity", "shapes", "--data", "shapes", "--limit", "4", "--method", "gradient", "--stages", "2",
        "--faithful", "2", "--out", str(out), "--figure", str(figure),
    )  # fmt: skip
    assert found[0]["verdicts"]["randomisation"] in ("passes", "fails")
    assert json.loads(out.read_text())[0]["method"] == "gradient"
    assert is_picture(figure)


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
        (["attribute", "shapes", "--direct"], "is not a TransformerLens bridge"),
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
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not workspace.exists()
