"""Tests of what units detect: tuning, and the four questions of "Curve Detectors" (Cammarata et al. 2020).

Causality: is it the unit that matters, or would another do? Generality: does it find the feature wherever it is?
Purity: does it answer to nothing else? Family: are these units one unit, turned?
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from circuits.claims.evidence import Auroc, Known, Region, Share
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject, without_code
from circuits.claims.verdicts import Level, Measured, quantity
from circuits.examples import Examples
from circuits.experiments.ablation import ablate
from circuits.families import measure_family
from circuits.models.adapter.inputs import ImageInput
from circuits.stimuli.labels import read_labels
from circuits.stimuli.orbits import Transformation
from circuits.stimuli.sources import open_source
from circuits.tasks.contrasts import parse_classes
from circuits.tuning.invariances import ASPECTS, invariance
from circuits.tuning.measures import echo, fwhm, preferred
from circuits.tuning.radial import radial_tuning

_STEP = 5.0
"""Between the angles of a tuning curve, in degrees."""


def _of_images(subject: Subject) -> str:
    """Why a test of images cannot be made; empty if it can."""
    if isinstance(subject.model.input, ImageInput):
        return ""
    return f"model {subject.model.name} takes tokens: the test is of units of image models"


def tuned(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Whether a unit is a curve detector of an angle, over curves that differ in what should not matter."""
    if why := _of_images(subject):
        return subject.cannot(why)
    model, unit = subject.model, settings["unit"]
    [curve] = radial_tuning(model, [unit], step=_STEP, seed=subject.seed)
    [line] = radial_tuning(model, [unit], "line", step=_STEP, seed=subject.seed)
    peak = curve.curves.max(1)
    if not (peak > 0).all():
        return subject.cannot(f"unit {unit} does not answer to some of the curves at all")
    angle = preferred(curve.angles, curve.curves)
    off = np.abs((angle - settings["angle"] + 180) % 360 - 180)
    kinds = len(curve.curves)
    # These kinds of curves are all that are drawn, and no sample of others: the worst of them decides.
    made = partial(quantity, level=level, parts=4, n=kinds, exact=True)
    widths, echoes = (measure(curve.angles, curve.curves) for measure in (fwhm, echo))
    found = (
        made(
            f"preferred angle off {settings['angle']:g}, at most", Known(float(off.max())),
            Region(high=settings["tolerance"]), unit="degrees",
        ),
        made(
            "full width at half maximum, at most", Known(float(widths.max())), Region(high=settings["width"]),
            unit="degrees",
        ),
        made("echo, of the peak, at most", Known(float(echoes.max())), Region(high=settings["echo"])),
        made(
            "answer to lines, of the peak, at most", Known(float((line.curves.max(1) / peak).max())),
            Region(high=settings["lines"]),
        ),
    )  # fmt: skip
    said = (
        f"all {kinds} kinds of curves (ink, paper, thickness) of radius {curve.radius:.3g} pixels at "
        f"{len(curve.angles)} angles"
    )
    return Measured(found, said, subject.seed)


def invariant(subject: Subject, settings: Settings, level: Level) -> Measured:
    """How much of a curve unit's answer is left as contrast, colour, fill, thickness or corners change."""
    if why := _of_images(subject):
        return subject.cannot(why)
    tunings = radial_tuning(subject.model, [settings["unit"]], step=_STEP, seed=subject.seed)
    made = partial(quantity, level=level, parts=len(settings["aspects"]), exact=True)
    found = [
        made(
            f"smallest answer over the largest, as {one.aspect} changes", Known(one.kept),
            Region(low=settings["least"]), n=len(one.values),
        )
        for one in invariance(subject.model, tunings, settings["aspects"])
    ]  # fmt: skip
    return Measured(
        tuple(found),
        "drawn curves of the preferred angle and radius, all values of each aspect",
        subject.seed,
    )


def family(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Whether some units are one unit turned (mirrored, …): they agree more than random units of the site."""
    if why := _of_images(subject):
        return subject.cannot(why)
    measured = measure_family(
        subject.model, settings["units"], settings["transformation"], permutations=settings["groups"], seed=subject.seed
    )  # fmt: skip
    n = measured.n_null
    beaten = n - round(measured.p_value * (1 + n) - 1)
    outcomes = np.array([1.0] * beaten + [0.0] * (n - beaten))
    found = quantity(
        "share of random groups that agree less", Share(outcomes, range(n)), Region(low=settings["rank"]), level,
        null_is=measured.null,
    )  # fmt: skip
    phases = ", ".join(f"{m.unit} {m.phase:.0f}" for m in measured.members)
    return Measured(
        (found,),
        measured.stimuli,
        subject.seed,
        (f"agreement {measured.score:.3f}; phases: {phases}",),
    )


# --- on a dataset ------------------------------------------------------------------------------------


def _shown(
    subject: Subject, settings: Settings
) -> tuple[Examples, Float[np.ndarray, " example"], Bool[np.ndarray, " example"]]:
    """Examples of a dataset, the unit's largest answer to each, and which are of the named classes."""
    model = subject.model
    source = open_source(without_code(settings["data"]))
    file = settings["labels"]
    labels = read_labels(source, model.classes, None if file == "names" else subject.folder / file)
    examples = Examples(model, source, settings["limit"], seed=subject.seed, labels=labels)
    wanted = set(parse_classes(model, "|".join(settings["classes"])))
    unit = model.unit(settings["unit"])
    site = model.site(unit.site)
    found = np.zeros(len(examples))
    for part in examples.batches():
        tensor = model.run(part.inputs, read=[site], until=site)[site]
        maps = site.by_unit(tensor)[:, unit.index].flatten(1)
        found[list(part.which)] = maps.max(1).values.double().cpu().numpy()
    own = examples.labels
    assert own is not None, "they were given"
    return examples, found, np.array([label in wanted for label in own])


def generality(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Whether the unit answers more to images of the feature than to others, over all of them and not the best few."""
    if why := _of_images(subject):
        return subject.cannot(why)
    examples, found, is_one = _shown(subject, settings)
    if is_one.all() or not is_one.any():
        return subject.cannot(
            "all images are of the named classes, or none is: there is nothing to compare"
        )
    least = Region(low=settings["least"])
    made = quantity(
        "AUROC", Auroc(found[is_one], found[~is_one]), least, level, null=(0.5,), null_is="chance"
    )
    p = stats.mannwhitneyu(found[is_one], found[~is_one], alternative="greater").pvalue
    note = f"{is_one.sum()} images of the classes, {(~is_one).sum()} others; Mann-Whitney p {p:.3g}"
    return Measured((made,), f"{len(examples)} images of {settings['data']}", subject.seed, (note,))


def purity(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Which share of the images that drive the unit most are of the feature."""
    if why := _of_images(subject):
        return subject.cannot(why)
    examples, found, is_one = _shown(subject, settings)
    bar = float(np.quantile(found, 1 - settings["top"]))
    strong = found >= bar
    if not found[strong].min() > found.min():
        return subject.cannot("the unit gives the same answer to most images: none stand out")
    base = float(is_one.mean())
    outcomes = Share(is_one[strong].astype(float), range(int(strong.sum())))
    made = quantity(
        f"share of the classes among the top {settings['top']:.0%}", outcomes, Region(low=settings["least"]), level,
        null=(base,), null_is="the classes' share of all images",
    )  # fmt: skip
    return Measured((made,), f"{len(examples)} images of {settings['data']}", subject.seed)


def causality(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Whether ablating units changes the task's metric more than ablating as many equally active ones."""
    effects = ablate(
        subject.model, settings["units"], subject.test, how="mean", n_random=settings["random"], seed=subject.seed,
        progress=subject.progress,
    ).effects  # fmt: skip
    effect = effects[subject.test.metric.name]
    if not effect.null:
        return subject.cannot("there are no other units that are equally active to compare with")
    smaller = np.array([abs(v) < abs(effect.change) for v in effect.null], float)
    made = quantity(
        "share of random units that change less", Share(smaller, range(len(smaller))), Region(low=settings["rank"]),
        level, null=effect.null, null_is=effect.null_is,
    )  # fmt: skip
    note = f"{effect.measure}: {effect.intact:.4g} before, {effect.changed:.4g} after ablation by means"
    return Measured((made,), subject.said(), subject.seed, (note,))


def _check_units(subject: Subject, settings: Settings) -> None:
    for unit in settings.get("units", (settings.get("unit"),)):
        subject.model.unit(unit)


_UNIT = Parameter("unit", "the unit, as SITE:INDEX", form="text")
_ON_DATA = (
    _UNIT,
    Parameter("classes", "the classes of the images that show the feature", form="texts"),
    Parameter("data", "the dataset, as `--data` takes it", form="text"),
    Parameter("labels", "a file with the class of each image, or `names`", "names", form="text"),
    Parameter("limit", "how many images", 500, 10, 10**6, whole=True),
)

TESTS = (
    ClaimTest(
        "tuning", ("curve-detector",),
        "Preferred angle, width, echo and answer to lines of a unit's radial tuning curve (Cammarata et al. 2020).",
        (
            _UNIT,
            Parameter("angle", "where the curve bulges, in degrees", None, -360, 360),
            Parameter("tolerance", "how far the preferred angle may be off, in degrees", 15, 0, 180),
            Parameter("width", "the largest full width at half maximum, in degrees", 90, 0, 360),
            Parameter("echo", "the largest answer to the opposed curve, of the peak", 0.2, 0, 1),
            Parameter("lines", "the largest answer to a straight line, of the peak", 0.8, 0, 10),
        ), tuned, circuit=False, check=_check_units,
    ),
    ClaimTest(
        "invariance", ("curve-detector",),
        "How much of a curve unit's answer is left as what should not matter changes.",
        (
            _UNIT,
            Parameter("aspects", "what changes", ("contrast", "thickness"), choices=ASPECTS, form="texts"),
            Parameter("least", "the smallest answer, as a share of the largest", 0.5, 0, 1),
        ), invariant, circuit=False, check=_check_units,
    ),
    ClaimTest(
        "family", ("family",),
        "Whether units are turned (mirrored, scaled, hue-shifted) copies of each other, against random groups.",
        (
            Parameter("units", "the units", form="texts"),
            Parameter("transformation", "how they differ", "rotation", choices=get_args(Transformation), form="text"),
            Parameter("groups", "random groups of units", 199, 19, 10**5, whole=True),
            Parameter("rank", "the least share of random groups that agree less", 0.9, 0, 1),
        ), family, circuit=False, check=_check_units,
    ),
    ClaimTest(
        "generality", ("detector",),
        "The area under the ROC curve of the unit's answer, for images of the feature among others.",
        (*_ON_DATA, Parameter("least", "the least AUROC", 0.8, 0, 1)), generality, circuit=False, check=_check_units,
    ),
    ClaimTest(
        "purity", ("detector",),
        "Which share of the images that drive the unit most show the feature.",
        (
            *_ON_DATA, Parameter("top", "which share of the images counts as driving it most", 0.05, 0.001, 1),
            Parameter("least", "the least share of them", 0.8, 0, 1),
        ), purity, circuit=False, check=_check_units,
    ),
    ClaimTest(
        "causality", ("detector",),
        "Whether ablating units changes the task's metric more than ablating equally active ones.",
        (
            Parameter("units", "the units", form="texts"),
            Parameter("random", "random sets of units", 99, 10, 10**5, whole=True),
            Parameter("rank", "the least share of them that change less", 0.9, 0, 1),
        ), causality, circuit=False, check=_check_units,
    ),
)  # fmt: skip
