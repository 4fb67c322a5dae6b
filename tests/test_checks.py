"""Numbers in texts, strictly: what Python takes besides decimal digits is refused wherever a number is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import circuits
from circuits.checks import number, whole
from circuits.cli.main import run
from circuits.models.adapter.tokenizing import by_numbers
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import open_source
from circuits.tasks.targets import parse_target
from circuits.units import Direction, Unit, Units

ODD = ("1_0", "+1", "٣", "①", "1²", "0x1", "1e1", "")
"""What Python reads as whole numbers, or takes for digits."""


@given(st.integers(-(10**17), 10**17), st.floats(allow_nan=False, allow_infinity=False))
def test_what_python_writes_is_read(index: int, value: float) -> None:
    assert whole(str(index)) == index
    assert number(repr(value)) == value


@pytest.mark.parametrize("text", ODD)
def test_other_digits_are_no_numbers_anywhere(text: str, capsys, tmp_path: Path) -> None:
    assert whole(text) is None
    for read in (Unit.parse, Units.parse, lambda t: Direction.parse(t, 9)):
        with pytest.raises(ValueError, match=r"form|sum of terms"):
            read(f"mixed3a:{text}")
    if text:
        with pytest.raises(ValueError, match="expected whole numbers"):
            by_numbers(f"1 {text}")
    shapes = circuits.load_model("shapes")
    with pytest.raises((ValueError, KeyError)):
        parse_target(shapes, f"class:{text}")
    with pytest.raises((ValueError, KeyError)):
        parse_target(shapes, f"mixed3a:1@{text}")
    (tmp_path / "labels.csv").write_text(f"name,label\ncurve 0°,{text}\n")
    with pytest.raises((ValueError, KeyError)):
        read_labels(open_source("curves"), ["a", "b"], tmp_path / "labels.csv")
    for words in (
        ["edit", "new", "shapes", str(tmp_path / "a.json"), f"scale mixed3a:1 at={text} factor=2"],
        ["sae", "train", "shapes", "mixed3a", "--name", "n", "--data", "shapes", "--seeds", text or "x"],
        ["families", "shapes", "mixed3a", "--units", text or "x", "--kind", "rotate"],
    ):  # fmt: skip
        assert run(words) == 2, words
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_module_takes_the_digits_of_other_scripts() -> None:
    """`isdigit` and, without re.ASCII, the class of digits take them; then `int` does, or raises its own error."""
    for path in Path(circuits.__file__).parent.rglob("*.py"):
        for n, line in enumerate(path.read_text().splitlines(), 1):
            odd = re.search(r"\.is(digit|decimal|numeric)\(|r\".*\\d", line)
            assert not odd or "re.ASCII" in line, f"{path}, line {n}: {line.strip()}"
