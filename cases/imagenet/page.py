"""The case's report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from cases.imagenet.evidence import CONTROL, OWN
from cases.pages import figures_of, interval_text, table_of, write_html

COLUMNS = ("what", "site", "units", OWN, CONTROL)


def rows_of(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What was found at each site, in the network and in the one with shuffled weights."""
    kinds = results["drawings"]["kinds"]
    rows: list[tuple[Any, ...]] = [
        ("prefer one kind of drawing", site, results["drawings"]["n_units"][site], sum(own.values()),
         sum(kinds[CONTROL][site].values()))
        for site, own in kinds[OWN].items()
    ]  # fmt: skip
    chance = results["curves"]["by_chance"]
    rows += [
        ("curve units (of each shuffle)", site, own["n_units"], own["curve_units"],
         ", ".join(map(str, chance[site]["curve_units"])))
        for site, own in results["curves"]["counts"][OWN].items()
    ]  # fmt: skip
    said = {
        "families_beyond_chance": "families beyond chance, p at most 0.05", "in_families": "in these families",
    }  # fmt: skip
    for key, what in said.items():
        rows += _compared(results["curves"], what, key, "n_units")
    rows += _compared(results["eyes"], "eyes or faces", "hold", "n_units")
    rows += _compared(
        results["classes"], "a group of classes, AUROC at least 0.9", "strong", "tested"
    )
    return rows


def _compared(stage: Mapping[str, Any], what: str, key: str, of: str) -> list[tuple[Any, ...]]:
    both = stage["counts"]
    return [
        (what, site, own[of], own[key], both[CONTROL][site][key])
        for site, own in both.get(OWN, {}).items()
    ]


def write_page(
    path: Path, results: Mapping[str, Any], figures: Mapping[str, Mapping[str, Path]]
) -> None:
    """Write the report; it shows the numbers of `results` and nothing else."""
    taken = results["photographs"]
    thin = (
        "Of these photographs no class is known, and they are few: no unit is named after classes or eyes, and what "
        "excites units most says little. "
        if results["thin"]
        else ""
    )
    parts = [
        f"<h1>What is in a network that recognises photographs</h1><p>{len(results['names'])} units have a name with "
        f"evidence. Photographs: {taken['n']} of {escape(taken['data'])}. {thin}All units are measured in front of "
        "their ReLU6; next to each count is that of the same network with the weights of each layer shuffled.</p>",
        table_of(COLUMNS, rows_of(results)),
    ]
    for stage, shown in figures.items():
        parts += figures_of(stage, shown) if shown else []
    parts += [*_origins(results), *_decision(results), *_transplant(results)]
    parts += [_directions(results), _names(results)]
    parts.append(
        f"<p>Weights {escape(str(results['hashes']))}; seed {results['seed']}"
        f"{', coarse (--fast)' if results['fast'] else ''}.</p>"
    )
    write_html(path, "What is in a network that recognises photographs", parts)


def _origins(results: Mapping[str, Any]) -> list[str]:
    rows = [
        (k, v["share"], v["by_chance"], v["p"], v["p_corrected"])
        for k, v in results["origins"]["same_orientation"].items()
    ]
    columns = ("from, to", "share with the same orientation", "by chance", "p", "p, corrected")
    said = "<h2>What units are built from</h2><p>Of the three units that each oriented unit reads most:</p>"
    turned = [
        (r["from"], r["to"], r["correlation"], r["null"], r["p_corrected"])
        for r in results["origins"]["equivariance"]
    ]
    heads = (
        "from",
        "to",
        "correlation of weights with the angle between units",
        "by chance (sd)",
        "p, corrected",
    )
    return [said, table_of(columns, rows), table_of(heads, turned) if turned else ""]


def _decision(results: Mapping[str, Any]) -> list[str]:
    rows = [
        (r["photograph"], f"{r['cat']} less {r['dog']}", r["difference"], k, v["attributed"], v["most_active_others"],
         f"{v['random']:.2f} ({v['random_low']:.2f} to {v['random_high']:.2f})")
        for r in results["decision"]["rows"]
        for k, v in r["lost"].items()
    ]  # fmt: skip
    columns = (
        "photograph",
        "decision",
        "logits",
        "units zeroed",
        "lost: attributed",
        "most active others",
        "random",
    )
    return ["<h2>A cat against a dog</h2>", table_of(columns, rows)]


def _transplant(results: Mapping[str, Any]) -> list[str]:
    stage = results["transplant"]
    if not stage["conditions"]:
        return [f"<h2>Transplant</h2><p>{stage['units']} curve units: too few for a family.</p>"]
    rows = [
        (
            name,
            interval_text(c["recovered_kl"], 2),
            interval_text(c["kl"], 3),
            c["top5"]["value"],
            c["p_kl"],
        )
        for name, c in stage["conditions"].items()
    ]
    columns = ("in their place", "KL recovered", "KL, nats", "top-5", "p of KL")
    return [f"<h2>{stage['units']} curve units replaced</h2>", table_of(columns, rows)]


def _directions(results: Mapping[str, Any]) -> str:
    found = results["directions"]
    if not found["units"]:
        return ""
    return (
        f"<p>Zeroing one unit that tells a group of classes, of {found['units']}: "
        f"{found['lower_than_all_others']} lower the group's log-probability by more than all other units that were "
        f"tried, {found['higher_than_all_others']} raise it by more ({found['each_by_chance']:.1f} of each by chance); "
        f"{found['mean_change']:.4f} nats in the mean of all.</p>"
    )


def _names(results: Mapping[str, Any]) -> str:
    rows = [
        (n["unit"], n["text"], n["score"], n["p_value"], n["evidence"]["zeroed"]["kl"],
         n["evidence"]["zeroed"].get("change_of_log_p"), ", ".join(f for f, _ in n["evidence"]["best_photographs"]))
        for n in results["names"]
    ]  # fmt: skip
    columns = (
        "unit",
        "name",
        "score",
        "p",
        "KL when zeroed",
        "change of the group's log p",
        "best photographs",
    )
    return f"<details><summary>All {len(rows)} names</summary>{table_of(columns, rows)}</details>"
