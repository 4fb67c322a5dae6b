"""Memory: how much is free, and numbers of bytes in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import device

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
"""Where Linux says how much memory there is, and how much a group of processes (a container) may take."""

_KINDS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of the second and the first version of control groups: the folder of the controller, and the files with the limit and
the use; the entry of `memory.stat` with what the kernel drops as soon as it is needed for something else."""


def free_memory(where: device | None = None) -> int | None:
    """Bytes of memory that are free or can be made so, in the machine and in the control groups of this process.

    Args:
        where: the device; the machine's own memory if None or a CPU.

    Returns:
        None where nothing says so (no Linux, or a device that is neither a CPU nor CUDA).
    """
    if where is not None and where.type != "cpu":
        if where.type != "cuda":
            return None
        import torch

        return int(torch.cuda.mem_get_info(where)[0])
    found = list(_free_in_groups())
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    return min(found, default=None)


def _free_in_groups() -> Iterator[int]:
    """What the limit of each group that this process is in leaves, from its own group up to the root."""
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        first = "memory" in controllers.split(",")
        if controllers and not first:
            continue
        controller, limit, used, spare = _KINDS[first]
        place = GROUPS / controller / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(GROUPS):
                break
            try:
                most, now = (int((folder / name).read_text("ascii")) for name in (limit, used))
            except (OSError, ValueError):  # no limit ("max"), or the group is seen elsewhere
                continue
            stat = dict(row.split() for row in _lines(folder / "memory.stat"))
            yield max(0, most - now + int(stat.get(spare, 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def in_bytes(n: float) -> str:
    """A number of bytes in words.

    >>> in_bytes(2.5e6), in_bytes(1.34e9)
    ('2.5 MB', '1.3 GB')
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"
