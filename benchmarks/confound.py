"""A concept bottleneck that learned a confound, found and corrected.

ResNet-20 on CIFAR-10 (`$CIRCUITS_ASSETS` has both): an autoencoder of its last block's output, and a linear classifier
on its latents. On the third of the images that both learn from, every image of one class carries a painted square.
Latents that carry the class there and not on the second third, which is clean, are listed (`suspects`); how many of
them are corrected is chosen there too. A latent is corrected by setting it to its mean in training (`set`): it tells
nothing any more, and takes nothing from the class; `off` sets it to zero. Measured on the last third, which nobody
saw: clean, and with the square painted on the other classes.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuits.concepts import (
    Bottleneck,
    Intervention,
    intervene,
    pooled,
    suspects,
    train_bottleneck,
)
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.sae import ArrayRows, Hyperparameters, Schedule, train

SITE, MARKED, NAME = "layer3.2", 1, "confound"


class Data:
    """Images of three classes in three parts, painted or not."""

    def __init__(self, model: HookedModel, side: int, seed: int) -> None:
        file = Path(os.environ["CIRCUITS_ASSETS"]) / "images" / "cifar10_test_3000.npz"
        examples = Examples(model, f"npz:{file}:images", None)
        self.model, self.side = model, side
        self.images = torch.stack([examples.load(i) for i in range(len(examples))])
        self.labels = np.load(file)["labels"].astype(int)
        self.names = list(model.classes[: self.labels.max() + 1])
        order = np.random.default_rng(seed).permutation(len(self.labels))
        self.parts = np.split(order, [len(order) // 3, 2 * len(order) // 3])

    def truth(self, part: int) -> list[int]:
        """Classes of a part."""
        return self.labels[self.parts[part]].tolist()

    def shown(self, part: int, mark: str) -> tuple[Tensor, ...]:
        """A part as the model takes it, a square painted on `none`, on the marked `class`, or on `others`."""
        which = self.parts[part]
        own = self.labels[which] == MARKED
        on = {"none": np.zeros(len(which), bool), "class": own, "others": ~own}[mark]
        made = self.images[torch.from_numpy(which)].clone()
        colour = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
        made[torch.from_numpy(on), :, : self.side, : self.side] = colour
        return self.model.input.normalize(made).split(250)  # type: ignore[union-attr]


def autoencoder(data: Data, steps: int, seed: int) -> HookedModel:
    """The model with an autoencoder of what it does on the painted training images."""
    model, place = data.model, data.model.site(SITE)
    rows = [
        model.run(x, read=[SITE], until=SITE)[SITE].movedim(place.unit_axis, -1).flatten(0, -2)
        for x in data.shown(0, "class")
    ]
    code = train(
        ArrayRows(torch.cat(rows).numpy(), SITE), Hyperparameters("topk", 512, k=16, lr=1e-3, seed=seed),
        Schedule(steps, 2048, seed=seed), name=NAME,
    )[""]  # fmt: skip
    print(
        f"autoencoder: {code.n_latents} latents of {SITE}, fvu in training {code.about.metrics['fvu']:.3f}"
    )
    return model.attach(code, NAME, SITE)


def corrections(
    probe: Bottleneck, training: np.ndarray, middle: np.ndarray, data: Data
) -> dict[str, list[Intervention]]:
    """What is done to the suspects; how many of them follows from the second part."""
    listed = suspects(probe, training, data.truth(0), middle, data.truth(1))
    listed = [s for s in listed if s.label == data.names[MARKED]]
    each = [Intervention((s.unit,), "set", float(training[:, s.unit.index].mean())) for s in listed]
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= len(each)]
    right = [intervene(probe, middle, data.truth(1), each[:n], n_random=0).after for n in sizes]
    n = sizes[int(np.argmax(right))]
    first = ", ".join(f"{s.unit} ({s.training:.2f} -> {s.elsewhere:.2f})" for s in listed[:3])
    print(f"suspected of {data.names[MARKED]!r}: {len(listed)} latents, {n} corrected: {first}, …")
    return {"set": each[:n], "off": [Intervention(tuple(s.unit for s in listed[:n]))]}


def model_right(data: Data) -> float:
    """How often the model is right on the last part, if it may say only the classes that there are."""
    said = [data.model.logits(x)[:, : len(data.names)].argmax(1) for x in data.shown(2, "none")]
    return float((torch.cat(said).numpy() == data.truth(2)).mean())


def main() -> None:
    """Train, find, correct; print a line each and one of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=8, help="pixels of the square")
    parser.add_argument("--steps", type=int, default=1000, help="of the autoencoder's training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = Data(load_model("cifar10-resnet20"), options.side, options.seed)
    own = autoencoder(data, options.steps, options.seed)

    def codes(part: int, mark: str) -> np.ndarray:
        return pooled(own, f"sae/{NAME}", data.shown(part, mark), "mean")

    training, held = codes(0, "class"), codes(2, "none")
    clean = train_bottleneck(
        f"sae/{NAME}", codes(0, "none"), data.truth(0), data.names, seed=options.seed
    )
    probe = train_bottleneck(f"sae/{NAME}", training, data.truth(0), data.names, seed=options.seed)
    done = corrections(probe, training, codes(1, "none"), data)
    own_right, accuracy = model_right(data), clean.accuracy(held, data.truth(2))
    print(
        f"the model, of {len(data.names)} classes: {own_right:.3f} right; bottleneck trained clean {accuracy.own:.3f} "
        f"({accuracy.low:.3f} to {accuracy.high:.3f}); shuffled labels {accuracy.shuffled_labels:.3f}"
    )
    found = {"model": own_right, "trained clean": accuracy.own}
    for what, units in (("clean", held), ("square on others", codes(2, "others"))):
        for how, steps in done.items():
            effect = intervene(probe, units, data.truth(2), steps, seed=options.seed)
            found |= {f"{what}, before": effect.before, f"{what}, {how}": effect.after}
            random = f"random others {min(effect.random):+.3f} to {max(effect.random):+.3f}"
            interval = f"{effect.low:+.3f} to {effect.high:+.3f}"
            print(
                f"{what}, {how}: {effect.before:.3f} -> {effect.after:.3f} ({interval}; {random})"
            )
            for c in effect.classes:
                print(f"    {c.name}: {c.intact:.3f} -> {c.changed:.3f}")
    print(json.dumps({"name": "confound", "seed": options.seed, **found}))


if __name__ == "__main__":
    main()
