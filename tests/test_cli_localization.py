"""Verbs that say where a behaviour is: what they print is what the library returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from circuits.cli.main import run
from circuits.edits.recipes import Recipe, edited
from circuits.edits.records import read_edit
from circuits.localization import patch_grid, sufficiency
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task


def output(capsys: pytest.CaptureFixture[str], *arguments: str):
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return min(image.size) > 100


def test_patch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "grid.png"
    found = output(
        capsys, "patch", "induction", "--by", "head", "--limit", "6", "--direction", "noising", "--random", "0",
        "--figure", str(figure),
    )  # fmt: skip
    model = load_model("induction")
    grid = patch_grid(model, load_task(model, n=6), by="head", direction="noising", n_random=0)
    effects = found["directions"]["noising"]["effects"]
    assert [e["change"] for e in effects] == pytest.approx([e.change for e in grid.effects()])
    assert found["record"]["task"]["task"] == "repeats"
    assert is_picture(figure)
    text = said(
        capsys,
        "patch",
        "addition-by-hand",
        "--at",
        "-1,0",
        "--limit",
        "4",
        "--sites",
        "attn_out",
        "--top",
        "1",
    )
    assert "noising: cross_entropy of addition" in text
    assert "1 of 2 cells" in text
    assert "blocks.0.hook_attn_out@-1" in text


def test_keep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "keep.png"
    units = "hook_embed blocks.0.attn.hook_z:3 blocks.1.attn.hook_z"
    found = output(
        capsys, "keep", "induction", units, "--limit", "6", "--random", "3", "--figure", str(figure)
    )
    model = load_model("induction")
    same = sufficiency(model, units.split(), load_task(model, n=6), n_random=3)
    assert found["faithfulness"] == pytest.approx(same.faithfulness)
    assert found["null"] == pytest.approx(list(same.null))
    assert is_picture(figure)
    text = said(capsys, "keep", "induction", "hook_embed z", "--limit", "4", "--how", "zero")
    assert "random sets: none" in text


def test_lens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "lens.png"
    found = output(capsys, "lens", "induction", "--limit", "6", "--held", "--figure", str(figure))
    assert [d["site"] for d in found["depths"]] == [
        "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
    ]  # fmt: skip
    assert found["norm"] == "held"
    assert is_picture(figure)
    words = output(
        capsys, "lens", "induction", "--tokens", "--text", "5 6 7 5", "--figure", str(figure)
    )
    model = load_model("induction")
    best = model.logits(torch.tensor([[0, 5, 6, 7, 5]]))[0].argmax(-1)
    assert words["first"][-1] == best.tolist()
    assert "most probable next token" in said(
        capsys, "lens", "induction", "--tokens", "--text", "5 6"
    )
    assert "0.0" in said(capsys, "lens", "induction", "--limit", "4")


def test_a_text_that_is_longer_than_the_context_is_read_in_part_and_that_is_said(capsys) -> None:
    n_ctx = load_model("induction").input.n_ctx
    line = f"--text has {2 * n_ctx + 1} tokens: the model takes {n_ctx}, and the rest is not read"
    for command in (["lens", "induction", "--tokens"], ["attention", "induction", "1.0"]):
        for text, cut in (("5 6 " * n_ctx, True), ("5 6", False)):
            assert run([*command, "--text", text]) == 0
            assert (line in capsys.readouterr().err) == cut


def test_probe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "probe.png"
    found = output(
        capsys, "probe", "addition-by-hand", "--method", "mean_difference", "--at", "0", "--limit", "20",
        "--random", "5", "--steer", "1", "--figure", str(figure),
    )  # fmt: skip
    assert found["n_fitted"] == 10
    assert len(found["readouts"]) == len(found["steered"]) == 1
    assert len(found["readouts"][0]["random"]) == 5
    assert is_picture(figure)
    text = said(
        capsys, "probe", "addition-by-hand", "--limit", "12", "--random", "3", "--at", "0,1"
    )
    assert "clean or corrupted, fitted on 6 examples and judged on addition (test half)" in text


def test_heads_and_attention(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "heads.png"
    found = output(capsys, "heads", "induction", "--texts", "8", "--figure", str(figure))
    first = next(h for h in found["heads"] if h["kind"] == "previous_token")
    assert first["head"] == "blocks.0.attn.hook_pattern:3"
    assert is_picture(figure)
    assert "induction heads of induction: 8 texts" in said(
        capsys, "heads", "induction", "--texts", "8"
    )
    seen = output(
        capsys, "attention", "induction", "0.3,1.0", "--text", "5 6 7 5 6", "--figure", str(figure)
    )
    raw = torch.tensor(seen["heads"][0]["raw"])
    assert raw.diagonal(-1).min() > 0.5, "to the token before"
    assert is_picture(figure)
    text = said(capsys, "attention", "induction", "0.3", "--text", "5 6 7 5 6")
    assert "attends most to" in text


def test_generate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = load_model("induction")
    texts = ["1 2 3 4 5 6 7 1 2 3", "9 8 7 9"]
    rows = [[0, *map(int, t.split())] for t in texts]

    def by_hand() -> list[str]:
        """Greedy, one text and one token at a time."""
        found = []
        for row in rows:
            made = list(row)
            for _ in range(4):
                made.append(int(model.logits(torch.tensor([made]))[0, -1].argmax()))
            found.append(" ".join(map(str, made[len(row) :])))
        return found

    words = "zero blocks.0.attn.hook_z:3"
    arguments = ["generate", "induction", "--text", texts[0], "--text", texts[1], "--tokens", "4"]
    found = output(capsys, *arguments, "--edit", words)
    assert [f["clean"] for f in found] == by_hand()
    assert found[0]["clean"] == "4 5 6 7", "copied"
    with edited(model, [read_edit(model, words)]):
        assert [f["edited"] for f in found] == by_hand()
    assert found[0]["edited"] != found[0]["clean"]
    Recipe.of(model, [read_edit(model, words)]).save(tmp_path / "r.json")
    assert output(capsys, *arguments, "--edit", str(tmp_path / "r.json")) == found
    text = said(capsys, *arguments, "--edit", words)
    assert text.splitlines()[:2] == [texts[0], "  as it is: 4 5 6 7"]
    assert "edited" not in said(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patch", "induction", "--data", "repeats"], "task next token has no counterparts: there is nothing to patch"),
        (["patch", "induction", "--sites", "resid_pr"], "did you mean resid_pre"),
        (["patch", "induction", "--at", "99", "--limit", "3"], "position 99 is outside every text of task"),
        (["patch", "induction", "--metric", "logit_difference"], "needs wrong answers to compare with"),
        (["patch", "shapes", "--task", "shapes"], "sites: model shapes has no default sites for by 'position'"),
        (["keep", "induction", "blocks.0.hook_resid_pre"], "is not among the sites at which units are replaced"),
        (["lens", "shapes"], "model shapes has no residual stream: no attention"),
        (["lens", "induction", "--tokens"], "--tokens needs a text (--text)"),
        (["heads", "shapes"], "model shapes takes images: heads are scored by what they attend to among tokens"),
        (["heads", "addition-by-hand"], "length 3: expected 6 (the shortest that repeats anything) to 3"),
        (["attention", "induction", "0.9", "--text", "1 2"], "unknown head of induction '0.9'"),
        (["attention", "induction", "0.1"], "--text is empty"),
        (["generate", "shapes", "--text", "a"], "model shapes takes images: it continues no texts"),
        (["generate", "induction"], "--text is missing"),
        (["generate", "induction", "--text", "1", "--edit", "zero blocks.0.attn.hook_z:9"], "does not exist"),
        (["probe", "induction", "--data", "repeats", "--limit", "8"], "labels 'pair': task next token has no"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
