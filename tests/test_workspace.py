"""The workspace: names of files, and records of models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from circuits.units import Unit
from circuits.workspace import ModelRecord, Workspace

HASH = "0" * 64


def test_pictures_of_two_targets_are_two_files(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    terms = " + ".join(f"channel(conv:{i})" for i in range(20))
    letters = "\u732b" * 100  # 300 bytes
    targets = [f"{terms}{end}" for end in (" + a", " + b", "/", "%2F")] + [
        *(f"{letters}:{i}" for i in (1, 12)),
        *("conv/1:2", "conv%2F1:2", "conv:2"),
    ]
    paths = {place.picture_path(HASH, target, "64steps-512px-seed0") for target in targets}
    assert len(paths) == len(targets)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # a file system takes it
        assert path.parent == tmp_path / HASH[:16] / "pictures"


def test_a_picture_is_found_by_its_unit(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    units = [Unit("conv/1", 2), Unit("conv%2F1", 2), Unit("conv" * 100, 1), Unit("conv" * 100, 12)]
    for unit in units:
        path = place.picture_path(HASH, str(unit), "64steps-512px-seed0")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert place.pictures(HASH, unit) == [path]
    assert {unit for unit, _ in place.pictured(HASH)} == set(units[:2]), "never another unit"


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"spec": 1, "hash": 2}', "[1e999]"])
def test_a_damaged_record_of_a_model_is_named(text: str, tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    good = ModelRecord("shapes", "a" * 64)
    for record in (good, ModelRecord("cleanroom", "b" * 64)):
        place.register(record)
    (place.model_folder("b" * 64) / "model.json").write_text(text)
    assert place.models() == [good]
    (line,) = place.damaged_models()
    assert "bbbb" in line
    assert "is damaged" in line


@pytest.mark.parametrize(
    "damaged",
    [
        {"spec": "a", "hash": "../../outside"}, {"spec": "a", "hash": "e" * 64}, {"spec": "\ud800", "hash": "f" * 64},
        {"spec": "a", "hash": "f" * 64, "weights": "\udfff"}, {"spec": 1, "hash": "f" * 64}, {"spec": "a"}, [1], "a",
        {"spec": "a", "hash": "f" * 64, "weights": 0},
    ],
)  # fmt: skip
def test_a_damaged_record_is_left_out_and_the_others_are_read(
    damaged: object, tmp_path: Path
) -> None:
    place = Workspace(tmp_path)
    record = ModelRecord("cleanroom", HASH)
    place.register(record)
    folder = place.model_folder("f" * 64)
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(damaged))
    assert place.models() == [record]
