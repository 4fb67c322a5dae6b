"""The transplant into a host: its curve units, the images for it, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cases.curve_detector import drawing
from cases.curve_detector.stage import Options
from cases.stages import Progress, Stage
from circuits.cleanroom.network import FAMILIES
from circuits.examples import Examples
from circuits.files import Keep
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.stimuli.labels import read_labels
from circuits.stimuli.shapes import CLASSES, draw_shapes
from circuits.stimuli.sources import open_source
from circuits.tables import by_reason
from circuits.transplant import Graft, Tuned, match_and_fit, measure_transplant
from circuits.tuning import find_curve_units
from circuits.units import Unit

SITES = {"shapes": "mixed3b_5x5", "googlenet": "mixed3b_5x5"}
"""Where curve units are looked for, unless told otherwise: the branch with the largest kernels."""

_LOOKING = 5  # finding the curve units takes about a fifth of the time: for the progress bar


def site_of(host: HookedModel, options: Options) -> str:
    """Where the host's curve units are looked for.

    Raises:
        KeyError: if the host has no such site.
        ValueError: if none is known, or it has no map.
    """
    name = options.site or SITES.get(host.name, "")
    if not name:
        raise ValueError(f"--site: name one of {host.name} whose curve units are to be replaced")
    if host.site(name).position_axes != ("y", "x"):
        raise ValueError(
            f"--site {name} of {host.name} has no map: expected a site of an image's places"
        )
    return host.site(name).name


def transplant(
    model: HookedModel,
    host: HookedModel,
    images: Images,
    options: Options,
    progress: Progress,
    keep: Keep,
) -> Stage:
    site = site_of(host, options)

    def look() -> list[tuple[str, float]]:
        found = find_curve_units(
            host, site, seed=options.seed, progress=lambda done, n: progress(done, _LOOKING * n)
        )
        return [(str(c.unit), c.tuning.measures.direction.value) for c in found if c.is_curve_unit]

    hosts = [Tuned(Unit.parse(unit), angle) for unit, angle in keep("curve units", look)]
    if len(hosts) < 3:
        raise ValueError(
            f"site {site} of {host.name} has {len(hosts)} curve units by their tuning: a family has at least 3"
        )
    calibration, evaluation = images.load()
    graft = match_and_fit(host, hosts, model, curve_families(model), calibration, keep=keep)
    report = measure_transplant(
        host, graft, calibration, evaluation, n_random=1 if options.fast else 3, seed=options.seed,
        progress=lambda done, n: progress(n + (_LOOKING - 1) * done, _LOOKING * n), keep=keep,
    )  # fmt: skip
    alike, crops = _side_by_side(host, graft, evaluation, options.seed)
    numbers = {
        "transplant": {
            c.name: {k: v for k, v in asdict(c).items() if k != "name"}
            for c in report.conditions
        },
        "transplant_facts": {
            k: v for k, v in report.to_dict().items() if k != "conditions"
        } | {
            "host": host.name, "site": site, "scale": graft.scale, "maps": alike,
            "calibration": images.facts["calibration"], "evaluation": images.facts["evaluation"],
        },
    }  # fmt: skip
    return Stage(
        numbers,
        {
            f"{host.name}, {site}: {len(hosts)} curve units replaced; share of the KL divergence of zeroing them that "
            "is recovered, with 95 % intervals.": drawing.recovered(report),
            f"Strongest crops of evaluation images: for units of {host.name} (left) and for the hand-written ones in "
            "their places (right).": drawing.crops(crops),
        },
    )


def _side_by_side(
    host: HookedModel, graft: Graft, evaluation: Examples, seed: int
) -> tuple[dict[str, float], list[tuple[str, Tensor, Tensor]]]:
    """How alike both units' maps are, image by image, and their strongest crops."""
    site, units = graft.site, [m.host.index for m in graft.matches]
    theirs, ours = [], []
    for part in evaluation.batches():
        theirs.append(host.run(part.inputs, read=[site], until=site)[site][:, units])
        ours.append(graft.maps(host, part.inputs))
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
    images = evaluation.images()
    assert images is not None, "hosts take photographs"
    for k in best:
        parts = [drawing.crops_at(images, maps[:, k], 20, pixels) for maps in (wanted, put)]
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


# --- images ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What a transplant is fitted and measured on.

    Attributes:
        facts: where both are from, and their hashes.
        load: those to calibrate on, and those to evaluate on, with their labels if these are known.
    """

    facts: dict[str, str]
    load: Callable[[], tuple[Examples, Examples]]


def images_of(options: Options, host: HookedModel) -> Images:
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

    def drawn(count: int, number: int) -> Examples:
        generator = torch.Generator().manual_seed(number)
        labels = torch.arange(count) % len(CLASSES)
        parts = [spec.normalize(draw_shapes(some, generator)) for some in labels.split(100)]
        return Examples.given(host, parts, labels=labels.tolist(), data=f"drawings, seed {number}")

    one, other = 2 * seed + 100_001, 2 * seed + 100_002
    facts = {
        "calibration": f"{n} drawings of shapes, seed {one}",
        "evaluation": f"{m} drawings of shapes, seed {other}",
    }
    return Images(facts, lambda: (drawn(n, one), drawn(m, other)))


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
        labels = read_labels(sources[1], host.classes, options.labels)
    chosen = (
        Examples(host, sources[0], None, among=fit).readable(),
        Examples(host, sources[1], None, among=test, labels=labels).readable(),
    )
    said = [_account(name, taken) for name, taken in zip(what, chosen, strict=True)]
    facts = {
        "calibration": said[0], "evaluation": said[1], "data": " ".join(s.hash for s in sources),
        "labels": str(options.labels or ""),
    }  # fmt: skip

    def shown(images: Examples) -> Examples:
        # decoded once, for many passes
        return Examples.given(host, images.inputs, labels=images.labels, data=images.data)

    return Images(facts, lambda: (shown(chosen[0]), shown(chosen[1])))


def _account(name: str, taken: Examples) -> str:
    """A folder with how many of its images were taken, and which could not be read and why."""
    skipped = f"; skipped {by_reason(taken.skipped)}" if taken.skipped else ""
    return f"{name} ({len(taken)}{skipped})"
