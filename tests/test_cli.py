from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from circuits.cli.main import run
from circuits.cli.output import show_json
from circuits.models.zoo.loading import BUILTIN
from tests.commands import given, output, put, refused, said
from tests.test_models import OWN


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return f"python:{path}:make"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "ws"))
    return tmp_path / "ws"


def test_models_and_sites_as_json(capsys, own: str) -> None:
    names = [m["name"] for m in output(capsys, "models")]
    assert names[:3] == ["cleanroom", "shapes", "induction"]
    sites = {s["name"]: s for s in output(capsys, "sites", own)}
    assert sites["block.conv@1"]["n_units"] == 8
    assert sites["stem"]["axes"] == ["batch", "channel", "y", "x"]
    assert run(["sites", own]) == 0
    assert "block.conv@1" in capsys.readouterr().out


def test_what_harvest_asks_for(workspace: Path) -> None:
    asked = given(
        "harvesting.run", "harvest", "cleanroom", "--data", "curves", "--sites", "line,complex", "--full", "line",
        "--batch", "4", "--memory", "2", "--layout", "rows", "--positions", "9", "--skip-bad", "--overwrite",
        "--seed", "3",
    )  # fmt: skip
    expected = {
        "sites": ["line", "complex"], "full": ["line"], "covariance": [], "batch": 4, "memory": 2 * 2**30,
        "layout": "rows", "compress": False, "precision": "float32", "positions": 9, "skip_bad": True,
        "overwrite": True,
        "seed": 3, "workers": None,
    }  # fmt: skip
    assert {k: asked[k] for k in expected} == expected
    assert asked["record"].spec == "cleanroom"


def test_weights_as_json_and_table(capsys) -> None:
    facts = output(capsys, "weights", "shapes", "mixed3a:100", "--top", "4")
    assert len(facts["incoming"]) == len(facts["outgoing"]) == 4
    first = facts["incoming"][0]
    assert first["source"].startswith("mixed3a_5x5_bottleneck:")
    assert len(first["kernel"]) == 5
    assert facts["incoming_through"] is None
    assert run(["weights", "shapes", "conv2d0:1"]) == 0
    assert "input:0" in capsys.readouterr().out


def test_examples_of_texts_show_what_stands_around_a_token(
    capsys, workspace: Path, tmp_path: Path
) -> None:
    text = tmp_path / "tokens.txt"
    text.write_text("0 5 6 7 8 5 6 7 8\n0 9 3 9 3 9 3\n")
    facts = output(
        capsys,
        "harvest",
        "induction",
        "--data",
        f"tokens:{text}",
        "--sites",
        "blocks.1.attn.o.hook_in",
    )
    assert facts["sites"] == ["blocks.1.attn.hook_z"]
    assert Path(facts["folder"]).is_relative_to(workspace)
    found = output(capsys, "examples", "induction", "blocks.1.attn.hook_z:0", "--each", "2")
    drawn = [e for b in found["bins"] for e in b["examples"]]
    lines = [[int(t) for t in line.split()] for line in text.read_text().splitlines()]
    assert drawn
    for e in drawn:  # the token that excites, in what stands around it
        marked = f"«{lines[e['index']][e['position'][0]]}»"
        assert marked in e["text"]
    assert "«" in said(capsys, "examples", "induction", "blocks.1.attn.hook_z:0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sites", "shaeps"], "did you mean shapes"),
        (["weights", "shapes", "mixed3c:1"], "did you mean mixed3"),
        (["weights", "shapes", "mixed3a:160"], "units 0 to 159"),
        (["weights", "shapes", "mixed3a"], "SITE:INDEX"),
        (["weights", "shapes", "mixed3a:1", "--data", "shapes"], "is for a unit that reads one other unit only"),
        (["harvest", "shapes", "--data", "fotos", "--sites", "mixed3a"], "did you mean photos"),
        (["harvest", "shapes", "--data", "folder:{tmp}/empty", "--sites", "mixed3a"], "holds no images"),
        (["harvest", "shapes", "--data", "folder:{tmp}/bad", "--sites", "mixed3a"], "cannot be read"),
        (["harvest", "shapes", "--data", "photos", "--sites", ","], "at least one site"),
        (["harvest", "shapes", "--data", "photos", "--sites", "logits", "--workspace", "{tmp}/file/w"],
         "cannot be written"),
        (["sites", "shapes", "--weights", "{tmp}/cut.safetensors"], "not a complete safetensors file"),
        (["sites", "shapes", "--weights", "{tmp}/none.safetensors"], "does not exist"),
        (["harvest", "{own}", "--data", "photos", "--sites", "stem"], "the model takes 5"),
        (["visualize", "shapes", "mixed3a:1", "--out", "{tmp}/file/a.png"], "cannot be written"),
        (["visualize", "induction", "hook_unembed:1", "--out", "{tmp}/a.png"], "takes tokens"),
        (["visualize", "shapes", "mixed3a:1", "--steps", "0"], "steps"),
        (["visualize", "shapes", "mixed3a:1", "--size", "1000000"], "8 to 4096"),
        (["demo", "--port", "0"], "'--port': 0 must be 1 to 65535"),
        (["nonsense"], "nonsense"),
        (["sites"], "argument"),
        (["visualize", "shapes", "mixed3a:1", "--steps", "x"], "--steps"),
        (["harvest", "shapes", "--data", "photos", "--sites", "logits", "--batch", "0"], "'--batch': 0 must be"),
        (["app", "--port", "99999"], "'--port': 99999 must be 1 to 65535"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys, tmp_path: Path, own: str, workspace: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("not an image")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "cut.safetensors").write_bytes((BUILTIN / "shapes.safetensors").read_bytes()[:5000])
    filled = [a.replace("{tmp}", str(tmp_path)).replace("{own}", own) for a in arguments]
    refused(capsys, message, *filled)
    assert not workspace.exists() or not any(workspace.iterdir()), "nothing was written"


def test_json_has_null_for_what_is_not_finite(capsys) -> None:
    show_json({"a": [1.0, float("nan"), float("inf")], "b": "NaN"})
    assert json.loads(capsys.readouterr().out) == {"a": [1.0, None, None], "b": "NaN"}


def test_a_bug_is_a_line_too(capsys, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("circuits.cli.options.load_model", broken)
    assert run(["sites", "shapes"]) == 2
    assert (
        "ZeroDivisionError: deep inside (CIRCUITS_DEBUG=1 shows where)" in capsys.readouterr().err
    )


def test_a_reader_may_stop_early() -> None:
    verb = "weights shapes mixed3a:1 --top 900"
    command = f"set -o pipefail; {sys.executable} -m circuits.cli.main {verb} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("mixed3a:1")
    assert not done.stderr
    assert done.returncode == 0


# --- visualize -------------------------------------------------------------------------------------

TINY = ("--steps", "2", "--size", "32")


def test_pictures_are_written_where_they_belong(capsys, workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    picture = output(capsys, "visualize", "cleanroom", "line:3", "--out", str(out), *TINY)
    assert picture["size"] == [32, 32]
    with Image.open(out) as image:
        assert image.size == (32, 32)
    kept = output(capsys, "visualize", "cleanroom", "line:3", *TINY)
    assert Path(kept["out"]).is_relative_to(workspace)
    several = output(
        capsys, "visualize", "cleanroom", "line:3", "--diverse", "2", "--seeds", "2", "--out", str(tmp_path / "b.webp"),
        *TINY,
    )  # fmt: skip
    assert [(p["seed"], p["kind"]) for p in several] == [(s, "diverse") for s in (0, 0, 1, 1)]
    assert sorted(p.name for p in tmp_path.glob("*.webp")) == [f"b-{i}.webp" for i in range(4)]
    assert "after 2 steps" in said(capsys, "visualize", "cleanroom", "line:3", "--negative", *TINY)


def test_a_sheet_has_every_unit(capsys, workspace: Path) -> None:
    sheet = output(capsys, "visualize", "cleanroom", "line", "--sheet", *TINY)
    assert len(sheet["units"]) == len(list(Path(sheet["out"]).glob("0*.webp")))
    assert Path(sheet["atlas"]).is_relative_to(workspace)


@pytest.mark.parametrize(
    ("options", "settings", "target"),
    [
        (("line:3",), {"steps": 256, "size": None, "param": "fourier", "alpha": False, "natural": None}, "line:3"),
        (("line:3", "--alpha", "--param", "pixel", *TINY), {"steps": 2, "size": 32, "param": "pixel", "alpha": True},
         "line:3"),
        (("line:3", "--seeds", "2", "--seed", "7", "--negative"), {"seed": 7, "negative": True}, "line:3"),
        (("line:3", "--objective", "neuron"), {}, "neuron line:3"),
        (("line:3+0.5*line:4", "--objective", "cosine"), {}, "direction in line cosine^1"),
        (("line", "--objective", "deepdream"), {}, "deepdream line"),
    ],
)  # fmt: skip
def test_what_visualize_asks_for(
    options: tuple[str, ...], settings: dict[str, Any], target: str, workspace: Path
) -> None:
    asked = given("pictures.visualize_units", "visualize", "cleanroom", *options)
    whole = asked | asked.get("options", {})
    assert {k: whole[k] for k in settings} == settings
    (made,) = asked["targets"]
    assert getattr(made, "text", made) == target


def test_statistics_of_images_are_fitted_once(capsys, workspace: Path) -> None:
    for options in (("--param", "maco"), ("--images", "photos")):
        asked = given("pictures.visualize_units", "visualize", "cleanroom", "line:3", *options)
        assert (asked | asked.get("options", {}))["natural"].data == "photos"
    assert len(list((workspace / "natural-images").glob("*.safetensors"))) == 1


def test_a_badge_is_measured_against_photographs(
    capsys, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    badge = SimpleNamespace(
        to_dict=lambda: {
            "score": 0.5, "randomized_score": 0.25, "reached": 1.5, "held_out": 0.5, "seeds": 0.9, "natural": 0.75,
            "examples": {"data": "photos", "chosen": "200 of 163"}, "flags": ["too good to be true"],
        }
    )  # fmt: skip
    seen = []
    put(
        monkeypatch,
        "pictures.natural_responses",
        lambda model, site, examples: seen.append((site, examples.data)),
    )
    put(monkeypatch, "pictures.reliability", lambda *a, **k: [badge])
    told = said(capsys, "visualize", "cleanroom", "line:3", "--badge", *TINY)
    assert seen == [("line", "photos")]
    assert (
        "reliability 0.50 (made on shuffled weights: 0.25): reaches 1.5 x the top example" in told
    )
    assert "! too good to be true" in told


def test_a_model_of_tokens_gets_embeddings(capsys, workspace: Path) -> None:
    found = output(capsys, "visualize", "induction", "blocks.1.attn.hook_z:0", "--steps", "4")
    assert len(found["tokens"]) == len(found["words"]) == 8
    assert found["activation"] > found["start_activation"]
    for option in ("--sheet", "--badge", "--alpha", "--negative"):
        message = f"takes tokens: {option} is for pictures"
        refused(capsys, message, "visualize", "induction", "blocks.1.attn.hook_z", option)
    message = "--badge is for single units, leave it out"
    refused(capsys, message, "visualize", "cleanroom", "line", "--sheet", "--badge")
