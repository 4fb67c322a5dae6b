"""Peak memory of a harvest of 500 and of 5000 examples, each in a process of its own.

Peak is the largest sum of the proportional set sizes (PSS) of the process and its workers, so that
memory which they share counts once. The ratio is that of 5000 examples over 500.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HARVEST = """
import sys
from pathlib import Path
from circuits.harvesting import harvest
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import open_source
from circuits.workspace import Workspace
model, photos, n = load_model("shapes"), open_source("photos"), int(sys.argv[1])
names = tuple(map(str, range(n)))
source = ImageSource("photos", names, f"{n} {photos.hash}", lambda i: photos.image(i % len(photos)))
sites = [site.name for site in model.sites]
harvest(model, source, sites, Workspace(Path(sys.argv[2])), full=["mixed3b", "mixed3a"], workers=2)
"""


def proportional(pid: int) -> int:
    """A process' own share of the memory it has, in bytes; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def family(pid: int) -> list[int]:
    """A process and its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *map(int, children)]


def peak(n: int) -> int:
    """The most memory that a harvest of so many examples took, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, "-c", HARVEST, str(n), folder])
        most = 0
        while process.poll() is None:
            most = max(most, sum(map(proportional, family(process.pid))))
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"the harvest of {n} examples failed")
    return most


def main() -> None:
    """Measure both, print them, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1, help="rounds")
    rounds = parser.parse_args().n
    few = min(peak(500) for _ in range(rounds))
    many = min(peak(5000) for _ in range(rounds))
    print(
        f"500 examples {few / 1e6:.0f} MB, 5000 examples {many / 1e6:.0f} MB ({many / few - 1:+.1%})"
    )
    print(
        json.dumps({"name": "memory", "ours": many, "peer": few, "ratio": many / few, "n": rounds})
    )


if __name__ == "__main__":
    main()
