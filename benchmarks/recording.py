"""Recording every activation of a transformer: ours against TransformerLens' own `run_with_cache`.

Both run on the same bridge in one process, interleaved; the ratio is the median peer time over the
median of ours, so above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.transformers import native_bridge


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Time both, print them, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20, help="rounds")
    rounds = parser.parse_args().n
    bridge = native_bridge(
        d_model=256, d_head=64, n_heads=4, n_layers=6, n_ctx=128, d_vocab=1000, act_fn="gelu"
    )
    model = HookedModel(bridge, TokenInput(1000, 128))
    tokens = torch.randint(1000, (8, 128), generator=torch.Generator().manual_seed(0))
    names = [site.name for site in model.sites]
    ours: list[float] = []
    peer: list[float] = []

    def theirs() -> object:
        with torch.no_grad():
            return bridge.run_with_cache(tokens, names_filter=names)

    for _ in range(rounds + 2):
        ours.append(seconds(lambda: model.run(tokens, read=names)))
        peer.append(seconds(theirs))
    mine, other = statistics.median(ours[2:]), statistics.median(peer[2:])
    print(f"ours {1e3 * mine:.1f} ms, run_with_cache {1e3 * other:.1f} ms, {len(names)} sites")
    result = {"name": "recording", "ours": mine, "peer": other, "ratio": other / mine, "n": rounds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
