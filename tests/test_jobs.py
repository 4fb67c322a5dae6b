"""Work in the background: real processes.

A new Python takes seconds to import everything. One job is started as it always is; for others the test's own
process is forked, see `Forked`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, NoReturn

import pytest
import torch

import circuits.jobs
from circuits.cli import output
from circuits.cli.main import run
from circuits.environment import PROGRESS
from circuits.harvesting import kernels
from circuits.jobs import Job, cancel, job, jobs, log_of, remove, start
from circuits.workspace import Workspace

_DATA = """
import time
from pathlib import Path
import torch
from circuits.stimuli.images import ImageSource

def image(i):
    if Path(__file__).with_name("slow").exists():
        time.sleep(0.05)
    return torch.full((3, 64, 64), i / 200)

def images():
    return ImageSource("own", tuple(map(str, range(192))), "5" * 64, image)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Iterator[Workspace]:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "ws"))
    made = Workspace(tmp_path / "ws")
    yield made
    hurried = ((signal.SIGINT, 0.3), (signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0))
    monkeypatch.setattr(circuits.jobs, "PATIENCE", hurried)
    for one in jobs(made):
        cancel(one)
    left = [_processes(path.parent) for path in made.root.glob("jobs/*/lock")]
    assert not any(left), "nothing is left behind"


@pytest.fixture
def harvest(tmp_path: Path) -> list[str]:
    """A harvest that takes long, as long as there is a file `slow`."""
    (tmp_path / "own.py").write_text(_DATA)
    (tmp_path / "slow").touch()
    data = f"python:{tmp_path / 'own.py'}:images"
    return ["harvest", "cleanroom", "--data", data, "--sites", "line", "--workers", "2"]


@pytest.fixture
def idle(tmp_path: Path, monkeypatch) -> Path:
    """What is started instead of Python: does nothing until it is ended."""
    script = tmp_path / "idle"
    script.write_text("#!/bin/sh\nwhile :; do sleep 0.1; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


class Forked:
    """Stands in for the `subprocess.Popen` of a job: a fork of this process, which has imported everything.

    What Popen is asked to do it does: a session of its own, streams, environment, and no files but those passed on.
    """

    def __init__(
        self, command: Sequence[str], *, stdin: int, stdout: BinaryIO, stderr: BinaryIO, env: Mapping[str, str],
        start_new_session: bool, pass_fds: Sequence[int],
    ) -> None:  # fmt: skip
        assert list(command[:-1]) == [sys.executable, "-P", "-m", "circuits.jobs"]
        assert stdin == subprocess.DEVNULL
        assert start_new_session
        with warnings.catch_warnings():
            # from Python 3.12: the child needs nothing that another thread of this process might hold
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            os.setsid()
            streams = os.open(os.devnull, os.O_RDONLY), stdout.fileno(), stderr.fileno()
            self._become(Path(command[-1]), streams, env, pass_fds)

    def _become(
        self, folder: Path, streams: Sequence[int], env: Mapping[str, str], kept: Sequence[int]
    ) -> NoReturn:
        """Be the job's process from here on; nothing of pytest's may run or be ended here."""
        code = 1
        try:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for number in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *kept}:
                with suppress(OSError):  # the one that listed them is closed already
                    os.close(number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ.clear()
            os.environ.update(env)
            warnings.resetwarnings()
            torch.set_num_threads(1)  # a forked process has no other threads
            circuits.jobs._run(folder)
            code = 0
        except SystemExit as end:  # the verb's process, forked once more
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> int:
        return os.waitpid(self.pid, 0)[1]


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are forked, once what a harvest needs is loaded."""
    kernels.prepare()
    known = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(circuits.jobs, "subprocess", known)


def _processes(folder: Path) -> list[int]:
    """All processes of a job: those of its process group that have not ended."""
    group = (folder / "lock").read_text()
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended just now
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if pgrp == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def _until(true: Callable[[Job], bool], one: Job, place: Workspace) -> Job:
    """A job once it is as wanted."""
    until = time.monotonic() + 60
    while not true(one):
        assert time.monotonic() < until, f"{one}\n{log_of(one)}"
        time.sleep(0.05)
        one = job(place, one.id)
    return one


def _ended(one: Job) -> bool:
    return one.state != "running"


def _folder(place: Workspace, id: str = "20260101-000000-000000", **files: str) -> Path:
    """A job's folder, made by hand."""
    folder = place.root / "jobs" / id
    folder.mkdir(parents=True)
    asked = {"argv": ["tune", "shapes"], "title": "Tuning", "started": "2026-01-01T00:00:00+00:00"}
    (folder / "job.json").write_text(json.dumps(asked))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.fixture(params=["kernel", "none"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system with the kernel's locks, and on one without."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "none":
        monkeypatch.setattr(fcntl, "flock", refused)


@contextmanager
def _held(folder: Path, content: str) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        lock.write(content)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(argv: list[str], said: Path) -> None:
    with said.open("w") as file, redirect_stdout(file):
        sys.exit(run(["jobs", "start", "--json", *argv]))


def test_a_job_outlives_its_starter_is_cancelled_and_goes_on(
    locks: None, place: Workspace, harvest: list[str], forking: None, tmp_path: Path
) -> None:
    starter = get_context("fork").Process(target=_start, args=(harvest, tmp_path / "said"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as in `Forked`
        starter.start()
    starter.join()
    assert starter.exitcode == 0
    first = job(place, json.loads((tmp_path / "said").read_text())["id"])
    assert (first.state, first.argv) == ("running", tuple(harvest))
    assert start(place, harvest).id == first.id, "the same runs already"
    first = _until(lambda one: one.done >= 16, first, place)
    assert (first.state, first.total) == ("running", 192)
    assert first.message == f"harvest cleanroom on {harvest[3]}"
    assert len(_processes(first.folder)) == 4  # its own, the verb, two workers
    with pytest.raises(BlockingIOError, match=f"job {first.id} is running: it has to end first"):
        remove(first)

    first = cancel(first)
    assert (first.state, _processes(first.folder)) == ("cancelled", [])
    assert first.message == "circuits: stopped; run the same command again to go on"
    assert 16 <= first.done < 192
    assert cancel(first) == first
    made = {path: path.stat().st_mtime_ns for path in place.root.glob("*/*/*/shard-*.h5")}
    assert made

    (tmp_path / "slow").unlink()
    second = _until(_ended, start(place, harvest), place)
    assert (second.state, second.done, second.total) == ("done", 192, 192), log_of(second)
    assert "192 examples" in log_of(second)
    assert all(path.stat().st_mtime_ns == at for path, at in made.items()), "it went on"
    assert list(place.root.glob("*/*/*/statistics.h5"))
    assert [one.id for one in jobs(place)] == [second.id, first.id]
    remove(first)
    assert jobs(place) == [second]


def test_two_at_once_of_which_one_fails_and_one_is_killed(
    locks: None,
    place: Workspace,
    harvest: list[str],
    forking: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = start(place, harvest, title="Long")
    monkeypatch.setattr(circuits.jobs, "subprocess", subprocess)  # the other is a new Python
    failed = start(place, ["tune", "shapes", "mixd3b"])
    assert {killed.state, failed.state} == {"running"}
    assert (killed.title, failed.title) == ("Long", "tune shapes mixd3b")
    assert [one.id for one in jobs(place)] == [failed.id, killed.id]

    killed = _until(lambda one: one.total > 0, killed, place)
    group = int((killed.folder / "lock").read_text())
    os.kill(group, signal.SIGKILL)  # its own process: the verb goes on
    time.sleep(0.2)
    assert job(place, killed.id).state == "running"
    os.killpg(group, signal.SIGKILL)
    killed = _until(_ended, killed, place)
    assert killed.state == "lost"
    assert cancel(killed).state == "lost"

    failed = _until(_ended, failed, place)
    assert failed.state == "failed"
    assert failed.message.startswith("circuits: unknown site of shapes 'mixd3b': did you mean")


def test_removing_a_job_leaves_what_is_not_its_own(place: Workspace, tmp_path: Path) -> None:
    folder = _folder(place, log="said", notes_txt="mine")
    (found,) = jobs(place)
    remove(found)
    assert jobs(place) == []
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    elsewhere = _folder(Workspace(tmp_path / "elsewhere"))
    folder.with_name("20260101-000000-000001").symlink_to(elsewhere)
    assert jobs(place) == [], "a link's target is not the workspace's"


def test_a_folder_of_jobs_that_a_link_leads_to_is_left_alone(
    place: Workspace, tmp_path: Path
) -> None:
    folder = _folder(place, log="said")
    (found,) = jobs(place)
    (place.root / "jobs").rename(tmp_path / "outside")
    (place.root / "jobs").symlink_to(tmp_path / "outside")
    assert jobs(place) == []
    for act in (lambda: remove(found), lambda: start(place, ["tune", "shapes"])):
        with pytest.raises(ValueError, match="or a symbolic link leads to it"):
            act()
    left = sorted(path.name for path in (tmp_path / "outside").rglob("*"))
    assert left == [folder.name, "job.json", "log"]


def test_the_same_started_at_once_is_one_job(place: Workspace, idle: Path) -> None:
    asked = [["tune", "shapes"]] * 6 + [["tune", str(i)] for i in range(6)]
    with ThreadPoolExecutor(len(asked)) as pool:
        started = list(pool.map(lambda argv: start(place, argv), asked))
    assert len({one.id for one in started[:6]}) == 1
    assert len({one.id for one in started}) == len(jobs(place)) == 7


def test_what_does_not_listen_is_killed(place: Workspace, idle: Path, monkeypatch) -> None:
    idle.write_text("#!/bin/sh\ntrap 'echo no' INT TERM\necho ready\n" + idle.read_text())
    patience = ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGKILL, 5.0))
    monkeypatch.setattr(circuits.jobs, "PATIENCE", patience)
    one = _until(lambda one: one.message == "ready", start(place, ["tune", "shapes"]), place)
    assert cancel(one).state == "cancelled"
    assert "no" in log_of(one).splitlines()


def test_a_job_is_cancelled_before_it_has_begun(place: Workspace) -> None:
    first = start(place, ["demo", "--no-serve"])
    assert cancel(first).state == "cancelled"
    assert not _processes(first.folder)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "verb '' cannot run as a job: expected one of harvest, visualize, sae"),
        (["harvst", "x"], "verb 'harvst' cannot run as a job: did you mean harvest? expected one"),
        (["app"], "verb 'app' cannot run as a job"),
        (["--help"], "verb '--help' cannot run as a job"),
        (["v" * 9999], f"verb '{'v' * 59}…' cannot run as a job"),
        (["tune", "a\nb"], r"argument 'a\nb' of job tune is not printable: expected text in one"),
        (["tune", "\ud800"], r"argument '\ud800' of job tune is not printable"),
    ],
)
def test_what_cannot_run_is_refused(argv: list[str], message: str, place: Workspace) -> None:
    with pytest.raises(ValueError) as caught:
        start(place, argv)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not place.root.exists()


def test_a_title_is_one_line(place: Workspace) -> None:
    with pytest.raises(ValueError, match=r"title 'a.nb' of job tune is not printable"):
        start(place, ["tune", "shapes"], "a\nb")


def test_nothing_is_left_of_a_job_that_cannot_be_started(place: Workspace, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(place.root / "no-python"))
    with pytest.raises(FileNotFoundError, match="no-python"):
        start(place, ["tune", "shapes"])
    assert [path.name for path in (place.root / "jobs").iterdir()] == [".lock"]


@pytest.mark.parametrize("id", ["", "../x", "/", ".", "x" * 9999, "20260101-000000-00000١", "a\0b"])
def test_ids_are_no_paths(id: str, place: Workspace) -> None:
    with pytest.raises(KeyError, match="the workspace has none"):
        job(place, id)
    _folder(place)
    with pytest.raises(KeyError, match=r"unknown job '.*': .*20260101-000000-000000"):
        job(place, id)


@pytest.mark.parametrize(
    ("result", "state"),
    [
        ('{"code": 0, "cancelled": false}', "done"),
        ('{"code": 0, "cancelled": true}', "done"),  # it was too late
        ('{"code": 2, "cancelled": false}', "failed"),
        ('{"code": -9, "cancelled": false}', "failed"),
        ('{"code": null, "cancelled": true}', "cancelled"),
        ("[]", "lost"),
        ("", "lost"),
    ],
)
def test_states(result: str, state: str, place: Workspace) -> None:
    _folder(place, result_json=result, progress='{"what": "tune", "done": 3, "total": 8}')
    (found,) = jobs(place)
    assert (found.state, found.done, found.total, found.message) == (state, 3, 8, "tune")


def test_a_damaged_record_is_listed_as_such(place: Workspace) -> None:
    assert jobs(place) == []
    good = _folder(place, progress="{", log="a\nb\n")
    place.root.joinpath("jobs", "notes").mkdir()
    texts = ("", "{}", "[]", '{"argv": [1], "title": "", "started": ""}', "[" * 100_000, "[1e999]")
    for n, text in enumerate(texts, 1):
        (_folder(place, f"20260101-000000-00000{n}") / "job.json").write_text(text)
    *bad, found = sorted(jobs(place), key=lambda job: job.folder == good)
    assert [job.state for job in bad] == ["damaged"] * len(texts)
    assert all(job.message and "\n" not in job.message for job in bad)
    remove(bad[0])
    assert bad[0].id not in {job.id for job in jobs(place)}
    assert (found.folder, found.state, found.done, found.total) == (good, "lost", 0, 0)
    assert (found.argv, found.title, found.message) == (("tune", "shapes"), "Tuning", "b")


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_what_is_no_file_is_not_read(kind: str, place: Workspace, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    make: Mapping[str, Callable[[Path], None]] = {
        "pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir,
        "link": lambda path: path.symlink_to(tmp_path / "secret"),
    }  # fmt: skip
    make[kind](_folder(place) / "log")
    locked = _folder(place, "20260101-000000-000001")
    make[kind](locked / "lock")
    damaged, lost = jobs(place)
    assert (lost.state, damaged.state) == ("lost", "damaged")
    assert all(one.message.endswith("is no regular file") for one in (damaged, lost))
    assert log_of(lost) == lost.message
    for act in (cancel, remove):
        with pytest.raises(ValueError, match="is no regular file"):
            act(damaged)
    shutil.rmtree(locked)  # or the fixture would look for its processes


def test_the_log_is_plain(place: Workspace) -> None:
    lines = [
        "first", "\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x1b\\",
        "10 %\r50 %\r100 %\r", "a\tb\x00\x08c\u202e", "", "",
    ]  # fmt: skip
    folder = _folder(place)
    (found,) = jobs(place)
    assert (log_of(found), found.message) == ("", "")
    (folder / "log").write_bytes("\n".join(lines).encode() + b"\xff\n\n")
    assert log_of(found) == "first\nred link\n100 %\na\tbc\n\n\ufffd"
    assert log_of(found, 1) == "\ufffd"
    with pytest.raises(ValueError, match="lines 0 must be at least 1"):
        log_of(found, 0)
    (folder / "log").write_text("x" * 10**6 + "\nlast")
    assert log_of(found, 1) == "last"


@pytest.mark.parametrize("group", ["", "0", "1", "-1", "what"])
def test_only_its_own_processes_are_signalled(group: str, place: Workspace, monkeypatch) -> None:
    folder = _folder(place)
    monkeypatch.setattr(circuits.jobs, "PATIENCE", ((signal.SIGINT, 0.0),))
    monkeypatch.setattr(circuits.jobs, "_NOTING", 0.0)
    monkeypatch.setattr(os, "killpg", lambda *a: pytest.fail(f"killpg{a}"))
    with _held(folder, group):
        (found,) = jobs(place)
        assert found.state == "running"
        with pytest.raises(BlockingIOError, match="is running"):
            cancel(found)
    (folder / "lock").write_text(str(os.getpid()))  # nobody holds it: the number is another's
    assert cancel(found).state == "lost"
    remove(found)
    with pytest.raises(KeyError, match="has been removed"):
        cancel(found)
    with pytest.raises(FileNotFoundError):
        remove(found)


@pytest.mark.parametrize("record", ["evil~aaaaaaaa~bbbbbbbb~cccccccc~g7~1~00000000", ""])
def test_a_group_that_does_not_hold_the_lock_is_not_signalled(
    record: str, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job of another machine the number is somebody else's here."""
    monkeypatch.setattr(circuits.jobs, "_NOTING", 0.1)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        folder = _folder(place, lock=str(other.pid))
        if record:
            (folder / f"lock~{record}").touch()
        with nullcontext() if record else _held(folder, str(other.pid)):
            (found,) = jobs(place)
            assert found.state == "running"
            with pytest.raises(BlockingIOError, match="is running"):
                cancel(found)
            assert other.poll() is None
        other.kill()
    shutil.rmtree(folder)


def test_progress_is_noted_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(PROGRESS, str(tmp_path / "progress"))
    written = []
    real = output.write_json
    monkeypatch.setattr(
        output, "write_json", lambda path, value: (written.append(dict(value)), real(path, value))
    )
    with output.progress_bar("idle", quiet=True):
        pass
    assert not written

    def count() -> None:
        with output.progress_bar("count", quiet=True) as move:
            for i in range(8):
                move(i, 9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count()
    assert [w["done"] for w in written] == [0, 7]
    told = json.loads((tmp_path / "progress").read_text())
    assert told == {"what": "count", "done": 7, "total": 9}
    monkeypatch.setenv(PROGRESS, "/proc/nowhere/progress")
    with output.progress_bar("count", quiet=True) as move:
        move(1, 2)  # no reason to stop


def test_the_command_line_shows_cancels_and_removes(place: Workspace, capsys) -> None:
    id = _folder(place, log="one\ntwo\n").name
    assert run(["jobs", "ls", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts == {
        "id": id, "folder": str(place.root / "jobs" / id), "argv": ["tune", "shapes"], "title": "Tuning",
        "started": "2026-01-01T00:00:00+00:00", "state": "lost", "done": 0, "total": 0, "message": "two",
    }  # fmt: skip
    assert run(["jobs", "ls"]) == 0
    assert "Tuning" in capsys.readouterr().out
    assert run(["jobs", "show", id, "--json", "--lines", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["log"] == "two"
    assert run(["jobs", "show", id]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Tuning: lost\n")
    assert said.endswith("\none\ntwo\n")
    assert run(["jobs", "cancel", id]) == 0
    assert capsys.readouterr().out == f"{id}: lost\n"
    assert run(["jobs", "rm", id]) == 0
    assert capsys.readouterr().out == f"deleted job {id}\n"
    assert jobs(place) == []


def test_bad_input_at_the_command_line_is_one_line(place: Workspace, capsys) -> None:
    _folder(place)
    for arguments, message in (
        (["show", "../x"], "unknown job '../x': expected one of 20260101-000000-000000"),
        (["rm", ""], "unknown job ''"),
        (["cancel", "20260101-000000-000001"], "did you mean 20260101-000000-000000?"),
        (["show", "20260101-000000-000000", "--lines", "0"], "0 must be 1 or more"),
        (["start", "store", "rm", "--yes", "x"], "verb 'store' cannot run as a job"),
        (["start", "tune", "a\nb"], r"argument 'a\nb' of job tune is not printable"),
        (["start"], "Missing argument 'VERB'"),
    ):
        assert run(["jobs", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
