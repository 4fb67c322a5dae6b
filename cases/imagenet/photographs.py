"""The photographs that units are shown, what is on them, and a control network with shuffled weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from circuits.examples import Examples
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.randomizing import randomized
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import open_source

GROUPS: dict[str, tuple[tuple[int, int], ...]] = {
    "animals": ((0, 397),), "fish": ((0, 6), (389, 397)), "birds": ((7, 24), (80, 100), (127, 146)),
    "lizards": ((38, 48),), "snakes": ((52, 68),), "crustaceans": ((118, 126),), "dogs": ((151, 268),),
    "wolves and foxes": ((269, 280),), "cats": ((281, 293),), "insects": ((300, 326),), "hoofed animals": ((339, 354),),
    "primates": ((365, 384),), "food": ((924, 969),), "landscapes": ((970, 980),), "mushrooms": ((991, 997),),
}  # fmt: skip
"""Groups of ImageNet's classes, which are sorted by kind: first and last class of each range."""

EYES = Path(__file__).parent / "eyes.json"
"""Where the eyes of animals are on some photographs: across and down, as shares of what the network is shown."""


def classes_of(group: str) -> list[int]:
    """The classes of a group."""
    return [c for low, high in GROUPS[group] for c in range(low, high + 1)]


@dataclass(frozen=True, eq=False)
class Photographs:
    """Photographs as the network is shown them.

    Attributes:
        shown: decoded once, for many passes.
        names: of the files.
        groups: of `GROUPS`, those that each photograph is of; empty if classes are not known.
        eyes: numbers of photographs, and where eyes are on them.
        facts: where they are from.
    """

    shown: Examples
    names: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    eyes: dict[int, list[tuple[float, float]]]
    facts: dict[str, Any]
    _kept: dict[str, np.ndarray] = field(default_factory=dict)

    def of(self, group: str, most: int) -> Examples:
        """At most so many photographs of a group."""
        return self.shown.subset([i for i, g in enumerate(self.groups) if group in g][:most])

    def strengths(self, model: HookedModel, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Each unit's largest activation on each photograph, example x unit; of all sites in one pass."""
        if missing := [site for site in sites if f"{model.name} {site}" not in self._kept]:
            parts: dict[str, list[np.ndarray]] = {site: [] for site in missing}
            last = model.last(missing)
            for part in self.shown.batches():
                cache = model.run(part.inputs, read=missing, until=last)
                for site in missing:
                    parts[site].append(cache[site].amax((2, 3)).numpy())
            self._kept.update({f"{model.name} {s}": np.concatenate(p) for s, p in parts.items()})
        return {site: self._kept[f"{model.name} {site}"] for site in sites}


def photographs_of(
    model: HookedModel, folder: Path | None, labels: Path | None, most: int | None
) -> Photographs:
    """A folder's photographs with their classes, or those that are installed, of which no class is known.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if labels do not fit, or come without a folder.
    """
    if folder is None and labels is not None:
        raise ValueError("--labels: expected with --evaluate, whose photographs they are of")
    source = open_source("photos" if folder is None else f"folder:{folder}")
    known = None if labels is None else read_labels(source, model.classes, labels)
    among = list(range(len(source)))
    if most is not None and len(among) > most:
        among = [among[i * len(among) // most] for i in range(most)]
    taken = Examples(model, source, None, among=among, labels=known).readable()
    names = tuple(taken.names)
    shown = Examples.given(model, taken.inputs, labels=taken.labels, data=taken.data)
    eyes = {
        names.index(name): [(float(x), float(y)) for x, y in at]
        for name, at in read_json(EYES).items()
        if name in names
    }
    groups = tuple(
        tuple(g for g, ranges in GROUPS.items() if any(a <= c <= b for a, b in ranges))
        for c in taken.labels or ()
    )
    facts = {
        "data": str(folder or "photos"),
        "hash": source.hash,
        "n": len(shown),
        "labels": bool(groups),
    }
    return Photographs(shown, names, groups, eyes, facts)


def shuffled_model(model: HookedModel, photographs: Tensor, seed: int) -> HookedModel:
    """A control: the weights of each layer in a random order, and each channel rescaled.

    Without rescaling most channels of a network with ReLU6 are silent or saturated. So each convolution's channels get
    the mean and the standard deviation that they have in the model on some photographs, as batch norm would see to.
    """
    wanted: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, out: Tensor) -> None:
        wanted[name] = out.mean((0, 2, 3)), out.std((0, 2, 3))

    _with_hooks(model.module, lambda name, _, out: note(name, out), photographs)
    control = randomized(model, seed)

    def rescale(name: str, conv: nn.Conv2d, out: Tensor) -> Tensor:
        mean, std = wanted[name]
        own, spread = out.mean((0, 2, 3)), out.std((0, 2, 3))
        gain = torch.where(spread > 1e-5, std / spread.clamp_min(1e-5), 1.0)
        assert conv.bias is not None, "batch norm is folded into it"
        conv.weight.data.mul_(gain[:, None, None, None])
        conv.bias.data.copy_((conv.bias - own) * gain + mean)
        return (out - own[:, None, None]) * gain[:, None, None] + mean[:, None, None]

    _with_hooks(control.module, rescale, photographs)
    return control.around(control.module, f"{model.name} with shuffled weights")


def _with_hooks(module: nn.Module, see: Any, inputs: Tensor) -> None:
    """Run a module once; `see(name, convolution, output)` is called for each one, and may replace its output."""
    handles = [
        conv.register_forward_hook(lambda m, _, out, name=name: see(name, m, out))
        for name, conv in module.named_modules()
        if isinstance(conv, nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            module(inputs)
    finally:
        for handle in handles:
            handle.remove()
