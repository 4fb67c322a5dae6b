"""Work that runs in the background: verbs of the command line in processes of their own.

A job goes on when what started it ends, and its folder in the workspace says all there is to know:

<root>/jobs/<id>/job.json      what was asked for, and when
                 lock          held as long as a process of the job lives; the process group's number
                 progress      how far it is, written by the verb
                 log           what the verb printed
                 result.json   how it ended; missing if its processes were killed

`python -m circuits.jobs FOLDER` is the process of a job. Whether one runs is asked of the kernel, which
frees a lock however its holder ends, and never of a process number, which may be another's by now.
"""

from __future__ import annotations

import gc
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NoReturn

from circuits.checks import clipped, whole
from circuits.environment import PROGRESS, WORKSPACE
from circuits.files import check_inside, is_inside, owned, remove_owned, write_json
from circuits.json_files import read_json
from circuits.locks import hand_on, held, held_by_group, is_held, open_own
from circuits.units import nearest, unknown
from circuits.workspace import Workspace

VERBS = ("harvest", "visualize", "sae", "graph", "families", "case", "demo", "tune", "verify")
"""What can run as a job."""

PATIENCE = ((signal.SIGINT, 5.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
"""How a job is cancelled: as by Ctrl-C, so that it leaves things tidy; then less and less kindly. In seconds."""

State = Literal["running", "done", "failed", "cancelled", "lost", "damaged"]

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9]{6}")
_FILES = owned(r"(job|result)\.json|progress|log|lock(~.*)?")
_ANSI = re.compile(  # colours and movements; titles and links; the rest
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)?|\x1b.?"
)
_LOG_BYTES = 1 << 16  # of the end of a log: more than is ever shown
_YIELDING = 5  # of niceness: whoever looks at pages meanwhile does not wait for a job
_LONGEST_NUMBER = 32  # bytes of a process group's number
_MESSAGE = 500  # characters of its last line
_NOTING = 1.0  # seconds: for who has started a job to note its number
_STARTING = 10.0  # seconds: for those who are starting another job


@dataclass(frozen=True)
class Job:
    """A job, as its folder had it when it was looked at.

    Attributes:
        id: its name; later ones sort after earlier ones.
        folder: where all about it is kept.
        argv: the verb and its arguments.
        title: what it is called.
        started: when, in UTC (ISO 8601).
        state: `lost` if its processes ended without noting how: killed, or the power went; `damaged` if what was asked
            for, or the lock, cannot be read (then without command and title).
        done: how much is done.
        total: how much there is; 0 as long as nobody knows.
        message: the last line of its log, or what it is at while it has said nothing.
    """

    id: str
    folder: Path
    argv: tuple[str, ...]
    title: str
    started: str
    state: State
    done: int
    total: int
    message: str


def start(workspace: Workspace, argv: Sequence[str], title: str = "") -> Job:
    """Start a verb of the command line in the background; the same that runs already is not started twice.

    Args:
        workspace: where the job is kept, and its results go.
        argv: the verb, one of `VERBS`, and its arguments; relative paths are from the current folder.
        title: what to call it; the command if it is not given.

    Raises:
        ValueError: if the verb cannot run as a job, an argument is not printable, or `jobs` is a symbolic link.
        OSError: if the workspace cannot be written, or no process can be started.
    """
    _check(argv, title)
    place = _place(workspace.writable())
    check_inside(place, workspace.root)
    place.mkdir(parents=True, exist_ok=True)
    refusal = f"jobs of {str(workspace.root)!r}: another process is starting one"
    # Of two who start the same, the second finds the first's.
    with held(place / ".lock", refusal, _STARTING):
        for known in jobs(workspace):
            if known.state == "running" and known.argv == tuple(argv):
                return known
        folder = _new_folder(place)
        asked = {
            "argv": list(argv),
            "title": title or shlex.join(argv),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            _launch(folder, asked, workspace.root.absolute())
        except OSError:
            remove_owned(folder, _FILES, first="job.json", root=workspace.root)
            raise
    return _known(folder)


def jobs(workspace: Workspace) -> list[Job]:
    """The jobs of a workspace, newest first; those whose record cannot be read are `damaged`."""
    folders = sorted(_place(workspace).glob("*"), reverse=True)
    found = (_read(folder) for folder in folders if _ID.fullmatch(folder.name))
    return [job for job in found if job]


def job(workspace: Workspace, id: str) -> Job:
    """A job by its id.

    Raises:
        KeyError: if there is none.
    """
    found = _read(_place(workspace) / id) if _ID.fullmatch(id) else None
    if found is None:
        known = [job.id for job in jobs(workspace)]
        if not known:
            raise KeyError(f"unknown job {clipped(str(id))!r}: the workspace has none")
        raise unknown("job", clipped(str(id)), known)
    return found


def cancel(job: Job) -> Job:
    """Interrupt all processes of a job and wait until they have gone; one that has ended stays as it is.

    Raises:
        BlockingIOError: if they are not processes of this machine, or do not end, not even killed.
        KeyError: if the job has been removed.
    """
    if not _is_running(job.folder):
        return _known(job.folder)
    if _is_known_here(job.folder):
        for number, seconds in PATIENCE:
            _signal(job.folder, number)
            if _has_ended(job.folder, seconds):
                break
    with _alone(job.folder):
        result = job.folder / "result.json"
        if (job.folder / "job.json").exists() and not result.exists():
            write_json(result, {"code": None, "cancelled": True})  # its process could not
    return _known(job.folder)


def remove(job: Job) -> None:
    """Forget a job: its log and how it ended. What it made is left alone.

    Raises:
        BlockingIOError: if it is running.
        FileNotFoundError: if it has been removed.
        ValueError: if its folder is not in the workspace, but a symbolic link leads there.
    """
    check_inside(job.folder, _root(job.folder))  # before a lock is made there
    with _alone(job.folder):
        remove_owned(job.folder, _FILES, first="job.json", root=_root(job.folder))


def log_of(job: Job, lines: int = 50) -> str:
    """The end of what a job printed, as plain text without colours and control characters.

    Raises:
        ValueError: if `lines` is less than 1.
    """
    if lines < 1:
        raise ValueError(f"lines {lines} must be at least 1")
    return "\n".join(_log(job.folder)[-lines:])


def _check(argv: Sequence[str], title: str) -> None:
    verb = argv[0] if argv else ""
    if verb not in VERBS:
        close = nearest(str(verb), VERBS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"verb {clipped(str(verb))!r} cannot run as a job: {hint}expected one of {', '.join(VERBS)}"
        )
    for name, text in (*(("argument", a) for a in argv), ("title", title)):
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(
                f"{name} {clipped(str(text))!r} of job {verb} is not printable: expected text in one line"
            )


def _place(workspace: Workspace) -> Path:
    return workspace.root.absolute() / "jobs"


def _root(folder: Path) -> Path:
    """The workspace's folder of a job's."""
    return folder.parent.parent


def _new_folder(place: Path) -> Path:
    """A folder named by the time: nobody else's, as only one of two can make it."""
    while True:
        # The time to the microsecond also sorts jobs by their start.
        folder = place / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def _launch(folder: Path, asked: dict[str, object], root: Path) -> None:
    """Start a job's process, with a lock that is never free: this process hands it on while it holds it."""
    path = folder / "lock"
    with held(path, f"job {folder.name} is there") as lock:
        write_json(folder / "job.json", asked)  # from here on it is a job, and running
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "circuits.jobs", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, WORKSPACE: str(root)},
                start_new_session=True,  # Ctrl-C where it was started is not meant for it
                pass_fds=(lock,),
            )
        os.write(lock, str(process.pid).encode())
        hand_on(path, process.pid)
    threading.Thread(target=process.wait, daemon=True).start()  # nothing is left when it ends


def _read(folder: Path) -> Job | None:
    if not is_inside(folder, _root(folder)):
        return None  # its files are somebody else's
    try:
        asked = read_json(folder / "job.json", "its record")
        argv, title, started = tuple(asked["argv"]), asked["title"], asked["started"]
        if not all(isinstance(text, str) for text in (*argv, title, started)):
            raise TypeError("its record has other types")
        state = _state(folder)
        at, done, total = _progress(folder)
        log = _log(folder)
    except OSError:
        return None  # removed, or of somebody else
    except (ValueError, KeyError, TypeError) as error:
        return Job(
            folder.name, folder, (), "a damaged record", "", _damaged(folder), 0, 0, str(error)[:_MESSAGE]
        )  # fmt: skip
    said = log[-1].strip()[:_MESSAGE] if log else at
    return Job(folder.name, folder, argv, title, started, state, done, total, said)


def _known(folder: Path) -> Job:
    found = _read(folder)
    if found is None:
        raise KeyError(f"job {folder.name} has been removed")
    return found


def _state(folder: Path) -> State:
    if _is_running(folder):
        return "running"
    try:
        result = read_json(folder / "result.json")
        code, cancelled = result["code"], result["cancelled"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "lost"
    if code == 0:
        return "done"
    return "cancelled" if cancelled else "failed"


def _damaged(folder: Path) -> State:
    """The state of a job of which a file is damaged: it may be running nevertheless."""
    try:
        return "running" if _is_running(folder) else "damaged"
    except ValueError:
        return "damaged"  # the lock itself is


def _progress(folder: Path) -> tuple[str, int, int]:
    """What it is at, how much of it is done and how much there is."""
    try:
        told = read_json(folder / "progress")
        return str(told["what"]), int(told["done"]), int(told["total"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "", 0, 0


def _log(folder: Path) -> list[str]:
    """The last lines of the log, plain; what is wrong with it if it is no regular file."""
    try:
        opened = open_own(folder / "log", os.O_RDONLY)
    except FileNotFoundError:
        return []
    except ValueError as error:
        return [f"the log {error}"]
    with os.fdopen(opened, "rb") as file:
        # The first line may be cut in two; it is not among the last that are shown.
        file.seek(max(0, os.fstat(opened).st_size - _LOG_BYTES))
        text = file.read(_LOG_BYTES).decode(errors="replace")
    # A carriage return goes back to the line's start: what a terminal would show is what follows the last one.
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    plain = [_plain(line) for line in lines]
    while plain and not plain[-1]:
        plain.pop()
    return plain


def _plain(line: str) -> str:
    """
    >>> _plain("\\x1b[31mcircuits:\\x1b[0m no\\x07 such site ")
    'circuits: no such site'
    """
    return "".join(c for c in _ANSI.sub("", line) if c.isprintable() or c == "\t").rstrip()


def _is_running(folder: Path) -> bool:
    # A job on a machine that cannot be seen from here is running as long as it has not noted how it ended.
    return is_held(folder / "lock", unknown=not (folder / "result.json").exists())


def _has_ended(folder: Path, seconds: float) -> bool:
    """Whether no process of a job is left, waiting so long for it."""
    until = time.monotonic() + seconds
    while _is_running(folder):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _alone(folder: Path) -> AbstractContextManager[int]:
    """Hold a job's lock, which is refused while the job is running."""
    return held(folder / "lock", f"job {folder.name} is running: it has to end first")


def _group(folder: Path) -> int | None:
    """The process group of a job that runs on this machine; None if no group here holds the job's lock."""
    with os.fdopen(open_own(folder / "lock", os.O_RDONLY), "rb") as file:
        leader = whole(file.read(_LONGEST_NUMBER).decode("ascii", "replace"))
    return leader if leader is not None and held_by_group(folder / "lock", leader) else None


def _is_known_here(folder: Path) -> bool:
    """Whether a job's processes can be signalled; who has just started it may still have to note their number."""
    until = time.monotonic() + _NOTING
    while _group(folder) is None:
        if time.monotonic() > until or not _is_running(folder):
            return False
        time.sleep(0.05)
    return True


def _signal(folder: Path, number: signal.Signals) -> None:
    """Signal all processes of a job that is running: as long as one lives, their group's number is theirs."""
    leader = _group(folder)
    if leader is not None and _is_running(folder):
        with suppress(ProcessLookupError):  # ended just now
            os.killpg(leader, number)


def _run(folder: Path) -> None:
    """What a job's process does: it lets the verb run in a child, and notes how that ended.

    The child holds the lock too, being forked. If this process alone is killed, the job is still running,
    as is true, and can be cancelled.
    """
    argv = read_json(folder / "job.json")["argv"]
    heard: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: heard.append(got))
    child = _fork()
    if child == 0:
        _become(argv, folder)

    def end(number: int, _: object) -> None:
        heard.append(number)
        os.kill(child, number)  # whoever stops this process means the verb

    signal.signal(
        signal.SIGTERM, end
    )  # SIGINT goes to the group, and twice would be once too often
    if heard:
        os.kill(child, signal.SIGTERM)  # it came before there was a child to hear it
    _, status = os.waitpid(child, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what is left to do is soon done
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and not heard:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        sys.stderr.write(f"circuits: the job was ended by {name}{hint}\n")
    write_json(folder / "result.json", {"code": code, "cancelled": bool(heard)})


def _fork() -> int:
    """Fork: the package is imported once, which takes seconds, and the two share its memory."""
    gc.freeze()  # collecting would touch, and so copy, all that is shared
    with warnings.catch_warnings():
        # from Python 3.12: nothing has been computed yet, so that no other thread holds anything
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become(argv: list[str], folder: Path) -> NoReturn:
    """Be the command line from here on."""
    os.nice(_YIELDING)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ[PROGRESS] = str(folder / "progress")
    sys.argv = ["circuits", *argv]
    runpy.run_module("circuits", run_name="__main__", alter_sys=True)
    raise AssertionError("the command line ends in SystemExit")


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
