from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from circuits.files import replacing

_KILLED = """
import os, signal
from pathlib import Path
from circuits.files import replacing
with replacing(Path({path!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.write_text("before")
    run = subprocess.run([sys.executable, "-c", _KILLED.format(path=str(path))], check=False)
    assert run.returncode == -9
    (left,) = tmp_path.glob(".*.tmp")
    assert (path.read_text(), left.read_text()) == ("before", "half")
    os.utime(left, (1, 1))
    with replacing(path) as mine:
        assert not left.exists()
        os.utime(mine, (1, 1))  # old, but held
        with replacing(path) as other:
            other.write_text("second")
        mine.write_text("first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_where_no_file_can_be_made_the_one_asked_for_is_named() -> None:
    with pytest.raises(OSError, match=r"'/proc/x\.png'"), replacing(Path("/proc/x.png")):
        pass
