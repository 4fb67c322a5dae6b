"""A graph store of ten million edges: building, opening, neighbourhoods cold and warm, and paths.

Ten pairs of sites of 1000 units with 3 x 3 kernels are written a few rows at a time, as `build_graph` does.
Cold means that the file's pages were dropped from memory and the store is opened anew. The peer holds the
same edges in networkx, at a hundredth of the size (the whole would take some ten gigabytes), and answers
the same question there, with everything in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import networkx as nx
import numpy as np

from circuits.graph import BlockInfo, GraphStore
from circuits.graph.blocks import writing


def build(folder: Path, units: int, pairs: int) -> None:
    """Write the store."""
    generator = np.random.default_rng(0)
    sites = {f"s{i}": units for i in range(pairs + 1)}
    with writing(folder / "graph.h5", "benchmark", "0" * 64, sites) as writer:
        for i in range(pairs):
            info = BlockInfo(
                f"s{i}", f"s{i + 1}", "weight", f"l{i}", (), (), (), (units, units), (3, 3), {"method": "random"}
            )  # fmt: skip
            with writer.block(info) as block:
                for _ in range(0, units, 50):
                    block.write(generator.normal(size=(50, units, 3, 3)).astype(np.float32))


def memory() -> float:
    """The most that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget(path: Path) -> None:
    """Drop a file from memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def opened(folder: Path, units: int, pairs: int, n: int) -> dict[str, float]:
    """Times and memory of reading, in milliseconds and MB."""
    before = memory()
    generator = np.random.default_rng(1)
    names = [f"s{generator.integers(1, pairs)}:{generator.integers(units)}" for _ in range(n)]
    times: dict[str, list[float]] = {
        "open": [],
        "cold": [],
        "warm": [],
        "two hops": [],
        "paths": [],
    }
    for name in names:
        forget(folder / "graph.h5")
        begin = time.perf_counter()
        store = GraphStore(folder)
        ready = time.perf_counter()
        store.neighbourhood(name)
        cold = time.perf_counter()
        store.neighbourhood(name)
        warm = time.perf_counter()
        store.neighbourhood(name, hops=2)
        times["open"].append(ready - begin)
        times["cold"].append(cold - ready)
        times["warm"].append(warm - cold)
        times["two hops"].append(time.perf_counter() - warm)
        store.close()
    after = memory() - before
    store = GraphStore(folder)
    for name in names[:3]:
        begin = time.perf_counter()
        store.paths("s0:0", f"s{pairs}:{name.partition(':')[2]}", top=5)
        times["paths"].append(time.perf_counter() - begin)
    found = {what: 1e3 * statistics.median(values) for what, values in times.items()}
    found |= {f"{what} worst": 1e3 * max(values) for what, values in times.items()}
    return found | {"memory of opening and neighbourhoods": after}


def in_networkx(units: int, pairs: int) -> float:
    """Milliseconds of the same neighbourhood in networkx, everything in memory."""
    generator = np.random.default_rng(0)
    graph = nx.MultiDiGraph()
    for i in range(pairs):
        for t, row in enumerate(generator.normal(size=(units, units)).tolist()):
            for s, value in enumerate(row):
                graph.add_edge((f"s{i}", s), (f"s{i + 1}", t), norm=abs(value))
    taken = []
    for t in range(20):
        begin = time.perf_counter()
        into = sorted(graph.in_edges(("s2", t), data="norm"), key=lambda edge: -edge[2])[:10]
        out = sorted(graph.out_edges(("s2", t), data="norm"), key=lambda edge: -edge[2])[:10]
        graph.edge_subgraph([(a, b, 0) for a, b, _ in (*into, *out)])
        taken.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(taken)


def main() -> None:
    """Measure everything, print it, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20, help="neighbourhoods")
    parser.add_argument("--build", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    units, pairs = 1000, 10
    if args.build:
        before = memory()
        begin = time.perf_counter()
        build(Path(args.build), units, pairs)
        print(
            json.dumps(
                {"seconds": time.perf_counter() - begin, "memory": memory(), "before": before}
            )
        )
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own, so that its memory can be told
        run = subprocess.run(
            [sys.executable, __file__, "--build", name], check=True, capture_output=True
        )
        built = json.loads(run.stdout)
        size = (folder / "graph.h5").stat().st_size / 1e6
        print(f"built {units * units * pairs:.0e} edges, {size:.0f} MB, in {built['seconds']:.1f} s with at most "
              f"{built['memory']:.0f} MB of memory ({built['before']:.0f} MB of it for Python's modules)")  # fmt: skip
        found = opened(folder, units, pairs, args.n)
    for what, value in found.items():
        print(f"{what}: {value:.2f} {'MB' if 'memory' in what else 'ms'}")
    peer = in_networkx(units // 10, pairs)
    print(f"the same neighbourhood in networkx with a hundredth of the edges: {peer:.2f} ms")
    result = {
        "name": "graph",
        "ours": found["warm"],
        "peer": peer,
        "ratio": peer / found["warm"],
        "n": args.n,
    }
    print(json.dumps(result | {"built": built, **found}))


if __name__ == "__main__":
    main()
