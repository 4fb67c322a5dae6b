"""The evidence, stage by stage: of each the network's numbers and those of a network with shuffled weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import binom
from scipy.stats import t as student
from torch import Tensor

from cases.imagenet import drawing
from cases.imagenet.photographs import Photographs
from cases.stages import Progress, Stage
from circuits.attribution.channels import attribute
from circuits.cleanroom.network import FAMILIES
from circuits.concepts import name_by_attributes
from circuits.edits.activations import zero
from circuits.equivariance import measure_equivariance
from circuits.examples import Examples
from circuits.experiments.ablation import as_task
from circuits.experiments.running import run
from circuits.experiments.statistics import corrected, p_value
from circuits.experiments.variants import Variant
from circuits.families import Family, find_families
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.stimuli.photos import photographs
from circuits.tasks.metrics import Custom
from circuits.tasks.targets import Target
from circuits.transplant import Tuned, match_and_fit, measure_transplant
from circuits.tuning import find_curve_units, joint_tuning
from circuits.tuning.preferring import preferences
from circuits.tuning.responding import stimulus_size
from circuits.units import Unit, Units
from circuits.weights.expanded import expand_weights

Pair = Mapping[str, HookedModel]
"""The network and the control, by name."""

OWN, CONTROL = "trained", "shuffled weights"
EARLY = (
    "block2b_depthwise",
    "block3a_depthwise",
    "block3b_depthwise",
    "block4a_expand",
    "block4a_depthwise",
)
CURVES = ("block3b_depthwise", "block4a_expand", "block4a_depthwise")
EYES = ("block4c_depthwise", "block5a_depthwise", "block5b_depthwise", "block5c_depthwise")
LATE = ("block5c_depthwise", "block6c_depthwise", "head")
HOST = "block4a_expand"
SOURCES = {
    "block3a_depthwise": "block2b_depthwise", "block3b_depthwise": "block3a_depthwise",
    "block4a_expand": "block3b_depthwise", "block4a_depthwise": "block3b_depthwise",
}  # fmt: skip
"""The nearest site in front that has a privileged basis."""

READ = tuple(dict.fromkeys(f"{site}_pre_relu" for site in (*EARLY, *EYES, *LATE)))
"""What is read of the network on photographs, in one pass."""


def before(site: str) -> str:
    """The site in front of a ReLU6: behind it, many examples are tied at 6."""
    return f"{site}_pre_relu"


def behind(unit: Unit) -> Unit:
    """The same unit behind the ReLU6."""
    return Unit(unit.site.removesuffix("_pre_relu"), unit.index)


def drawings(pair: Pair, sites: Sequence[str], replicates: int, progress: Progress) -> Stage:
    """Which kind of drawing each unit prefers."""
    kinds: dict[str, dict[str, dict[str, int]]] = {name: {} for name in pair}
    units, every = [], {}
    for k, (name, model) in enumerate(pair.items()):
        for j, site in enumerate(sites):
            found = preferences(model, before(site), replicates=replicates)
            kinds[name][site] = dict(Counter(p.kind for p in found if p.holds))
            if name == OWN:
                units += [p.to_dict() | {"unit": str(behind(p.unit))} for p in found if p.holds]
                every[site] = [_along(p.kind, p.angle) if p.peak > 0 else None for p in found]
            progress(k * len(sites) + j + 1, 2 * len(sites))
    shown = {site: pair[OWN].site(site).n_units for site in sites}
    return Stage(
        {"kinds": kinds, "units": units, "along": every, "n_units": shown},
        {
            "Units that prefer one kind of drawing to all others, of both networks.": drawing.kinds(
                kinds
            ),
            "Responses to drawings of one look as they are turned (over the peak), for three units of each kind that "
            "is turned: blue, orange and grey in this order.": drawing.preferred(units),
        },
    )


def _along(kind: str, angle: float) -> float | None:
    """Along which orientation a unit's drawing runs, from 0 to 180; None where it has none."""
    if kind in ("line", "line end", "grating"):
        return angle % 180
    if kind in ("curve", "edge", "colour edge", "high-low frequency edge"):
        return (angle + 90) % 180
    return None


def curves(
    pair: Pair,
    again: Sequence[HookedModel],
    sites: Sequence[str],
    permutations: int,
    progress: Progress,
) -> Stage:
    """Curve units by their tuning, and families of units that are one unit turned.

    Args:
        pair: the network and the control.
        again: more controls, shuffled with other seeds, to count curve units in.
        sites: where to look.
        permutations: of each search for families.
        progress: called with the searches done and all there are.
    """
    counts: dict[str, Any] = {name: {} for name in pair}
    units, families, tunings = [], [], {}
    for k, (name, model) in enumerate(pair.items()):
        for j, site in enumerate(sites):
            at = before(site)
            found = find_curve_units(model, at, step=15.0)
            some = find_families(
                model, at, permutations=permutations, size=stimulus_size(model, at, None)
            )
            curved = [c for c in found if c.is_curve_unit]
            beyond = [f for f in some if f.p_value <= 0.05]  # of the largest of any shuffle
            counts[name][site] = {
                "curve_units": len(curved), "n_units": len(found), "families": len(some),
                "families_beyond_chance": len(beyond),
                "in_families": sum(len(f.members) for f in beyond),
                "largest": max((len(f.members) for f in beyond), default=0),
                "coverage": joint_tuning([c.tuning for c in curved]).coverage if curved else 0.0,
            }  # fmt: skip
            tunings[name, site] = [c.tuning for c in (curved or found)[:11]]
            if name == OWN:
                units += [
                    c.to_dict() | {"unit": str(behind(c.unit)), "curve": c.tuning.mean.tolist()}
                    for c in curved
                ]
                families += [f.to_dict() for f in some]
            progress(k * len(sites) + j + 1, 2 * len(sites))
    shown = {name: tunings[name, sites[-1]] for name in pair}
    caption = f"Curve units of {sites[-1]} by their tuning; of shuffled weights the most selective units instead."
    numbers = {"counts": counts, "units": units, "families": families}
    return Stage(
        numbers | {"by_chance": _by_chance(counts, again)}, {caption: drawing.tuned(shown)}
    )


def _by_chance(counts: Mapping[str, Any], again: Sequence[HookedModel]) -> dict[str, Any]:
    """How many curve units each control has, site by site, and whether the network clearly has more (Holm)."""
    others = {site: [own["curve_units"]] for site, own in counts[CONTROL].items()}
    for model, (site, found) in product(again, others.items()):
        units = find_curve_units(model, before(site), step=15.0)
        found.append(sum(c.is_curve_unit for c in units))
    p = corrected([rate_p(counts[OWN][s]["curve_units"], n) for s, n in others.items()])
    rows = zip(others.items(), p, strict=True)
    return {site: {"curve_units": n, "p_corrected": q} for (site, n), q in rows}


def rate_p(there: int, others: Sequence[int]) -> float:
    """How likely it is that one count is as high beside several others if all are of one rate: exact, for Poisson.

    >>> rate_p(1, [0]), rate_p(2, [0, 0, 0])
    (0.5, 0.0625)
    """
    return float(binom.sf(there - 1, there + sum(others), 1 / (1 + len(others))))


def origins(model: HookedModel, found: Mapping[str, Any], seed: int) -> Stage:
    """What units are built from: whether the units that a unit reads most have its own orientation."""
    along, generator = found["drawings"]["along"], np.random.default_rng(seed)
    rows, reads = {}, {}
    for target, source in SOURCES.items():
        if not {target, source} <= along.keys():
            continue
        weight = channel_weights(model, source, target)
        reads[target] = {"source": source, "weight": weight}
        own, theirs = (
            np.array([np.nan if a is None else a for a in along[s]]) for s in (target, source)
        )
        alike = [_alike(weight, own, theirs)]
        alike += [_alike(weight, own, generator.permutation(theirs)) for _ in range(200)]
        rows[f"{source} to {target}"] = {
            "share": alike[0], "by_chance": float(np.mean(alike[1:])), "p": p_value(alike[0], alike[1:], "greater"),
        }  # fmt: skip
    p = corrected([r["p"] for r in rows.values()], "benjamini-hochberg")
    alike = {k: r | {"p_corrected": q} for (k, r), q in zip(rows.items(), p, strict=True)}
    equal = _equivariance(model, found["curves"]["families"], seed)
    return Stage({"same_orientation": alike, "equivariance": equal})


def channel_weights(model: HookedModel, source: str, target: str) -> np.ndarray:
    """Weights from units of a site to those of the next, target x source, through the linear layers between them."""
    expand = target.replace(
        "_depthwise", "_expand"
    )  # a depthwise kernel reads its own channel alone
    expanded = expand_weights(model, source, before(expand))
    return expanded.weight.sum((2, 3)).double().numpy()


def _alike(weight: np.ndarray, own: np.ndarray, theirs: np.ndarray) -> float:
    """Of the three units that each unit reads most, the share with its orientation, to 22.5 degrees."""
    top = np.argsort(-weight, 1)[:, :3]
    apart = np.abs((theirs[top] - own[:, None] + 90) % 180 - 90)
    return float(np.nanmean(np.where(np.isnan(apart), np.nan, apart <= 22.5)))


def _equivariance(model: HookedModel, raw: Sequence[Any], seed: int) -> list[dict[str, Any]]:
    """How the weights between families of two sites turn with them."""
    families = [_moved(Family.from_dict(f)) for f in raw]
    expanded = expand_weights(model, "block3b_depthwise", before("block4a_expand"))
    rows = []
    for target in (f for f in families if f.site == "block4a_expand" and f.period == 360):
        goal = replace(
            target, site=expanded.target,
            members=tuple(replace(m, unit=Unit(expanded.target, m.unit.index)) for m in target.members),
        )  # fmt: skip
        for source in (f for f in families if f.site == "block3b_depthwise"):
            made = measure_equivariance(expanded, goal, source, permutations=199, seed=seed)
            rows.append(
                {
                    "from": source.name, "to": target.name, "correlation": made.correlation,
                    "p": made.correlation_p, "null": made.correlation_null,
                }
            )  # fmt: skip
    p = corrected([r["p"] for r in rows], "benjamini-hochberg") if rows else ()
    return [r | {"p_corrected": q} for r, q in zip(rows, p, strict=True)]


def _moved(family: Family) -> Family:
    """A family that was measured in front of a ReLU6, of the units behind it."""
    members = tuple(replace(m, unit=behind(m.unit)) for m in family.members)
    return replace(family, site=family.site.removesuffix("_pre_relu"), members=members)


def classes(pair: Pair, shown: Photographs, sites: Sequence[str], seed: int) -> Stage:
    """Units that tell a group of classes; none where photographs have no labels."""
    if not shown.groups:
        return Stage({"labels": False, "counts": {}, "units": []})
    counts: dict[str, Any] = {name: {} for name in pair}
    units = []
    for name, model in pair.items():
        strengths = shown.strengths(model, READ if name == OWN else [before(s) for s in sites])
        for site in sites:
            own = strengths[before(site)]
            made = name_by_attributes(site, own, shown.groups, data=shown.facts["data"], seed=seed)
            kept = made.holding
            counts[name][site] = {
                "tested": made.n_units, "hold": len(kept), "by_chance": made.by_chance,
                "strong": sum(n.score >= 0.9 for n in kept),
                "groups": dict(Counter(n.text for n in kept if n.score >= 0.9)),
            }  # fmt: skip
            if name == OWN:
                units += [n.to_dict() for n in kept if n.score >= 0.9]
    return Stage({"labels": True, "counts": counts, "units": units})


def eyes(pair: Pair, shown: Photographs, sites: Sequence[str]) -> Stage:
    """Units whose map is highest where the eyes of animals are."""
    if len(shown.eyes) < 5:
        return Stage({"photographs": len(shown.eyes), "counts": {}, "units": []})
    inputs = torch.stack([shown.shown.load(i) for i in shown.eyes])
    places = list(shown.eyes.values())
    counts: dict[str, Any] = {name: {} for name in pair}
    units = []
    for name, model in pair.items():
        cache = model.run(inputs, read=[before(s) for s in sites])
        for site in sites:
            ranks, gain = _at_eyes(cache[before(site)], places)
            n = len(places)
            with np.errstate(invalid="ignore", divide="ignore"):
                p = student.sf(gain.mean(0) / (gain.std(0, ddof=1) / np.sqrt(n)), n - 1)
            q = np.array(corrected(np.nan_to_num(p, nan=1.0).tolist(), "benjamini-hochberg"))
            held = np.flatnonzero((q <= 0.05) & (ranks.mean(0) >= 0.9))
            counts[name][site] = {
                "n_units": len(q), "hold": len(held), "beyond_chance": int((q <= 0.05).sum()),
                "highest": float(ranks.mean(0).max()),
            }  # fmt: skip
            if name == OWN:
                units += [
                    {"unit": f"{site}:{u}", "rank": float(ranks[:, u].mean()), "gain": float(gain[:, u].mean()),
                     "p": float(q[u]), "n": n}
                    for u in held[np.argsort(-ranks.mean(0)[held])]
                ]  # fmt: skip
    return Stage({"photographs": len(places), "counts": counts, "units": units})


def _at_eyes(
    maps: Tensor, places: Sequence[Sequence[tuple[float, float]]]
) -> tuple[np.ndarray, np.ndarray]:
    """For each photograph and unit, the rank of the map at the eyes, 0 to 1, and what it is above other places.

    These are where the eyes of the other photographs are, since eyes are rarely at the border.
    """
    n, _, h, w = maps.shape
    order = maps.flatten(2).argsort(2).argsort(2).double() / (h * w - 1)
    ranks = order.unflatten(2, (h, w)).numpy()
    at = np.stack(
        [np.stack([ranks[:, :, int(y * h), int(x * w)] for x, y in each]).max(0) for each in places]
    )  # eyes of x photograph x unit
    own = at[np.arange(n), np.arange(n)]
    return own, own - (at.sum(0) - own) / (n - 1)


def decision(model: HookedModel, shown: Photographs, draws: int, seed: int) -> Stage:
    """A cat against a dog breed: the units that attribution names, compared with ablating others."""
    chelsea = next(p for p in photographs() if p.name == "chelsea")  # a cat that is always there
    cat = Examples.pictures(model, [Image.fromarray(chelsea.pixels)]).inputs
    names = ["chelsea"]
    for i in (i for i, c in enumerate(shown.shown.labels or ()) if 281 <= c <= 285):
        names.append(shown.names[i])
        cat = torch.cat([cat, shown.shown.load(i)[None]])
    logits = model.logits(cat)
    one = 281 + logits[:, 281:286].argmax(1)
    other = 151 + logits[:, 151:269].argmax(1)
    site, rows, generator = "block5c_depthwise", [], np.random.default_rng(seed)
    goal = Target("logits", tuple(one.tolist()), None, tuple(other.tolist()))
    made = attribute(model, cat, goal, site, "integrated_gradients", check=32, seed=seed)
    credit = made.units().double().numpy()
    strength = model.run(cat, read=[site], until=site)[site].mean((2, 3)).numpy()
    for k, name in enumerate(names):
        a, b = int(one[k]), int(other[k])
        lost = _losses(model, cat[k : k + 1], credit[k], strength[k], a, b, draws, generator)
        intact = float(logits[k, a] - logits[k, b])
        rows.append({"photograph": name, "cat": model.classes[a], "dog": model.classes[b], "difference": intact,
                     "lost": lost, "units": [int(u) for u in np.argsort(-credit[k])[:10]]})  # fmt: skip
    check = None if made.check is None else asdict(made.check)
    return Stage(
        {"site": site, "rows": rows, "check": check},
        {
            f"What the logit of the cat less that of the dog loses when units of {site} are zeroed.": drawing.lost(
                rows
            )
        },
    )


def _losses(
    model: HookedModel, image: Tensor, credit: np.ndarray, strength: np.ndarray, a: int, b: int, draws: int,
    generator: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    """What is lost without the k units of most credit, without the k most active others, and without k live ones."""
    site = "block5c_depthwise"
    live, order, found = np.flatnonzero(strength > 0), np.argsort(-credit), {}
    measure = Custom("difference", function=lambda out: out[:, a] - out[:, b])
    variants: list[Variant] = []
    sizes = (1, 3, 10, 30)
    for k in sizes:
        top = order[:k]
        rest = live[~np.isin(live, top)]
        active = rest[np.argsort(-strength[rest])][:k]
        groups = {"attributed": top, "most active others": active}
        groups |= {f"random {d}": generator.choice(rest, k, replace=False) for d in range(draws)}
        variants += [_without(f"{name} {k}", site, group) for name, group in groups.items()]
    outcomes = run(model, variants, as_task(model, image), measures=[measure])
    intact = outcomes.mean("difference", "intact")
    for k in sizes:
        lost = {
            v.name.rpartition(" ")[0]: intact - outcomes.mean("difference", v.name)
            for v in variants
            if v.name.endswith(f" {k}")
        }
        drawn = [x for name, x in lost.items() if name.startswith("random")]
        found[str(k)] = {
            "attributed": lost["attributed"], "most_active_others": lost["most active others"],
            "random": float(np.mean(drawn)), "random_low": float(np.quantile(drawn, 0.025)),
            "random_high": float(np.quantile(drawn, 0.975)),
        }  # fmt: skip
    return found


def _without(name: str, site: str, units: Iterable[Any]) -> Variant:
    return Variant(name, (zero(Units(site, tuple(int(u) for u in units))),))


def transplant(
    model: HookedModel,
    found: Mapping[str, Any],
    shown: Photographs,
    options: Any,
    progress: Progress,
) -> Stage:
    """The curve units of a site replaced by units that were written by hand."""
    units = [u for u in found["curves"]["units"] if Unit.parse(u["unit"]).site == HOST]
    hosts = [Tuned(model.unit(u["unit"]), u["preferred"]) for u in units]
    if len(hosts) < 3:
        return Stage({"units": len(hosts), "conditions": {}})
    donor = load_model("cleanroom")
    families, at = [], 0
    for family in FAMILIES["curve"]:
        families.append(
            [Tuned(donor.unit(f"curve_pre_relu:{at + k}"), f.angle) for k, f in enumerate(family)]
        )
        at += len(family)
    most, n = (20, len(shown.shown)) if options.fast else (60, len(shown.shown))
    order = np.random.default_rng(options.seed).permutation(n)
    half = min(most, n // 2)
    fit, test = (
        shown.shown.subset(sorted(o.tolist()))
        for o in (order[:half], order[half : half + 2 * most])
    )
    graft = match_and_fit(model, hosts, donor, families, fit)
    report = measure_transplant(
        model, graft, fit, test, n_random=1, seed=options.seed, progress=progress
    )
    conditions = {
        c.name: {k: v for k, v in asdict(c).items() if k != "name"} for c in report.conditions
    }
    caption = f"{len(hosts)} curve units of {HOST} replaced: share of the KL of zeroing them that is recovered."
    matches = [m.to_dict() for m in graft.matches]
    facts = {
        "units": len(hosts),
        "fitted_on": len(fit),
        "measured_on": len(test),
        "matches": matches,
    }
    return Stage(facts | {"conditions": conditions}, {caption: drawing.recovered(conditions)})
