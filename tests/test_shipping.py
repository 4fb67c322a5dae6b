"""Pictures that come with the package."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from circuits.featurevis import shipping
from circuits.featurevis.pictures import read_facts
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import open_picture
from circuits.workspace import Workspace


def test_what_is_made_is_unpacked_and_found_as_any_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "BUILTIN", tmp_path)
    model, place = load_model("shapes"), Workspace(tmp_path / "w")
    assert shipping.unpack(model, place) == 0
    made = (
        shipping.Batch("mixed3b", range(200, 202), 32, 2),
        shipping.Batch("conv2d0", range(1), 16, 1),
    )
    seen: list[tuple[int, int]] = []
    shipping.make(model, made, shipping.archive("shapes"), 3, lambda n, of: seen.append((n, of)))
    assert seen == [(2, 3), (3, 3)]
    first = shipping.archive("shapes").read_bytes()
    # Again: nothing is made that is there.
    monkeypatch.setattr(shipping, "visualize_units", None)
    shipping.make(model, made, shipping.archive("shapes"), 3)
    assert shipping.archive("shapes").read_bytes() == first
    lines = shipping.archive("shapes").with_suffix(".log.jsonl").read_text().splitlines()
    assert [json.loads(line)["site"] for line in lines] == ["mixed3b", "conv2d0"]

    assert shipping.unpack(model, place) == 3
    units = [str(unit) for unit, _ in place.pictured(model.hash)]
    assert units == ["mixed3b:200", "mixed3b:201", "conv2d0:0"]
    (path,) = place.pictures(model.hash, model.unit("mixed3b:201"))
    assert path.name == "mixed3b:201-2steps-32px-seed3.webp"
    facts = read_facts(path)
    assert (facts["unit"], facts["seed"], facts["model_hash"]) == ("mixed3b:201", 3, model.hash)
    with open_picture(path) as picture:
        assert picture.size == (shipping.TILE, shipping.TILE)
    path.unlink()
    other = place.pictures(model.hash, model.unit("mixed3b:200"))[0]
    other.write_bytes(b"changed by a person")
    assert shipping.unpack(model, place) == 3
    assert path.exists()
    assert other.read_bytes() == b"changed by a person"


def test_pictures_of_other_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "BUILTIN", tmp_path)
    with zipfile.ZipFile(shipping.archive("shapes"), "w") as file:
        file.comment = b"0123456789abcdef0123"
    with pytest.raises(ValueError, match="are of weights 0123456789abcdef, not of"):
        shipping.unpack(load_model("shapes"), Workspace(tmp_path / "w"))


def test_the_pictures_of_the_package_are_of_its_network(tmp_path: Path) -> None:
    model = load_model("efficientnet-lite0")
    assert shipping.unpack(model, Workspace(tmp_path)) >= 500
    assert shipping.archive(model.name).stat().st_size <= 3_000_000
    found = {unit.site for unit, _ in Workspace(tmp_path).pictured(model.hash)}
    assert found == {batch.site for batch in shipping.SHIPPED[model.name]}
