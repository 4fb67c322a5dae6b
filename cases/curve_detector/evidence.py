"""The evidence on the clean room itself, a function a stage, each compared with shuffled orientations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cases.curve_detector import drawing
from cases.curve_detector.stage import Options
from cases.stages import Stage
from circuits.cleanroom.network import FAMILIES, RADII, UNIT_NAMES
from circuits.featurevis.render import visualize_units
from circuits.figures import heat_map_figure
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo.loading import load_model
from circuits.saliency import saliency_map
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import open_source
from circuits.tuning import heat_map, radial_tuning
from circuits.tuning.radial import RadialTuning
from circuits.weights import expand_weights

PUBLISHED = Path(__file__).parent / "published_curves.json"
MIDDLE = 24
"""The first curve of the middle radius: the family that figures show."""


def shuffled_model(model: HookedModel, seed: int) -> HookedModel:
    """The clean room with shuffled orientations: a control.

    Early curves and curves read the units of each family below in a random order, the same for all of them. All else,
    sizes and places of weights too, stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    made = load_model("cleanroom")
    for layer, below in (("early", "line"), ("curve", "early")):
        order, at = [], 0
        for family in FAMILIES[below]:
            order.append(at + torch.randperm(len(family), generator=generator))
            at += len(family)
        name = f"{layer}_pre_relu.weight"
        made.parameters[name].data.copy_(model.parameters[name][:, torch.cat(order)])
    return made


def tuning(model: HookedModel, options: Options) -> Stage:
    step = 5.0 if options.fast else 1.0
    sizes = {"line": 12, "early": 72, "curve": 72}
    found = {
        layer: radial_tuning(
            model, [f"{layer}:{k}" for k in range(n)], "line" if layer == "line" else "curve",
            step=step if layer == "curve" or not options.fast else 15.0, seed=options.seed,
        )
        for layer, n in sizes.items()
    }  # fmt: skip
    lines = {
        layer: radial_tuning(model, [f"{layer}:{k}" for k in range(n)], "line", step=15.0)
        for layer, n in sizes.items()
    }
    other = shuffled_model(model, options.seed)
    control = radial_tuning(other, [f"curve:{MIDDLE + k}" for k in range(24)], step=5.0)
    wide = 30.0 if options.fast else 10.0
    control_map = heat_map(other, [f"curve:{MIDDLE + 3}"], step=wide)
    published = read_json(PUBLISHED)["mixed3b"]
    alike = {u: _alike(np.array(c)[:: int(step)], found["curve"]) for u, c in published.items()}
    chance = {u: _alike(np.array(c)[::5], control) for u, c in published.items()}
    units = [
        _unit(layer, t, line, published, step) for layer in sizes
        for t, line in zip(found[layer], lines[layer], strict=True)
    ]  # fmt: skip
    shown = [found["curve"][MIDDLE + k] for k in range(24)]
    maps = heat_map(model, [f"curve:{MIDDLE + k}" for k in (0, 3, 9)], step=wide)
    numbers = {
        "units": units,
        "published": {
            u: {"unit": str(alike[u][1]), "r": alike[u][0], "r_shuffled_orientations": chance[u][0]} for u in published
        },
        "r_published_min": min(r for r, _ in alike.values()),
        "r_published_median": float(np.median([r for r, _ in alike.values()])),
    }  # fmt: skip
    figures = {
        "Radial tuning of the 24 curves of radius 26 (left), and with shuffled orientations below them (right). Each "
        "is divided by its peak.": drawing.families(shown, control),
        "The published curves of InceptionV1 mixed3b (Cammarata et al. 2020, 2021; green), the hand-written unit that "
        "is most alike, turned (orange), and with shuffled orientations (grey).": drawing.published(
            published, found["curve"], control
        ),
        "Orientation x radius: three hand-written curves, and one of the control with shuffled orientations.": (
            heat_map_figure([*maps, *control_map])
        ),
    }
    return Stage(numbers, figures)


def _unit(
    layer: str, tuning: RadialTuning, line: RadialTuning, published: dict[str, Any], step: float
) -> dict[str, Any]:
    m, index = tuning.measures, tuning.unit.index
    family = next(f for f in _families(layer) if index in f[1])
    curves = [np.array(c)[:: int(step)] for c in published.values()]
    return {
        "name": UNIT_NAMES[layer][index], "unit": str(tuning.unit), "layer": layer, "family": family[0],
        "preferred": m.direction.value, "fwhm": m.fwhm.value, "echo": m.echo.value,
        "peak": m.peak.value, "radius": tuning.radius, "line_share": line.measures.peak.value / m.peak.value,
        "r_published": None if layer != "curve" else max(drawing.turned(c, tuning.mean)[0] for c in curves),
    }  # fmt: skip


def _families(layer: str) -> list[tuple[str, range]]:
    """Names of a layer's families, and which units they are."""
    made, at = [], 0
    for family in FAMILIES[layer]:
        first = family[0]
        name = f"{first.kind}s" + (f", radius {first.radius:g}" if first.radius else "")
        made.append((name, range(at, at + len(family))))
        at += len(family)
    return made


def _alike(curve: np.ndarray, tunings: Sequence[RadialTuning]) -> tuple[float, Any]:
    """The best correlation of a published curve with any of ours, turned, and whose it is."""
    return max(((drawing.turned(curve, t.mean)[0], t.unit) for t in tunings), key=lambda v: v[0])


def echo(model: HookedModel, options: Options) -> Stage:
    units = [f"curve:{MIDDLE + k}" for k in range(24)]
    names = ("early_pre_relu.weight", "curve_pre_relu.weight")
    step = 15.0 if options.fast else 5.0
    intact = radial_tuning(model, units, step=step)
    with model.rewriting({n: model.parameters[n].clamp_min(0) for n in names}):
        without = radial_tuning(model, units, step=step)
    generator = torch.Generator().manual_seed(options.seed)
    thinned = {}
    for n in names:  # as many weights, as strong in sum, but of either sign
        own = model.parameters[n]
        share = own.clamp_max(0).abs().sum() / own.abs().sum()
        thinned[n] = own * (torch.rand(own.shape, generator=generator) >= share)
    with model.rewriting(thinned):
        control = radial_tuning(model, units, step=step)

    def mean(tunings: Sequence[RadialTuning]) -> float:
        return float(np.nanmean([t.measures.echo.value for t in tunings]))

    numbers = {
        "echo": mean(intact), "echo_without_negative": mean(without), "echo_without_random": mean(control),
        "fwhm_without_negative": float(np.median([t.measures.fwhm.value for t in without])),
    }  # fmt: skip
    caption = (
        f"A curve as written (blue), without its and the early curves' negative weights (orange), and without random "
        f"weights of the same sum (grey). The echo, 180 degrees away, is {numbers['echo']:.2f} of the peak as written, "
        f"{numbers['echo_without_negative']:.2f} without the negative ones, and "
        f"{numbers['echo_without_random']:.2f} without random ones."
    )
    return Stage(numbers, {caption: drawing.echoes(intact, without, control)})


def weights(model: HookedModel, options: Options) -> Stage:
    name = "curve_pre_relu.weight"
    other = shuffled_model(model, options.seed)
    own, control = model.parameters[name], other.parameters[name]
    shown = {"as written": own, "shuffled orientations": control}
    sums = {k: [_block(w, i) for i in range(len(RADII))] for k, w in shown.items()}
    expanded = expand_weights(
        model, "complex", "curve_pre_relu", units=[MIDDLE + 3, MIDDLE + 15], size=(128, 128)
    )
    random = expand_weights(other, "complex", "curve_pre_relu", units=[MIDDLE + 3], size=(128, 128))
    by_layer = {
        "early -> curve": own[MIDDLE + 3, MIDDLE : MIDDLE + 24 : 2],
        "complex -> curve, expanded": expanded.weight[0],
        "complex -> opposed curve, expanded": expanded.weight[1],
        "complex -> curve, shuffled orientations": random.weight[0],
    }
    numbers = {
        "circulant_r2": {f"radius {r:g}": circulant(sums["as written"][i]) for i, r in enumerate(RADII)},
        "circulant_r2_shuffled": {
            f"radius {r:g}": circulant(sums["shuffled orientations"][i]) for i, r in enumerate(RADII)
        },
    }  # fmt: skip
    return Stage(
        numbers,
        {
            "Early curves (columns) to curves (rows) of each radius: sums of kernels, by angle. Above as written, "
            "below with shuffled orientations.": drawing.matrices(sums, RADII),
            "Weights into the curve at 45 degrees, layer by layer, one kernel for each angle of the source.": (
                drawing.kernels(by_layer)
            ),
        },
    )


def _block(weight: Tensor, k: int) -> np.ndarray:
    here = slice(24 * k, 24 * k + 24)
    return weight[here, here].double().sum((2, 3)).numpy()


def circulant(block: np.ndarray) -> float:
    """The share of a matrix's variance that depends on the difference of angles alone (R^2)."""
    aligned = np.stack([np.roll(row, -i) for i, row in enumerate(block)])
    rest = ((aligned - aligned.mean(0)) ** 2).sum()
    return float(1 - rest / ((block - block.mean()) ** 2).sum())


def pictures(model: HookedModel, options: Options) -> Stage:
    steps, which = (16, range(0, 24, 6)) if options.fast else (96, range(24))
    units = [f"curve:{MIDDLE + k}" for k in which]
    own = visualize_units(model, units, steps=steps, size=96, seed=options.seed)
    control = visualize_units(
        shuffled_model(model, options.seed), units[:6], steps=steps, size=96, seed=options.seed
    )
    names = [UNIT_NAMES["curve"][MIDDLE + k] for k in which]
    figure = drawing.pictures([p.image for p in own], names, [p.image for p in control])
    return Stage(
        {}, {"What excites each curve most; in the last row with shuffled orientations.": figure}
    )


def photographs(model: HookedModel, options: Options) -> Stage:
    source = open_source("photos")
    assert isinstance(source, ImageSource), "photographs are images"
    n = 40 if options.fast else len(source)
    spec = ImageInput(3, 224, 224)
    images = torch.stack([spec.load(source.image(i)) for i in range(n)])  # type: ignore[arg-type]
    control, crops, credits, numbers = shuffled_model(model, options.seed), [], [], {}
    for k in (0, 6, 12, 18):
        unit = MIDDLE + k
        own = drawing.strongest_crops(model, "curve", unit, images, 6)
        other = drawing.strongest_crops(control, "curve", unit, images, 6)
        crops.append((UNIT_NAMES["curve"][unit], own.images, other.images))
        numbers[UNIT_NAMES["curve"][unit]] = {
            "strongest": own.values[0],
            "strongest_shuffled": other.values[0],
        }
        credit = saliency_map(
            model,
            own.images[:3],
            f"curve:{unit}",
            "smoothgrad_squared",
            samples=8,
            seed=options.seed,
            size="keep",
        )
        credits.append((own.images[:3], credit))
    return Stage(
        {"n": n, "data": f"photos {source.hash[:16]}", "units": numbers},
        {
            "Photographs' strongest crops for four curves (left six), and with shuffled orientations (right six).": (
                drawing.crops(crops)
            ),
            "What of the crop the curve answers to (squared gradients, 8 noisy copies).": drawing.overlays(
                credits
            ),
        },
    )
