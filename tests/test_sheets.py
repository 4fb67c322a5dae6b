from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from circuits.featurevis.sheets import Sheet, find_sheets, render_sheet, sheet_name
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from tests.forked import command_line


def tiles(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("0*.webp"))}


def test_a_sheet_has_every_unit(own_net: HookedModel, tmp_path: Path) -> None:
    made = render_sheet(own_net, "relu", tmp_path / "a", steps=4)
    assert made is not None
    assert [f["unit"] for f in made.facts] == [f"relu:{i}" for i in range(8)]
    assert all(f["activation"] >= f["start_activation"] - 1e-3 for f in made.facts)
    assert all(f["model_hash"] == own_net.hash for f in made.facts)
    with Image.open(made.atlas) as atlas:
        rows = -(-8 // made.columns)
        assert atlas.size == (made.columns * made.tile[1], rows * made.tile[0])
    assert find_sheets(tmp_path) == [made] == [Sheet.open(tmp_path / "a")]


def test_a_stopped_sheet_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.featurevis.sheets.TILES_AT_ONCE", 3)
    model = load_model("cleanroom")
    whole = render_sheet(model, "line", tmp_path / "whole", steps=3, size=32)
    assert whole is not None
    stopped = render_sheet(
        model, "line", tmp_path / "parts", steps=3, size=32, progress=lambda done, n: done < 5
    )
    assert stopped is None
    kept = tiles(tmp_path / "parts")
    assert len(kept) == 6
    ages = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("0*.webp")}
    render_sheet(model, "line", tmp_path / "parts", steps=3, size=32)
    assert tiles(tmp_path / "parts") == tiles(tmp_path / "whole")
    for name, age in ages.items():
        assert (tmp_path / "parts" / name).stat().st_mtime_ns == age, "not made again"


def test_a_killed_sheet_goes_on(tmp_path: Path) -> None:
    words = (
        f"visualize shapes conv2d2 --sheet --steps 10 --size 48 --out {tmp_path / 'sheet'}".split()
    )
    process = command_line(*words)
    deadline = time.monotonic() + 120
    while len(tiles(tmp_path / "sheet")) < 16 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    before = tiles(tmp_path / "sheet")
    assert 16 <= len(before) < 64
    assert command_line(*words).wait() == 0
    after = tiles(tmp_path / "sheet")
    assert len(after) == 64
    assert before.items() <= after.items()
    assert Sheet.open(tmp_path / "sheet").columns == 8


def test_each_way_has_a_folder_of_its_own(own_net: HookedModel) -> None:
    names = {
        sheet_name(own_net, "relu", steps=4), sheet_name(own_net, "relu", steps=5),
        sheet_name(own_net, "relu", negative=True, steps=4), sheet_name(own_net, "stem", steps=4),
    }  # fmt: skip
    assert len(names) == 4


def test_sheets_of_nothing_are_named(
    own_net: HookedModel, bridge: HookedModel, tmp_path: Path
) -> None:
    with pytest.raises(KeyError, match="unknown site"):
        render_sheet(own_net, "relo", tmp_path)
    with pytest.raises(ValueError, match="takes tokens"):
        render_sheet(bridge, "hook_unembed", tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished sheet"):
        Sheet.open(tmp_path)
    (tmp_path / "sheet.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        Sheet.open(tmp_path)
    assert list(tmp_path.glob("*.webp")) == []
