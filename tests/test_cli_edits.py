from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from circuits.cli.main import run


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def said(capsys, *arguments: str, code: int = 0) -> str:
    assert run(["edit", *arguments]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def output(capsys, *arguments: str, code: int = 0) -> Any:
    return json.loads(said(capsys, *arguments, "--json", code=code))


def test_a_recipe_from_new_to_bake(capsys, tmp_path: Path, workspace: Path) -> None:
    recipe, weights = str(tmp_path / "r.json"), str(tmp_path / "w.safetensors")
    said(
        capsys,
        "new",
        "cleanroom",
        recipe,
        "zero complex:3",
        "mean complex:4",
        "--limit",
        "8",
        "--note",
        "why",
        "--author",
        "me",
    )
    made = json.loads(Path(recipe).read_text())
    assert [e["operator"] for e in made["edits"]] == ["scale", "set"]
    assert (made["note"], made["author"]) == ("why", "me")
    applied = output(
        capsys, "apply", "cleanroom", recipe, "--limit", "4", "--random", "1", "--data", "curves"
    )
    assert [e["note"] for e in applied["entries"]] == ["why", "why"]
    assert applied["entries"][0]["author"] == "me"
    assert applied["report"]["restored"] is True
    shown = said(capsys, "show", "cleanroom", applied["entries"][1]["hash"][:8])
    assert json.loads(shown)["reports"][0]["effects"].keys() == applied["report"]["effects"].keys()

    assert "filter_weights" in said(
        capsys,
        "apply",
        "cleanroom",
        "filter_weights into=line:*",
        "--no-measure",
        "--note",
        "no inhibition",
    )
    before = output(capsys, "replay", "cleanroom")
    assert before["same"] is True
    assert len(before["entries"]) == 3
    assert "undone" in said(capsys, "undo", "cleanroom")
    assert output(capsys, "replay", "cleanroom")["model_hash"] != before["model_hash"]
    assert "made again" in said(capsys, "redo", "cleanroom")
    assert output(capsys, "replay", "cleanroom")["model_hash"] == before["model_hash"]
    said(capsys, "branch", "cleanroom", "b", "--at", applied["entries"][0]["hash"][:10])
    listed = said(capsys, "log", "cleanroom")
    assert "no inhibition" in listed
    assert "main is at" in listed
    assert [e["kind"] for e in output(capsys, "log", "cleanroom")] == [
        "apply", "apply", "measure", "apply", "undo", "redo", "branch",
    ]  # fmt: skip
    signs = [d["sign"] for d in output(capsys, "diff", "main", "b", "--model", "cleanroom")]
    assert signs == [" ", "-", "-"]
    assert "the same edits" in said(capsys, "diff", recipe, recipe)

    baked = output(capsys, "bake", "shapes", weights, "filter_weights into=mixed3b:1-4")
    assert (
        output(capsys, "replay", "shapes", "--weights", weights)["model_hash"]
        == baked["model_hash"]
    )
    assert said(capsys, "verify").strip().startswith("consistent: 7 events of the ledger, 0 saved")
    head = output(capsys, "head")["head"]
    assert output(capsys, "verify", "--head", head)["state"] == "unchanged"
    said(capsys, "undo", "cleanroom")
    line = "unchanged up to that head: 7 events of the ledger"
    assert said(capsys, "verify", "--head", head).startswith(line)
    assert run(["edit", "verify", "--head", "x" * 4000]) == 2
    assert "is not of the form COUNT-COUNT-HASH" in capsys.readouterr().err
    with sqlite3.connect(workspace / "workspace.db") as connection:
        connection.execute("UPDATE edit_entries SET body = replace(body, 'why', 'who')")
    assert "was changed" in said(capsys, "verify", code=1)


def test_what_an_edit_does_is_measured_and_drawn(capsys, tmp_path: Path) -> None:
    figure, out = tmp_path / "e.png", tmp_path / "e.json"
    text = said(
        capsys, "measure", "shapes", "zero mixed3b:200", "--target", "class:0", "--data", "shapes", "--labels", "names",
        "--generalise", "photos", "--limit", "12", "--random", "2", "--figure", str(figure), "--out", str(out),
    )  # fmt: skip
    assert "undone: model identical to the bit" in text
    assert "on other examples class:0" in text
    assert figure.stat().st_size > 5000
    assert json.loads(out.read_text())["generalisation"].keys() == {
        "class:0", "class:0 is first choice",
    }  # fmt: skip


def test_a_fact_is_stored_from_the_command_line(capsys, tmp_path: Path) -> None:
    recipe = str(tmp_path / "r.json")
    said(
        capsys,
        "new",
        "induction",
        recipe,
        "--associate",
        "blocks.1.attn.o",
        "--prompt",
        "5 6 7",
        "--answer",
        "token:9",
    )
    made = json.loads(Path(recipe).read_text())["edits"][0]
    assert made["operator"] == "associate"
    assert "answered with token:9" in made["origin"]


def test_recipes_for_other_weights_need_force(capsys, tmp_path: Path) -> None:
    recipe, weights = str(tmp_path / "r.json"), str(tmp_path / "w.safetensors")
    said(capsys, "new", "shapes", recipe, "zero mixed3b:3")
    said(capsys, "bake", "shapes", weights, "filter_weights into=mixed3b:1-4")
    assert run(["edit", "apply", "shapes", recipe, "--weights", weights, "--no-measure"]) == 2
    assert "--force accepts it" in capsys.readouterr().err
    assert output(capsys, "log", "shapes", "--weights", weights) == []
    assert (
        run(["edit", "apply", "shapes", recipe, "--weights", weights, "--no-measure", "--force"])
        == 0
    )
    assert "what was measured of it does not hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apply", "shapes"], "nothing to apply"),
        (["apply", "shapes", "skale mixed3a:1"], "did you mean scale"),
        (["apply", "shapes", "scale mixed3a:1"], "lacks factor"),
        (["apply", "shapes", "scale mixed3a:1 factor=nan"], "is not a finite number"),
        (["apply", "shapes", "zero mixed3a:160"], "units 0 to 159"),
        (["apply", "shapes", "zero mixed3c:1"], "did you mean mixed3"),
        (["apply", "shapes", "{tmp}/file"], "is not JSON"),
        (["apply", "shapes", "{tmp}/none.json"], "none.json"),
        (["apply", "shapes", "{tmp}/newer.json"], "a newer version of circuits wrote it"),
        (["apply", "shapes", "{tmp}/nan.json"], "NaN is not a number that JSON has"),
        (["apply", "shapes", "zero mixed3a:1", "--limit", "0"], "'--limit': 0 must be 1"),
        (["apply", "shapes", "zero mixed3a:1", "--limit", "2", "--random", "-1"], "'--random': -1"),
        (
            ["apply", "shapes", "zero mixed3a:1", "--limit", "2", "--seed", "-1"],
            "'--seed': -1 must be 0 to",
        ),
        (["apply", "shapes", "zero mixed3a:1 at=200,0", "--limit", "2"], "position 200 along y"),
        (
            ["apply", "induction", "zero blocks.0.attn.hook_z:1 at=64"],
            "is out of range: expected -64 to 63",
        ),
        (
            ["apply", "shapes", "scale_weights into=mixed3b:1 factor=1e300"],
            "has 1e+300: expected at most 3.4e+38",
        ),
        (["apply", "shapes", "zero mixed3a:1 factor=2"], "gives factor twice"),
        (["apply", "shapes", "zero"], "lacks units"),
        (["apply", "shapes", "set mixed3a:1 values=@{tmp}/none.npy"], "array file"),
        (["apply", "shapes", "leace mixed3a"], "leace needs --labels"),
        (["apply", "shapes", "patch mixed3a:1 example=x"], "example=N"),
        (["apply", "shapes", "zero mixed3a:1", "--target", "class:99"], "class"),
        (["apply", "shapes", "zero mixed3a:1", "--branch", "x", "--no-measure"], "no branch 'x'"),
        (
            ["apply", "shapes", "filter_weights into=mixed3b:1 keep=some"],
            "not one of positive, negative",
        ),
        (
            ["apply", "shapes", "set_weights into=mixed3b:1 source=mixed3a:1 values=1,2,3"],
            "do not fit",
        ),
        (["apply", "shapes", "rotate_weights into=logits:1"], "can be rotated"),
        (["new", "shapes", "{tmp}/file/r.json", "zero mixed3a:1"], "cannot be written"),
        (["new", "shapes", "{tmp}/r.json"], "nothing to edit"),
        (
            ["new", "induction", "{tmp}/r.json", "--associate", "blocks.1.attn.o", "--prompt", "1"],
            "--answer",
        ),
        (["measure", "shapes"], "give either"),
        (
            ["measure", "shapes", "zero mixed3a:1", "--figure", "{tmp}/a.txt"],
            "must end in .png or .svg",
        ),
        (["undo", "shapes"], "no edit to undo"),
        (["redo", "shapes"], "no undone edit"),
        (["show", "shapes", "abc"], "no entry 'abc'"),
        (["bake", "shapes", "{tmp}/w.pt", "zero mixed3a:1"], "must end in .safetensors"),
        (["bake", "shapes", "{tmp}/w.safetensors", "zero mixed3a:1"], "changes activations"),
        (["diff", "{tmp}/none.json", "{tmp}/none.json"], "none.json"),
        (["diff", "{tmp}", "{tmp}"], "is a folder"),
        (["apply", "shapes", "patch mixed3a:1 example=99999"], "has 0 to 162"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys, tmp_path: Path, workspace: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "newer.json").write_text('{"schema": 3, "edits": []}')
    edit = '{"operator": "scale", "units": "mixed3a:1", "factor": NaN}'
    (tmp_path / "nan.json").write_text(f'{{"schema": 2, "edits": [{edit}]}}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run(["edit", *[a.format(tmp=tmp_path) for a in arguments]]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("circuits: ")
    assert len(captured.err.strip().splitlines()) == 1
    assert message in captured.err
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and ".db" not in p.name}
    assert after == before
    assert not list(workspace.rglob("*.db")) or output(capsys, "log", "shapes") == []


def test_operators_and_schema_are_listed(capsys) -> None:
    assert "filter_weights" in said(capsys, "operators")
    assert json.loads(said(capsys, "schema"))["properties"]["schema"] == {"const": 2}
