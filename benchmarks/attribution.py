"""Attribution at a layer and occlusion, against captum (a development dependency only).

Both run GoogLeNet (its own weights if `$CIRCUITS_ASSETS` has them, else random ones) on photographs, each
for its own prediction: activation x gradient and integrated gradients (20 steps) at mixed3b and mixed4c, and
occlusion by 49 windows. Rounds are interleaved; the median of each is taken, and how far the numbers agree.
`--extremal N` instead compares the probability kept by the best 10 % of N photographs, by extremal masks and by
Grad-CAM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from circuits.attribution import Passes, attribute, parse_target
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.inception import googlenet
from circuits.models.zoo.loading import load_model
from circuits.saliency import extremal, saliency_map
from circuits.saliency.perturbations import hard, shown_by

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import captum.attr as captum


def compared(
    name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], rounds: int, n: int
) -> None:
    """Time both in turn and print a line each and one of JSON."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    made: dict[str, Tensor] = {}
    for _ in range(rounds + 1):
        for who, run in (("ours", ours), ("peer", theirs)):
            start = time.perf_counter()
            made[who] = run().detach()
            times[who].append(time.perf_counter() - start)
    mine, other = (statistics.median(times[who][1:]) / n * 1000 for who in ("ours", "peer"))
    # an image counts as equal if its numbers are within 1e-5 of the largest
    gap = (made["ours"] - made["peer"]).abs().flatten(1).amax(1) / made["peer"].abs().flatten(
        1
    ).amax(1)
    equal = int((gap < 1e-5).sum())
    print(
        f"{name}: ours {mine:.1f} ms an image, captum {other:.1f}; {equal} of {n} images equal to 1e-5"
    )
    print(
        json.dumps(
            {
                "name": name,
                "ours": mine,
                "peer": other,
                "ratio": other / mine,
                "n": n,
                "equal": equal,
                "largest_gap": float(gap.max()),
            }
        )
    )


def layers(model: HookedModel, x: Tensor, rounds: int, windows: int) -> None:
    """Attribution at layers, and occlusion."""
    net, top = model.module, model.logits(x).argmax(1)
    blank = torch.zeros_like(x[:1])
    for site in ("mixed3b", "mixed4c"):
        layer = net.get_submodule(site)
        compared(
            f"activation x gradient at {site}",
            lambda site=site: attribute(model, x, "top", site, check=0).values,
            lambda layer=layer: captum.LayerGradientXActivation(net, layer).attribute(x, top),
            rounds, len(x),
        )  # fmt: skip
        few = x[:4]
        base = model.run(blank, read=[site])[site][0]  # captum's baseline is that of a blank input
        compared(
            f"integrated gradients at {site}, 20 steps",
            lambda site=site, base=base, few=few: attribute(
                model, few, "top", site, "integrated_gradients", steps=20, tolerance=None, baseline=base, check=0
            ).values,
            lambda layer=layer, few=few: captum.LayerIntegratedGradients(net, layer).attribute(
                few, target=top[: len(few)], n_steps=20, internal_batch_size=32
            ),
            rounds, len(few),
        )  # fmt: skip
    few = x[:windows]
    compared(
        "occlusion, 49 windows",
        lambda: saliency_map(model, few, "top", "occlusion", window=32, stride=32).values.expand(-1, 3, -1, -1),
        lambda: captum.Occlusion(net).attribute(few, (3, 32, 32), strides=(3, 32, 32), target=top[: len(few)]),
        rounds, len(few),
    )  # fmt: skip


def masks(model: HookedModel, x: Tensor) -> None:
    """Extremal masks against the best part of Grad-CAM."""
    probability = parse_target(model, "top", quantity="probability")
    goal = Passes(model, x, probability)
    cam = shown_by(goal, hard(saliency_map(model, x, "top", "grad_cam").values, 0.1))
    start = time.perf_counter()
    found = extremal(model, x, replace(probability, quantity="log_probability"))
    seconds = time.perf_counter() - start
    kept = shown_by(goal, hard(found.masks, 0.1))
    wins = int((kept > cam).sum())
    print(f"best 10 %: extremal {float(kept.mean()):.3f}, Grad-CAM {float(cam.mean()):.3f}, "
          f"random {float(found.random.exp().mean()):.3f}, whole image {float(goal.values.mean()):.3f}; "
          f"extremal is above on {wins} of {len(x)}, {seconds / len(x):.1f} s an image")  # fmt: skip
    print(json.dumps({"name": "extremal masks against Grad-CAM", "ours": wins, "peer": len(x) - wins, "n": len(x),
                      "ratio": wins / len(x)}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--occluded", type=int, default=2)
    parser.add_argument("--extremal", type=int, default=0)
    options = parser.parse_args()
    assets = os.environ.get("CIRCUITS_ASSETS")
    if assets:
        model, data = load_model("googlenet"), f"folder:{assets}/images/imagenet500"
    else:
        torch.manual_seed(0)
        model, data = HookedModel(googlenet(), (3, 224, 224), "googlenet, random"), "photos"
    x = Examples(model, data, options.extremal or options.images).inputs
    if options.extremal:
        masks(model, x)
    else:
        layers(model, x, options.rounds, options.occluded)


if __name__ == "__main__":
    main()
