"""Harvesting summaries of all sites against the bare forward pass of the same batches.

Both run in one process run, interleaved, on the same decoded batches: the forward pass as torch runs
it by default, and the whole harvest: planning, forward passes, summaries of all sites, files with their
checksums, merging. Images are decoded beforehand for both. The ratio is the harvest's time over the bare
forward pass (median of rounds), so 1.10 is an overhead of 10 %. `write` compares the writing of whole
activations with plain h5py's.
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
import torch

from circuits.examples import Examples
from circuits.harvesting import harvest
from circuits.harvesting.running import LARGEST_BATCH
from circuits.hdf5 import created, file_hash
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.sites import evaluating
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.transformers import native_bridge
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import Source, open_source
from circuits.stimuli.texts import TextSource
from circuits.store.hdf5 import CHUNK, write_full
from circuits.store.provenance import Depth
from circuits.workspace import Workspace


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def transformer(width: int, vocabulary: int) -> HookedModel:
    """Six layers, heads of 64, 128 tokens; 768 and 50257 is DistilGPT-2's shape."""
    bridge = native_bridge(
        d_model=width, d_head=64, n_heads=width // 64, n_layers=6, n_ctx=128,
        d_vocab=vocabulary, act_fn="gelu",
    )  # fmt: skip
    return HookedModel(bridge, TokenInput(vocabulary, 128), f"transformer of width {width}")


def texts(n: int, vocabulary: int) -> TextSource:
    """Random tokens: what they say does not matter to the time."""
    drawn = torch.randint(vocabulary, (n, 128), generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(n)))
    return TextSource(
        "random", names, f"random {n} {vocabulary}", tuple(map(tuple, drawn.tolist()))
    )


def decoded(model: HookedModel, n: int) -> ImageSource:
    """The photographs over and over, as the model takes them."""
    photos = open_source("photos")
    assert isinstance(photos, ImageSource)
    examples = Examples(model, photos, None)
    images = [examples.load(i) for i in range(len(examples))]
    names = tuple(f"{i}" for i in range(n))
    return ImageSource("decoded", names, f"decoded {n}", lambda i: images[i % len(images)])


def overhead(name: str, model: HookedModel, source: Source, rounds: int) -> None:
    """Time a harvest of all sites beside the bare forward pass, and print both."""
    n = len(source)
    ready = [b.inputs for b in Examples(model, source, None).batches(LARGEST_BATCH)]
    sites = [site.name for site in model.sites]

    def bare() -> None:
        with evaluating(model.module), torch.no_grad():
            for x in ready:
                model.module(model.fitted(x))

    ours: list[float] = []
    peer: list[float] = []
    for _ in range(rounds + 1):
        peer.append(seconds(bare))
        with tempfile.TemporaryDirectory() as folder:
            place = Workspace(Path(folder))
            ours.append(seconds(lambda place=place: harvest(model, source, sites, place)))
    mine, other = statistics.median(ours[1:]), statistics.median(peer[1:])
    print(
        f"{name}: {n} examples, {len(sites)} sites: forward pass {other:.2f} s, harvest {mine:.2f} s, "
        f"overhead {100 * (mine / other - 1):+.1f} % (rounds: "
        f"{', '.join(f'{100 * (a / b - 1):+.0f}' for a, b in zip(ours[1:], peer[1:], strict=True))})"
    )
    result = {
        "name": f"harvest {name}",
        "ours": mine,
        "peer": other,
        "ratio": mine / other,
        "n": rounds,
    }
    print(json.dumps(result))


def writing(rounds: int) -> None:
    """Time the writing of whole activations beside plain h5py, both flushed to the disk."""
    values = np.random.default_rng(0).standard_normal((160_000, 512), np.float32)
    half = values.astype(np.float16)

    def flush(path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def plain(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("activations", data=half, chunks=CHUNK)
        flush(path)

    def written(path: Path) -> None:
        with created(path) as file:
            write_full(file, values, Depth())
        flush(path)

    ours: list[float] = []
    peer: list[float] = []
    checksum: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds + 1):
            a, b = Path(folder) / f"a{i}.h5", Path(folder) / f"b{i}.h5"
            peer.append(seconds(lambda b=b: plain(b)))
            ours.append(seconds(lambda a=a: written(a)))
            checksum.append(seconds(lambda a=a: file_hash(a)))
            a.unlink()
            b.unlink()
    mine, other, more = (statistics.median(times[1:]) for times in (ours, peer, checksum))
    size = half.nbytes / 1e6
    print(
        f"writing {size:.0f} MB as float16: ours, from float32 and with an overflow check, "
        f"{size / mine:.0f} MB/s; h5py, from float16, {size / other:.0f} MB/s; the checksum, taken while the "
        f"next shard is computed, {size / more:.0f} MB/s"
    )
    result = {"name": "write", "ours": mine, "peer": other, "ratio": other / mine, "n": rounds}
    print(json.dumps(result))


def main() -> None:
    """Run all, or what is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5, help="rounds")
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument(
        "--only", help="googlenet, shapes, efficientnet-lite0, transformer, small or write"
    )
    args = parser.parse_args()
    wanted = [args.only] if args.only else ["googlenet", "transformer", "write"]
    for what in wanted:
        if what == "googlenet" and not os.environ.get("CIRCUITS_ASSETS"):
            print("googlenet: left out, CIRCUITS_ASSETS names no folder with its weights")
        elif what in ("googlenet", "shapes", "efficientnet-lite0"):
            model = load_model(what)
            overhead(what, model, decoded(model, args.examples), args.n)
        elif what == "transformer":
            overhead(what, transformer(768, 50257), texts(args.examples // 2, 50257), args.n)
        elif what == "small":
            overhead(what, transformer(256, 1000), texts(2 * args.examples, 1000), args.n)
        else:
            writing(args.n)


if __name__ == "__main__":
    main()
