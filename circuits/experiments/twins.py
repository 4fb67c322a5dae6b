"""The null of an edit: the same edit of other units that are equally active ("twins"), or random changes of equal norm.

Dead units, whose activation never varies, are never twins: removing one does nothing, or the same to every
example, which would make any edit look large. They are counted. If a site has too few other
units, each draw is a random direction instead, along which the site's tensor moves at each position as far as the edit
moves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor

from circuits.edits.activations import Set
from circuits.edits.records import Edit, twin_of
from circuits.examples import Examples
from circuits.experiments.variants import Context, Prepared, Variant, prepared
from circuits.hooks import Change
from circuits.means import Activity, activities
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Site, Unit

N_RANDOM = 99
"""The default number of random variants that an edit is compared with."""

FEWEST = 19
"""With fewer different twins than this no p-value can reach 0.05 (1 / (1 + 19)); random directions are drawn
instead."""

NEAREST = 20
"""A unit's twins are drawn from at least this many units of its site, or a quarter of them: those nearest in
activity."""


@dataclass(frozen=True, eq=False)
class Null:
    """Random variants of an edit.

    Attributes:
        variants: the random variants, named `random 1`, `random 2`, …
        units: the units of each variant, if they are twins.
        is_: what the variants are, for titles and reports.
    """

    variants: tuple[Variant, ...]
    units: tuple[tuple[Unit, ...], ...]
    is_: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(v.name for v in self.variants)


def null_of(
    model: HookedModel,
    variant: Variant,
    examples: Examples,
    n: int = N_RANDOM,
    seed: int = 0,
    units: Sequence[Unit] | None = None,
    pool: Sequence[Unit] | None = None,
    remake: Callable[[Mapping[Unit, Unit]], Variant] | None = None,
) -> Null:
    """Random variants of an edited model.

    The same edits on the same examples with the same seed have the same twins in every command.

    Args:
        model: the model.
        variant: the edited model, whose edits are randomised.
        examples: the examples on which activity is matched.
        n: number of random variants; 0 for none.
        seed: seed of the draws.
        units: the units that the variant changes, if its edits do not say so.
        pool: units that twins are drawn from, instead of those that are equally active.
        remake: makes the variant with other units, given which unit replaces which; for variants whose changes are not
            (only) edits.

    Raises:
        ValueError: if `n` or the seed is out of range, or the pool is too small.
    """
    if n < 0:
        raise ValueError(f"n_random {n} must be 0 or more")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must be from 0 to 2^63 - 1")
    if not n:
        return Null((), (), "no random edits")
    ready = prepared(model, variant)
    owners = _owners(ready.model, variant.edits) if units is None else dict.fromkeys(units)
    if variant.edits and not owners and variant.live is None:
        return _redrawn(ready, n, seed) or _random_changes(
            model, ready, n, seed, "no units are edited"
        )
    seen = activities(ready.model, list(dict.fromkeys(u.site for u in owners)), examples)
    draw = Draw(owners, seen, pool)
    # A caller who asks for fewer than 19 draws does not aim at p < 0.05, and gets as many groups as there are.
    fewest = FEWEST if pool is None and n >= FEWEST else 1
    swaps = draw.different(min(n, draw.ways), seed) if owners and draw.ways >= fewest else []
    twins = []
    for i, swap in enumerate(swaps):
        # A seed for each draw, so that parts of an edit that are drawn at random differ from twin to twin.
        twin = remake(swap) if remake else _twin(ready.model, variant, swap, seen, seed + i)
        if twin is not None:
            twins.append((twin, tuple(swap.values())))
    if len(twins) >= fewest:
        variants = _named([twin for twin, _ in twins])
        return Null(variants, tuple(units for _, units in twins), draw.described(len(twins)))
    if pool is not None:
        raise ValueError(
            f"pool: {len(pool)} units are too few: expected more active units than the {len(owners)} edited"
        )
    return _random_changes(model, ready, n, seed, draw.why_not())


def _named(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    return tuple(replace(v, name=f"random {i}") for i, v in enumerate(variants, 1))


def _redrawn(ready: Prepared, n: int, seed: int) -> Null | None:
    """Edits of directions or layers, redrawn with random numbers of the same norm; None if one cannot be redrawn."""
    found = []
    for i in range(n):
        twin = twin_of(ready.model, ready.variant.edits, {}, seed + i)
        if twin is None:
            return None
        found.append(replace(ready.variant, edits=twin))
    return Null(_named(found), (), f"{n} random edits of the same kind and norm")


def _owners(model: HookedModel, edits: Sequence[Edit]) -> dict[Unit, frozenset[int] | None]:
    """The units that edits change, each with the units of its site that can replace it (None: any)."""
    found: dict[Unit, frozenset[int] | None] = {}
    for edit in edits:
        # A unit that several edits change needs a twin that suits all of them.
        for unit, among in edit.edited_units(model).items():
            before = found.get(unit)
            both = among if before is None else before if among is None else before & among
            found[unit] = both
    return found


class Draw:
    """Draws random twins for a group of units.

    Args:
        owners: the units, each with the units of its site that can replace it (None: any).
        seen: how active the units of their sites are.
        pool: units to draw from, instead of those that are equally active.
    """

    def __init__(
        self,
        owners: Mapping[Unit, frozenset[int] | None],
        seen: Mapping[str, Activity],
        pool: Sequence[Unit] | None = None,
    ) -> None:
        self.owners, self.seen, self.given = owners, seen, pool
        self.pools = {unit: self._pool(unit) for unit in owners}

    def _pool(self, unit: Unit) -> list[Unit]:
        activity, among = self.seen[unit.site], self.owners[unit]
        allowed = range(len(activity.rms)) if among is None else sorted(among)
        every = [Unit(unit.site, i) for i in allowed if activity.alive[i]]
        # A twin from the edited group would be edited in both, and compare the edit with itself.
        free = [u for u in every if u not in self.owners]
        if self.given is not None:
            names = set(self.given)
            return [u for u in free if u in names]
        # Nearest in the logarithm: activity spans orders of magnitude, and twice as active is as far as half as active.
        size = np.log(np.maximum(activity.rms, 1e-300))
        # Ties by number, so that the choice is the same on every machine.
        near = sorted(free, key=lambda u: (abs(size[u.index] - size[unit.index]), u.index))
        group = sum(u.site == unit.site for u in self.owners)
        # At least twice as many as units are replaced at once, or random groups would hardly differ from each other.
        return near[: max(NEAREST, len(free) // 4, 2 * group)]

    @property
    def ways(self) -> int:
        """An upper bound on the number of different groups; 0 if a site has too few other units."""
        ways = 1
        for site in dict.fromkeys(u.site for u in self.owners):
            own = [self.pools[u] for u in self.owners if u.site == site]
            together = {u for pool in own for u in pool}
            if len(together) < len(own) or not all(own):
                return 0
            ways *= math.comb(len(together), len(own))
        return ways if self.owners else 0

    def different(self, n: int, seed: int) -> list[dict[Unit, Unit]]:
        """At most n random replacements of all units, no two of them with the same set of units."""
        # Drawing with rejection: 50 tries for each keeps the loop finite where few different groups exist.
        generator = np.random.default_rng(seed)
        found: dict[frozenset[Unit], dict[Unit, Unit]] = {}
        for _ in range(50 * n):
            swap = self._one(generator)
            if swap is not None:
                found.setdefault(frozenset(swap.values()), swap)
            if len(found) == n:
                break
        return list(found.values())

    def _one(self, generator: np.random.Generator) -> dict[Unit, Unit] | None:
        swap: dict[Unit, Unit] = {}
        taken: set[Unit] = set()
        for unit, pool in self.pools.items():
            free = [u for u in pool if u not in taken]
            if not free:
                return None
            swap[unit] = free[int(generator.integers(len(free)))]
            taken.add(swap[unit])
        return swap

    def described(self, n: int) -> str:
        sites = dict.fromkeys(u.site for u in self.owners)
        if self.given is not None:
            return f"{n} groups of the {len(self.given)} units given"
        alive = {site: self.seen[site].alive for site in sites}
        dead = ", ".join(
            f"{int((~a).sum())} of {len(a)} units of {site} are dead" for site, a in alive.items() if not a.all()
        )  # fmt: skip
        named = f"{n} groups of other units of {', '.join(sites)}, about as active"
        return f"{named} ({dead})" if dead else named

    def why_not(self) -> str:
        if not self.owners:
            return "the edit does not change single units"
        free = {
            s: len({u for o in self.owners if o.site == s for u in self.pools[o]})
            for s in dict.fromkeys(u.site for u in self.owners)
        }
        few = min(free, key=lambda s: free[s])
        n = free[few]
        return f"{few} has {n or 'no'} other live unit{'s' * (n != 1)}, too few to draw from"


def _twin(
    model: HookedModel,
    variant: Variant,
    swap: Mapping[Unit, Unit],
    seen: Mapping[str, Activity],
    seed: int,
) -> Variant | None:
    """A variant with its units replaced; twins that are set to a number are set equally far from their own means."""
    found = twin_of(model, variant.edits, swap, seed)
    if found is None:
        return None
    edits = tuple(
        _equally_far(model, edit, twin, seen)
        if isinstance(edit, Set) and isinstance(twin, Set)
        else twin
        for edit, twin in zip(variant.edits, found, strict=True)
    )
    return replace(variant, edits=edits)


def _equally_far(model: HookedModel, edit: Set, twin: Set, seen: Mapping[str, Activity]) -> Set:
    """The twins of units that are set to numbers, set as far from their means as the units are from theirs."""
    # twin value = twin mean + (unit value - unit mean). Setting a twin to the unit's own number could be a far larger
    # or smaller change than the edit is.
    site = model.site(edit.units.site)
    mean = seen[site.name].mean
    own, other = (mean[list(e.units.among(site))] for e in (edit, twin))
    values = edit.values.double()
    if values.ndim < own.ndim:
        values = values.reshape(*values.shape, *(1,) * (own.ndim - values.ndim))
    return replace(
        twin, values=other + values - own, origin=f"as far from the mean as {edit.units}"
    )


def _random_changes(model: HookedModel, ready: Prepared, n: int, seed: int, why: str) -> Null:
    """Random changes as large as a variant's: activations move along random directions, weights in the same entries."""
    generator = Generator().manual_seed(seed)
    variants = tuple(
        _random_change(model, ready, f"random {i}", generator) for i in range(1, n + 1)
    )
    return Null(variants, (), f"{n} random changes of equal norm ({why})")


def _random_change(model: HookedModel, ready: Prepared, name: str, generator: Generator) -> Variant:
    sites = [model.site(s) for s in ready.sites]
    along = {s.name: _unit_vector(s, generator) for s in sites}
    tensors = {
        key: _same_size(model.parameters[key].data, tensor, generator)
        for key, tensor in ready.tensors.items()
    }

    def live(context: Context) -> Mapping[str, Change]:
        return {
            s.name: _moved_along(s, change, along[s.name])
            for s, change in ((model.site(k), c) for k, c in ready.on(context).items())
        }

    return Variant(
        name, live=live if sites else None, sites=tuple(s.name for s in sites), reads=ready.reads,
        model=ready.variant.model, tensors=tensors,
    )  # fmt: skip


def _unit_vector(site: Site, generator: Generator) -> Tensor:
    drawn = torch.randn(site.unit_shape, generator=generator, dtype=torch.float64)
    return site.spread(drawn / drawn.norm())


def _moved_along(site: Site, change: Change, direction: Tensor) -> Change:
    axes = [site.unit_axis, *([] if site.inner_axis is None else [site.inner_axis])]

    def move(value: Tensor) -> Tensor:
        # The edit's own length at each position, whatever its direction: the null differs in direction alone.
        gone = change(value) - value
        length = gone.square().sum(axes, keepdim=True).sqrt()
        return value + length * direction.to(value)

    return move


def _same_size(before: Tensor, after: Tensor, generator: Generator) -> Tensor:
    """A parameter with a random change of the same norm in the same entries."""
    gone = (after - before).cpu()
    # Only where the edit changed something: the same number of entries, the same total length.
    drawn = torch.randn(gone.shape, generator=generator, dtype=torch.float64) * (gone != 0)
    scaled = drawn * (gone.double().norm() / drawn.norm().clamp_min(1e-300))
    return before + scaled.to(before)
