"""Names of models and data: one form of each, whatever is typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from circuits import specs
from circuits.models.zoo.loading import load_model, record_of
from circuits.stimuli.sources import open_source

CODE = """
import numpy as np
from torch import nn
def net():
    made = nn.Conv2d(3, 2, 3)
    made.input_shape = (3, 8, 8)
    return made
def data():
    return list(np.zeros((2, 8, 8, 3), np.uint8))
"""


def test_data_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a+b: c"
    odd.mkdir()
    (odd / "stories.txt").write_text("1 2\n")
    (odd / "own.py").write_text(CODE)
    np.savez(odd / "x:y.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "link").symlink_to(odd)
    monkeypatch.chdir(odd)
    for typed in ("tokens:{}stories.txt", "npz:{}x:y.npz", "npz:{}x:y.npz:images", "{}own.py:data"):
        whole = open_source(typed.format(f"{odd}/")).spec
        for front in ("", "./", "../link/", f"{tmp_path}/link/", f"{odd}/../{odd.name}/"):
            assert open_source(typed.format(front)).spec == whole
            assert specs.normal_data(typed.format(front)) == whole
        assert specs.normal_data(whole) == whole
    assert open_source("own.py:data").spec == f"python:{odd}/own.py:data"
    with pytest.raises(ValueError, match=r"is not of the form .* FILE\.py:FUNCTION"):
        open_source("own.py")


def test_a_file_of_ones_own_needs_no_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a+b"
    odd.mkdir()
    (odd / "own.py").write_text(CODE)
    monkeypatch.chdir(odd)
    model = load_model("own.py:net")
    spec = f"python:{odd}/own.py:net"
    named = [record_of(text, None, model.identity).spec for text in ("own.py:net", spec)]
    assert named == [spec, spec]
    assert load_model(spec).sites == model.sites
    for text in ("own.py:net", spec, "own.py:net+sae/x", "python:package:make"):
        assert specs.runs_code(text)
    for text in ("shapes", "tokens:stories.txt", "shapes+sae/x"):
        assert not specs.runs_code(text)
    assert specs.split_attached("own.py:net+sae/x") == ["own.py:net", "sae/x"]
    assert specs.split_attached(f"{spec}+sae/x") == [spec, "sae/x"]
    assert specs.split_attached(f"hf:{odd}:vision+sae/x") == [f"hf:{odd}:vision", "sae/x"]


def test_a_plus_in_a_path_is_no_separator(tmp_path: Path) -> None:
    path = tmp_path / "one+two" / "sae.safetensors"
    path.parent.mkdir()
    path.touch()
    assert specs.split_attached(f"shapes+{path}+sae/b") == ["shapes", str(path), "sae/b"]
    assert specs.split_attached(f"tl:{path.parent}+sae/b") == [f"tl:{path.parent}", "sae/b"]
    assert specs.split_key(f"{path}:train/images") == (str(path), "train/images")


def test_an_array_that_is_meant_anyway_need_not_be_named(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(
        file,
        labels=np.zeros(2),
        images=np.zeros((2, 8, 8, 3), np.uint8),
        other=np.ones((2, 8, 8, 3), np.uint8),
    )
    plain, named, other = (open_source(f"npz:{file}{key}") for key in ("", ":images", ":other"))
    assert plain.spec == named.spec == f"npz:{file}" != other.spec
    assert plain.hash == named.hash != other.hash
    assert specs.normal_data(f"npz:{file}:no") == f"npz:{file}:no"
    assert specs.normal_data("npz:/no/such.npz:images") == "npz:/no/such.npz:images"
