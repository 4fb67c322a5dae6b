"""How much memory this process may still take. In the lowest layer: whatever is large asks before it begins.

A container has less than its machine: the kernel ends a process that goes beyond the limit of its control group, or of
any group above that one, without a word.
"""

from __future__ import annotations

from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def free_memory(proc: Path = Path("/proc"), groups: Path = _GROUPS) -> int | None:
    """Bytes of memory that are free or can be made so, on the machine and below the limits of control groups.

    Args:
        proc: where the kernel says what the machine has, and in which groups this process is.
        groups: where control groups are mounted, of version 2 or 1.

    Returns:
        The least of them; None where the kernel says nothing (no Linux).
    """
    found = [
        _of_machine(proc / "meminfo"),
        *(_of_group(folder, *names) for folder, names in _own_groups(proc / "self/cgroup", groups)),
    ]
    return min((n for n in found if n is not None), default=None)


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _own_groups(listed: Path, mounted: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process' groups up to the root, with the names that files have in them.

    In a container the path that is listed may be that of the host, which is not there: the root is the container's own.
    """
    made = []
    for line in _text(listed).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = mounted, _V2
        elif "memory" in controllers.split(","):
            root, names = mounted / "memory", _V1
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        made += [(root.joinpath(*parts[:n]), names) for n in range(len(parts) + 1)]
    return made


def _of_group(folder: Path, limit: str, used: str, kept: str) -> int | None:
    """Bytes below a group's limit; None if it has none. What is kept of files alone can be given back."""
    most, now = (_text(folder / name).strip() for name in (limit, used))
    if not (most.isdigit() and now.isdigit()):  # no such file, or `max`
        return None
    return max(0, int(most) - int(now) + _number(folder / "memory.stat", kept))


def _of_machine(path: Path) -> int | None:
    found = _number(path, "MemAvailable:")
    return 1024 * found if found else None


def _number(path: Path, name: str) -> int:
    """The number behind a name in a file of lines; 0 if there is none."""
    lines = (line.split() for line in _text(path).splitlines())
    return next((int(words[1]) for words in lines if len(words) > 1 and words[0] == name), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
