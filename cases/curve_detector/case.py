"""The case: curve detectors written by hand, shown as the articles show theirs, and put into other networks.

Cammarata et al. 2020, "Curve Detectors", and 2021, "Curve Circuits" (Distill). Each stage is kept in the workspace by
what it was made from, so that a second run, or one after an interruption, makes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cases.curve_detector import drawing
from cases.curve_detector.page import write_page
from circuits.attribution import saliency
from circuits.cleanroom.network import FAMILIES, RADII, UNIT_NAMES, provenance
from circuits.featurevis.render import visualize_units
from circuits.figures import heat_map_figure, save_figure
from circuits.files import write_json
from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput
from circuits.models.loading import load_model
from circuits.stimuli.images import ImageSource
from circuits.stimuli.labels import read_labels
from circuits.stimuli.shapes import CLASSES, draw_shapes
from circuits.stimuli.sources import open_source
from circuits.transplant import Graft, Tuned, match_and_fit, measure_transplant
from circuits.tuning import find_curve_units, heat_map, radial_tuning
from circuits.tuning.radial import RadialTuning
from circuits.weights import expand_weights
from circuits.workspace import Workspace

NAME = "curve-detector"
FOLDER = Path(__file__).parent
MIDDLE = 24
"""The first curve of the middle radius: the family that figures show."""

SITES = {"shapes": "mixed3b_5x5", "googlenet": "mixed3b_5x5"}
"""Where curve units are looked for, unless told otherwise: the branch with the largest kernels."""

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Options:
    """What a run is to show.

    Attributes:
        fast: coarser angles, fewer pictures and images: for a test.
        transplant: the host, as models are named.
        site: of the host; of known hosts the branch with the largest kernels.
        weights: the host's weights file.
        calibrate: a folder of images for fitting; of `shapes`, which has its own drawings, none.
        evaluate: another, for measuring.
        labels: of both, as `circuits.stimuli.labels` reads them.
        seed: of everything random.
    """

    fast: bool = False
    transplant: str = "shapes"
    site: str = ""
    weights: Path | None = None
    calibrate: Path | None = None
    evaluate: Path | None = None
    labels: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a run showed.

    Attributes:
        results: all numbers, as `results.json` has them.
        page: the report.
        folder: where both are.
    """

    results: dict[str, Any]
    page: Path
    folder: Path


@dataclass
class Stage:
    """One part of the evidence.

    Attributes:
        numbers: for `results.json`.
        figures: captions and files.
    """

    numbers: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)


def run(
    workspace: Workspace, options: Options = Options(), progress: Progress | None = None
) -> Result:
    """Run the case, or what is missing of it; write `results.json` and `report.html`.

    Args:
        workspace: where stages are kept, below `cases/curve-detector`.
        options: what to show.
        progress: called with stages done and all there are.

    Raises:
        FileNotFoundError: if a model's weights or a folder of images are missing.
        KeyError, ValueError: if an option does not fit, or the host has no curve units.
    """
    options = Options() if options is None else options
    model = load_model("cleanroom")
    host = load_model(options.transplant, options.weights)
    images = _images_of(options, host)
    base = {"model": model.hash, "code": _code(), "fast": options.fast, "seed": options.seed}
    own = {"host": host.hash, "site": options.site, "images": images.facts}
    stages: dict[str, tuple[dict[str, Any], Callable[[], Stage]]] = {
        "tuning": (base, lambda: _tuning(model, options)),
        "negative weights": (base, lambda: _echo(model, options)),
        "weights": (base, lambda: _weights(model, options)),
        "pictures": (base, lambda: _pictures(model, options)),
        "photographs": (base, lambda: _photographs(model, options)),
        f"transplant into {host.name}": (
            base | own, lambda: _transplant(model, host, images, options),
        ),
    }  # fmt: skip
    folder = workspace.writable().root / "cases" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {}
    figures: dict[str, dict[str, Path]] = {}
    for k, (name, (facts, make)) in enumerate(stages.items()):
        if progress is not None:
            progress(k, len(stages))
        numbers[name], figures[name] = _kept(folder, name, facts, make)
    if progress is not None:
        progress(len(stages), len(stages))
    moved = numbers[f"transplant into {host.name}"]
    results = {
        "case": NAME,
        "units": numbers["tuning"].pop("units"),
        **numbers["tuning"],
        **numbers["negative weights"],
        **numbers["weights"],
        "photographs": numbers["photographs"],
        **moved,
        "seed": options.seed,
        "fast": options.fast,
        "hashes": {"cleanroom": model.hash, host.name: host.hash},
        "provenance": provenance(),
    }
    write_json(folder / "results.json", results)
    page = folder / "report.html"
    write_page(page, results, figures)
    return Result(results, page, folder)


def _code() -> str:
    """What the case's own code is, in short."""
    sources = [*sorted(FOLDER.glob("*.py")), FOLDER / "published_curves.json"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _kept(
    folder: Path, name: str, facts: dict[str, Any], make: Callable[[], Stage]
) -> tuple[dict[str, Any], dict[str, Path]]:
    """A stage as it was made before from the same facts, or made now."""
    key = hashlib.sha256(json.dumps([name, facts], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / "stages" / f"{name.replace(' ', '-')}-{key}"
    try:
        known = json.loads((place / "stage.json").read_text())
        paths = {caption: place / file for caption, file in known["figures"].items()}
        if all(path.is_file() for path in paths.values()):
            return known["numbers"], paths
    except (OSError, ValueError, KeyError):
        pass  # there is none, or it was not finished: it is made now
    stage = make()
    place.mkdir(parents=True, exist_ok=True)
    files = {caption: f"figure-{k}.png" for k, caption in enumerate(stage.figures)}
    for caption, figure in stage.figures.items():
        save_figure(figure, place / files[caption])
    write_json(place / "stage.json", {"numbers": stage.numbers, "figures": files, "facts": facts})
    # read back, so that a first run and one from the cache say the same
    numbers = json.loads((place / "stage.json").read_text())["numbers"]
    return numbers, {caption: place / file for caption, file in files.items()}


# --- the control -------------------------------------------------------------------------------


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


# --- stages ------------------------------------------------------------------------------------


def _tuning(model: HookedModel, options: Options) -> Stage:
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
    published = json.loads((FOLDER / "published_curves.json").read_text())["mixed3b"]
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
        "The published curves of InceptionV1 mixed3b (Cammarata et al. 2020, 2021; black), the hand-written unit that "
        "is most alike, turned (red), and with shuffled orientations (grey).": drawing.published(
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
        "preferred": m.direction.value, "half_width": m.half_width.value, "echo": m.echo.value,
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


def _echo(model: HookedModel, options: Options) -> Stage:
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
        "half_width_without_negative": float(np.median([t.measures.half_width.value for t in without])),
    }  # fmt: skip
    caption = (
        "A curve as written (black), without its and the early curves' negative weights (red), and without random "
        "weights of the same sum (grey): the echo, 180 degrees away, appears without the negative ones."
    )
    return Stage(numbers, {caption: drawing.echoes(intact, without, control)})


def _weights(model: HookedModel, options: Options) -> Stage:
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


def _pictures(model: HookedModel, options: Options) -> Stage:
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


def _photographs(model: HookedModel, options: Options) -> Stage:
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
        credit = saliency(
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


def _transplant(model: HookedModel, host: HookedModel, images: Images, options: Options) -> Stage:
    site = options.site or SITES.get(host.name, "")
    if not site:
        raise ValueError(
            f"site: name one of {host.name} whose curve units are to be replaced (--site)"
        )
    found = [c for c in find_curve_units(host, site, seed=options.seed) if c.is_curve_unit]
    if len(found) < 3:
        raise ValueError(
            f"site {site} of {host.name} has {len(found)} curve units by their tuning: a family has at least 3"
        )
    hosts = [Tuned(c.unit, c.tuning.measures.direction.value) for c in found]
    calibration, evaluation, labels = images.load()
    graft = match_and_fit(host, hosts, model, curve_families(model), calibration)
    report = measure_transplant(
        host, graft, calibration, evaluation, labels, n_random=1 if options.fast else 3,
        calibrated_on=images.facts["calibration"], evaluated_on=images.facts["evaluation"], seed=options.seed,
    )  # fmt: skip
    alike, crops = _side_by_side(host, graft, evaluation, options.seed)
    numbers = {
        "transplant": {
            c.name: {
                "top1": _measured(c.top1), "top5": _measured(c.top5), "kl": _measured(c.kl),
                "recovered_kl": _measured(c.recovered_kl), "p_kl": c.p_kl, "p_top1": c.p_top1, "repeats": c.repeats,
            }
            for c in report.conditions
        },
        "transplant_facts": {
            k: v for k, v in report.to_dict().items() if k not in ("conditions",)
        } | {"site": site, "scale": graft.scale, "maps": alike},
    }  # fmt: skip
    return Stage(
        _finite(numbers),
        {
            f"{host.name}, {site}: {len(hosts)} curve units replaced; share of the KL divergence of zeroing them that "
            "is recovered, with 95 % intervals.": drawing.recovered(report),
            f"Strongest crops of evaluation images: for units of {host.name} (left) and for the hand-written ones in "
            "their places (right).": drawing.crops(crops),
        },
    )


def _side_by_side(
    host: HookedModel, graft: Graft, evaluation: Sequence[Tensor], seed: int
) -> tuple[dict[str, float], list[tuple[str, Tensor, Tensor]]]:
    """How alike both units' maps are, image by image, and their strongest crops."""
    site, units = graft.site, [m.host.index for m in graft.matches]
    theirs, ours = [], []
    for x in evaluation:
        theirs.append(host.run(x, read=[site], until=site)[site][:, units])
        ours.append(graft.maps(host, x))
    wanted, put = torch.cat(theirs), torch.cat(ours)
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
    numbers = {
        "median_r_per_image": _median_r(wanted, put),
        "median_r_per_image_shuffled_orientations": _median_r(wanted, put[:, order]),
    }
    best = sorted(range(len(units)), key=lambda k: -np.nan_to_num(graft.matches[k].correlation))[:4]
    crops = []
    assert isinstance(host.input, ImageInput), "checked when it was fitted"
    pixels = host.input.height / site.position_shape[0]
    for k in best:
        parts = [
            drawing.crops_at(evaluation, maps[:, k], 20, pixels, host.input)
            for maps in (wanted, put)
        ]
        crops.append((f"{graft.matches[k].host} ({graft.matches[k].angle:.0f}°)", *parts))
    return numbers, crops


def _median_r(one: Tensor, other: Tensor) -> float:
    """The median over images and units of Pearson's r of two maps; images where one is silent do not count."""
    a, b = (v.flatten(2).double() for v in (one, other))
    a, b = a - a.mean(2, keepdim=True), b - b.mean(2, keepdim=True)
    r = (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2))
    return float(r[torch.isfinite(r)].median())


def curve_families(model: HookedModel) -> list[list[Tuned]]:
    """The clean room's curves before their nonlinearity, one family a radius, by the angle each is written for."""
    made, at = [], 0
    for family in FAMILIES["curve"]:
        site = "curve_pre_relu"
        made.append([Tuned(model.unit(f"{site}:{at + k}"), f.angle) for k, f in enumerate(family)])
        at += len(family)
    return made


def _measured(m: Any) -> dict[str, float]:
    return {"value": m.value, "low": m.low, "high": m.high}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


# --- images for the transplant -----------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What a transplant is fitted and measured on.

    Attributes:
        facts: where both are from, and their hashes.
        load: batches to calibrate on, batches to evaluate on, and the labels of these, if they are known.
    """

    facts: dict[str, str]
    load: Callable[[], tuple[list[Tensor], list[Tensor], list[int] | None]]


def _images_of(options: Options, host: HookedModel) -> Images:
    if host.name == "shapes":
        if options.calibrate or options.evaluate or options.labels:
            raise ValueError(
                "--calibrate, --evaluate and --labels: shapes is shown its own drawings"
            )
        return _drawings(host, *((120, 240) if options.fast else (800, 1600)), options.seed)
    if options.calibrate is None or options.evaluate is None:
        raise ValueError(
            f"--transplant {host.name} needs images: --calibrate DIR --evaluate DIR (the same: halves of it)"
        )
    return _photographs_of(options, host)


def _drawings(host: HookedModel, n: int, m: int, seed: int) -> Images:
    assert isinstance(host.input, ImageInput), "shapes takes images"
    spec = host.input

    def drawn(count: int, number: int) -> tuple[list[Tensor], list[int]]:
        generator = torch.Generator().manual_seed(number)
        labels = torch.arange(count) % len(CLASSES)
        parts = [spec.normalize(draw_shapes(some, generator)) for some in labels.split(100)]
        return parts, labels.tolist()

    def load() -> tuple[list[Tensor], list[Tensor], list[int] | None]:
        return drawn(n, 2 * seed + 100_001)[0], *drawn(m, 2 * seed + 100_002)

    facts = {
        "calibration": f"{n} drawings of shapes, seed {2 * seed + 100_001}",
        "evaluation": f"{m} drawings of shapes, seed {2 * seed + 100_002}",
    }
    return Images(facts, load)


def _photographs_of(options: Options, host: HookedModel) -> Images:
    sources = [open_source(f"folder:{folder}") for folder in (options.calibrate, options.evaluate)]
    known, measured = ([Path(s.spec.removeprefix("folder:")) / n for n in s.names] for s in sources)
    fit, test = list(range(len(known))), list(range(len(measured)))
    if options.calibrate == options.evaluate:
        fit, test = fit[0::2], test[1::2]
        what = [f"every second of {options.calibrate}, from the {k}" for k in ("first", "second")]
    else:
        what = [str(options.calibrate), str(options.evaluate)]
        seen = {hashlib.sha256(path.read_bytes()).digest() for path in known}
        twice = [p.name for p in measured if hashlib.sha256(p.read_bytes()).digest() in seen]
        if twice:
            raise ValueError(
                f"--evaluate {options.evaluate}: {len(twice)} images are among those of --calibrate, the first "
                f"{twice[0]}: expected images that nothing was fitted on"
            )
    if options.fast:
        fit, test = fit[:40], test[:40]
    if not fit or not test:
        raise ValueError(
            f"images: {len(fit)} to calibrate on and {len(test)} to evaluate on: expected some"
        )
    labels = None
    if options.labels is not None:
        every = read_labels(sources[1], host.classes, options.labels)
        labels = [every[i] for i in test]

    def load() -> tuple[list[Tensor], list[Tensor], list[int] | None]:
        return _batches(sources[0], fit, host), _batches(sources[1], test, host), labels

    facts = {
        "calibration": f"{what[0]} ({len(fit)})", "evaluation": f"{what[1]} ({len(test)})",
        "data": " ".join(s.hash for s in sources), "labels": str(options.labels or ""),
    }  # fmt: skip
    return Images(facts, load)


def _batches(source: Any, which: Sequence[int], host: HookedModel, size: int = 25) -> list[Tensor]:
    assert isinstance(source, ImageSource), "folders hold images"
    assert isinstance(host.input, ImageInput), "checked when curve units were found"
    made = []
    for start in range(0, len(which), size):
        some = [host.input.load(source.image(i)) for i in which[start : start + size]]  # type: ignore[arg-type]
        made.append(host.input.normalize(torch.stack(some)))
    return made
