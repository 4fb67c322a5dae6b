"""Kill a harvest with SIGKILL at random moments, again and again, and let it finish.

Each run goes on where the last was killed, in a new process; moments are drawn over the time that a
whole run takes. Nothing that had been renamed into place may be lost or changed, and the final files
must be byte for byte those of a run that nobody disturbed. Where a run finishes before its moment
comes, its store is deleted and the next begins anew, so that as many kills happen as were asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKERS = ("--workers", "2")


def command(args: argparse.Namespace, place: Path) -> list[str]:
    """The harvest that is killed."""
    what = ["--data", args.data, "--sites", args.sites, "--full", args.full, *WORKERS]
    return [
        sys.executable,
        "-m",
        "circuits",
        "harvest",
        args.model,
        *what,
        "--workspace",
        str(place),
    ]


def files(place: Path) -> dict[str, str]:
    """The store's finished files and their SHA-256."""
    found = place.glob("*/*/*/*")
    kept = [
        p for p in found if p.suffix in (".h5", ".json", ".jsonl") and not p.name.startswith(".")
    ]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(kept)}


def shards(found: dict[str, str]) -> dict[str, str]:
    """Those that are never changed."""
    return {name: digest for name, digest in found.items() if name.endswith(".h5")}


def main() -> None:
    """Run it and print what happened, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--n", type=int, help="the same as --kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--sites", default="*")
    parser.add_argument("--full", default="conv2d0,conv2d1,mixed3a,mixed3b")
    args = parser.parse_args()
    kills, lost, changed, restarts = args.n or args.kills, 0, 0, 0
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, place = Path(folder) / "whole", Path(folder) / "killed"
        subprocess.run(command(args, whole), check=True, capture_output=True)
        start = time.monotonic()
        subprocess.run(command(args, place), check=True, capture_output=True)
        duration = time.monotonic() - start
        done, seen = 0, {}
        while done < kills:
            if not seen or set(shards(files(place))) == set(shards(files(whole))):
                subprocess.run(["rm", "-rf", str(place)], check=True)
                seen, restarts = {}, restarts + 1
            process = subprocess.Popen(
                command(args, place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(moments.uniform(0.2, 1.0) * duration)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
            time.sleep(0.05)  # its workers die with it
            now = shards(files(place))
            lost += len(set(seen) - set(now))
            changed += sum(now[name] != digest for name, digest in seen.items() if name in now)
            seen = now
        subprocess.run(command(args, place), check=True, capture_output=True)
        expected, found = files(whole), files(place)
        left = [p.name for p in place.rglob(".*.tmp")]
    same = found == expected
    differ = [name for name in expected if found.get(name) != expected[name]]
    print(
        f"{kills} kills over runs of {duration:.1f} s ({restarts} begun anew, {os.cpu_count()} CPUs, seed "
        f"{args.seed}): {lost} files lost, {changed} changed, {len(expected)} final files "
        f"{'identical' if same else f'DIFFER: {differ}'}, {len(left)} temporary files left"
    )
    ok = same and not lost and not changed and not left
    print(
        json.dumps(
            {"name": "kill_harvest", "kills": kills, "lost": lost, "identical": same, "n": kills}
        )
    )
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
