"""Interrupt long commands at random moments (SIGKILL, SIGTERM, SIGINT), run them again, and compare the bytes.

Every command is first run undisturbed. Then it is interrupted at a moment drawn over the time that this took, in a
workspace of its own, and run again until it ends by itself: what lies in the workspace then must be the same files with
the same bytes, nothing that had been renamed into place may be lost or changed on the way, and no temporary file may be
left. Processes are forked from one that has imported everything, so that moments fall into the work.

    python benchmarks/interruptions.py --n 110
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from circuits.environment import WORKSPACE
from tests.forked import Forked, command_line

COMMANDS = {
    "harvest": "harvest shapes --data npz:{images} --sites mixed3a,logits --full mixed3a --workers 2 --memory 64",
    "texts": "harvest induction --data tokens:{texts} --sites blocks.0.attn.hook_z --full *",
    "autoencoder": "sae train shapes mixed3a --name mine --data npz:{images} --latents 64 --k 8 --steps 60 --every 10",
    "sheet": "visualize cleanroom line --sheet --steps 3 --size 32",
    "graph": "graph build shapes",
    "edits": "edit apply shapes 'filter_weights into=mixed3b:200 keep=positive' --author me --no-measure",
}
"""By name; `edits` writes to the database, whose rows are counted: they hold times."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def prepare(folder: Path) -> dict[str, str]:
    """Make the data that the commands read; their arguments, by their names."""
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 255, (256, 64, 64, 3), dtype=np.uint8))
    lines = (" ".join(map(str, rng.integers(0, 64, 48))) for _ in range(400))
    (folder / "texts.txt").write_text("\n".join(lines))
    named = {"images": folder / "images.npz", "texts": folder / "texts.txt"}
    return {name: line.format(**named) for name, line in COMMANDS.items()}


def begin(line: str, place: Path) -> Forked:
    """Start a command in a workspace."""
    return command_line(*shlex.split(line), environment={WORKSPACE: str(place), "USER": "me"})


def files(place: Path) -> dict[str, str]:
    """The finished files of a workspace and their SHA-256; of the database, that of how many rows it has."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if (
            not path.is_file()
            or path.name.startswith(".")
            or path.suffix in (".lock", ".part", ".log")
        ):
            continue
        if path.name.endswith(("-wal", "-shm", "-journal")) or path.stem == "checkpoint":
            continue
        data = rows(path) if path.name == "workspace.db" else path.read_bytes()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def rows(path: Path) -> bytes:
    """How many rows each table of a database has: what is in them holds times, and hashes of these."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        found = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        )
        names = [name for (name,) in found]
        return repr(
            {n: connection.execute(f'SELECT count(*) FROM "{n}"').fetchone() for n in names}
        ).encode()


def lost(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Shards that were finished once and are gone, or are others."""
    return [n for n, digest in before.items() if "shard" in n and after.get(n, digest) != digest]


def trial(
    line: str, number: signal.Signals, moment: float, place: Path, whole: dict[str, str]
) -> list[str]:
    """Interrupt a command once, and let it end; what differs from the undisturbed run."""
    shutil.rmtree(place, ignore_errors=True)
    process = begin(line, place)
    time.sleep(moment)
    if process.running():
        os.kill(process.pid, number)
    process.wait()
    time.sleep(0.05)  # its workers die with it
    between = files(place)
    if code := to_the_end(line, place):
        return [f"ends with {code} afterwards"]
    after = files(place)
    wrong = [f"{n} differs" for n in whole.keys() | after.keys() if whole.get(n) != after.get(n)]
    left = [p.name for p in place.rglob(".*.tmp")]
    return [
        *wrong,
        *(f"{n} was lost" for n in lost(between, after)),
        *(f"{n} is left" for n in left),
    ]


def to_the_end(line: str, place: Path) -> int:
    """Run a command to its end; its exit code. An edit that is in the ledger is not made twice."""
    if line.startswith("edit apply") and _in_the_ledger(place):
        return 0
    return begin(line, place).wait(600)


def _in_the_ledger(place: Path) -> bool:
    out = place.parent / "log"
    out.unlink(missing_ok=True)
    log = command_line(
        "edit", "log", "shapes", "--json", environment={WORKSPACE: str(place)}, out=out
    )
    return log.wait() == 0 and bool(json.loads(out.read_text()))


def main() -> None:
    """Run them, print what differs, and one JSON line at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=110, help="how many interruptions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(COMMANDS), help="interrupt this command only")
    args = parser.parse_args()
    draw, names = random.Random(args.seed), [args.only] if args.only else list(COMMANDS)
    same, counts, began = 0, Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines = prepare(Path(folder))
        whole: dict[str, dict[str, str]] = {}
        took: dict[str, float] = {}
        place = Path(folder) / "place"  # the same for all: paths are in some files
        for name in names:
            for _ in range(2):  # the first starts the server that is forked from
                shutil.rmtree(place, ignore_errors=True)
                start = time.monotonic()
                if code := to_the_end(lines[name], place):
                    sys.exit(f"{name}: {lines[name]} ends with {code}")
                took[name], whole[name] = time.monotonic() - start, files(place)
        for i in range(args.n):
            name, number = names[i % len(names)], SIGNALS[i // len(names) % 3]
            wrong = trial(
                lines[name], number, draw.uniform(0.02, 1) * took[name], place, whole[name]
            )
            same += not wrong
            counts[f"{name} {number.name}"] += 1
            if wrong:
                print(f"{i} {name} {number.name}:", *wrong[:5], sep="\n    ", flush=True)
    told = {
        "interruptions": args.n,
        "same": same,
        "seed": args.seed,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(told | {"counts": dict(counts)}))
    sys.exit(0 if same == args.n else 1)


if __name__ == "__main__":
    main()
