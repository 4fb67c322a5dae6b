"""Reports of claims: read as they were written, and the exit code of `circuits verify`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from circuits.claims import ClaimFile, Quantity, Region, Report, read_claims, write_claims
from circuits.claims.drawing import interval_svg
from circuits.claims.report import page, read_report, write_report
from circuits.cli.main import run
from tests import canned
from tests.test_claim_files import changed, written


@pytest.fixture
def file(tmp_path: Path) -> ClaimFile:
    claims = [
        {"name": name, "claim": "sufficient", "test": "faithfulness", "with": {"least": 0.8}}
        for name in ("first", "second", "third")
    ]
    return read_claims(written(tmp_path, changed(claims=claims)))


def test_a_report_is_read_as_it_was_written(file: ClaimFile, tmp_path: Path) -> None:
    report = canned.claims_report(file)
    write_report(report, tmp_path)
    again = read_report(tmp_path / "report.json")
    assert again.to_dict() == report.to_dict()
    assert again.file == file
    assert page(again) == page(report)
    (unknown,) = again.judged[2].measured.quantities
    assert math.isnan(unknown.low)
    assert unknown.region == Region(high=0.1)
    assert again.judged[1].registration == report.judged[1].registration


@pytest.mark.parametrize(
    "change",
    [
        {"claims": []}, {"claims": None}, {"file": {}}, {"model_hash": 3}, {"verdict": "fine"}, {"name": "other"},
        {"why": None}, {"measured": {}}, {"earlier": [1]}, {"registered": 1},
    ],
    ids=str,
)  # fmt: skip
def test_other_reports_are_refused_in_one_line(
    change: dict[str, Any], file: ClaimFile, tmp_path: Path
) -> None:
    raw = canned.claims_report(file).to_dict()
    (raw["claims"][0] if raw.keys().isdisjoint(change) else raw).update(change)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="is none that this version of circuits wrote") as error:
        read_report(path)
    assert str(error.value).startswith(f"report {str(path)!r}")
    assert "\n" not in str(error.value)


def test_the_interval_is_drawn_over_the_claimed_region() -> None:
    """Worked out by hand: from 0 to 1, with 15 % on both sides, over 220 - 2 * 8 pixels."""
    q = Quantity("x", 0.5, 0.25, 0.75, Region(0.0, 1.0), 0.01, 1.0)
    region, interval, value = ElementTree.fromstring(interval_svg(q))
    assert (region.attrib["x"], region.attrib["width"]) == ("31.5", "157.0")
    assert (interval.attrib["x1"], interval.attrib["x2"]) == ("70.8", "149.2")
    assert value.attrib["cx"] == "110.0"
    nothing = Quantity("x", math.nan, math.nan, math.nan, Region(high=0.0), math.nan, math.nan)
    assert len(ElementTree.fromstring(interval_svg(nothing))) == 1


def test_exit_zero_says_only_that_all_was_looked_at(
    file: ClaimFile, tmp_path: Path, monkeypatch, capsys
) -> None:
    path = tmp_path / "claims.yaml"
    write_claims(path, file)
    monkeypatch.setattr(
        "circuits.cli.verifying.verified", lambda *_, **__: canned.claims_report(file)
    )
    at = ["verify", str(path), "--workspace", str(tmp_path / "ws")]
    assert run(at) == 1
    assert run([*at, "--exit-zero"]) == 0
    made = read_report(tmp_path / "ws" / "claims" / "a-story" / "report.json")
    assert isinstance(made, Report)
    assert made.exit_code == 1
    path.write_text("nothing")
    assert run([*at, "--exit-zero"]) == 2
