"""The package as it is installed: the wheel alone, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.mark.nightly
def test_the_wheel_runs_the_demo_and_a_case_away_from_the_checkout(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        str(tmp_path / "dist"),
    ]
    subprocess.run(build, cwd=PROJECT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "installed")
    away = tmp_path / "away"
    away.mkdir()

    def circuits(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "circuits", *words],
            cwd=away,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert circuits("--version").startswith("circuits ")
    assert "cleanroom" in circuits("demo", "--no-serve", "--workspace", "w")
    assert "report.html" in circuits("case", "curve-detector", "--fast", "--workspace", "w")
    assert (away / "w/cases/curve-detector/report.html").is_file()
