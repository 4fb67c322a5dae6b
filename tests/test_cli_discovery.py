"""What `circuits discover`, `evaluate` and `compare` say, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from circuits.cli import discovering
from circuits.cli.main import run

FEW = ["--limit", "8", "--random", "2", "--random-rankings", "1", "--check", "0", "--method", "eap"]


def test_what_was_found_is_said_before_the_search_in_shuffled_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, said = discovering.found_circuit, list[str]()

    def found_circuit(*given: Any, **settings: Any) -> Any:
        said.append(capsys.readouterr().out)
        return own(*given, **settings)

    monkeypatch.setattr(discovering, "found_circuit", found_circuit)
    scores = tmp_path / "scores.json"
    words = [
        "discover",
        "addition-by-hand",
        *FEW,
        "--size",
        "3",
        "--shuffled",
        "--scores",
        str(scores),
    ]
    assert run(words) == 0
    assert len(said) == 2
    assert said[0] == ""
    assert "removing an edge" in said[1]
    assert "faithfulness by size" in said[1]
    last = capsys.readouterr().out
    assert "shuffled weights" in last
    assert "faithfulness by size" not in last, "it was said"
    assert scores.exists()


@pytest.mark.parametrize("option", ["--save", "--scores"])
def test_an_empty_text_is_not_the_same_as_none(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["discover", "addition-by-hand", option, "", *FEW]) == 2
    error = capsys.readouterr().err
    assert f"Invalid value for '{option}': expected a text that is not empty" in error


def test_a_name_that_cannot_be_kept_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("circuits.cli.options.Model.load", loaded)
    long = "x" * 4000
    for words in (
        ["discover", "addition-by-hand", "--save", long],
        ["graph", "show", "addition-by-hand", "--save", long],
        ["graph", "show", "addition-by-hand", "--save", " "],
        ["graph", "import", "addition-by-hand", "found.json", "--name", long],
    ):
        assert run(words) == 2
        error = capsys.readouterr().err
        assert "must have 1 to 200 characters" in error or "a text that is not empty" in error, (
            error
        )
        assert len(error) < 300


def test_the_steps_of_pruning_belong_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["discover", "addition-by-hand", "--pruning-steps", "5", *FEW]) == 2
    assert "belong to the search pruning, not to greedy" in capsys.readouterr().err


def test_seeds_that_find_the_same_circuit_say_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = ["--workspace", str(tmp_path)]
    for seed in ("0", "1"):
        words = ["--seed", seed, "--save", f"seed {seed}", "--size", "3"]
        assert run(["discover", "addition-by-hand", *FEW, *words, *own]) == 0
    capsys.readouterr()
    assert run(["compare", "addition-by-hand", "seed 0", "seed 1", *own]) == 0
    said = capsys.readouterr().out
    assert said.startswith("the same circuit: all 3 edges are in both, nothing differs: Jaccard 1")
    assert len(said.splitlines()) == 1, "no empty table"


def test_nothing_is_minus_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["discover", "addition-by-hand", *FEW, "--size", "3"]) == 0
    assert "-0 " not in capsys.readouterr().out
