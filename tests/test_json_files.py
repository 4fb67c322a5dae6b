"""One reader of JSON: what it refuses, and that nothing else in the package parses JSON."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest

from circuits.edits.recipes import Recipe
from circuits.json_files import MOST_BYTES, MOST_DEPTH, parse_json, read_json

PACKAGE = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON: Expecting value at character 1"),
        (b'{"a": 1,}', "is not JSON: "),
        (b"\xff\xfe", "is not UTF-8: byte 0 is 0xff"),
        (b"\xef\xbb\xbf{}", "starts with a byte-order mark: expected UTF-8 without one"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "field 'c' is repeated"),
        (b"[1e999]", "1e999 is larger than any number of 64 bits"),
        (b"[-Infinity]", "-Infinity is not a number that JSON has"),
        (b"[NaN]", "NaN is not a number that JSON has"),
        (b"9" * 5000, "9999999999999999999… has 5000 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, f"nested too deeply, more than {MOST_DEPTH} levels"),
        (json.dumps({"x" * 5000: 1})[:-1].encode() + b',"' + b"x" * 5000 + b'":2}', "is repeated"),
    ],
)
def test_what_no_two_readers_agree_on_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_json(tmp_path / "a.json")
    assert str(error.value).startswith(f"file '{tmp_path}/a.json'")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_the_rest_is_read_as_python_reads_it() -> None:
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    for text in ('{"a": [1, 2.5, -0.0, "\\u00e4", null, true, 1e308]}', deep, "3"):
        assert repr(parse_json(text, "it")) == repr(json.loads(text))
    low, none = parse_json("[-Infinity, NaN]", "it", nan=True)
    assert low == -math.inf
    assert math.isnan(none)


def test_only_files_of_a_reasonable_size_are_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe x does not exist"):
        read_json(tmp_path / "none", "recipe x")
    with pytest.raises(ValueError, match="is a folder"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no regular file"):
        read_json(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no space
    with pytest.raises(ValueError, match=f"has {MOST_BYTES + 1} bytes: expected at most"):
        read_json(tmp_path / "large")


def test_nothing_else_parses_json() -> None:
    """`json.loads` is left where a text goes back and forth inside one function, or was just written."""
    found = {
        str(path.relative_to(PACKAGE))
        for folder in ("circuits", "apps", "cases")
        for path in (PACKAGE / folder).rglob("*.py")
        if re.search(r"json\.loads?\(", path.read_text())
    }
    assert found == {"circuits/json_files.py", "circuits/sae/training.py", "circuits/tensors.py"}


GOOD = Recipe.from_dict(
    {"schema": 2, "edits": [{"operator": "scale", "units": "a:1", "factor": 2.0}]}
).to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(GOOD)[:-1] + ', "edits": []}', "field 'edits' is repeated"),
        (json.dumps(GOOD).replace("2.0", "2.0, \"factor\": 3.0"), "field 'factor' is repeated"),
        (json.dumps(GOOD).replace("2.0", "1e999"), "1e999 is larger than any number"),
        (json.dumps(GOOD).replace("2.0", "NaN"), "NaN is not a number that JSON has"),
        (json.dumps(GOOD | {"more": 1}), "unknown field of recipe"),
        (json.dumps(GOOD | {"seed": 10**30}), "is not a whole number of 64 bits"),
        (json.dumps(GOOD | {"model_hash": "x" * 4000}), "is not 64 hexadecimal digits"),
        (json.dumps(GOOD | {"note": ["x"] * 4000}), "is not a text"),
        (json.dumps(GOOD | {"schema": "x" * 4000}), "expected 1 or 2"),
        ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_recipes_that_say_two_things_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises((ValueError, KeyError), match=message) as error:
        Recipe.load(tmp_path / "r.json")
    assert len(str(error.value)) < 400
