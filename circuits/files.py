"""Writing files so that a reader never sees half of one, and keeping the parts of long work in them."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from circuits.json_files import parse_json, read_json
from circuits.locks import Holder

_ABANDONED = 7 * 24 * 3600  # seconds after which no writer of another machine is still writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the folder of `path` to write to; flushed and renamed into place at the end.

    If the block raises, `path` is as it was and the temporary file is gone. Writers of one path do
    not meet: the last to finish wins. What a writer left that was killed is removed by the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:32]}."
    for left in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        if _is_left(left, Holder.parse(left.name.removeprefix(prefix))):
            left.unlink(missing_ok=True)
    # The name tells the next writer whether this one still lives: not every file system has locks.
    mine = f"{prefix}{Holder.of(os.getpid())}."
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=mine, suffix=".tmp")
    except OSError as error:  # about the file that was asked for, not about the temporary one
        raise type(error)(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # On the disk before the name is: after a crash there is the old file or the new one, and never a name without
        # content.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone.
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def owned(names: str) -> re.Pattern[str]:
    """A pattern of the files that a folder's owner writes: those of `names`, and what is left of such if it was killed.

    >>> bool(owned("log").fullmatch("log")), bool(owned("log").fullmatch(".log.x.tmp")), owned("log").fullmatch("a.log")
    (True, True, None)
    """
    return re.compile(rf"({names})|\.({names})\..*\.tmp")


def is_inside(folder: Path, root: Path) -> bool:
    """Whether a folder is below another, and no symbolic link leads from there to it; `root` itself may be one."""
    place, top = folder.absolute(), root.absolute()
    return place.is_relative_to(top) and place.resolve() == root.resolve() / place.relative_to(top)


def check_inside(folder: Path, root: Path) -> None:
    """Raise ValueError unless `is_inside(folder, root)`: what is elsewhere is somebody else's."""
    if not is_inside(folder, root):
        raise ValueError(
            f"folder {str(folder)!r} is not in {str(root)!r}, or a symbolic link leads to it: expected a folder there"
        )


def remove_owned(folder: Path, files: re.Pattern[str], first: str, root: Path) -> list[str]:
    """Delete the files of a folder whose whole names match, and the folder if there was nothing else in it.

    Everything else is left: files of other names, folders, and symbolic links whatever their name.

    Args:
        folder: the folder.
        files: what to delete.
        first: the file without which an interruption leaves nothing that is taken for a whole.
        root: the workspace's folder.

    Returns:
        The names of what is left.

    Raises:
        ValueError: if the folder is not in the workspace, or only by a symbolic link.
    """
    check_inside(folder, root)
    left = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.name != first, path.name)):
        if files.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()
        else:
            left.append(path.name)
    if not left:
        folder.rmdir()
    return left


def _is_left(temporary: Path, writer: Holder | None) -> bool:
    """Whether a temporary file's writer has ended."""
    lives = None if writer is None else writer.lives()
    if lives is not None:
        return not lives
    try:
        return time.time() - temporary.stat().st_mtime > _ABANDONED
    except OSError:
        return False  # gone


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, all or nothing; null for NaN and infinity."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Keep = Callable[[str, Callable[[], Any]], Any]
"""How long work keeps its parts: called with the name of a part and with what makes it, as JSON has it (NaN too).
Returns the part, which may have been made by an earlier run."""


def make_now(name: str, make: Callable[[], Any]) -> Any:
    """Keeps nothing: every part is made now."""
    return make()


def part_of(keep: Keep, work: str) -> Keep:
    """Keeps the parts of one piece of several pieces of work."""
    return lambda name, make: keep(f"{work} {name}", make)


def keeping(folder: Path) -> Keep:
    """Keep parts in a folder, a file each; the folder must belong to this very work, with these settings."""

    def keep(name: str, make: Callable[[], Any]) -> Any:
        path = folder / f"{name.replace(' ', '-')}.json"
        try:
            return read_json(path, nan=True)
        except (OSError, ValueError):
            made = json.dumps(make())  # floats are read as they were written, to the last bit
        with replacing(path) as temporary:
            temporary.write_text(made)
        return parse_json(made, str(path), nan=True)

    return keep


def check_packed(path: Path) -> None:
    """Raise ValueError if a zip file, as `torch.save` writes one, would unpack to far more than its size.

    `torch.save` compresses nothing, hence one that is packed tight was made to fill the memory of whoever opens it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile:
        return  # no zip file, or a damaged one, which torch refuses
    size = path.stat().st_size
    if inside > 2 * size + 2**20:
        raise ValueError(
            f"{str(path)!r} has {inside / 1e6:.0f} MB packed into {size / 1e6:.1f} MB: expected a file that torch.save "
            "wrote, which packs nothing"
        )


def check_writable(folder: Path, what: str) -> Path:
    """Return `folder` if files can be written into it; makes nothing.

    Raises:
        PermissionError: if not; the message names the folder.
    """
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is read-only" if there.is_dir() else "is not a folder"
        raise PermissionError(f"{what} {str(folder)!r} cannot be written: {str(there)!r} {why}")
    return folder
