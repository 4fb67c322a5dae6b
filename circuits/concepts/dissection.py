"""Units against labelled masks: network dissection, and concepts as combinations of units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.units import Unit

Maps = Float[Tensor, "example unit y x"]
Masks = Bool[Tensor, "example concept height width"]

_STEPS = 200
_BINS = 4096


@dataclass(frozen=True)
class Segment:
    """How well a concept's places are found.

    Attributes:
        concept: which.
        unit: the single unit that finds it best, and on which half of the examples it was chosen: the other one.
        iou: of it: intersection over union of its places and the concept's (network dissection).
        combined: the same of the best weighted combination of units (Net2Vec).
        units: those of the largest weights in it, with the weights.
        random_iou: of the unit, against the masks of other examples.
        random_combined: of a combination learned for the masks of other examples.
        n: examples on which it is measured, which hold the concept.
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
    """A site's units against labelled masks.

    Attributes:
        segments: one a concept.
        several: units that are among the best of more than one concept, with those concepts.
        quantile: a unit's places are where it is in its top share of activations.
        site: which.
        data: on what.
        seed: of the halves and shuffles.
    """

    segments: tuple[Segment, ...]
    several: dict[str, tuple[str, ...]]
    quantile: float
    site: str
    data: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        made = asdict(self)
        for own, segment in zip(made["segments"], self.segments, strict=True):
            own["unit"] = str(segment.unit)
            own["units"] = [[str(u), w] for u, w in segment.units]
        return made


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
    """Which unit, and which combination of units, finds the places of each concept.

    Half of the examples choose the unit and learn the weights, the other half is measured. A unit's places are
    where it is above the value that it exceeds in a share `quantile` of all positions, scaled up to the masks
    (Bau et al. 2017). A combination is a logistic regression on those places, concepts weighted against their
    absence (Fong and Vedaldi 2018, section 3.2), cut where it finds most on the half that chooses.

    Args:
        site: of the units.
        maps: their activations.
        masks: where each concept is.
        concepts: names of the masks.
        quantile: share of positions.
        top: units listed of each combination.
        data: where examples come from.
        seed: of the halves and shuffles.

    Raises:
        ValueError: if numbers do not fit, or a concept is on none of a half's examples.
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
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    for half in (first, second):
        empty = ~masks[half].flatten(2).any(2).any(0)
        if bool(empty.any()):
            raise ValueError(
                f"concept {concepts[int(empty.float().argmax())]!r} is on no example of one half"
            )
    level = _levels(maps[first], quantile)
    places = (maps > level[:, None, None]).float()
    iou_first = _ious(places[first], masks[first])
    shift = torch.roll(torch.arange(len(second)), 1)
    segments = []
    for c, concept in enumerate(concepts):
        best = int(iou_first[:, c].argmax())
        here, other = masks[second][:, c : c + 1], masks[second][shift][:, c : c + 1]
        own = places[second][:, best : best + 1]
        weights, bias = _learned(places[first], masks[first][:, c])
        mixed = masks[first][torch.roll(torch.arange(len(first)), 1)][:, c]
        null = _learned(places[first], mixed)
        strongest = weights.abs().topk(min(top, len(weights))).indices.tolist()
        combined = _combined(places, masks[:, c], weights, bias, first, second)
        segments.append(
            Segment(
                concept, Unit(site, best), float(_ious(own, here)), combined,
                tuple((Unit(site, u), float(weights[u])) for u in strongest), float(_ious(own, other)),
                _combined(places, masks[:, c], *null, first, second), int(here.flatten(1).any(1).sum()),
            )
        )  # fmt: skip
    used: dict[str, list[str]] = {}
    for s in segments:
        for unit, weight in s.units:
            if weight > 0:
                used.setdefault(str(unit), []).append(s.concept)
    several = {unit: tuple(c) for unit, c in sorted(used.items()) if len(c) > 1}
    return Dissection(tuple(segments), several, quantile, site, data, seed)


def _levels(maps: Tensor, quantile: float) -> Tensor:
    """What each unit exceeds in a share of all positions."""
    flat = maps.movedim(1, 0).flatten(1)
    k = round(quantile * flat.shape[1])
    if not k:
        raise ValueError(
            f"quantile {quantile:g} of {flat.shape[1]} positions is not one: expected a larger share, or more examples"
        )
    return flat.topk(k + 1, dim=1).values[:, -1].clamp_min(0)


def _ious(places: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union over all examples: unit x concept."""
    shape = masks.shape[2:]
    both = torch.zeros(places.shape[1], masks.shape[1])
    either = torch.zeros_like(both)
    for p, m in zip(places.split(16), masks.split(16), strict=True):
        on = (
            (F.interpolate(p, shape, mode="bilinear", align_corners=False) > 0.5)
            .movedim(1, 0)
            .flatten(1)
            .float()
        )
        wanted = m.movedim(1, 0).flatten(1).float()
        meet = on @ wanted.T
        both += meet
        either += on.sum(1, keepdim=True) + wanted.sum(1) - meet
    return both / either.clamp_min(1)


def _learned(places: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a logistic regression from units' places to a mask, at the units' own positions."""
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
        (loss / (share * (1 - share)) + 1e-3 * weights.abs().sum()).backward()
        optimizer.step()
    return weights.detach(), bias.detach()


def _combined(
    places: Tensor, mask: Tensor, weights: Tensor, bias: Tensor, first: Tensor, second: Tensor
) -> float:
    """IoU of a combination on the second half, cut where it is best on the first."""

    def scores(half: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        for i in half.split(16):
            value = torch.sigmoid(torch.einsum("b u y x, u -> b y x", places[i], weights) + bias)
            up = F.interpolate(
                value[:, None], mask.shape[1:], mode="bilinear", align_corners=False
            )[:, 0]
            yield up, mask[i]

    counts = np.zeros((2, _BINS))
    for value, wanted in scores(first):
        bins = (value * (_BINS - 1)).long().clamp(0, _BINS - 1)
        for i, part in enumerate((bins[wanted], bins[~wanted])):
            counts[i] += torch.bincount(part.flatten(), minlength=_BINS).numpy()
    inside, outside = (c[::-1].cumsum()[::-1] for c in counts)
    cut = int((inside / np.maximum(1, inside[0] + outside)).argmax()) / (_BINS - 1)
    both = either = 0.0
    for value, wanted in scores(second):
        on = value >= cut
        both += float((on & wanted).sum())
        either += float((on | wanted).sum())
    return both / max(1.0, either)
