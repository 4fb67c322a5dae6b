"""The fuzzer of hostile inputs sees what it is there to see, and finds nothing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import hostile

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ws").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


WATCHED: list[hostile.Watcher] = []


def _watcher(folder: Path) -> hostile.Watcher:
    """One audit hook for the process: hooks cannot be removed."""
    if not WATCHED:
        WATCHED.append(hostile.Watcher(()))
        sys.addaudithook(WATCHED[0])
    WATCHED[0].allowed = (str(folder / "ws"), str(folder / "out"))
    return WATCHED[0]


def _connect() -> None:
    import socket

    with socket.socket() as one:
        one.settimeout(0.01)
        one.connect_ex(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (lambda folder: (folder / "elsewhere").write_text("x"), "open "),
        (lambda folder: os.rename(folder / "mine", folder / "yours"), "os.rename"),
        (lambda folder: (folder / "mine").unlink(), "os.remove"),
        (lambda folder: _connect(), "socket.connect"),
        (lambda folder: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (lambda folder: (folder / "ran").write_text("evil.py"), "code ran"),
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: (folder / "ws" / "x").write_text("x"), ""),
    ],
)
def test_what_must_not_happen_is_seen(
    folder: Path, does: Callable[[Path], object], said: str
) -> None:
    (folder / "mine").write_text("x")
    one = hostile.Input(0, [], "upload", "planted", lambda: does(folder))
    _, found = hostile.faults(one, folder, _watcher(folder))
    assert any(said in f for f in found) if said else not found, found


def test_a_number_makes_the_same_input_each_time(folder: Path) -> None:
    lines = [hostile.words_of(line) for line in hostile.LINES.strip().splitlines()]
    made = [hostile.replaced(random.Random(f"0 {i}"), lines[i % len(lines)], i) for i in range(99)]
    again = [hostile.replaced(random.Random(f"0 {i}"), lines[i % len(lines)], i) for i in range(99)]
    assert made == again
    assert all(one.words != lines[i % len(lines)] for i, one in enumerate(made))


@pytest.mark.nightly
def test_hostile_inputs_do_no_harm() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/hostile.py", "--n", "400", "--seed", "2"],
        cwd=ROOT, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["inputs"] == 400
