"""Keeping only some units: everything else is replaced by its activation in another run.

A circuit suffices if the model still does the task when everything outside the circuit carries no information about the
example (Wang et al. 2022, section 4; Chan et al. 2022, "Causal Scrubbing").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from circuits.edits.activations import Set
from circuits.examples import BATCH, Examples
from circuits.experiments import INTACT, N_RANDOM, Outcomes, Record, Variant, run
from circuits.experiments.ablation import replaced
from circuits.experiments.statistics import least_p, p_value, percentiles
from circuits.files import finite
from circuits.means import activities, site_mean
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.selecting import select_sites
from circuits.progress import Progress
from circuits.tables import Table, between, spread
from circuits.tasks.task import Task
from circuits.units import Site, Unit, Units

Outside = Literal["counterpart", "mean", "position_mean", "zero"]
"""What replaces everything outside the circuit: its activation on the example's counterpart; its mean over all tokens
of the examples; its mean at each position; or zero."""

WRITERS = ("z", "mlp_out")
"""What writes into a transformer's residual stream after the embedding: heads and MLPs."""

Keep = str | Site | Unit
"""Units (`SITE:3`, `SITE:1,2,5-9`), or a site whose units are all kept."""

_TRIES = 20
"""How many draws are made for each random set before concluding that no more different sets exist."""

_KEPT, _NOTHING = "kept", "nothing kept"


@dataclass(frozen=True)
class Sufficiency:
    """How well a model does a task with only some units kept.

    Attributes:
        kept: the units and whole sites that were kept.
        sites: the sites at which everything else was replaced.
        how: what it was replaced by.
        metric: the task's metric.
        intact: the metric of the whole model, averaged over examples.
        nothing: the metric with nothing kept.
        only: the metric with only these units kept.
        faithfulness: (only - nothing) / (intact - nothing): 0 with nothing kept, 1 for the whole model; it can exceed
            1, and is NaN if intact and nothing are equal.
        low: lower end of its 95 % interval: bootstrap over examples, by cluster.
        high: upper end of the interval.
        null: the faithfulness of each random set.
        null_sets: what each random set keeps.
        null_is: what the random sets are.
        p_value: (1 + k) / (1 + n) for k of n random sets that are at least as faithful; NaN without random sets.
        least_p: the smallest p-value that this number of sets can give.
        n: the number of examples.
        record: where the numbers come from.
    """

    kept: tuple[str, ...]
    sites: tuple[str, ...]
    how: Outside
    metric: str
    intact: float
    nothing: float
    only: float
    faithfulness: float
    low: float
    high: float
    null: tuple[float, ...]
    null_sets: tuple[tuple[str, ...], ...]
    null_is: str
    p_value: float
    least_p: float
    n: int
    record: Record

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite(asdict(self))

    def tables(self) -> Iterator[Table]:
        """The metric with everything, nothing and the kept units alone, and the faithfulness."""
        row = (
            self.metric, self.intact, self.nothing, self.only, self.faithfulness, between(self.low, self.high),
            spread(self.null), self.p_value,
        )  # fmt: skip
        columns = (
            "metric", "whole model", "nothing kept", "kept", "faithfulness", "95 % interval", "random sets", "p",
        )  # fmt: skip
        kept, record = ", ".join(self.kept) or "nothing", self.record
        title = f"{kept} of {record.model} ({self.how}), {record.measured_on}; seed {record.seed}"
        least = f"; smallest possible p: {self.least_p:.2g}" if self.null else ""
        note = f"faithfulness: from nothing kept (0) to the whole model (1); random sets: {self.null_is}{least}"
        yield Table(columns, [row], title, note)


def keep_only(
    model: HookedModel,
    keep: Sequence[Keep],
    sites: str | Site | Sequence[str | Site] | None = None,
    *,
    how: Outside = "counterpart",
    examples: Examples | None = None,
    name: str = _KEPT,
) -> Variant:
    """The model in which everything at some sites except a set of units is replaced.

    The kept units are computed from what they then read. With `zero` and means the variant's `edits` are data, which
    `Recipe.of(model, variant.edits)` accepts.

    Args:
        model: the model.
        keep: units (`blocks.0.attn.hook_z:3,5-7`), and sites whose units are all kept (`blocks.0.hook_mlp_out`).
        sites: the sites at which everything else is replaced (see `select_sites`). By default a transformer's token
            embedding, all heads and all MLPs, so that keeping nothing gives the counterparts' run.
        how: what replaces everything else.
        examples: the examples over which means are taken.
        name: the variant's name.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if a kept unit is at none of the sites, the model lacks the default sites, or examples are missing
            for means or differ in length for means by position.
    """
    if how not in get_args(Outside):
        raise ValueError(f"how {how!r} is not one of {', '.join(get_args(Outside))}")
    places = keeping_sites(model, sites)
    kept = set(units_kept(model, keep, places))
    outside = [u for s in places for u in map(s.unit, range(s.n_units)) if u not in kept]
    if not outside:
        return Variant(name)
    if how in ("counterpart", "zero"):
        return replaced(model, outside, "zero" if how == "zero" else "counterpart", {}, name)
    if examples is None:
        raise ValueError(f"how {how!r} needs examples to take means over")
    if how == "mean":
        seen = activities(model, list(dict.fromkeys(u.site for u in outside)), examples)
        return replaced(model, outside, "mean", seen, name)
    return Variant(name, tuple(_position_means(model, outside, examples)))


def sufficiency(
    model: HookedModel,
    keep: Sequence[Keep],
    task: Task,
    sites: str | Site | Sequence[str | Site] | None = None,
    *,
    how: Outside = "counterpart",
    n_random: int = N_RANDOM,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sufficiency:
    """How well a model does a task with only a set of units kept, compared with random sets.

    A random set has equally many heads (from all heads of these sites), equally many whole sites, and equally many
    units of each partly kept site; an embedding that is kept stays in every set.

    Args:
        model: the model.
        keep: as in `keep_only`.
        task: what is measured on; it needs counterparts if `how` takes activations from them.
        sites: as in `keep_only`.
        how: what replaces everything else.
        n_random: the number of random sets.
        batch: examples per batch.
        seed: seed of random sets and intervals.
        progress: called with the work done and the total, in examples times runs.

    Raises:
        KeyError: if a site is unknown.
        ValueError: as in `keep_only`, or if `how` needs counterparts and the task has none.
    """
    if how == "counterpart" and task.counterparts is None:
        raise ValueError(f"task {task.name} has no counterparts: how 'counterpart' needs them")
    if n_random < 0:
        raise ValueError(f"n_random {n_random} must be 0 or more")
    places = keeping_sites(model, sites)
    units = units_kept(model, keep, places)
    drawn = _random_sets(model, units, places, n_random, seed)

    def made(kept: Sequence[Unit], name: str) -> Variant:
        return keep_only(model, kept, places, how=how, examples=task.examples, name=name)

    variants = [made(units, _KEPT), made((), _NOTHING)]
    variants += [made(some, f"random {i}") for i, some in enumerate(drawn, 1)]
    outcomes = run(
        model, variants, task, measures=[task.metric], batch=batch, seed=seed, progress=progress
    )
    return _report(outcomes, units, places, how, task, [written(some, places) for some in drawn])


def _report(
    outcomes: Outcomes,
    units: Sequence[Unit],
    places: Sequence[Site],
    how: Outside,
    task: Task,
    drawn: Sequence[tuple[str, ...]],
) -> Sufficiency:
    metric = task.metric.name
    names = (INTACT, _NOTHING, _KEPT)
    intact, nothing, only = (outcomes.mean(metric, name) for name in names)
    gap = intact - nothing

    def share(value: float) -> float:
        return (value - nothing) / gap if gap else float("nan")

    whole, none, some = outcomes.resampled(metric, names).T
    spread = np.where(whole != none, whole - none, np.nan)
    low, high = percentiles((some - none) / spread)
    if len(set(outcomes.clusters)) < 2:
        low = high = float("nan")
    null = tuple(share(outcomes.mean(metric, f"random {i + 1}")) for i in range(len(drawn)))
    null_is = f"{len(drawn)} sets of as many heads and sites, drawn at random" if drawn else "none"
    recovered, least = share(only), least_p(len(null)) if null else float("nan")
    return Sufficiency(
        written(units, places), tuple(s.name for s in places), how, metric, intact, nothing, only, recovered, low, high,
        null, tuple(drawn), null_is, p_value(recovered, null, "greater"), least, len(outcomes),
        outcomes.record,
    )  # fmt: skip


# --- which units ---------------------------------------------------------------------------------


def keeping_sites(
    model: HookedModel, sites: str | Site | Sequence[str | Site] | None = None
) -> list[Site]:
    """The sites at which everything that is not kept is replaced, in order of execution.

    Raises:
        KeyError: if there is no such site.
        ValueError: if no site is named and the model lacks the default ones.
    """
    if sites is None:
        known = {name for s in model.sites for name in (s.name, *s.aliases)}
        writers = [n for n in WRITERS if any(s.endswith(f".hook_{n}") for s in known)]
        if not writers:
            raise ValueError(
                f"sites: model {model.name} has no heads and MLPs under their usual names, so name the sites"
            )
        chosen = [model.embedding, *select_sites(model, writers)]
    else:
        chosen = select_sites(model, sites)
    if not chosen:
        raise ValueError("sites are empty: expected at least one")
    order = {s.name: i for i, s in enumerate(model.sites)}
    return sorted(chosen, key=lambda s: order[s.name])


def units_kept(model: HookedModel, keep: Sequence[Keep], places: Sequence[Site]) -> list[Unit]:
    """All kept units, each once."""
    if isinstance(keep, str | Site | Unit):
        keep = [keep]
    found: dict[Unit, None] = {}
    for item in keep:
        units = _named(model, item)
        far = next((u.site for u in units if u.site not in {s.name for s in places}), None)
        if far is not None:
            raise ValueError(
                f"keep {str(item)!r}: {far} is not among the sites at which units are replaced"
            )
        found |= dict.fromkeys(units)
    return list(found)


def _named(model: HookedModel, item: Keep) -> list[Unit]:
    if isinstance(item, Unit):
        return [model.unit(item)]
    if isinstance(item, str) and ":" in item:
        some = Units.parse(item)
        site = model.site(some.site)
        return [site.unit(i) for i in some.among(site)]
    return [site.unit(i) for site in select_sites(model, item) for i in range(site.n_units)]


def written(units: Sequence[Unit], places: Sequence[Site]) -> tuple[str, ...]:
    """Units in short: only the site's name if all of its units are included."""
    found = []
    for site in places:
        own = tuple(sorted(u.index for u in units if u.site == site.name))
        if own:
            found.append(site.name if len(own) == site.n_units else str(Units(site.name, own)))
    return tuple(found)


def _random_sets(
    model: HookedModel, units: Sequence[Unit], places: Sequence[Site], n: int, seed: int
) -> list[list[Unit]]:
    """Different random sets of the same composition; the given set itself is never drawn."""
    generator = np.random.default_rng(seed)
    first = model.embedding if isinstance(model.input, TokenInput) else None
    own = {s: [u for u in units if u.site == s.name] for s in places}
    heads = [s.unit(i) for s in places if s.kind == "head" for i in range(s.n_units)]
    others = [s for s in places if s.kind != "head" and s != first]
    parts = [s for s in others if 0 < len(own[s]) < s.n_units]
    wholes = [s for s in others if s not in parts]
    n_heads = sum(len(own[s]) for s in places if s.kind == "head")
    n_wholes = sum(len(own[s]) > 0 for s in wholes)

    def drawn() -> list[Unit]:
        some = [heads[i] for i in generator.permutation(len(heads))[:n_heads]]
        for i in generator.permutation(len(wholes))[:n_wholes]:
            some += [wholes[i].unit(k) for k in range(wholes[i].n_units)]
        for site in parts:
            some += [
                site.unit(int(k)) for k in generator.permutation(site.n_units)[: len(own[site])]
            ]
        return some

    fixed = [] if first is None else own.get(first, [])
    tried = (fixed + drawn() for _ in range(_TRIES * n))
    # The set itself is entered first, so that it counts as drawn, and dropped from the result.
    found: dict[frozenset[Unit], list[Unit]] = {frozenset(units): []}
    for some in tried:
        found.setdefault(frozenset(some), some)
        if len(found) > n:
            break
    return list(found.values())[1:]


# --- means by position ---------------------------------------------------------------------------


def _position_means(model: HookedModel, outside: Sequence[Unit], examples: Examples) -> list[Set]:
    """An edit for each position of each site that sets units to their mean there."""
    lengths = {len(examples.load(i)) for i in range(len(examples))}
    if len(lengths) > 1:
        raise ValueError(
            f"how 'position_mean' needs texts of equal length: these have {min(lengths)} to {max(lengths)} tokens"
        )
    found = []
    for name in dict.fromkeys(u.site for u in outside):
        own = Units(name, tuple(u.index for u in outside if u.site == name))
        values = site_mean(model, name, examples, by="position").values[:, list(own.indices or ())]
        found += [
            Set(own, values=row, origin="mean at the position", at=(p,))
            for p, row in enumerate(values)
        ]
    return found
