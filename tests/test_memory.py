"""How much memory is free: of the machine, and below the limits of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from circuits.memory import free_memory

MACHINE = "MemTotal: 2000 kB\nMemAvailable:    1000 kB\n"


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc", root / "groups"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MACHINE}, 1_024_000),
        # The group above has the lower limit; what it keeps of files can be given back.
        (
            {
                "proc/self/cgroup": "0::/a/b\n", "groups/a/b/memory.max": "max\n", "groups/a/b/memory.current": "5\n",
                "groups/a/memory.max": "9000\n", "groups/a/memory.current": "5000\n",
                "groups/a/memory.stat": "anon 7\ninactive_file 300\n",
            },
            4300,
        ),
        # A container: the path is the host's, and the root is its own.
        (
            {"proc/self/cgroup": "0::/host/x\n", "groups/memory.max": "800\n", "groups/memory.current": "100\n"},
            700,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/c\n4:memory:/a\n0::/\n",
                "groups/memory/a/memory.limit_in_bytes": "5000\n", "groups/memory/a/memory.usage_in_bytes": "4000\n",
                "groups/memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 20\n",
                "groups/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "groups/memory/memory.usage_in_bytes": "4000\n",
            },
            1020,
        ),
        # More is used than the limit that was lowered since.
        ({"proc/self/cgroup": "0::/\n", "groups/memory.max": "8\n", "groups/memory.current": "9\n"}, 0),
    ],
)  # fmt: skip
def test_the_least_of_the_machine_and_the_groups_is_free(
    files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    made = write(tmp_path, files)
    assert free_memory(*made) == expected
    if expected is not None and "proc/meminfo" not in files:
        write(tmp_path, {"proc/meminfo": MACHINE})
        assert free_memory(*made) == expected, "the machine has more"


def test_this_machine_says_how_much_is_free() -> None:
    free = free_memory()
    assert free is None or free > 1_000_000
