"""Transplants: a family of one network put in the place of another's, fitted.

Cammarata et al. 2021, "Curve Circuits" (Distill), put hand-written curve detectors in the place of InceptionV1's.
Both families are found by their tuning and matched by angle. Three numbers are fitted for each unit, on images that
nothing is measured on: a threshold (as many positions active as before), a gain (least squares) and a shift by at
most one position. Least squares shrinks what it cannot predict, and what comes after misses the strength: so all
gains are multiplied by one more number, with which the network's answers come nearest to the intact ones, on those
same images. Every control has the same freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from circuits.examples import Examples, as_examples, choose
from circuits.experiments.running import run
from circuits.experiments.variants import Context, Variant
from circuits.files import Keep, make_now
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.tasks.metrics import kl
from circuits.tasks.task import of_examples
from circuits.units import Site, Unit

Maps = Float[Tensor, "image unit y x"]
DonorMaps = Float[Tensor, "image donor y x"]

SHIFTS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1))
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)
"""What all gains are multiplied by."""
_NEAR, _ORDERS = 45.0, 5000
_CHOOSING = 160  # calibration images, at most, that choose a strength or a constant


@dataclass(frozen=True)
class Tuned:
    """A unit and the angle that it prefers, in degrees."""

    unit: Unit
    angle: float


@dataclass(frozen=True)
class UnitMatch:
    """A unit of the host and the unit of the donor that takes its place.

    Attributes:
        host: the unit that is replaced.
        donor: the one put in its place.
        angle: what the host's unit prefers, in degrees.
        donor_angle: and the donor's.
        gain: of the donor's activation before its nonlinearity.
        offset: added to that.
        shift: down and to the right, in positions of the host's map.
        correlation: of both on the calibration images, over images and positions.
    """

    host: Unit
    donor: Unit
    angle: float
    donor_angle: float
    gain: float
    offset: float
    shift: tuple[int, int]
    correlation: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"host": str(self.host), "donor": str(self.donor)}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> UnitMatch:
        """Of what `to_dict` gave."""
        y, x = facts["shift"]
        host, donor = (Unit.parse(facts[name]) for name in ("host", "donor"))
        return cls(**{**facts, "host": host, "donor": donor, "shift": (y, x)})


@dataclass(frozen=True, eq=False)
class Graft:
    """Units of a donor, fitted to the places of a host's: gain * activation + offset, from 0 to `ceiling`, shifted.

    Attributes:
        donor: the other network; it sees the images that the host sees.
        site: the host's.
        donor_site: where the donor's units are read; before their nonlinearity, if it has such a site.
        scale: by which images are enlarged for the donor, so that its map is as fine as the host's.
        matches: unit by unit.
        weights: of the donor, by name, to be used instead of its own: a control.
        ceiling: the largest activation that the host's nonlinearity lets through (6 behind a ReLU6).
    """

    donor: HookedModel
    site: Site
    donor_site: Site
    scale: float
    matches: tuple[UnitMatch, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    ceiling: float = math.inf

    def read(self, host: HookedModel, inputs: Tensor) -> DonorMaps:
        """All units of the donor's site, on the host's map, for inputs as the host takes them."""
        own, theirs = _images(host), _images(self.donor)
        # Back to 0..1, and from there as the donor takes images.
        images = own.restore(inputs)
        if own.channels != theirs.channels:
            images = images.mean(1, keepdim=True).expand(-1, theirs.channels, -1, -1)
        # Antialiased when made smaller: fine stripes would otherwise turn into coarse ones.
        if self.scale != 1:
            images = F.interpolate(
                images, scale_factor=self.scale, mode="bilinear", antialias=self.scale < 1
            )
        with self.donor.rewriting(self.weights):
            site = self.donor_site
            maps = self.donor.run(theirs.normalize(images), read=[site], until=site)[site]
        shape = self.site.position_shape
        if tuple(maps.shape[2:]) != tuple(shape):
            maps = F.interpolate(maps, size=shape, mode="bilinear", align_corners=False)
        return maps.to(inputs.device)

    def maps(self, host: HookedModel, inputs: Tensor) -> Maps:
        """What is put in the places of the host's units, for inputs as the host takes them."""
        return self.placed(self.read(host, inputs))

    def placed(self, read: DonorMaps) -> Maps:
        """The same, of what `read` gave."""
        moved = [m.gain * _moved(read[:, m.donor.index], m.shift) + m.offset for m in self.matches]
        # What it replaces is behind a ReLU.
        return torch.stack(moved, 1).clamp(0, self.ceiling)


# --- matching and fitting ----------------------------------------------------------------------


Pairs = Sequence[tuple[Tuned, Tuned]]
"""A unit of the host, and the donor's for its place."""


def match_angles(hosts: Sequence[Tuned], donors: Sequence[Tuned]) -> Pairs:
    """For each unit of the host the donor's whose angle is nearest.

    Args:
        hosts: the units to be replaced.
        donors: a family.

    Raises:
        ValueError: if there is none of either.

    >>> one, near, far = Tuned(Unit("a", 0), 350.0), Tuned(Unit("b", 1), 5.0), Tuned(Unit("b", 2), 300.0)
    >>> match_angles([one], [far, near])[0][1].unit
    Unit(site='b', index=1)
    """
    if not hosts or not donors:
        raise ValueError(
            f"{len(hosts)} units of the host and {len(donors)} of the donor: need some of both"
        )
    return [(h, min(donors, key=lambda d: apart(d.angle, h.angle))) for h in hosts]


def apart(one: float, other: float) -> float:
    """How far two angles are from each other, in degrees, from 0 to 180.

    >>> apart(350.0, 10.0)
    20.0
    """
    # 350 and 10: (340 + 180) % 360 - 180 = -20.
    return abs((one - other + 180) % 360 - 180)


def match_and_fit(
    host: HookedModel,
    hosts: Sequence[Tuned],
    donor: HookedModel,
    families: Sequence[Sequence[Tuned]],
    calibration: Examples | Tensor | Iterable[Tensor] | str,
    *,
    keep: Keep = make_now,
) -> Graft:
    """Put the nearest unit of a donor's family in the place of each unit, with gain, offset and shift fitted.

    Where there are several families (of several radii, say) all are tried, and the one is taken whose units
    correlate best with the host's on the calibration images, in the mean.

    Args:
        host: a network of images.
        hosts: its units and their angles, of one site with a map.
        donor: the other network.
        families: units of one of its sites and their angles.
        calibration: images that nothing will be measured on.
        keep: keeps what was fitted.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if units are of several sites or of one without a map, a family is empty, or there is no image.
    """
    site, read = (
        _one_site(host, hosts),
        _one_site(donor, [t for family in families for t in family]),
    )
    shown = as_examples(host, calibration)
    scale = _scale(host, site, donor, read)
    ceiling = math.inf if site.ceiling is None else site.ceiling
    bare = Graft(donor, site, read, scale, (), ceiling=ceiling)

    def fit() -> Graft:
        wanted, there = _recorded(bare, host, [t.unit.index for t in hosts], shown)
        fitted = [_fitted(bare, match_angles(hosts, family), wanted, there) for family in families]
        # Families are not mixed: the one whose units correlate best on average is taken as a whole.
        best = max(
            fitted, key=lambda graft: np.nan_to_num([m.correlation for m in graft.matches]).mean()
        )
        return _strengthened(host, best, shown)

    return _kept(keep, "fit", bare, fit)


def _kept(keep: Keep, name: str, bare: Graft, make: Callable[[], Graft]) -> Graft:
    """A graft that `make` makes of `bare`, or that was made before: what it has of its own are its matches."""
    rows = keep(name, lambda: [match.to_dict() for match in make().matches])
    return replace(bare, matches=tuple(map(UnitMatch.from_dict, rows)))


def shuffled(
    host: HookedModel,
    graft: Graft,
    calibration: Examples,
    generator: Generator,
    n: int,
    keep: Keep = make_now,
) -> Iterator[Graft]:
    """Controls: the same units of the donor in each other's places, fitted likewise.

    The order is random, but for this: no unit's angle is less than 45 degrees from the one that it replaces. Without
    that condition about a quarter of GoogLeNet's are, and what is shuffled is not quite shuffled.
    """
    own = _pairs(graft)
    recorded = cache(lambda: _recorded(graft, host, [h.unit.index for h, _ in own], calibration))

    def fit(pairs: Pairs) -> Graft:
        return _strengthened(host, _fitted(graft, pairs, *recorded()), calibration)

    for number in range(1, n + 1):
        # Drawn even if what follows is known, so that the next draw is the same.
        order = _disordered(own, generator)
        pairs = [(own[i][0], own[k][1]) for i, k in enumerate(order)]
        yield _kept(keep, f"shuffled {number}", graft, partial(fit, pairs))


def with_random_weights(
    host: HookedModel,
    graft: Graft,
    calibration: Examples,
    generator: Generator,
    keep: Keep = make_now,
) -> Graft:
    """A control: each layer's weights of the donor in a random order, the same units, fitted likewise."""
    weights = {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)
        for name, tensor in graft.donor.parameters.items()
        # Biases keep their place: only what units read from each other is put in another order.
        if tensor.ndim > 1
    }
    bare = replace(graft, weights=weights)

    def fit() -> Graft:
        wanted, there = _recorded(bare, host, [m.host.index for m in graft.matches], calibration)
        return _strengthened(host, _fitted(bare, _pairs(graft), wanted, there), calibration)

    return _kept(keep, "random weights", bare, fit)


@contextmanager
def grafted(host: HookedModel, graft: Graft) -> Iterator[HookedModel]:
    """Hold a graft in place for every forward pass of the host inside the block."""
    seen: list[Tensor] = []

    # The change at the site needs the images, which hooks of the site are not given.
    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[0].detach()]

    def change(value: Tensor) -> Tensor:
        return put_in(value, graft, graft.maps(host, seen[0]))

    with host.lock:
        handle = host.module.register_forward_pre_hook(keep)
        try:
            with host.intervening({graft.site.name: change}):
                yield host
        finally:
            handle.remove()


def put_in(value: Tensor, graft: Graft, maps: Tensor) -> Tensor:
    """A site's tensor with others in the places of a graft's units."""
    changed = value.clone()
    changed[:, [m.host.index for m in graft.matches]] = maps.to(value.dtype)
    return changed


def _images(model: HookedModel) -> ImageInput:
    spec = model.input
    if not isinstance(spec, ImageInput) or spec.channels not in (1, 3):
        raise ValueError(f"model {model.name} takes no photographs: expected 1 or 3 channels")
    return spec


def _one_site(model: HookedModel, units: Iterable[Tuned]) -> Site:
    sites = sorted({model.unit(t.unit).site for t in units})
    if len(sites) != 1:
        raise ValueError(f"units of {model.name} are of {len(sites)} sites: expected one")
    site = model.site(sites[0])
    if site.position_axes != ("y", "x"):
        raise ValueError(f"site {site.name} of {model.name} has no map to transplant")
    return site


def _scale(host: HookedModel, site: Site, donor: HookedModel, read: Site) -> float:
    """How many pixels the donor must see for one of the host's, for both maps to be as fine."""
    own = _images(host).height / site.position_shape[0]
    return _images(donor).height / read.position_shape[0] / own


def _moved(
    maps: Float[Tensor, "*batch y x"], shift: tuple[int, int]
) -> Float[Tensor, "*batch y x"]:
    """Maps moved down and to the right; what comes in from outside is the border."""
    for axis, by in zip((-2, -1), shift, strict=True):
        n = maps.shape[axis]
        places = (torch.arange(n, device=maps.device) - by).clamp(0, n - 1)
        maps = maps.index_select(axis, places)
    return maps


def _recorded(
    graft: Graft, host: HookedModel, units: Sequence[int], examples: Examples
) -> tuple[Maps, DonorMaps]:
    """What the host's units and all of the donor's do on images."""
    wanted, there = [], []
    for part in examples.batches():
        cache = host.run(part.inputs, read=[graft.site], until=graft.site)
        wanted.append(cache[graft.site][:, list(units)])
        there.append(graft.read(host, part.inputs))
    return torch.cat(wanted), torch.cat(there)


def _fitted(graft: Graft, pairs: Pairs, wanted: Maps, there: DonorMaps) -> Graft:
    """A graft with gain, offset and shift of each pair."""
    matches = []
    for k, (host, donor) in enumerate(pairs):
        # Without the graft's own shift: all nine are tried in `_fit`.
        maps = there[:, donor.unit.index]
        gain, offset, shift = _fit(maps, wanted[:, k])
        put = (gain * _moved(maps, shift) + offset).clamp(0, graft.ceiling)
        fit = _correlation(put, wanted[:, k])
        matches.append(
            UnitMatch(host.unit, donor.unit, host.angle, donor.angle, gain, offset, shift, fit)
        )
    return replace(graft, matches=tuple(matches))


def _fit(
    there: Float[Tensor, "image y x"], wanted: Float[Tensor, "image y x"]
) -> tuple[float, float, tuple[int, int]]:
    """Gain, offset and shift: active at as many positions as wanted, moved to where it correlates best.

    max(0, gain * there + offset) is active above the threshold -offset / gain: the donor's quantile of 1 - the share
    of positions where the host is active. A donor that never varies gets gain 0 and the host's mean as offset.
    """
    # As many positions active as the host's unit has: the threshold is the donor's quantile at 1 - share.
    share = float((wanted > 0).float().mean())
    # A quantile of a million values is near enough, and torch refuses far more than that.
    some = there.flatten()[:: max(1, there.numel() // 1_000_000)]
    threshold = float(torch.quantile(some, 1 - share))
    above = (there - threshold).clamp_min(0)
    if not bool(above.any()):
        return 0.0, float(wanted.mean()), (0, 0)
    fits = [_correlation(_moved(above, shift), wanted) for shift in SHIFTS]
    shift = SHIFTS[int(np.argmax(np.nan_to_num(fits, nan=-1.0)))]
    moved = _moved(above, shift)
    # Least squares of wanted on moved, without a constant: argmin |g m - w|^2 = m.w / m.m.
    gain = float((moved * wanted).sum() / (moved * moved).sum())
    # gain (x - threshold) = gain x - gain threshold.
    return gain, -gain * threshold, shift


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; NaN if one does not vary."""
    x, y = (v.flatten().double() - v.double().mean() for v in (a, b))
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else float("nan")


def _pairs(graft: Graft) -> Pairs:
    return [(Tuned(m.host, m.angle), Tuned(m.donor, m.donor_angle)) for m in graft.matches]


def _disordered(pairs: Pairs, generator: Generator) -> list[int]:
    """A random order in which as few donors as can be found are near the angle that they replace."""

    def near(order: list[int]) -> int:
        return sum(
            apart(h.angle, pairs[k][1].angle) < _NEAR
            for (h, _), k in zip(pairs, order, strict=True)
        )

    best: list[int] = []
    # By trial, with a bound: some families have no order in which nothing is near, and then the best of the draws is
    # taken.
    for _ in range(_ORDERS):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        if not best or near(order) < near(best):
            best = order
        if near(best) == 0:
            break
    return best


# --- choosing by what the host makes of it -----------------------------------------------------


class Donors:
    """Makes variants of a host of grafts; on each batch a donor that several of them share is run once."""

    def __init__(self, host: HookedModel) -> None:
        self.host = host
        self._inputs = torch.empty(0)
        self._read: dict[int, DonorMaps] = {}

    def variant(self, name: str, graft: Graft) -> Variant:
        """The host with a graft in place."""

        def live(context: Context) -> dict[str, Change]:
            assert context.batch is not None, "grafts look at the images"
            maps = graft.placed(self._of(graft, context.batch.inputs))
            return {graft.site.name: lambda value: put_in(value, graft, maps)}

        return Variant(name, live=live, sites=(graft.site.name,))

    def _of(self, graft: Graft, inputs: Tensor) -> DonorMaps:
        # By identity: the same batch object means the same images.
        if inputs is not self._inputs:
            self._inputs, self._read = inputs, {}
        # Controls with other orders share the donor's maps; those with other weights have maps of their own.
        key = id(graft.weights)
        if key not in self._read:
            self._read[key] = graft.read(self.host, inputs)
        return self._read[key]


def _strengthened(host: HookedModel, graft: Graft, calibration: Examples) -> Graft:
    """A graft with all gains and offsets times the strength that leaves the host's answers nearest."""
    tried = [
        replace(
            graft,
            matches=tuple(
                replace(m, gain=by * m.gain, offset=by * m.offset) for m in graft.matches
            ),
        )
        for by in STRENGTHS
    ]
    donors = Donors(host)
    named = [donors.variant(f"strength {k}", each) for k, each in enumerate(tried)]
    return tried[nearest(host, named, calibration)]


def nearest(host: HookedModel, tried: Sequence[Variant], calibration: Examples) -> int:
    """Which of several variants leaves the answers to some calibration images nearest to the intact ones."""
    some = calibration.subset(choose(range(len(calibration)), _CHOOSING, "spread", 0))
    outcomes = run(host, tried, of_examples(some), measures=[kl])
    return int(np.argmin([outcomes.mean(kl.name, v.name) for v in tried]))
