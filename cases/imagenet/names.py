"""Names of units, put together from all of the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cases.imagenet import drawing
from cases.imagenet.evidence import READ, SOURCES, before, channel_weights
from cases.imagenet.photographs import Photographs, classes_of
from cases.stages import Stage
from circuits.concepts import Name
from circuits.edits.activations import zero
from circuits.experiments.ablation import as_task
from circuits.experiments.running import run
from circuits.experiments.variants import Variant
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks.metrics import Custom, kl
from circuits.units import Unit, Units

BY = "case imagenet"
_EACH = 6
"""Units that are named of each kind and site: those that are told most clearly."""
_OTHERS = 6  # units that are zeroed for comparison

ABOUT = (
    "Found by `circuits case imagenet`. Kinds of drawings: the unit prefers one drawing of the kind to all drawings of "
    "other kinds, on replicates that did not choose it (score: on which share of them; p: paired t, corrected over the "
    "units of the site). Curves: by tuning (`find_curve_units`; score: 1 - circular variance). Eyes: the mean rank of "
    "the map at the eyes of animals (p: against the eyes of other photographs, corrected over the site). Groups of "
    "classes: AUROC on photographs that did not choose the group (p: rank test, corrected over the site). All are "
    "measured in front of the ReLU6."
)


def name_all(
    model: HookedModel, found: Mapping[str, Any], shown: Photographs, most: int, seed: int
) -> Stage:
    """A name for each unit that evidence was found for, with this evidence."""
    shown.strengths(model, READ)
    made: dict[Unit, Name] = {}
    for name in (*_curves(found), *_drawings(found), *_eyes(found), *_groups(found)):
        made.setdefault(name.unit, name)
    zeroed = ablations(
        model,
        shown,
        [(u, n.text if n.evidence["by"] == "photographs" else "") for u, n in made.items()],
        most,
        seed,
    )
    reads = _reads(model, made)
    names = [
        name.to_dict()
        | {
            "evidence": dict(name.evidence)
            | {
                "measured_at": before(unit.site), "best_photographs": _best(model, shown, unit),
                "zeroed": zeroed[str(unit)],
            }
            | ({"reads": reads[unit]} if unit in reads else {})
        }
        for unit, name in sorted(made.items())
    ]  # fmt: skip
    caption = "What photographs excite units most, for units of each kind of name: each photograph's strongest part."
    return Stage(
        {"names": names, "directions": _directions(zeroed.values())},
        {caption: drawing.crops(model, shown, names)},
    )


def _directions(zeroed: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How many units change their group's log-probability by more than all others that were tried, down and up."""
    of_groups = [z for z in zeroed if "group" in z]
    return {
        "units": len(of_groups),
        "lower_than_all_others": sum(z["change_of_log_p"] < z["of_others_low"] for z in of_groups),
        "higher_than_all_others": sum(
            z["change_of_log_p"] > z["of_others_high"] for z in of_groups
        ),
        "each_by_chance": len(of_groups) / (_OTHERS + 1),
        "raised": sum(z["change_of_log_p"] > 0 for z in of_groups),
        "mean_change": sum(z["change_of_log_p"] for z in of_groups) / max(len(of_groups), 1),
    }


def _curves(found: Mapping[str, Any]) -> list[Name]:
    """Of sites that have clearly more than shuffled weights, p at most .01: elsewhere they may be there by chance."""
    made = []
    for u in found["curves"]["units"]:
        if found["curves"]["by_chance"][Unit.parse(u["unit"]).site]["p_corrected"] > 0.01:
            continue
        evidence = {k: u[k] for k in ("preferred", "fwhm", "echo", "radius", "line_peak", "peak")}
        evidence |= {
            "by": "tuning",
            "angles": list(range(0, 360, 15)),
            "curve": [round(v, 3) for v in u["curve"]],
        }
        text = f"curves that bulge at {u['preferred']:.0f}°"
        made.append(_name(u["unit"], text, 1 - u["circular_variance"], None, evidence))
    return made


def _drawings(found: Mapping[str, Any]) -> list[Name]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for u in found["drawings"]["units"]:
        groups.setdefault((Unit.parse(u["unit"]).site, u["kind"]), []).append(u)
    made = []
    for some in groups.values():
        for u in sorted(some, key=lambda u: u["p_value"])[:_EACH]:
            evidence = {
                k: u[k] for k in ("kind", "look", "angle", "peak", "rival", "rival_peak", "ratio")
            }
            evidence |= {
                "by": "drawings",
                "angles": u["angles"],
                "curve": [round(v, 3) for v in u["curve"]],
            }
            # of a unit that answers at all angles the name says none
            tuned = u["curve"] and min(u["curve"]) < 0.5 * max(u["curve"])
            made.append(
                _name(
                    u["unit"],
                    text_of(u["kind"], u["look"], u["angle"] if tuned else None),
                    u["wins"],
                    u["p_value"],
                    evidence,
                )
            )
    return made


def text_of(kind: str, look: str, angle: float | None) -> str:
    """A name for a unit that prefers a drawing.

    >>> text_of("line", "dark, thin", 45.0), text_of("colour spot", "red in cyan, radius 0.16", None)
    ('line along 45°: dark, thin', 'colour spot: red in cyan, radius 0.16')
    """
    how = {
        "curve": "that bulges at", "line": "along", "line end": "that points at", "corner": "that points at",
        "edge": "lighter at", "grating": "along", "high-low frequency edge": "finer at", "colour edge": "facing",
    }.get(kind)  # fmt: skip
    return (
        f"{kind}: {look}" if how is None or angle is None else f"{kind} {how} {angle:.0f}°: {look}"
    )


def _eyes(found: Mapping[str, Any]) -> list[Name]:
    made = []
    sites: dict[str, int] = {}
    for u in found["eyes"]["units"]:
        site = Unit.parse(u["unit"]).site
        if sites.setdefault(site, 0) < _EACH:
            sites[site] += 1
            evidence = {"by": "eyes", "rank": u["rank"], "gain": u["gain"], "photographs": u["n"]}
            made.append(_name(u["unit"], "eyes or faces of animals", u["rank"], u["p"], evidence))
    return made


def _groups(found: Mapping[str, Any]) -> list[Name]:
    made, seen = [], {}
    for n in found["classes"]["units"]:
        key = n["unit"].partition(":")[0], n["text"]
        if seen.setdefault(key, 0) < _EACH:
            seen[key] += 1
            made.append(
                _name(
                    n["unit"],
                    n["text"],
                    n["score"],
                    n["p_value"],
                    {"by": "photographs"} | n["evidence"],
                )
            )
    return made


def _name(unit: str, text: str, score: float, p: float | None, evidence: dict[str, Any]) -> Name:
    unknown = float("nan")
    return Name(
        Unit.parse(unit), text, score, unknown if p is None else p, True, unknown, BY, evidence
    )


def _best(model: HookedModel, shown: Photographs, unit: Unit) -> list[list[Any]]:
    """The three photographs with the largest activations, and these."""
    strengths = shown.strengths(model, [before(unit.site)])[before(unit.site)][:, unit.index]
    return [[shown.names[i], round(float(strengths[i]), 3)] for i in np.argsort(-strengths)[:3]]


def _reads(model: HookedModel, made: Mapping[Unit, Name]) -> dict[Unit, list[list[Any]]]:
    """The three units of the site before that excite each unit most, with their names if they have one."""
    found = {}
    for target, source in SOURCES.items():
        units = [u for u in made if u.site == target]
        weight = channel_weights(model, source, target) if units else np.empty(0)
        for unit in units:
            top = np.argsort(-weight[unit.index])[:3]
            said = [made.get(Unit(source, int(k))) for k in top]
            found[unit] = [
                [
                    f"{source}:{k}",
                    round(float(weight[unit.index, k]), 3),
                    "" if n is None else n.text,
                ]
                for k, n in zip(top, said, strict=True)
            ]
    return found


def ablations(
    model: HookedModel, shown: Photographs, named: Sequence[tuple[Unit, str]], most: int, seed: int
) -> dict[str, Any]:
    """What zeroing each unit does: to all answers, and of units that tell a group, to the group on its photographs.

    Args:
        model: the network.
        shown: the photographs.
        named: units with the group that each tells, or with none.
        most: photographs of each task.
        seed: of the other units that are zeroed for comparison.
    """
    generator, made = np.random.default_rng(seed), {}
    some = shown.shown.subset(range(0, len(shown.shown), max(1, len(shown.shown) // most))[:most])
    for site, group in sorted({(u.site, g) for u, g in named}):
        own = [u.index for u, g in named if (u.site, g) == (site, group)]
        live = np.flatnonzero(shown.strengths(model, [before(site)])[before(site)].max(0) > 0)
        others = generator.choice(live[~np.isin(live, own)], _OTHERS, replace=False)
        variants = [Variant(f"{u}", (zero(Units(site, (int(u),))),)) for u in [*own, *others]]
        measure = _log_p(group or "animals")
        task = as_task(model, shown.of(group, most) if group else some)
        outcomes = run(model, variants, task, measures=[measure, kl])
        intact = outcomes.mean(measure.name, "intact")
        null = [outcomes.mean(measure.name, str(u)) - intact for u in others]
        null_kl = [outcomes.mean("kl", str(u)) for u in others]
        for u in own:
            found = {
                "kl": outcomes.mean("kl", str(u)),
                "kl_of_others": float(np.median(null_kl)),
                "photographs": len(outcomes.of("kl")),
            }
            if group:
                found |= {
                    "group": group, "change_of_log_p": outcomes.mean(measure.name, str(u)) - intact,
                    "of_others": float(np.mean(null)), "of_others_low": float(min(null)),
                    "of_others_high": float(max(null)),
                }  # fmt: skip
            made[f"{site}:{u}"] = found
    return made


def _log_p(group: str) -> Custom:
    """The log-probability that the answer is a class of the group."""
    which = classes_of(group)
    return Custom("log p", function=lambda out: out.log_softmax(1)[:, which].logsumexp(1))
