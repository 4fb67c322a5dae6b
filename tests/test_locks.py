from __future__ import annotations

import errno
import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from circuits import locks
from circuits.files import replacing
from circuits.locks import Holder, held, is_held
from tests.forked import Forked

ERRORS = [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS]

WITHOUT = """
import fcntl
def refused(*_):
    raise OSError(37, "No locks available")
fcntl.flock = refused
"""
"""What makes a process one on a file system without locks."""

_HOLDS = """
import sys, time
from pathlib import Path
from circuits.locks import held
with held(Path(sys.argv[1]), "taken"):
    Path(sys.argv[2]).touch()
    time.sleep(60)
"""

_COUNTS = """
import sys
from pathlib import Path
from circuits.locks import held
count = Path(sys.argv[2])
for _ in range(20):
    with held(Path(sys.argv[1]), "taken", 60.0):
        count.write_text(str(int(count.read_text()) + 1))
"""


@pytest.fixture(params=["kernel", *ERRORS])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The code with which processes begin: there are locks of the kernel, or none."""
    if request.param == "kernel":
        return ""

    def refused(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refused)
    return WITHOUT.replace("37", str(request.param))


def _until(there: Path) -> None:
    until = time.monotonic() + 60
    while not there.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_holds_it_and_who_is_killed_does_not(before: str, tmp_path: Path) -> None:
    lock, there = tmp_path / "lock", tmp_path / "there"
    assert not is_held(lock)
    process = Forked(before + _HOLDS, lock, there)
    _until(there)
    assert is_held(lock)
    said = rf"^taken \(process {process.pid}\)$" if before else "^taken$"
    with pytest.raises(BlockingIOError, match=said), held(lock, "taken", 0.1):
        raise AssertionError
    process.kill()
    assert not is_held(lock)
    with held(lock, "taken") as handle:
        os.write(handle, b"5")
        assert is_held(lock)
        with pytest.raises(BlockingIOError), held(lock, "taken", 0.1):
            raise AssertionError("the same process, in another thread, say")
    assert not is_held(lock)
    assert lock.read_bytes() == b"5"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "there"], "no record is left"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_no_lock(kind: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    make = {
        "link": lambda: lock.symlink_to(tmp_path / "outside"),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }
    make[kind]()
    with pytest.raises(ValueError, match="is no regular file"), held(lock, "taken"):
        raise AssertionError
    with pytest.raises(ValueError, match="is no regular file"):
        is_held(lock)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_is_counted_by_several_is_all_there(before: str, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    started = [Forked(before + _COUNTS, tmp_path / "lock", count) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert count.read_text() == "60"


def test_tidy_leaves_nothing_if_nothing_was_written(before: str, tmp_path: Path) -> None:
    for name, kept in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        with held(tmp_path / name / ".lock", "taken", tidy=True):
            if kept:
                (tmp_path / name / "result").touch()
        assert (tmp_path / name).exists() == kept


@pytest.mark.parametrize("again", [False, True])
def test_a_file_that_its_last_holder_removes_meanwhile_is_no_lock(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, the last holder removes it, and perhaps another process makes it."""
    path, lock, taken = tmp_path / "lock", fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not taken:
            path.unlink()
            if again:
                path.touch()
        taken.append(handle)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with held(path, "taken") as handle:
        assert len(taken) == 2, "the lock of the removed file was let go"
        assert os.path.samestat(path.stat(), os.fstat(handle))
        with path.open("rb") as other, pytest.raises(BlockingIOError):
            lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_record_that_is_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks of the kernel, the last holder's tidying may take the record that a process has just made."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    made: list[Path] = []
    announce = locks._announce

    def lost(path: Path, holder: Holder) -> Path:
        made.append(announce(path, holder))
        if len(made) == 1:
            made[0].unlink()
        return made[-1]

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(locks, "_announce", lost)
    with held(tmp_path / "lock", "taken"):
        assert [p.exists() for p in made] == [False, True]


def test_another_machine_is_believed_until_it_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, me = tmp_path / "lock", Holder.of(os.getpid())
    elsewhere = replace(me, host="node7", machine="0" * 8)
    record = tmp_path / f"lock~{elsewhere}~1"
    record.touch()
    said = (
        rf"^taken \(process {me.pid} on 'node7', which cannot be seen from here: if it has ended, set "
        r"CIRCUITS_TAKE_OVER=node7\)$"
    )
    with pytest.raises(BlockingIOError, match=said), held(lock, "taken", 0.0):
        raise AssertionError
    assert (is_held(lock), is_held(lock, unknown=False)) == (True, False)
    monkeypatch.setenv("CIRCUITS_TAKE_OVER", "node8")
    with pytest.raises(BlockingIOError), held(lock, "taken", 0.0):
        raise AssertionError
    monkeypatch.setenv("CIRCUITS_TAKE_OVER", "node7")
    with held(lock, "taken", 0.0):
        assert not record.exists()


def test_who_lives() -> None:
    me = Holder.of(os.getpid())
    assert Holder.parse(str(me)) == me
    assert me.lives() is True
    assert replace(me, started=me.started + 1).lives() is False, "the number is another's by now"
    assert replace(me, boot="0" * 8).lives() is False, "the machine has been started since"
    assert replace(me, space="0" * 8).lives() is None, "another container"
    assert replace(me, machine="0" * 8, boot="0" * 8).lives() is None
    assert Holder.of(os.getpgrp(), "g").lives() is True


def test_a_group_lives_as_long_as_one_of_its_processes(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
os.setsid()
if os.fork() == 0:
    time.sleep(60)
Path(sys.argv[1]).touch()
time.sleep(60)
"""
    process = Forked(code, tmp_path / "there")
    _until(tmp_path / "there")
    one, group = Holder.of(process.pid), Holder.of(process.pid, "g")
    process.kill()
    assert (one.lives(), group.lives()) == (False, True)
    os.killpg(process.pid, 9)
    until = time.monotonic() + 10
    while group.lives():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_temporary_files_of_other_machines_are_left_for_a_week(tmp_path: Path) -> None:
    elsewhere = replace(Holder.of(os.getpid()), machine="0" * 8)
    left = tmp_path / f".a.txt.{elsewhere}.x.tmp"
    for age, there in ((3600, True), (8 * 24 * 3600, False)):
        left.touch()
        written = time.time() - age
        os.utime(left, (written, written))
        with replacing(tmp_path / "a.txt"):
            pass
        assert left.exists() == there
