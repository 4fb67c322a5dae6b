"""The case's report: one HTML file with its figures inside."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from cases.pages import figures_of, interval_text, write_html


def write_page(
    path: Path, results: Mapping[str, Any], figures: Mapping[str, Mapping[str, Path]]
) -> None:
    """Write the report; it shows the numbers of `results` and nothing else."""
    parts = [_claim(results), _table_of_conditions(results)]
    for stage, shown in figures.items():
        parts += figures_of(stage, shown)
    parts += [_units(results), _facts(results)]
    write_html(path, "Curve detectors written by hand", parts)


def _claim(results: Mapping[str, Any]) -> str:
    curves = [u for u in results["units"] if u["layer"] == "curve"]
    widths = [u["fwhm"] for u in curves]
    chance = _median([p["r_shuffled_orientations"] for p in results["published"].values()])
    r2, shuffled = results["circulant_r2"].values(), results["circulant_r2_shuffled"].values()
    least, middle = results["r_published_min"], results["r_published_median"]
    rows = [
        (
            "full width at half maximum of the 72 curves, degrees",
            f"{min(widths):.0f} to {max(widths):.0f}", "published: 28 to 69",
        ),
        (
            "echo: the response to the opposed curve, over the peak",
            f"{max(u['echo'] for u in curves):.3f} at most", "published: 0.028 at most",
        ),
        ("response to a straight line, over the peak", f"{max(u['line_share'] for u in curves):.2f} at most", ""),
        (
            "r of the ten published curves with what is most alike",
            f"{least:.3f} at least, median {middle:.3f}", f"shuffled orientations: median {chance:.2f}",
        ),
        (
            "echo without negative weights", f"{results['echo_without_negative']:.2f} (with: {results['echo']:.3f})",
            f"without random weights: {results['echo_without_random']:.2f}",
        ),
        (
            "circulant part of early curve to curve weights, R²", f"{min(r2):.3f} at least",
            f"shuffled orientations: {max(shuffled):.2f} at most",
        ),
    ]  # fmt: skip
    return (
        "<h1>Curve detectors written by hand</h1><p>Each weight of this network of five layers was computed from what "
        f"its unit is to look for; nothing in it is learned. {escape(found_in_place(results))}</p>"
        "<table><tr><th>measure<th>hand-written<th>compared with</tr>"
        + "".join(f"<tr><td>{escape(a)}<td>{escape(b)}<td>{escape(c)}</tr>" for a, b, c in rows)
        + "</table>"
    )


_CONTROLS = ("mean", "best constant", "shuffled orientations", "random weights")


def found_in_place(results: Mapping[str, Any]) -> str:
    """How well the hand-written units stand in for the host's, compared with the best control."""
    facts, conditions = results["transplant_facts"], results["transplant"]
    own = conditions["transplant"]["recovered_kl"]
    units = f"{len(facts['matches'])} units of {facts['host']}"
    known = [n for n in _CONTROLS if conditions[n]["recovered_kl"]["value"] is not None]
    if own["value"] is None or not known:
        return (
            f"Zeroing {units} costs nothing here, so that nothing can be recovered in their place."
        )
    best = max(known, key=lambda name: conditions[name]["recovered_kl"]["value"])
    control = conditions[best]["recovered_kl"]
    text = (
        f"In the place of {units} it recovers {interval_text(own, 2)} of the KL divergence that zeroing them costs; "
        f"of the controls {best} recovers most, {interval_text(control, 2)}"
    )
    apart = None not in (own["low"], control["high"]) and own["low"] > control["high"]
    below = None not in (own["high"], control["low"]) and own["high"] < control["low"]
    if apart:
        return f"{text}."
    return f"{text}: {'more than' if below else 'not clearly less than'} the hand-written units."


def found_of_constants(results: Mapping[str, Any]) -> str:
    """What a constant in the units' place says of what zeroing them costs."""
    best = results["transplant"]["best constant"]["recovered_kl"]
    if best["value"] is None:
        return ""
    said = f"The best constant recovers {interval_text(best, 2)}"
    if best["low"] is not None and best["low"] > 0:
        return f"{said}: that part of what zeroing costs is a missing bias of later layers."
    if best["value"] > 0:
        return f"{said}, which may be nothing."
    return f"{said}: what zeroing costs is no missing bias of later layers."


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _table_of_conditions(results: Mapping[str, Any]) -> str:
    facts = results["transplant_facts"]
    rows = ""
    for name, c in results["transplant"].items():
        cells = "".join(
            f"<td>{interval_text(c[k], d)}"
            for k, d in (("recovered_kl", 2), ("kl", 3), ("accuracy", 3), ("top5", 3))
        )
        p = "" if c["p_kl"] is None else f"{c['p_kl']:.2g}, {c['p_accuracy']:.2g}"
        rows += f"<tr><td>{escape(name)}{cells}<td>{p}</tr>"
    return (
        f"<h2>The transplant into {escape(facts['host'])}</h2><p>{len(facts['matches'])} units of "
        f"{escape(facts['site'])}, found by their tuning, were replaced; calibrated on {escape(facts['calibration'])}, "
        f"measured on {escape(facts['evaluation'])}; labels: {escape(facts['labels'])}. Maps of both units on an image "
        f"correlate with r {_number(facts['maps']['median_r_per_image'])} (median; shuffled orientations "
        f"{_number(facts['maps']['median_r_per_image_shuffled_orientations'])}).</p>"
        "<table><tr><th>in their place<th>KL recovered<th>KL, nats<th>top-1<th>top-5<th>p of KL, of top-1</tr>"
        f"{rows}</table><p>In brackets 95 % bootstrap intervals over images; p: paired sign-flip test against the "
        f"transplant. {escape(found_of_constants(results))}</p>"
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _units(results: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(u['name'])}<td>{escape(u['family'])}<td>{u['preferred']:.0f}<td>{u['fwhm']:.0f}"
        f"<td>{_number(u['echo'])}<td>{u['radius']}<td>{_number(u['r_published'])}</tr>"
        for u in results["units"]
    )
    return (
        f"<details><summary>All {len(results['units'])} tuned units</summary><table><tr><th>unit<th>family"
        "<th>preferred, degrees<th>full width at half maximum<th>echo<th>radius, pixels<th>r with the published</tr>"
        f"{rows}</table></details>"
    )


def _facts(results: Mapping[str, Any]) -> str:
    hashes = "; ".join(f"{k} {v[:16]}" for k, v in results["hashes"].items())
    photographs = f"{results['photographs']['n']} of {results['photographs']['data']}"
    return (
        f"<h2>Made from</h2><p>Weights: {escape(hashes)}. Seed {results['seed']}. Photographs: "
        f"{escape(photographs)}. {'Coarse (--fast). ' if results['fast'] else ''}Published curves: Cammarata et "
        "al. 2020, Curve Detectors, and 2021, Curve Circuits (Distill), CC-BY 4.0; nothing was fitted to them.</p>"
    )
