"""Files of names: as they were written, and into a workspace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from circuits.concepts import (
    Name,
    import_names,
    name_unit,
    names_of,
    read_names,
    shipped_names,
    write_names,
)
from circuits.database import Database
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.units import Unit

NAMES = (
    Name(
        Unit("curve", 3), "curves at 15°", 0.9, 0.01, True, float("nan"), "a study", {"peak": 2.0}
    ),
    Name(Unit("line", 0), "lines", 1.0, float("nan"), True, 1.0, "a study", {}),
)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model("cleanroom")


@pytest.fixture
def path(model: HookedModel, tmp_path: Path) -> Path:
    write_names(tmp_path / "x.json", model, NAMES, "by hand")
    return tmp_path / "x.json"


def test_what_is_written_is_read(model: HookedModel, path: Path) -> None:
    found = read_names(path)
    assert (found.model, found.model_hash, found.about) == ("cleanroom", model.hash, "by hand")
    assert [repr(n) for n in found.names] == [repr(n) for n in NAMES]  # NaN is not equal to itself


def test_names_go_into_a_workspace_once_and_leave_those_of_people_alone(
    model: HookedModel, path: Path, tmp_path: Path
) -> None:
    database = Database(tmp_path / "workspace.db")
    name_unit(database, model.hash, Unit("line", 0), "my own")
    saved = import_names(database, model, path, "from a file")
    assert [r.name for r in saved] == ["curve:3"]
    known = names_of(database, model.hash)
    assert {u: r.body["text"] for u, r in known.items()} == {
        "line:0": "my own",
        "curve:3": "curves at 15°",
    }
    assert known["curve:3"].body["evidence"] == {"peak": 2.0}
    assert known["curve:3"].author == "a study"
    assert import_names(database, model, path) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"circuits_names": 2}, "no field 'circuits_names' of value 1"),
        ({"about": 3}, "must be texts"),
        ({"names": [{"unit": "line:0"}]}, "must have the fields unit, text"),
        (
            {"names": [{**NAMES[1].to_dict(), "p_value": "low"}]},
            "'lines' has a field of another type",
        ),
        ({"names": [NAMES[0].to_dict() | {"chosen": None}] * 2}, "unit curve:3 is named twice"),
    ],
)
def test_what_is_no_file_of_names_is_refused(path: Path, change: dict, said: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change).replace("NaN", "null"))
    with pytest.raises(ValueError, match=said) as error:
        read_names(path)
    assert str(path) in str(error.value)


def test_names_of_another_model_or_unit_are_refused(
    model: HookedModel, path: Path, tmp_path: Path
) -> None:
    database = Database(tmp_path / "workspace.db")
    other = json.loads(path.read_text()) | {"model_hash": "0" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"is of cleanroom .*, not of cleanroom"):
        import_names(database, model, tmp_path / "other.json")
    write_names(path, model, [replace(NAMES[0], unit=Unit("curve", 999))], "")
    with pytest.raises(ValueError, match="999"):
        import_names(database, model, path)
    with pytest.raises(FileNotFoundError, match="no names file ships for model 'cleanroom'"):
        import_names(database, model)
    assert names_of(database, model.hash) == {}


def test_names_that_ship_are_of_their_model_with_evidence(tmp_path: Path) -> None:
    model = load_model("efficientnet-lite0")
    path = shipped_names(model)
    assert path is not None
    found = read_names(path)
    assert len(found.names) >= 40
    for name in found.names:
        assert not name.unit.site.endswith("_pre_relu")
        assert {"by", "measured_at", "best_photographs", "zeroed"} <= name.evidence.keys()
    saved = import_names(Database(tmp_path / "workspace.db"), model)
    assert len(saved) == len(found.names)
