"""Expanded weights of the 96 channels of mixed3b's 5x5 branch, against one call of autograd a channel.

Both run GoogLeNet (its own weights if `$CIRCUITS_ASSETS` has them, else random ones) on photographs and
give every channel's gradient by a source site at one position. The peer uses torch alone: it keeps the
graph from the source on and asks autograd for each channel. Rounds are interleaved. `gradients` leaves
out the forward pass, which both need once a photograph; `whole` is all of `expand_weights`, with the hash
of the weights, for one photograph and for the mean over eight.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from torch import Tensor

from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.tape import Tape, one_hot
from circuits.models.zoo.inception import googlenet
from circuits.models.zoo.loading import load_model
from circuits.weights import expand_weights

UNITS = list(range(320, 416))


def started(kept: list[Tensor], value: Tensor) -> Tensor:
    """The source's tensor as a leaf of the graph."""
    kept.append(value.detach().clone().requires_grad_(True))
    return kept[0] * 1


def peer(model: HookedModel, source: str, x: Tensor) -> tuple[Tensor, float]:
    """One call of autograd a channel and photograph: channel x source channel x y x x, summed over
    photographs; and how long the gradients alone took.
    """
    total, seconds = torch.zeros(()), 0.0
    for one in x.split(1):
        kept: list[Tensor] = []
        edits = {source: lambda value, kept=kept: started(kept, value)}
        maps = model.run(one, read=["mixed3b"], edits=edits, until="mixed3b", grad=True)["mixed3b"]
        begin = time.perf_counter()
        total = total + torch.stack(
            [
                torch.autograd.grad(maps[0, u, 14, 14], kept[0], retain_graph=True)[0][0]
                for u in UNITS
            ]
        )
        seconds += time.perf_counter() - begin
    return total, seconds


def pulled(model: HookedModel, source: str, x: Tensor) -> tuple[Tensor, float]:
    """The same for one photograph by a tape, and how long the gradients alone took."""
    with Tape("gradient") as tape:
        model.run(x, edits={source: tape.start, "mixed3b": tape.end}, until="mixed3b")
    begin = time.perf_counter()
    windows = [
        tape.pull(one_hot(tape.shape, 1, UNITS[i : i + 32], (14, 14), x.device))
        for i in (0, 32, 64)
    ]
    seconds = time.perf_counter() - begin
    whole = (1, *model.site(source).shape)
    return torch.cat([w.whole(whole)[:, 0] for w in windows if w is not None]), seconds


def main() -> None:
    """Time both, print them, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5, help="rounds")
    args = parser.parse_args()
    if os.environ.get("CIRCUITS_ASSETS"):
        model = load_model("googlenet")
    else:
        torch.manual_seed(0)
        model = HookedModel(googlenet(), (3, 224, 224), "googlenet, random weights")
    photos = Examples(model, "photos", 8).inputs
    result: dict[str, object] = {"name": "expand"}
    for source in ("mixed3a", "conv2d2"):
        times: dict[str, list[float]] = {}
        for _ in range(args.n + 1):
            ours, seconds = pulled(model, source, photos[:1])
            times.setdefault("ours", []).append(seconds)
            theirs, seconds = peer(model, source, photos[:1])
            times.setdefault("peer", []).append(seconds)
            for n in (1, 8):
                x = photos[:n]
                begin = time.perf_counter()
                expand_weights(model, source, "mixed3b", mode="mean", units=UNITS, examples=x)
                middle = time.perf_counter()
                peer(model, source, x)
                times.setdefault(f"ours, whole, {n}", []).append(middle - begin)
                times.setdefault(f"peer, whole, {n}", []).append(time.perf_counter() - middle)
        off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        medians = {what: statistics.median(values[1:]) for what, values in times.items()}
        print(
            f"{model.name}, {source} to 96 channels of mixed3b; difference {off:.1e} of the largest"
        )
        ratios = {}
        for what in ("", ", whole, 1", ", whole, 8"):
            mine, other = medians[f"ours{what}"], medians[f"peer{what}"]
            ratios[what] = other / mine
            print(f"  {what.removeprefix(', ') or 'gradients'}: {1e3 * mine:.1f} ms, one call a channel "
                  f"{1e3 * other:.0f} ms, ratio {other / mine:.1f}")  # fmt: skip
        if source == "mixed3a":
            result |= {"ours": medians["ours"], "peer": medians["peer"], "ratio": ratios[""], "n": args.n,
                       "ratio_whole": ratios[", whole, 1"], "ratio_whole_mean_of_8": ratios[", whole, 8"]}  # fmt: skip
        else:
            result |= {"ratio_conv2d2": ratios[""]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
