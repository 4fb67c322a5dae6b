"""How far a picture of a unit can be trusted.

A network can be changed so that its feature visualizations show anything while its behaviour stays almost the same
(Geirhos et al. 2023). Each picture is therefore shown with measurements: whether it excites the unit as much as
examples do, also after changes and from another seed; whether it does so through the same intermediate activations as
examples; and whether a network with shuffled weights would have given the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.featurevis.pictures import Picture
from circuits.featurevis.render import Settings, visualize_units
from circuits.featurevis.transforms import held_out
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.paths.randomizing import randomized
from circuits.models.paths.receptive import ReceptiveField, receptive_field
from circuits.progress import Progress
from circuits.units import Site, Unit

TOP, HELD_OUT, MOST_LAYERS, MAP = 8, 8, 12, 28
"""The number of natural examples that a picture is compared with, of held-out changes, and of layers that are compared;
and the largest side of a layer's map that is kept."""

# A picture may well excite a unit several times as much as any photograph does: only fifty times is flagged.
LOW_REACH, LOW_HELD, LOW_SEEDS, LOW_NATURAL, HIGH_RANDOM, HIGH_REACH = (
    0.5,
    0.1,
    0.5,
    0.25,
    0.5,
    50.0,
)
"""The thresholds at which a measurement is flagged."""


@dataclass(frozen=True, eq=False)
class NaturalResponses:
    """The activations of the layers up to a site on natural images, for comparison around each unit's maximum.

    Attributes:
        examples: which images, and how they were chosen (see `Examples.describe`).
        site: the site whose units have pictures.
        layers: the sites before it that are compared.
        maximum: the largest activation, per image and unit; of a site with a ceiling, that of the site before it.
        places: its position, per image and unit: y and x as shares of the map's height and width.
        reach: half the side of the compared window, as a share of the input's height and width.
        maps: the activations of each layer, image x unit x y x x, at most `MAP` positions along an axis.
        center: the mean of each unit, per layer.
        spread: the standard deviation of each unit, per layer.
    """

    examples: Mapping[str, Any]
    site: Site
    layers: tuple[Site, ...]
    maximum: Float[np.ndarray, "image unit"]
    places: Float[np.ndarray, "image unit 2"]
    reach: tuple[float, float]
    maps: dict[str, Float[Tensor, "_ _ _ _"]]
    center: dict[str, Float[Tensor, " _"]]
    spread: dict[str, Float[Tensor, " _"]]


def _layers_before(model: HookedModel, site: Site) -> tuple[Site, ...]:
    """At most `MOST_LAYERS` sites with maps before a site, evenly spread, the last one included."""
    order = [s.name for s in model.sites]
    before = [
        s
        for s in model.sites[: order.index(site.name)]
        # Similarity is a cosine over units after their mean is taken off: with fewer than four there is hardly a
        # direction left.
        if s.position_axes == ("y", "x") and s.n_units >= 4
    ]
    # With 25 sites before (indices 0..24) and 12 wanted, these are 0, 2, 4, 7, 9, 11, 13, 15, 17, 20, 22, 24; the set
    # takes together the repetitions that arise where there are fewer than 12.
    chosen = sorted({round(i * (len(before) - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)})
    return tuple(before[i] for i in chosen if 0 <= i < len(before))


@dataclass(frozen=True, eq=False)
class _LayerMaps:
    """A site's activations on some inputs, and the layers before it, with large maps pooled."""

    units: Float[Tensor, "image unit position"]
    size: tuple[int, int]
    maps: dict[str, Float[Tensor, "_ _ _ _"]]

    def best(self, image: int, unit: int) -> tuple[float, float]:
        """Where a unit is most active, as shares of height and width (the middle of the position)."""
        # Positions are flattened row by row: in a map 7 wide, position 16 is row 2, column 2.
        at, width = int(self.units[image, unit].argmax()), self.size[1]
        return (at // width + 0.5) / self.size[0], (at % width + 0.5) / width


def _read(model: HookedModel, site: Site, layers: Sequence[Site], inputs: Tensor) -> _LayerMaps:
    read = model.before_ceiling(site)
    cache = model.run(inputs, read=[*layers, read], until=site)
    maps = {}
    for layer in layers:
        value = cache[layer].float()
        small = (min(MAP, value.shape[-2]), min(MAP, value.shape[-1]))
        maps[layer.name] = (
            value if small == value.shape[-2:] else F.adaptive_avg_pool2d(value, small)
        )
    units = read.activations(cache[read]).float()
    # Sites without a map (logits) count as one row of positions, so that one formula for places serves both.
    mapped = site.position_axes == ("y", "x")
    height, width = site.positions_of(cache[read]) if mapped else (1, units.shape[2])
    return _LayerMaps(units, (height, width), maps)


def natural_responses(
    model: HookedModel, site: str | Site, examples: Examples | Tensor
) -> NaturalResponses:
    """Run a model on natural images, up to a site.

    Args:
        model: an image model.
        site: the site whose units have pictures.
        examples: the images; preferably 50 or more.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if there are fewer images than `TOP` + 1.
    """
    found = model.site(site)
    given = as_examples(model, examples)
    n = len(given)
    if n <= TOP:
        raise ValueError(
            f"images {given.data}: there are {n}, expected at least {TOP + 1} to compare pictures with"
        )
    layers = _layers_before(model, found)
    maxima, places = [], []
    maps: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for batch in given.batches(4):
        seen = _read(model, found, layers, batch.inputs)
        best, at = seen.units.max(2)
        height, width = seen.size
        y, x = (at // width + 0.5) / height, (at % width + 0.5) / width
        maxima.append(best.cpu().numpy())
        places.append(torch.stack([y, x], 2).cpu().numpy())
        for name, value in seen.maps.items():
            maps[name].append(value.cpu())
    joined = {name: torch.cat(parts) for name, parts in maps.items()}
    return NaturalResponses(
        examples=given.describe(),
        site=found,
        layers=layers,
        maximum=np.concatenate(maxima),
        places=np.concatenate(places),
        reach=_reach(receptive_field(model, found), found),
        maps=joined,
        center={name: value.mean((0, 2, 3)) for name, value in joined.items()},
        # A unit that is constant over the images would be divided by zero; it stays at 0 in both, and so has no say.
        spread={name: value.std((0, 2, 3)).clamp_min(1e-6) for name, value in joined.items()},
    )


def _reach(field: ReceptiveField, site: Site) -> tuple[float, float]:
    """A quarter of the side of a unit's receptive field, as a share of the input's side."""
    # The window is the middle half of the receptive field, whose borders contribute little; its half side is a quarter.
    middle = tuple(n // 2 for n in site.position_shape)
    top, left, bottom, right = field.at(middle)
    return (bottom - top) / field.size[0] / 4, (right - left) / field.size[1] / 4


@dataclass(frozen=True)
class Reliability:
    """How far a picture can be trusted.

    Attributes:
        reached: the unit's largest activation on the picture, divided by that on the dataset's top example.
        held_out: its mean activation under transformations that were not used in optimisation, divided by that without.
        seeds: the smaller mean activation divided by the larger, of this picture and of one from another seed.
        natural: how similar the earlier layers are on the picture and on the unit's top examples, where it is most
            active: 1 is as similar as top examples are to each other, 0 as similar as other images are.
        randomized: the unit's mean activation on a picture made for it on a network with shuffled weights, divided by
            that on this picture.
        score: the geometric mean of the first four numbers, clipped to 0..1, and of this picture's share of the summed
            activations on it and on the picture from shuffled weights.
        randomized_score: the same for the picture from the network with shuffled weights (with `seeds` as 1).
        flags: the problems found, in words; empty if there are none.
        examples: the images for comparison, and how they were chosen.
        seed: seed of everything random.
    """

    reached: float
    held_out: float
    seeds: float
    natural: float
    randomized: float
    score: float
    randomized_score: float
    flags: tuple[str, ...]
    examples: Mapping[str, Any]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


@recording_gradients()
def reliability(
    model: HookedModel,
    pictures: Sequence[Picture],
    natural: NaturalResponses,
    settings: Settings,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Reliability]:
    """Measure how far pictures of a site's units can be trusted.

    Each picture is made twice more: from another seed, and on the network with shuffled weights. A high score does not
    mean that the picture shows everything that excites the unit, nor does it say what the unit is for.

    Args:
        model: the model.
        pictures: pictures of units of one site, not negative ones.
        natural: the model's activations on natural images.
        settings: how the pictures were made.
        seed: seed of the transformations and of the shuffling.
        progress: called with the number of steps done and the total.

    Raises:
        ValueError: if a picture is not of a unit of the site that `natural` is of.
    """
    units: list[Unit] = []
    for picture in pictures:
        if picture.unit is None or picture.unit.site != natural.site.name:
            raise ValueError(
                f"picture of {picture.objective}: expected one of a unit of {natural.site.name}"
            )
        units.append(picture.unit)
    shuffled = randomized(model, seed)
    # Modulo 2^63, since the largest seed is valid too and must have a successor.
    other_seed = replace(settings, seed=(settings.seed + 1) % 2**63)
    again = visualize_units(
        model, units, progress=_half(progress, 0, settings.steps), **other_seed.options()
    )
    none = visualize_units(
        shuffled, units, progress=_half(progress, 1, settings.steps), **settings.options()
    )
    found = []
    for picture, other, empty, unit in zip(pictures, again, none, units, strict=True):
        own = _picture_scores(model, picture.image, unit, natural, seed)
        null = _picture_scores(model, empty.image, unit, natural, seed)
        # The smaller over the larger, so that it does not matter which of the two seeds found more.
        seeds = _ratio(*sorted((own.mean, float(other.activation))))
        found.append(_reliability(own, null, seeds, natural, seed))
    return found


def _half(progress: Progress | None, which: int, steps: int) -> Progress | None:
    """Reports the progress of the first or second of two equal parts."""
    if progress is None:
        return None
    return lambda done, _: progress(done + which * steps, 2 * steps)


@dataclass(frozen=True)
class _PictureScores:
    mean: float
    reached: float
    held_out: float
    natural: float


def _ratio(a: float, b: float) -> float:
    """a / b if both are positive, else 0."""
    return a / b if a > 0 and b > 0 else 0.0


def _picture_scores(
    model: HookedModel, image: Tensor, unit: Unit, natural: NaturalResponses, seed: int
) -> _PictureScores:
    """The measurements of a picture of a unit, wherever the picture comes from."""
    spec = model.input
    assert isinstance(spec, ImageInput), "pictures are of image models"
    site, index = natural.site, unit.index
    inputs = spec.normalize(image[None])
    seen = _read(model, site, natural.layers, inputs)
    own = seen.units[0, index]
    top = float(natural.maximum[:, index].max())
    # One seed for the picture and for the one from shuffled weights: both undergo the same changes.
    generator = torch.Generator().manual_seed(seed)
    change = held_out()
    changed = torch.cat([change(image[None], generator) for _ in range(HELD_OUT)])
    after = _read(model, site, [], spec.normalize(changed)).units
    # Places and reaches are shares of the input's sides, but a receptive field is a number of pixels: on a picture of
    # twice the side it covers half the share.
    scale = (spec.height / image.shape[-2], spec.width / image.shape[-1])
    return _PictureScores(
        mean=float(own.mean()),
        reached=_ratio(float(own.max()), top),
        held_out=_ratio(float(after[:, index].mean()), float(own.mean())),
        natural=_naturalness(seen.maps, seen.best(0, index), scale, index, natural, seed),
    )


def _window(
    value: Float[Tensor, "unit y x"], place: Sequence[float], reach: Sequence[float]
) -> Float[Tensor, " unit"]:
    """The mean over a window around a position."""
    cut = value
    for axis, (at, half) in enumerate(zip(place, reach, strict=True), 1):
        n = value.shape[axis]
        # Outwards to whole positions, and at least one: at = 0.5, half = 0.1 in a map of 7 is int(2.8) = 2 to ceil(4.2)
        # = 5, that is positions 2, 3 and 4.
        low = min(n - 1, max(0, int((at - half) * n)))
        high = min(n, max(low + 1, int(np.ceil((at + half) * n))))
        cut = cut.narrow(axis, low, high - low)
    return cut.mean((1, 2))


def _naturalness(
    maps: dict[str, Tensor],
    place: tuple[float, float],
    scale: tuple[float, float],
    index: int,
    natural: NaturalResponses,
    seed: int,
) -> float:
    """See `Reliability.natural`."""
    # (similarity of picture and top examples - chance) / (similarity among top examples - chance), with numerators and
    # denominators summed over layers before dividing: a layer in which top examples are no more alike than other images
    # then has no weight.
    # Stable, so that among equal maxima the choice does not depend on the sorting algorithm.
    order = np.argsort(-natural.maximum[:, index], kind="stable")
    top, rest = order[:TOP].tolist(), order[TOP:]
    # As many others as there are top examples, drawn for this unit alone: a unit's badge does not depend on the units
    # it is measured with.
    others = np.random.default_rng([seed, index]).choice(rest, min(TOP, len(rest)), replace=False)
    own_reach = (natural.reach[0] * scale[0], natural.reach[1] * scale[1])
    gained = possible = 0.0
    for layer in natural.layers:
        name = layer.name
        center, spread = natural.center[name], natural.spread[name]

        def vectors(images: Sequence[int], name: str = name) -> Tensor:
            seen = natural.maps[name]
            found = [
                _window(seen[i], natural.places[i, index].tolist(), natural.reach) for i in images
            ]
            return torch.stack(found)

        def unit_length(values: Tensor, center: Tensor = center, spread: Tensor = spread) -> Tensor:
            # Standardised by channel, then centred over channels: high contrast excites all channels, and would make
            # any two images of high contrast look alike.
            typical = (values - center) / spread
            return F.normalize(typical - typical.mean(-1, keepdim=True), dim=-1)

        best, rest_ = unit_length(vectors(top)), unit_length(vectors(others.tolist()))
        picture = unit_length(_window(maps[name][0].cpu(), place, own_reach))
        alike = best @ best.T
        n = len(best)
        # The diagonal is each example with itself, always 1, and would lift what "among examples" means.
        among = float((alike.sum() - alike.diagonal().sum()) / (n * (n - 1)))
        chance = float((rest_ @ best.T).mean())
        gained += float((best @ picture).mean()) - chance
        # A layer where top examples are no more alike than chance has nothing to gain; negative, it would cancel other
        # layers.
        possible += max(0.0, among - chance)
    return gained / possible if possible > 0 else 0.0


def _score(measured: _PictureScores, seeds: float, share: float) -> float:
    """The geometric mean of five parts in 0..1."""
    parts = np.clip([measured.reached, measured.held_out, seeds, measured.natural, share], 0, 1)
    # Geometric, so that one part near 0 brings the whole down: no part makes up for a picture that fails another.
    return float(np.prod(parts) ** (1 / len(parts)))


def _reliability(
    own: _PictureScores, null: _PictureScores, seeds: float, natural: NaturalResponses, seed: int
) -> Reliability:
    # The ratio is what people read (how many times), the share is bounded by 1 whichever of the two is larger: only a
    # bounded number can go into the score.
    chance = _ratio(null.mean, own.mean)
    share = _ratio(own.mean, max(0.0, own.mean) + max(0.0, null.mean))
    flags = []
    if own.reached < LOW_REACH:
        flags.append(
            f"excites the unit less than its top example does ({own.reached:.2g} times as much)"
        )
    if own.reached > HIGH_REACH:
        flags.append(
            f"excites the unit {own.reached:.3g} times as much as any example: far outside"
        )
    if own.held_out < LOW_HELD:
        flags.append(f"keeps only {own.held_out:.0%} of its activation when it is changed")
    if seeds < LOW_SEEDS:
        flags.append(f"another seed gives another activation (ratio {seeds:.2g})")
    if own.natural < LOW_NATURAL:
        flags.append(
            "excites the unit through other intermediate activations than its examples "
            f"(similarity {own.natural:.2f}; 1 is as among examples, 0 as other images)"
        )
    if chance > HIGH_RANDOM:
        flags.append(f"a network with shuffled weights gives {chance:.0%} of its activation")
    return Reliability(
        reached=own.reached,
        held_out=own.held_out,
        seeds=seeds,
        natural=own.natural,
        randomized=chance,
        score=_score(own, seeds, share),
        randomized_score=_score(null, 1.0, 1 - share),
        flags=tuple(flags),
        examples=natural.examples,
        seed=seed,
    )
