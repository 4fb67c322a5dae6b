"""What a variant of a model costs in an experiment.

`variant`: each of several ablations at mixed4c of GoogLeNet (its own weights if `$CIRCUITS_ASSETS` has them, else
random ones), against the bare part of the network behind that site on the same examples: the ratio is the bare part's
time over ours, and 0.91 or more means at most 10 % on top.

`measure` (with `--old`, a checkout of an earlier commit): what `circuits.measure` takes for each random edit of an edit
of activations, here and there, each in a process of its own with the same examples, interleaved; the ratio is the
earlier time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from circuits.edits.activations import zero
from circuits.examples import Examples
from circuits.experiments import Variant, run
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.inception import googlenet
from circuits.models.zoo.loading import load_model
from circuits.tasks import of_examples
from circuits.tasks.targets import output_site

SITE = "mixed4c"
RANDOM = 20

# Runs in either checkout: what a random edit costs is the slope of the time over their number.
MEASURE = """
import time, json, circuits
model = circuits.load_model("shapes")
x = model.input.example(64)
new = hasattr(circuits, "Examples")
edit = [circuits.edits.zero("mixed3b:200")]
def seconds(n):
    start = time.perf_counter()
    report = circuits.measure(model, edit, x if new else list(x.split(32)), n_random=n)
    return time.perf_counter() - start
seconds(2)
few, many = 4, 24
# before, each random edit had a twin and a random change of the same size
per = (seconds(many) - seconds(few)) / (many - few) / (1 if new else 2)
print(json.dumps(per))
"""


def network() -> HookedModel:
    """GoogLeNet."""
    if os.environ.get("CIRCUITS_ASSETS"):
        return load_model("googlenet")
    return googlenet()


def variant(model: HookedModel, rounds: int) -> dict[str, float]:
    """A variant's time against that of the part behind the site, both in one batch of 32."""
    x = model.input.example(32)
    task = of_examples(Examples.given(model, x))
    variants = [Variant(str(i), (zero(f"{SITE}:{i}"),)) for i in range(RANDOM)]
    end = output_site(model)
    tensor = model.run(x, read=[SITE], until=SITE)[SITE]
    ours, bare = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        run(model, variants[:2], task)
        few = time.perf_counter() - start
        start = time.perf_counter()
        run(model, variants, task)
        ours.append((time.perf_counter() - start - few) / (RANDOM - 2))
        start = time.perf_counter()
        for _ in range(4):
            model.run(x[:1], read=[end], until=end, edits={SITE: lambda _: tensor * 1})
        stem = time.perf_counter()
        for _ in range(4):
            model.run(x[:1], read=[SITE], until=SITE)
        alone = time.perf_counter() - stem
        bare.append((stem - start - alone) / 4)
    return {"ours": statistics.median(ours), "peer": statistics.median(bare)}


def measured(old: Path, rounds: int) -> dict[str, float]:
    """What a random edit costs in `measure`, here and in an earlier checkout."""
    here = Path(__file__).resolve().parents[1]

    def seconds(root: Path) -> float:
        env = os.environ | {"PYTHONPATH": str(root)}
        made = subprocess.run(
            [sys.executable, "-c", MEASURE],
            cwd=root,
            env=env,
            check=True,
            capture_output=True,
            text=True,
        )
        return json.loads(made.stdout.strip().splitlines()[-1])

    ours, peer = [], []
    for _ in range(rounds):
        ours.append(seconds(here))
        peer.append(seconds(old))
    return {"ours": statistics.median(ours), "peer": statistics.median(peer)}


def main() -> None:
    """Time both, print them, and one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5, help="rounds")
    parser.add_argument("--old", type=Path, help="a checkout of an earlier commit")
    given = parser.parse_args()
    found = {"variant": variant(network(), given.n)}
    if given.old is not None:
        found["measure"] = measured(given.old, given.n)
    for name, times in found.items():
        ratio = times["peer"] / times["ours"]
        print(
            f"{name}: ours {1e3 * times['ours']:.1f} ms, peer {1e3 * times['peer']:.1f} ms, {ratio:.2f}"
        )
        print(json.dumps({"name": f"experiments {name}", **times, "ratio": ratio, "n": given.n}))


if __name__ == "__main__":
    main()
