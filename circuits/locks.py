"""Locks on files that one process holds at a time, on every file system.

The kernel's lock (`flock`) is taken where there is one: the kernel frees it however its holder ends. NFS and cluster
file systems may be mounted without. There a process first makes a record, a file of its own whose name says who it is,
and then looks for records of other processes; if there are any, it removes its record and tries again later. Of two
that come at once each sees the record of the other unless it was there first, so they are never both let in. Nobody
takes away the record of a process that lives: names are never used twice, and only those of processes that have ended
are removed.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import random
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from circuits.environment import TAKE_OVER

PATIENCE = 1.0
"""How long to wait for a lock, in seconds: somebody may only look, and workers of a killed process end soon after."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_HOLDER = re.compile(
    r"(?P<host>[^~]+)~(?P<machine>\w+)~(?P<boot>\w+)~(?P<space>\w+)~(?P<kind>[pg])(?P<pid>[0-9]+)~(?P<started>[0-9]+)"
)


@dataclass(frozen=True)
class Holder:
    """A process, or a group of processes, as the names of its files tell it.

    Attributes:
        host: the machine's name, or the beginning of a long one.
        machine: a hash of its full name and of its installation.
        boot: a hash of what the kernel calls this run of the machine.
        space: a hash of the namespace in which process numbers count: containers have their own.
        pid: the process' number, or the group's.
        started: when the process started, in the kernel's ticks since the boot.
        kind: `p` for a process; `g` for a group, which lives as long as one of its processes.
    """

    host: str
    machine: str
    boot: str
    space: str
    pid: int
    started: int
    kind: Literal["p", "g"] = "p"

    def __str__(self) -> str:
        return f"{self.host}~{self.machine}~{self.boot}~{self.space}~{self.kind}{self.pid}~{self.started}"

    @classmethod
    def of(cls, pid: int, kind: Literal["p", "g"] = "p") -> Holder:
        """The holder that a process of this machine is."""
        return cls(*_here(), pid, _started(pid) or 0, kind)

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """The holder whose text `text` begins with; None if there is none.

        >>> Holder.parse("a~1~2~3~p12~99.rest")
        Holder(host='a', machine='1', boot='2', space='3', pid=12, started=99, kind='p')
        """
        found = _HOLDER.match(text)
        if found is None:
            return None
        host, machine, boot, space, kind, pid, started = found.groups()
        return cls(host, machine, boot, space, int(pid), int(started), "g" if kind == "g" else "p")

    def lives(self) -> bool | None:
        """Whether it still runs; None if that cannot be known here: another machine, or another container."""
        _, machine, boot, space = _here()
        if self.machine == machine and self.boot != boot:
            return False  # this machine has been started since
        if (self.machine, self.space) != (machine, space):
            return False if os.environ.get(TAKE_OVER) == self.host else None
        # A number alone does not tell: it may be another process' by now.
        started = _started(self.pid)
        if started is not None:
            return started == self.started
        return self.kind == "g" and _group_lives(self.pid)


def open_own(path: Path, flags: int, mode: int = 0o644) -> int:
    """Open a regular file, never what a symbolic link leads to; never waits for the other end of a pipe.

    Raises:
        ValueError: if it is a symbolic link, a folder, a pipe or a device.
        OSError: as `os.open` does.
    """
    said = f"{str(path)!r} is no regular file"
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ValueError(said) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(said)
    return handle


@contextmanager
def held(
    path: Path, refusal: str, patience: float = PATIENCE, *, tidy: bool = False
) -> Iterator[int]:
    """Hold the lock of the file `path` inside the block; yields the file's descriptor.

    Args:
        path: the file; made if it is not there.
        refusal: what to say if another process holds the lock.
        patience: how long to wait for it, in seconds.
        tidy: remove the file at the end, and its folder if that is then empty.

    Raises:
        BlockingIOError: if another process, or another block of this one, holds it for longer than that.
        ValueError: if it is no regular file.
    """
    until = time.monotonic() + patience
    while True:
        try:
            handle, record = _take(path)
            break
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise BlockingIOError(f"{refusal}{error}") from None
        time.sleep(random.uniform(0.01, 0.05))  # so that two that meet do not meet again
    try:
        yield handle
    finally:
        # Before the lock is let go, so that nobody else has begun in the folder.
        if tidy and all(p.name.startswith(path.name) for p in path.parent.iterdir()):
            path.unlink(missing_ok=True)
        if record is not None:
            record.unlink(missing_ok=True)
        if tidy and not path.exists():
            with suppress(OSError):  # somebody else wants the lock, and has made a record
                path.parent.rmdir()
        os.close(handle)


def hand_on(path: Path, group: int) -> None:
    """Let a process group hold a lock too, that this process holds and whose descriptor the group has inherited."""
    if _records(path):  # without records the kernel knows by the descriptor
        _announce(path, Holder.of(group, "g"))


def is_held(path: Path, unknown: bool = True) -> bool:
    """Whether somebody holds the lock of a file. Makes nothing.

    Args:
        path: the file.
        unknown: what to take for the answer if holders cannot be seen from here.

    Raises:
        ValueError: if it is no regular file.
    """
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two may ask at once
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    lives = (holder.lives() for _, holder in _records(path))
    return any(unknown if one is None else one for one in lives)


def held_by_group(path: Path, group: int) -> bool:
    """Whether a process group of this machine is among those that hold a lock.

    A number in a file does not tell: the file may be of another machine, where the group of that number is another.

    Args:
        path: the lock's file.
        group: the group's number.
    """
    if group <= 1:
        return False  # no group that anybody can mean
    noted = (holder for _, holder in _records(path) if holder.kind == "g" and holder.pid == group)
    return any(holder.lives() for holder in noted) or _group_opened(path, group)


def _take(path: Path) -> tuple[int, Path | None]:
    """Take a lock: its file's descriptor, and the record that was needed.

    Raises:
        BlockingIOError: if somebody has it; the message says who, as far as that is known.
    """
    handle = open_own(path, os.O_RDWR | os.O_CREAT)
    record = None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError("") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            record = _announce(path, Holder.of(os.getpid()))
        # Also where the kernel has locks: another machine may have mounted this without.
        for other, holder in _records(path):
            if other == record:
                continue
            if holder.lives() is not False:
                raise BlockingIOError(_said(holder))
            other.unlink(missing_ok=True)
        if not _is_there(path, handle) or not (record is None or record.exists()):
            raise BlockingIOError("")  # its last holder has removed it meanwhile
    except BaseException:
        if record is not None:
            record.unlink(missing_ok=True)
        os.close(handle)
        raise
    return handle, record


def _said(holder: Holder) -> str:
    if holder.lives():
        return f" (process {holder.pid})"
    return (
        f" (process {holder.pid} on {holder.host!r}, which cannot be seen from here: if it has ended, set "
        f"{TAKE_OVER}={holder.host})"
    )


def _announce(path: Path, holder: Holder) -> Path:
    """A record of a holder, made now."""
    record = path.with_name(f"{path.name}~{holder}~{secrets.token_hex(4)}")
    os.close(os.open(record, os.O_CREAT | os.O_EXCL, 0o644))
    return record


def _records(path: Path) -> list[tuple[Path, Holder]]:
    """The records of a lock, with those who made them."""
    found = path.parent.glob(f"{glob.escape(path.name)}~*")
    parsed = ((p, Holder.parse(p.name.removeprefix(f"{path.name}~"))) for p in found)
    return [(p, holder) for p, holder in parsed if holder is not None]


def _is_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@lru_cache(maxsize=1)
def _here() -> tuple[str, str, str, str]:
    """This machine's name, and hashes of the machine, its boot and the namespace of process numbers."""
    name = os.uname().nodename or "localhost"
    texts = [name + _text("/etc/machine-id"), _text("/proc/sys/kernel/random/boot_id"), ""]
    with suppress(OSError):
        texts[2] = os.readlink("/proc/self/ns/pid")
    machine, boot, space = (hashlib.sha256(text.encode()).hexdigest()[:8] for text in texts)
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:24], machine, boot, space


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""  # no Linux


def _answers(signal: Callable[[int, int], None], number: int) -> bool:
    """Whether a process or group is there to be signalled; another user's is, though it refuses."""
    try:
        signal(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _started(pid: int) -> int | None:
    """When a process started, 0 if this machine does not tell; None if it has ended."""
    if not Path("/proc/self/stat").exists():
        return 0 if _answers(os.kill, pid) else None
    state = _state(pid)
    return None if state is None else state[1]


def _state(pid: int | str) -> tuple[int, int] | None:
    """The group of a process and when it started; None if it has ended, even if its exit status is still unread."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else (int(words[2]), int(words[19]))


def _group_lives(group: int) -> bool:
    """Whether a process of a group lives whose first process has ended."""
    if not Path("/proc/self/stat").exists():
        return _answers(os.killpg, group)
    return any(True for _ in _processes(group))


def _group_opened(path: Path, group: int) -> bool:
    """Whether a process of a group has a file open, as whoever has inherited its lock does."""
    if not Path("/proc/self/stat").exists():
        return _answers(
            os.killpg, group
        )  # no Linux: it cannot be known which files a process has open
    try:
        there = path.stat()
    except OSError:
        return False
    for process in _processes(group):
        with suppress(
            OSError
        ):  # ended just now, or another user's, which cannot be signalled either
            for opened in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.path.samestat(there, opened.stat()):
                        return True
    return False


def _processes(group: int) -> Iterator[Path]:
    """The folders in /proc of the processes of a group that live."""
    for process in Path("/proc").iterdir():
        if re.fullmatch("[0-9]+", process.name):
            state = _state(process.name)
            if state is not None and state[0] == group:
                yield process
