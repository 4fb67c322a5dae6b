"""64 texts of 3 to 100 tokens run in padded batches, and one by one.

Ours are the batches of texts of similar length that `Examples.batches` makes; all 64 in a single batch are timed too.
Models are `stories260k`, if `$CIRCUITS_ASSETS` has its weights, and random GPT-2, Llama (with keys and values shared
among heads) and GPT-NeoX of a width that can be chosen. The time is the least of n interleaved rounds; logits must be
equal to 1e-5. The last line has the smallest ratio among the models.

    python benchmarks/padding.py --n 5 --width 64
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from tests.random_models import booted

Batches = list[tuple[list[int], Tensor, Tensor]]
"""Which texts, their tokens, the mask."""

MOST_APART = 1e-5
LEAST_RATIO = 5.0


def models(folder: Path, width: int) -> Iterator[tuple[str, HookedModel]]:
    """The models, by name."""
    if os.environ.get("CIRCUITS_ASSETS"):
        yield "stories260k", load_model("stories260k")
    for kind in ("gpt2", "llama", "neox"):
        (folder / kind).mkdir()
        yield f"{kind}, width {width}", booted(folder / kind, kind, width)


def batches(model: HookedModel, rows: Sequence[Tensor], groups: list[list[int]]) -> Batches:
    """The texts of each group as one batch."""
    return [(group, *model.pad([rows[i] for i in group])) for group in groups]


def run(model: HookedModel, parts: Batches) -> dict[int, Tensor]:
    """The logits of each text."""
    found = {}
    for group, tokens, mask in parts:
        logits = model.logits(tokens, mask=mask)
        found |= {i: logits[row][mask[row]] for row, i in enumerate(group)}
    return found


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def apart(found: dict[int, Tensor], expected: dict[int, Tensor]) -> float:
    """The largest difference of a logit, relative to the largest of its text or 1."""
    return max(
        float((found[i] - own).abs().max() / own.abs().max().clamp_min(1))
        for i, own in expected.items()
    )


def measured(model: HookedModel, n: int) -> dict[str, float]:
    """The least time of each way to run the texts."""
    generator = torch.Generator().manual_seed(0)
    spec = model.input
    lengths = [100, 3, *torch.randint(3, 101, (62,), generator=generator).tolist()]
    rows = [torch.randint(spec.n_vocab, (k,), generator=generator) for k in lengths]
    every = list(range(len(rows)))
    ways = {
        "one by one": batches(model, rows, [[i] for i in every]),
        "one batch": batches(model, rows, [every]),
        "by length": batches(
            model,
            rows,
            [list(b.which) for b in Examples.texts(model, [r.tolist() for r in rows]).batches()],
        ),
    }
    alone = run(model, ways["one by one"])
    for way, parts in ways.items():
        gap = apart(run(model, parts), alone)
        if gap > MOST_APART:
            raise SystemExit(f"{way}: logits differ by {gap:.1e} from those of the texts alone")
    times = {way: float("inf") for way in ways}
    for _ in range(n):
        for way, parts in ways.items():
            times[way] = min(times[way], seconds(lambda parts=parts: run(model, parts)))
    return times


def main() -> None:
    """Time each model, print it, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=5, help="rounds")
    parser.add_argument("--width", type=int, default=64, help="of the random models")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        for name, model in models(Path(folder), args.width):
            times = found[name] = measured(model, args.n)
            alone = times["one by one"]
            print(f"{name}: one by one {1e3 * alone:.0f} ms; " + "; ".join(
                f"{way} {1e3 * times[way]:.0f} ms, {alone / times[way]:.1f} times as fast"
                for way in ("one batch", "by length")
            ))  # fmt: skip
    ratios = {name: t["one by one"] / t["by length"] for name, t in found.items()}
    worst = min(ratios, key=lambda name: ratios[name])
    ours, peer = found[worst]["by length"], found[worst]["one by one"]
    result = {"name": "padding", "ours": ours, "peer": peer, "ratio": peer / ours, "n": args.n}
    print(json.dumps(result | {"model": worst, "enough": ratios[worst] >= LEAST_RATIO}))


if __name__ == "__main__":
    main()
