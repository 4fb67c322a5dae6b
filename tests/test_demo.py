from __future__ import annotations

import time
from pathlib import Path

import pytest

from circuits import demo
from circuits.harvesting import find_stores
from circuits.workspace import Workspace


@pytest.fixture
def small(monkeypatch) -> None:
    """The same demo on fewer sites, units and steps."""
    plans = (
        demo.Plan("cleanroom", ("curves",), ("line",), (("line", range(3)),)),
        demo.Plan("induction", ("repeats",), ("blocks.1.attn.hook_z",)),
    )
    monkeypatch.setattr(demo, "PLANS", plans)
    monkeypatch.setattr(demo, "PICTURE_STEPS", 2)


def test_builds_once_and_then_reuses(small, tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    seen: list[tuple[int, int]] = []
    rows = demo.build(place, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [r.model for r in rows] == ["cleanroom", "cleanroom", "induction"]
    assert all(Path(row.where).exists() for row in rows)
    (record,) = [r for r in place.models() if r.spec == "cleanroom"]
    assert [s.provenance.data for s in find_stores(place, record.hash)] == ["curves"]
    pictures = list((tmp_path / record.hash[:16] / "pictures").glob("*.png"))
    assert len(pictures) == 3

    start = time.monotonic()
    assert demo.build(place) == rows
    assert time.monotonic() - start < 5


def test_rebuilds_what_was_deleted(small, tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    demo.build(place)
    (record,) = [r for r in place.models() if r.spec == "cleanroom"]
    picture = next((tmp_path / record.hash[:16] / "pictures").glob("line:1-*.png"))
    picture.unlink()
    (tmp_path / "demo.json").write_text("{")
    demo.build(place)
    assert picture.exists()


def test_plans_name_sites_that_exist() -> None:
    from circuits.models.loading import load_model

    for plan in demo.PLANS:
        model = load_model(plan.model)
        for site in plan.sites:
            assert model.site(site)
        for site, units in plan.pictured:
            assert model.site(site).unit(units[-1])
