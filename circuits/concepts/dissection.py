"""Units compared with labelled masks: network dissection, and combinations of units (Net2Vec)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.units import Unit

Maps = Float[Tensor, "example unit y x"]
Masks = Bool[Tensor, "example concept height width"]

_STEPS = 200
"""Steps of Adam by which a combination is learned."""

_BINS = 4096
"""Bins of the histogram in which the best threshold of a combination is searched."""


@dataclass(frozen=True)
class Segment:
    """How well units segment a concept, measured on the half of the examples that did not choose them.

    Attributes:
        concept: the concept.
        unit: the unit that segments it best on the half that chooses.
        iou: that unit's intersection over union with the masks (network dissection).
        combined: the intersection over union of a weighted combination of all units (Net2Vec).
        units: the units with the largest weights in the combination, with the weights.
        random_iou: the unit's intersection over union with the masks of other examples.
        random_combined: that of a combination learned for the masks of other examples.
        n: the number of examples with the concept in the half that is measured.
    """

    concept: str
    unit: Unit
    iou: float
    combined: float
    units: tuple[tuple[Unit, float], ...]
    random_iou: float
    random_combined: float
    n: int


@dataclass(frozen=True)
class Dissection:
    """A site's units compared with labelled masks.

    Attributes:
        segments: one for each concept.
        several: units that have a large positive weight for more than one concept, with those concepts.
        quantile: the share of positions at which a unit counts as active.
        site: the site.
        data: the name of the data.
        seed: the seed of the halves.
    """

    segments: tuple[Segment, ...]
    several: dict[str, tuple[str, ...]]
    quantile: float
    site: str
    data: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        made = asdict(self)
        for own, segment in zip(made["segments"], self.segments, strict=True):
            own["unit"] = str(segment.unit)
            own["units"] = [[str(u), w] for u, w in segment.units]
        return made


@recording_gradients()
def dissect(
    site: str,
    maps: Maps,
    masks: Masks,
    concepts: Sequence[str],
    *,
    quantile: float = 0.005,
    top: int = 10,
    data: str = "",
    seed: int = 0,
) -> Dissection:
    """Find the unit, and the combination of units, that segment each concept best.

    One half of the examples chooses the unit and learns the weights, the other half is measured. A unit is active
    where it exceeds the value that it exceeds at a share `quantile` of all positions, upsampled to the masks (Bau et
    al. 2017). A combination is a logistic regression on the active places, with positive and negative places
    balanced (Fong and Vedaldi 2018, section 3.2), and a threshold with the best result on the half that chooses.

    Args:
        site: the site of the units.
        maps: the units' activations.
        masks: where each concept is.
        concepts: the names of the masks.
        quantile: the share of positions at which a unit counts as active.
        top: how many units of each combination to list.
        data: where examples come from, for the record.
        seed: the seed of the halves.

    Raises:
        ValueError: if shapes do not fit each other, a concept is on no example of one half, or the quantile is no
            position, or all of them.
    """
    if masks.shape[1] != len(concepts) or len(masks) != len(maps) or len(maps) < 2:
        raise ValueError(
            f"masks of shape {tuple(masks.shape)} for {len(maps)} examples and {len(concepts)} concepts: expected "
            "example x concept x height x width"
        )
    if not 0 < quantile < 1:
        raise ValueError(f"quantile {quantile} must be between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(maps), generator=generator)
    # Units, thresholds and combinations are chosen on one half and measured on the other: the best of hundreds of units
    # would look good on the examples that chose it.
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    for half in halves:
        empty = ~masks[half].flatten(2).any(2).any(0)
        if bool(empty.any()):
            raise ValueError(
                f"concept {concepts[int(empty.float().argmax())]!r} is on no example of one half"
            )
    level = _levels(maps[halves[0]], quantile)
    places = (maps > level[:, None, None]).float()
    iou = _ious(places[halves[0]], masks[halves[0]])
    segments = [
        _segment(site, name, int(iou[:, c].argmax()), places, masks[:, c], halves, top)
        for c, name in enumerate(concepts)
    ]
    used: dict[str, list[str]] = {}
    for s in segments:
        for unit, weight in s.units:
            if weight > 0:
                used.setdefault(str(unit), []).append(s.concept)
    several = {unit: tuple(c) for unit, c in sorted(used.items()) if len(c) > 1}
    return Dissection(tuple(segments), several, quantile, site, data, seed)


def _segment(
    site: str, concept: str, best: int, places: Tensor, mask: Tensor, halves: tuple[Tensor, Tensor], top: int
) -> Segment:  # fmt: skip
    """How well the best unit and a learned combination segment one concept.

    Args:
        site: the site of the units.
        concept: the concept's name.
        best: the unit that was chosen.
        places: where units are active, example x unit x y x x.
        mask: where the concept is, example x height x width.
        halves: the examples that choose, and those that are measured.
        top: how many units to list.
    """
    first, second = halves
    here, own = mask[second][:, None], places[second][:, best : best + 1]
    # The null: every example gets the mask of its neighbour, so that sizes and typical places of masks stay.
    other = mask[second][torch.roll(torch.arange(len(second)), 1)][:, None]
    mixed = mask[first][torch.roll(torch.arange(len(first)), 1)]
    weights, bias = _logistic_regression(places[first], mask[first])
    null = _logistic_regression(places[first], mixed)
    strongest = weights.abs().topk(min(top, len(weights))).indices.tolist()
    return Segment(
        concept, Unit(site, best), float(_ious(own, here)),
        _combined_iou(places, mask, weights, bias, first, second),
        tuple((Unit(site, u), float(weights[u])) for u in strongest), float(_ious(own, other)),
        _combined_iou(places, mask, *null, first, second), int(here.flatten(1).any(1).sum()),
    )  # fmt: skip


def _levels(maps: Tensor, quantile: float) -> Tensor:
    """The value that each unit exceeds at a share `quantile` of all positions; at least 0."""
    flat = maps.movedim(1, 0).flatten(1)
    k = round(quantile * flat.shape[1])
    if not k:
        raise ValueError(
            f"quantile {quantile:g} of {flat.shape[1]} positions is less than one position: expected a larger share, "
            "or more examples"
        )
    if k == flat.shape[1]:
        raise ValueError(
            f"quantile {quantile:g} of {k} positions is all of them: expected a share that leaves at least one out"
        )
    # The value of rank k + 1: exactly k positions lie above it, without ties.
    return flat.topk(k + 1, dim=1).values[:, -1].clamp_min(0)


def _ious(places: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union, summed over all examples before dividing: unit x concept."""
    shape = masks.shape[2:]
    both = torch.zeros(places.shape[1], masks.shape[1])
    either = torch.zeros_like(both)
    for p, m in zip(
        places.split(16), masks.split(16), strict=True
    ):  # upsampled maps of all would not fit
        on = (
            (F.interpolate(p, shape, mode="bilinear", align_corners=False) > 0.5)
            .movedim(1, 0)
            .flatten(1)
            .float()
        )
        wanted = m.movedim(1, 0).flatten(1).float()
        # Both are 0 or 1: a product counts where both are 1.
        meet = on @ wanted.T
        both += meet
        # |A or B| = |A| + |B| - |A and B|.
        either += on.sum(1, keepdim=True) + wanted.sum(1) - meet
    return both / either.clamp_min(1)


def _logistic_regression(places: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and bias of a logistic regression from active units to a mask, at the resolution of the units.

    The loss is balanced: with the share s of positive places, these count (1 - s) and negative ones s.
    """
    # The share of each position's area that the mask covers, as a soft target.
    wanted = F.interpolate(mask[:, None].float(), places.shape[2:], mode="area")[:, 0].flatten()
    x = places.movedim(1, -1).flatten(0, -2)
    share = wanted.mean().clamp(1e-4, 1 - 1e-4)
    weights = torch.zeros(x.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=0.05)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        logit = x @ weights + bias
        loss = -(
            (1 - share) * wanted * F.logsigmoid(logit) + share * (1 - wanted) * F.logsigmoid(-logit)
        ).mean()
        # Divided by its scale, so that one L1 penalty suits rare and frequent concepts; it keeps combinations short.
        (loss / (share * (1 - share)) + 1e-3 * weights.abs().sum()).backward()
        optimizer.step()
    return weights.detach(), bias.detach()


def _combined_iou(
    places: Tensor, mask: Tensor, weights: Tensor, bias: Tensor, first: Tensor, second: Tensor
) -> float:
    """The IoU of a combination on the second half, with the threshold that is best on the first."""

    def scores(half: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        for i in half.split(16):
            value = torch.sigmoid(torch.einsum("b u y x, u -> b y x", places[i], weights) + bias)
            up = F.interpolate(
                value[:, None], mask.shape[1:], mode="bilinear", align_corners=False
            )[:, 0]
            yield up, mask[i]

    # For every threshold t: IoU = (inside the mask and >= t) / (inside the mask, or >= t). Both follow from the
    # histograms of values inside and outside of the mask, added up from above.
    counts = np.zeros((2, _BINS))
    # A histogram instead of sorting: all pixels of all images at once would not fit.
    for value, wanted in scores(first):
        bins = (value * (_BINS - 1)).long().clamp(0, _BINS - 1)
        for i, part in enumerate((bins[wanted], bins[~wanted])):
            counts[i] += torch.bincount(part.flatten(), minlength=_BINS).numpy()
    inside, outside = (c[::-1].cumsum()[::-1] for c in counts)
    # inside[0] is the size of the mask: the union at t is the mask and what lies outside of it at t or above.
    cut = int((inside / np.maximum(1, inside[0] + outside)).argmax()) / (_BINS - 1)
    both = either = 0.0
    for value, wanted in scores(second):
        on = value >= cut
        both += float((on & wanted).sum())
        either += float((on | wanted).sum())
    return both / max(1.0, either)
