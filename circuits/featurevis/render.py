"""Feature visualization: the image that excites a unit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.featurevis.natural import NaturalImages
from circuits.featurevis.negatives import pre_activation
from circuits.featurevis.objectives import (
    Objective,
    Response,
    as_objective,
    channel,
    diversity,
)
from circuits.featurevis.optimizing import Optimized, Precision, optimize, values_of
from circuits.featurevis.parameterizations import (
    MAKERS,
    PARAMS,
    Parameterization,
    color_matrix,
    maco,
    squashed,
    with_alpha,
)
from circuits.featurevis.pictures import Picture
from circuits.featurevis.transforms import Transform, maco_standard, standard
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.tasks.targets import output_unit
from circuits.units import Direction, Unit, unknown

Subject = str | Unit | Direction | Objective
"""What can be visualized: a unit, a direction, a whole site (as in deepdream), or an objective."""

MACO_VIEWS = 4
"""The number of random crops that a step of MACO averages over."""

DIVERSE = 1.0
"""The weight of similarity between diverse pictures, relative to the objective's own value."""


@dataclass(frozen=True)
class Settings:
    """How pictures are made.

    Attributes:
        steps: number of optimisation steps, 1 to 100000.
        size: side of the images in pixels, or (height, width); the model's input size if not given.
        seed: seed of the initial images and the transforms, 0 to 2^63 - 1; the same seed gives the same pictures, bit
            for bit, on one kind of CPU, with as many threads and among the same other pictures in the same order.
        param: the parameterization: `fourier`, `pixel`, `laplacian`, `cppn` or `maco`.
        learning_rate: learning rate of NAdam; the parameterization's own if not given.
        transform: applied at each step; `standard` for the size if not given (for MACO, crops).
        views: number of random views of an image that a step averages over; 1 if not given, 4 for MACO.
        alpha: optimise the opacity of each pixel too.
        shared: images made together share a part, so that they line up (not for MACO).
        natural: images whose colours (and, for MACO, spectrum) to use; without them, three channels use ImageNet's
            colours, and other numbers of channels none.
        precision: precision of the passes through the network; reported values are always in float32.
        thresholds: after which steps to keep the image.
    """

    steps: int = 256
    size: int | tuple[int, int] | None = None
    seed: int = 0
    param: str = "fourier"
    learning_rate: float | None = None
    transform: Transform | None = None
    views: int | None = None
    alpha: bool = False
    shared: bool = False
    natural: NaturalImages | None = None
    precision: Precision = "float32"
    thresholds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100_000:
            raise ValueError(f"steps {self.steps} must be at least 1 (and at most 100000)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be from 0 to 2^63 - 1")
        if self.param not in PARAMS:
            raise unknown("param", self.param, PARAMS)
        if self.learning_rate is not None and not 0 < self.learning_rate < 1e4:
            raise ValueError(f"learning_rate {self.learning_rate} must be above 0")
        if self.views is not None and not 1 <= self.views <= 256:
            raise ValueError(f"views {self.views} must be from 1 to 256")
        if self.param == "maco" and self.natural is None:
            raise ValueError(
                "param 'maco' needs the spectrum of natural images: give natural=NaturalImages.fit(…) "
                "(on the command line --images DATA)"
            )
        # MACO's transparency comes from the sizes of gradients, and its images are no sums to which a shared part could
        # be added.
        if self.param == "maco" and (self.alpha or self.shared):
            raise ValueError(
                f"param 'maco' makes its own transparency and shares no parts: leave out "
                f"{'alpha' if self.alpha else 'shared'}"
            )
        bad = [t for t in self.thresholds if not 1 <= t <= self.steps]
        if bad:
            raise ValueError(f"threshold {bad[0]} must be from 1 to steps, {self.steps}")

    def shape(self, spec: ImageInput) -> tuple[int, int]:
        """Height and width of the pictures.

        Raises:
            ValueError: if they are out of range.
        """
        if self.size is None:
            return spec.height, spec.width
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        if min(height, width) < 8 or max(height, width) > 4096:
            raise ValueError(
                f"size {height} x {width} is not valid: expected 8 to 4096 pixels a side"
            )
        return height, width

    def describe(self) -> dict[str, Any]:
        """What is not said of a picture elsewhere, as a plain dictionary."""
        rest = {
            "param": self.param,
            "learning_rate": self.learning_rate,
            "transform": "standard" if self.transform is None else str(self.transform),
            "views": self.views,
            "alpha": self.alpha,
            "shared": self.shared,
            "precision": self.precision,
        }
        if self.natural is not None:
            rest |= {"images": self.natural.data, "images_hash": self.natural.data_hash}
        return rest

    def options(self) -> Options:
        """As keyword arguments."""
        return Options(**{f.name: getattr(self, f.name) for f in fields(self)})

    def key(self, spec: ImageInput) -> str:
        """One text for one way of making pictures of a model."""
        facts = {"steps": self.steps, "seed": self.seed, "size": self.shape(spec)}
        return json.dumps({**facts, **self.describe()}, sort_keys=True)


class Options(TypedDict, total=False):
    """The attributes of `Settings`, as keyword arguments."""

    steps: int
    size: int | tuple[int, int] | None
    seed: int
    param: str
    learning_rate: float | None
    transform: Transform | None
    views: int | None
    alpha: bool
    shared: bool
    natural: NaturalImages | None
    precision: Precision
    thresholds: tuple[int, ...]


@recording_gradients()
def visualize(
    model: HookedModel,
    target: Subject,
    *,
    negative: bool = False,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Picture:
    """The image that excites a unit (or direction, or objective) most, by gradient ascent.

    Olah et al. 2017. See `visualize_units` for arguments and errors, `Settings` for options.
    """
    return visualize_units(model, [target], negative=negative, progress=progress, **options)[0]


@recording_gradients()
def visualize_units(
    model: HookedModel,
    targets: Sequence[Subject],
    *,
    negative: bool = False,
    images: int = 1,
    diverse: int = 1,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> list[Picture]:
    """Visualize several units together, in one batch.

    A unit's picture depends on the other units, and on its place among them, by floating-point rounding alone: start
    and transforms are its own. Many steps enlarge a difference in rounding (a part in a million after one step; after
    48, `mixed3b:200` of `shapes` had an activation of 130.7 alone and 129.7 among three), so each picture's metadata
    says how many were made together, and with how many threads.

    Args:
        model: an image model.
        targets: what to visualize.
        negative: show what the units are least active on; for a unit after a ReLU, in the layer before the ReLU.
        images: number of pictures of each target, which its objective sees together (`interpolation`, `alignment`).
        diverse: number of pictures of each target that are made different from each other.
        progress: called with the number of steps done and the total; if it returns False, the work stops and the
            pictures are returned as they are.
        **options: see `Settings`.

    Returns:
        The pictures, target by target.

    Raises:
        KeyError: if a site or parameterization is unknown.
        ValueError: if a unit does not exist or cannot be negative, the model does not take images, an
            option is out of range, the site has no gradient, or the model's values are not finite.
    """
    spec = model.input
    if not isinstance(spec, ImageInput):
        raise ValueError(
            f"model {model.name} takes tokens: feature visualization needs images "
            "(`dream` optimises embeddings)"
        )
    if not targets:
        raise ValueError("targets are empty: expected at least one unit")
    for name, number in (("images", images), ("diverse", diverse)):
        if not 1 <= number <= 64:
            raise ValueError(f"{name} {number} must be from 1 to 64")
    each = max(images, diverse)
    settings = Settings(**options)
    objectives = [_objective(model, target, negative) for target in targets]
    group = [_diversified(model, o) if diverse > 1 else o for o in objectives]
    # Numbered within a target, so that a unit's first picture is the same whichever units it is made with.
    streams = [i for _ in targets for i in range(each)]
    made = _parameterization(settings, spec, streams, model.device)
    found = optimize(
        model,
        [(objective, each) for objective in group],
        made,
        steps=settings.steps,
        seed=settings.seed,
        transform=settings.transform or _standard(settings, spec),
        learning_rate=settings.learning_rate,
        views=settings.views or (MACO_VIEWS if settings.param == "maco" else 1),
        thresholds=settings.thresholds,
        precision=settings.precision,
        progress=progress,
    )
    units = [_unit(model, target) for target in targets for _ in range(each)]
    kind = "negative" if negative else "diverse" if diverse > 1 else "positive"
    parts = [(objective, each) for objective in objectives]
    return _pictures(model, found, parts, units, settings, kind)


def _unit(model: HookedModel, target: Subject) -> Unit | None:
    if isinstance(target, str) and (unit := output_unit(model, target)):
        return unit
    if isinstance(target, str) and ":" in target and not set(target) & set("+* "):
        return model.unit(target)
    return model.unit(target) if isinstance(target, Unit) else None


def _objective(model: HookedModel, target: Subject, negative: bool) -> Objective:
    if not negative:
        return as_objective(model, target)
    unit = _unit(model, target)
    if unit is None:
        return -as_objective(model, target)
    before = pre_activation(model, unit)
    objective = channel(model, before.unit)
    return -objective if before.sign > 0 else objective


def _diversified(model: HookedModel, objective: Objective) -> Objective:
    """The objective minus a penalty for similar images in its batch."""
    # The penalty is proportional to the objective's own (detached) value: as a share it suits units of every scale.
    # Style is measured where there are positions to average over.
    mapped = [name for name in objective.sites if model.site(name).position_axes]
    if not mapped:  # e.g. logits: the last map before them
        order = [site.name for site in model.sites]
        before = model.sites[: order.index(model.last(objective.sites).name)]
        mapped = [site.name for site in before if site.position_axes]
        if not mapped:
            raise ValueError(
                f"objective {objective.text}: there is no site with a map before it, so pictures cannot be made diverse"
            )
    alike = diversity(model, mapped[-1])

    def value(response: Response) -> Tensor:
        own = objective.value(response)
        # Detached, so that the penalty pulls images apart and is no reason to make the objective smaller.
        return own - DIVERSE * own.detach().abs() * alike.value(response)

    sites = tuple(dict.fromkeys((*objective.sites, *alike.sites)))
    return Objective(f"{objective.text}, diverse", sites, value)


def _standard(settings: Settings, spec: ImageInput) -> Transform:
    make = maco_standard if settings.param == "maco" else standard
    return make(*settings.shape(spec))


def _parameterization(
    settings: Settings, spec: ImageInput, streams: Sequence[int], device: torch.device
) -> Parameterization:
    shape = (len(streams), spec.channels, *settings.shape(spec))
    seed = settings.seed
    if settings.param == "maco":
        assert settings.natural is not None, "checked when the settings were made"
        return maco(shape, seed, streams, settings.natural, device)
    make = MAKERS[settings.param]
    colors = color_matrix(spec.channels, settings.natural)
    values = make(shape, seed, streams, device)
    if settings.shared:
        # seed + 2, since alpha has seed + 1: parts drawn with one seed would start alike and line up by construction.
        values = values + make((1, *shape[1:]), seed + 2, [0], device)
    made = squashed(values, colors)
    if not settings.alpha:
        return made
    return with_alpha(made, make((shape[0], 1, *shape[2:]), seed + 1, streams, device))


def _pictures(
    model: HookedModel,
    found: Optimized,
    parts: Sequence[tuple[Objective, int]],
    units: Sequence[Unit | None],
    settings: Settings,
    kind: str,
) -> list[Picture]:
    """The results as pictures, each with its own objective's value (without the diversity penalty)."""
    model_hash = model.hash
    values = values_of(model, parts, found.images.to(model.device))
    objectives = [objective for objective, n in parts for _ in range(n)]
    sign = (
        -1.0 if kind == "negative" else 1.0
    )  # report the unit's activation, not the negated objective
    # What rounding depends on: with another number of images or threads, sums are in another order.
    company = {"made_together": len(units), "threads": torch.get_num_threads()}
    pictures = []
    for i, (objective, unit) in enumerate(zip(objectives, units, strict=True)):
        pictures.append(
            Picture(
                objective=objective.text,
                unit=unit,
                image=found.images[i],
                activation=sign * float(values[i]),
                start=sign * float(found.start[i]),
                model_hash=model_hash,
                steps=found.steps,
                seed=settings.seed,
                settings={"kind": kind, **settings.describe(), **company},
                alpha=None if found.alpha is None else found.alpha[i],
                at={step: images[i] for step, images in found.at.items()},
            )
        )
    return pictures
