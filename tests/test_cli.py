from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from circuits.cli.main import run
from circuits.cli.output import show_json
from circuits.models.zoo.loading import BUILTIN
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


def output(capsys, *arguments: str) -> object:
    assert run(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_models_and_sites_as_json(capsys, own: str) -> None:
    names = [m["name"] for m in output(capsys, "models", "--json")]
    assert names[:3] == ["cleanroom", "shapes", "induction"]
    sites = {s["name"]: s for s in output(capsys, "sites", own, "--json")}
    assert sites["block.conv@1"]["n_units"] == 8
    assert sites["stem"]["axes"] == ["batch", "channel", "y", "x"]
    assert run(["sites", own]) == 0
    assert "block.conv@1" in capsys.readouterr().out


def test_harvest_then_visualize_then_edit(capsys, workspace: Path, tmp_path: Path) -> None:
    facts = output(
        capsys, "harvest", "cleanroom", "--data", "curves", "--sites", "line,complex", "--json"
    )
    assert facts["sites"] == ["line", "complex"]
    assert facts["examples"] == 192
    assert Path(facts["folder"]).is_relative_to(workspace)

    out = tmp_path / "a.png"
    picture = output(
        capsys, "visualize", "cleanroom", "line:3", "--out", str(out), "--steps", "8", "--size", "48", "--json"
    )  # fmt: skip
    assert picture["size"] == [48, 48]
    with Image.open(out) as image:
        assert image.size == (48, 48)
    kept = output(capsys, "visualize", "cleanroom", "line:3", "--steps", "2", "--json")
    assert Path(kept["out"]).is_relative_to(workspace)

    sheet = output(
        capsys, "visualize", "cleanroom", "line", "--sheet", "--steps", "2", "--size", "32", "--json"
    )  # fmt: skip
    assert len(sheet["units"]) == len(list(Path(sheet["out"]).glob("0*.webp")))
    assert Path(sheet["atlas"]).is_relative_to(workspace)

    report = output(
        capsys, "edit", "measure", "cleanroom", "zero complex:3", "scale complex:4 factor=0.5",
        "--data", "curves", "--limit", "8", "--random", "5", "--json",
    )  # fmt: skip
    assert report["restored"] is True
    assert report["effects"]["kl"]["change"] > 0
    assert len(report["effects"]["kl"]["null"]) == 5
    assert report["record"]["task"]["examples"]["chosen"] == "8 of 192, spread evenly (seed 0)"


def test_weights_as_json_and_table(capsys) -> None:
    facts = output(capsys, "weights", "shapes", "mixed3a:100", "--top", "4", "--json")
    assert len(facts["incoming"]) == len(facts["outgoing"]) == 4
    first = facts["incoming"][0]
    assert first["source"].startswith("mixed3a_5x5_bottleneck:")
    assert len(first["kernel"]) == 5
    assert run(["weights", "shapes", "conv2d0:1"]) == 0
    assert "input:0" in capsys.readouterr().out


def test_transformer_verbs(capsys, workspace: Path, tmp_path: Path) -> None:
    text = tmp_path / "tokens.txt"
    text.write_text("0 5 6 7 8 5 6 7 8\n0 9 3 9 3 9 3\n")
    facts = output(
        capsys, "harvest", "induction", "--data", f"tokens:{text}", "--sites", "blocks.1.attn.o.hook_in", "--json"
    )  # fmt: skip
    assert facts["sites"] == ["blocks.1.attn.hook_z"]
    found = output(
        capsys, "examples", "induction", "blocks.1.attn.hook_z:0", "--each", "2", "--json"
    )
    drawn = [e for b in found["bins"] for e in b["examples"]]
    lines = [[int(t) for t in line.split()] for line in text.read_text().splitlines()]
    assert drawn
    for e in drawn:  # the token that excites, in what stands around it
        marked = f"«{lines[e['index']][e['position'][0]]}»"
        assert marked in e["text"]
    assert run(["examples", "induction", "blocks.1.attn.hook_z:0"]) == 0
    assert "«" in capsys.readouterr().out
    report = output(
        capsys,
        "edit",
        "measure",
        "induction",
        "zero blocks.0.attn.hook_z:3",
        "--limit",
        "20",
        "--random",
        "19",
        "--json",
    )
    assert report["restored"] is True
    assert report["record"]["task"]["task"] == "repeats"
    assert report["effects"]["cross_entropy"]["change"] > max(report["effects"]["kl"]["null"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sites", "shaeps"], "did you mean shapes"),
        (["weights", "shapes", "mixed3c:1"], "did you mean mixed3"),
        (["weights", "shapes", "mixed3a:160"], "units 0 to 159"),
        (["weights", "shapes", "mixed3a"], "SITE:INDEX"),
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
        (["demo", "--port", "0"], "port 0"),
        (["nonsense"], "nonsense"),
        (["sites"], "argument"),
        (["visualize", "shapes", "mixed3a:1", "--steps", "x"], "--steps"),
        (["harvest", "shapes", "--data", "photos", "--sites", "logits", "--batch", "0"], "batch 0"),
        (["app", "--port", "99999"], "port 99999"),
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
    assert run(filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert not captured.out
    assert not workspace.exists() or not any(workspace.iterdir()), "nothing was written"


def test_json_has_null_for_what_is_not_finite(capsys) -> None:
    show_json({"a": [1.0, float("nan"), float("inf")], "b": "NaN"})
    assert json.loads(capsys.readouterr().out) == {"a": [1.0, None, None], "b": "NaN"}


def test_a_bug_is_a_line_too(capsys, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("circuits.cli.models.load_model", broken)
    assert run(["sites", "shapes"]) == 2
    assert (
        "ZeroDivisionError: deep inside (CIRCUITS_DEBUG=1 shows where)" in capsys.readouterr().err
    )


def test_a_reader_may_stop_early() -> None:
    for verb, first in (
        ("sites shapes --json", "["),
        ("weights shapes mixed3a:1 --top 900", "mixed3a:1"),
    ):
        command = f"set -o pipefail; {sys.executable} -m circuits.cli.main {verb} | head -1"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.stdout.startswith(first)
        assert not done.stderr
        assert done.returncode == 0


@pytest.mark.parametrize(
    "verb", ["models", "sites", "harvest", "visualize", "weights", "edit", "demo", "app"]
)
def test_every_verb_explains_itself(verb: str, capsys) -> None:
    assert run([verb, "--help"]) == 0
    assert f"circuits {verb}" in " ".join(capsys.readouterr().out.split())


def test_pictures_of_every_kind(capsys, workspace: Path, tmp_path: Path) -> None:
    common = ("--steps", "3", "--size", "32", "--json")
    several = output(
        capsys, "visualize", "cleanroom", "line:3", "--diverse", "2", "--seeds", "2", *common
    )
    assert [(p["seed"], p["kind"]) for p in several] == [(s, "diverse") for s in (0, 0, 1, 1)]
    assert len({p["out"] for p in several}) == 4
    least = output(capsys, "visualize", "cleanroom", "line:3", "--negative", *common)
    assert least["objective"].startswith("-line_")
    numbered = tmp_path / "a.webp"
    output(
        capsys, "visualize", "cleanroom", "line:3", "--seeds", "2", "--out", str(numbered), *common
    )
    assert sorted(p.name for p in tmp_path.glob("*.webp")) == ["a-0.webp", "a-1.webp"]
    badged = output(capsys, "visualize", "cleanroom", "line:3", "--badge", *common)
    assert 0 <= badged["reliability"]["score"] <= 1
    assert badged["reliability"]["examples"]["data"] == "photos"
    assert badged["reliability"]["examples"]["how"] == "spread"
    for options in (
        ("line:3", "--param", "maco"), ("line:3", "--images", "photos"), ("line:3", "--alpha"),
        ("line:3", "--objective", "neuron"), ("line:3+0.5*line:4", "--objective", "cosine"), ("line",),
    ):  # fmt: skip
        made = output(capsys, "visualize", "cleanroom", *options, *common)
        assert Path(made["out"]).is_file()
    kept = list((workspace / "natural-images").glob("*.safetensors"))
    assert len(kept) == 1, "fitted once"


def test_a_model_of_tokens_gets_embeddings(capsys, workspace: Path) -> None:
    found = output(
        capsys, "visualize", "induction", "blocks.1.attn.hook_z:0", "--steps", "4", "--json"
    )
    assert len(found["tokens"]) == len(found["words"]) == 8
    assert found["activation"] > found["start_activation"]
    for option in ("--sheet", "--badge", "--alpha", "--negative"):
        assert run(["visualize", "induction", "blocks.1.attn.hook_z", option]) == 2
        assert f"takes tokens: {option} is for pictures" in capsys.readouterr().err
    assert run(["visualize", "cleanroom", "line", "--sheet", "--badge"]) == 2
    assert "--badge is for single units, leave it out" in capsys.readouterr().err
