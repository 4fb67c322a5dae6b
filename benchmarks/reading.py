"""Reading a store: examples of a unit, and random rows against the best that chunk reads can do.

The store is that of the photographs in `$CIRCUITS_ASSETS/images` if there are any (500 of them with
GoogLeNet), else of the `shapes` model. Cold means that the file's pages were dropped from memory. The
peer of random rows reads each needed chunk once through h5py, in order, and picks from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from circuits.harvesting import harvest
from circuits.models.zoo.loading import load_model
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore
from circuits.store.shards import shard_name
from circuits.units import Unit
from circuits.workspace import Workspace


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget(folder: Path) -> None:
    """Drop a folder's files from memory."""
    for path in folder.glob("*.h5"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def chunk_reads(store: ActivationStore, site: str, rows: np.ndarray) -> np.ndarray:
    """Some rows by plain h5py: every chunk that holds one is read whole, once."""
    found = []
    starts = np.cumsum([0, *(len(r) for r in shard_rows(store, site))])
    for i, start in enumerate(starts[:-1]):
        here = np.sort(rows[(rows >= start) & (rows < starts[i + 1])]) - start
        with h5py.File(store.folder / shard_name(i)) as file:
            data = file[f"full/{site}/activations"]
            height = data.chunks[0] if data.chunks else 4096
            for at in np.unique(here // height) * height:
                block = data[at : at + height]
                found.append(block[here[(here >= at) & (here < at + height)] - at])
    return np.concatenate(found)


def shard_rows(store: ActivationStore, site: str) -> list[range]:
    """How many rows each shard has."""
    n = len(list(store.folder.glob("shard-*.h5")))
    found = []
    for i in range(n):
        with h5py.File(store.folder / shard_name(i)) as file:
            found.append(range(file[f"full/{site}/activations"].shape[0]))
    return found


def main() -> None:
    """Time everything, print it, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20, help="rounds")
    parser.add_argument("--layout", default="blocks", choices=("blocks", "rows"))
    args = parser.parse_args()
    images = Path(os.environ.get("CIRCUITS_ASSETS", "nowhere")) / "images"
    real = images.is_dir()
    name, site = ("googlenet", "mixed3b") if real else ("shapes", "mixed3b")
    source = open_source(f"folder:{images / 'imagenet500'}" if real else "shapes")
    model = load_model(name)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(
            model, source, [s.name for s in model.sites], Workspace(Path(folder)),
            full=[site], layout=args.layout, skip_bad=True,
        )  # fmt: skip
        units = [
            Unit(s.name, int(generator.integers(s.n_units)))
            for s in generator.choice(np.array(store.provenance.sites, object), args.n * 5)
        ]
        times = {}
        for what, ask in (
            ("top_examples", lambda unit: store.top_examples(unit)),
            ("quantile_examples", lambda unit: store.quantile_examples(unit)),
            ("statistics", lambda unit: store.statistics(unit)),
        ):
            warm = statistics.median(seconds(lambda u=u, ask=ask: ask(u)) for u in units)
            cold = []
            for unit in units[: args.n]:
                forget(store.folder)
                cold.append(seconds(lambda u=unit, ask=ask: ask(u)))
            times[what] = warm
            print(f"{what}: median {1e3 * warm:.2f} ms, cold {1e3 * statistics.median(cold):.1f} ms, "
                  f"worst cold {1e3 * max(cold):.1f} ms")  # fmt: skip
        rows = store.rows(site)
        ours, peer = [], []
        for _ in range(args.n + 2):
            wanted = generator.integers(len(rows), size=1024)
            peer.append(seconds(lambda w=wanted: chunk_reads(store, site, w)))
            ours.append(seconds(lambda w=wanted: rows.take(w)))
        mine, other = statistics.median(ours[2:]), statistics.median(peer[2:])
        print(f"{name}, {len(store.provenance.examples)} examples, {site} whole: {rows.shape} rows and "
              f"units; 1024 random rows {1e3 * mine:.1f} ms, chunk reads {1e3 * other:.1f} ms")  # fmt: skip
    result = {"name": "reading", "ours": mine, "peer": other, "ratio": other / mine, "n": args.n}
    print(json.dumps(result | {f"{k}_ms": 1e3 * v for k, v in times.items()}))


if __name__ == "__main__":
    main()
