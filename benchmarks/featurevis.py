"""Feature visualization side by side with lucent 0.1.8: time to the same activation, and activation at equal steps.

Both optimise the same network (GoogLeNet's shape; its real weights if CIRCUITS_ASSETS has them, else weights
drawn from a seed) at the same size under lucid's transforms, each as its own README calls it. Lucent runs in
an environment of its own, since it needs torchvision:

    python -m venv /opt/peers/lucent
    /opt/peers/lucent/bin/pip install torch==2.13.0 torchvision==0.28.0 torch-lucent==0.1.8
    python benchmarks/featurevis.py --peer /opt/peers/lucent/bin/python

Rounds are interleaved: lucent's 512 steps, then ours until its activation is reached. The ratio is lucent's time
over ours. Activations are the mean over positions on the untransformed picture, measured by one model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuits.featurevis.render import visualize_units
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo.inception import googlenet
from circuits.models.zoo.loading import load_model

PEER = """
import importlib.util, json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
import torch
# torchvision's operators are missing in a CPU build: their schemas are enough for it to import
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from lucent.optvis import param, render, transform
spec = importlib.util.spec_from_file_location("inception", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["inception"] = module
spec.loader.exec_module(module)
net = module.googlenet().eval()
net.load_state_dict(torch.load(sys.argv[2], weights_only=True))
mean = torch.tensor([104.0, 117.0, 123.0])[None, :, None, None]
for line in sys.stdin:
    ask = json.loads(line)
    torch.manual_seed(ask["seed"])
    np.random.seed(ask["seed"])
    start = time.perf_counter()
    images = render.render_vis(
        net, ask["objective"], lambda: param.image(ask["size"]),
        transforms=[*transform.standard_transforms, lambda x: x.flip(1) * 255 - mean],
        preprocess=False, progress=False, show_image=False, thresholds=(ask["steps"],),
    )
    seconds = time.perf_counter() - start
    np.save(ask["out"], images[-1])
    print(json.dumps({"seconds": seconds}), flush=True)
"""

CASES = (("mixed3b", 1), ("mixed3b", 16), ("mixed5b", 1))
"""Sites, and how many units of each are rendered together."""


def model_to_draw() -> HookedModel:
    """GoogLeNet, with its own weights or drawn ones."""
    if os.environ.get("CIRCUITS_ASSETS"):
        return load_model("googlenet")
    torch.manual_seed(0)
    spec = ImageInput(3, 224, 224, mean=(104.0, 117.0, 123.0), scale=255.0, bgr=True)
    return HookedModel(googlenet().eval(), spec, "googlenet-shaped")


class Peer:
    """Lucent in its own environment."""

    def __init__(self, python: Path, folder: Path, model: HookedModel) -> None:
        self.out = folder / "image.npy"
        script, weights = folder / "peer.py", folder / "weights.pt"
        script.write_text(PEER)
        torch.save(model.module.state_dict(), weights)
        source = Path(__file__).parents[1] / "circuits" / "models" / "inception.py"
        self.process = subprocess.Popen(
            [str(python), str(script), str(source), str(weights)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def render(self, unit: str, size: int, steps: int, seed: int) -> tuple[float, Tensor]:
        """Seconds, and the picture in 0..1."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        ask = {"objective": unit, "size": size, "steps": steps, "seed": seed, "out": str(self.out)}
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the peer ended: does its environment import lucent?")
        return json.loads(line)["seconds"], torch.from_numpy(np.load(self.out)).movedim(3, 1)


def activation(model: HookedModel, unit: str, image: Tensor) -> float:
    """The unit's mean activation on a picture."""
    assert isinstance(model.input, ImageInput)
    found = model.unit(unit)
    x = model.input.normalize(image.float())
    return float(
        model.run(x, read=[found.site], until=found.site)[found.site][0, found.index].mean()
    )


def steps_to(
    model: HookedModel, units: list[str], wanted: list[float], size: int, seed: int
) -> list[int]:
    """After how many of our steps each unit has an activation; 512 if it never has."""
    marks = tuple(range(8, 513, 8))
    tried = visualize_units(model, units, steps=512, size=size, seed=seed, thresholds=marks)
    found = []
    for unit, picture, value in zip(units, tried, wanted, strict=True):
        enough = (n for n in marks if activation(model, unit, picture.at[n][None]) >= value)
        found.append(next(enough, 512))
    return found


def report(name: str, ours: float, peer: float, ratio: float, n: int) -> None:
    """Print one JSON line."""
    print(
        json.dumps({"name": name, "ours": ours, "peer": peer, "ratio": ratio, "n": n}), flush=True
    )


def to_the_same(model: HookedModel, peer: Peer, site: str, n: int, rounds: int, size: int) -> None:
    """Time to the activation that lucent has after 512 steps, of so many units together."""
    first = 335 if site == "mixed3b" else 100
    units = [f"{site}:{first + i}" for i in range(n)]
    timed = units[:: max(1, n // 4)]  # lucent makes one at a time: of a batch, a few are timed
    ours, theirs = [], []
    for seed in range(rounds):
        found = [peer.render(unit, size, 512, seed) for unit in timed]
        wanted = [activation(model, u, image) for u, (_, image) in zip(timed, found, strict=True)]
        theirs.append(statistics.mean(seconds for seconds, _ in found))
        steps = steps_to(model, timed, wanted, size, seed)
        start = time.perf_counter()
        visualize_units(model, units, steps=max(steps), size=size, seed=seed)
        ours.append((time.perf_counter() - start) / n)
        print(
            f"{site} x {n}: lucent, 512 steps, {theirs[-1]:.1f} s a unit; ours, {steps} steps, "
            f"{ours[-1]:.1f} s a unit: {theirs[-1] / ours[-1]:.1f} x",
            flush=True,
        )
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    name = f"featurevis {site} x {n}"
    report(name, statistics.median(ours), statistics.median(theirs), ratio, rounds)


def at_equal_steps(
    model: HookedModel, peer: Peer, n: int, steps: int, size: int, seed: int
) -> None:
    """How many of some random units have the higher activation after so many steps of each."""
    chance, higher = np.random.default_rng(seed), 0
    for _ in range(n):
        site = ("mixed3a", "mixed3b", "mixed4a", "mixed4c", "mixed5a")[int(chance.integers(5))]
        unit = f"{site}:{int(chance.integers(model.site(site).n_units))}"
        _, image = peer.render(unit, size, steps, 0)
        other = activation(model, unit, image)
        own = visualize_units(model, [unit], steps=steps, size=size)[0].activation
        higher += own > other
        print(f"{unit} after {steps} steps: lucent {other:.4g}, ours {own:.4g}", flush=True)
    report("featurevis higher at equal steps", higher, n - higher, higher / max(1, n), n)


def main() -> None:
    """Measure all cases, then equal steps on random units."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=Path("/opt/peers/lucent/bin/python"))
    parser.add_argument("--n", type=int, default=1, help="rounds of each case")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--equal", type=int, default=10, help="units compared at equal steps")
    parser.add_argument("--equal-steps", type=int, default=512)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of those units")
    args = parser.parse_args()
    if not args.peer.exists():
        print(f"left out: no peer at {args.peer} (see the top of this file)")
        return
    model = model_to_draw()
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(args.peer, Path(folder), model)
        try:
            peer.render("mixed3b:0", 64, 1, 0)  # what is made once is made now, for both
            visualize_units(model, ["mixed3b:0"], steps=2, size=args.size)
            for site, n in CASES[: args.cases]:
                to_the_same(model, peer, site, n, args.n, args.size)
            at_equal_steps(model, peer, args.equal, args.equal_steps, args.size, args.seed)
        finally:
            peer.process.kill()
            peer.process.wait()


if __name__ == "__main__":
    main()
