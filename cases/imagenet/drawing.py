"""The case's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import torch

from circuits.figures import Figure
from circuits.figures.charts import BLUE, GREY, ORANGE, Row, data, encoded, panel, sized, together
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.receptive import receptive_field
from circuits.tuning.radial import RadialTuning
from circuits.units import Unit

_CROP = 64  # pixels of a crop in a figure


def kinds(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Figure:
    """How many units prefer each kind, in both networks, site by site."""
    rows = [
        {"network": network, "site": site, "kind": kind, "units": n}
        for network, sites in counts.items()
        for site, some in sites.items()
        for kind, n in some.items()
    ]
    names, panels = list(counts), []
    for site in next(iter(counts.values())):
        drawn = alt.Chart(data(r for r in rows if r["site"] == site)).mark_bar()
        own = drawn.encode(
            alt.X("units:Q", title="units", axis=alt.Axis(tickMinStep=1)),
            alt.Y("kind:N", title=None, axis=alt.Axis(labelLimit=200)), yOffset=alt.YOffset("network:N", sort=names),
            color=_colour(names),
        )  # fmt: skip
        panels.append(panel(sized(own, 170, 210), site))
    return together(panels, 3)


def _colour(names: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(names), range=[BLUE, GREY, ORANGE][: len(names)])
    return alt.Color("network:N", title=None, scale=scale)


def preferred(units: Sequence[Mapping[str, Any]]) -> Figure:
    """Responses of units as the drawing that they prefer is turned."""
    turned: dict[str, list[Mapping[str, Any]]] = {}
    for unit in sorted(units, key=lambda u: u["p_value"]):
        if len(unit["angles"]):
            turned.setdefault(unit["kind"], []).append(unit)
    panels = []
    for kind, some in sorted(turned.items()):
        rows = [
            {"unit": u["unit"], "angle": float(a), "response": max(0.0, float(v)) / max(u["curve"])}
            for u in some[:3]
            for a, v in zip(u["angles"], u["curve"], strict=True)
        ]
        panels.append(_curves(rows, [kind, *dict.fromkeys(r["unit"] for r in rows)]))
    return together(panels, 4)


def _curves(rows: Sequence[Row], title: str | Sequence[str]) -> Figure:
    x = alt.X("angle:Q", title="degrees", axis=alt.Axis(values=list(range(0, 361, 90))))
    y = alt.Y("response:Q", title="over the peak", scale=alt.Scale(domain=[0, 1.05]))
    drawn = alt.Chart(data(rows)).mark_line(strokeWidth=1.2).encode(x, y, detail="unit:N")
    scale = alt.Scale(range=[BLUE, ORANGE, GREY])
    drawn = drawn.encode(color=alt.Color("unit:N", sort=None, scale=scale, legend=None))
    return panel(sized(drawn, 150, 110), title)


def tuned(tunings: Mapping[str, Sequence[RadialTuning]]) -> Figure:
    """Tuning curves to curves of two networks, over their peaks."""
    panels = []
    for name, some in tunings.items():
        rows = [
            {
                "unit": str(t.unit),
                "angle": float(a),
                "response": max(0.0, float(v)) / float(t.mean.max()),
            }
            for t in some
            if t.mean.max() > 0
            for a, v in zip(t.angles, t.mean, strict=True)
        ]
        panels.append(_curves(rows, name))
    return together(panels, 2)


def lost(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What a difference of logits loses as more units are zeroed, photograph by photograph."""
    names = {
        "attributed": "attributed",
        "most_active_others": "most active others",
        "random": "random",
    }
    panels = []
    for row in rows:
        found = [
            {
                "network": label,
                "k": int(k),
                "lost": float(v[key]),
                "low": v["random_low"],
                "high": v["random_high"],
            }
            for k, v in row["lost"].items()
            for key, label in names.items()
        ]
        x = alt.X(
            "k:Q",
            title="units zeroed",
            scale=alt.Scale(type="log"),
            axis=alt.Axis(values=[1, 3, 10, 30]),
        )
        base = alt.Chart(data(found))
        band = base.mark_area(opacity=0.2, color=GREY).encode(x, alt.Y("low:Q"), alt.Y2("high:Q"))
        line = base.mark_line(point=True).encode(
            x, alt.Y("lost:Q", title="logits lost"), color=_colour([*names.values()])
        )
        said = f"{row['cat']} less {row['dog']}, {row['difference']:.1f} intact"
        panels.append(panel(sized(band + line, 190, 130), [row["photograph"][:30], said]))
    return together(panels, 3)


def recovered(conditions: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The share of the KL divergence that each condition recovers, with intervals."""
    rows = [
        {"network": name, **{k: c["recovered_kl"][k] for k in ("value", "low", "high")}}
        for name, c in conditions.items()
        if name not in ("intact", "zero")
    ]
    y = alt.Y(
        "network:N", title=None, sort=[r["network"] for r in rows], axis=alt.Axis(labelLimit=200)
    )
    bars = (
        alt.Chart(data(rows)).mark_bar(color=BLUE).encode(alt.X("value:Q", title="KL recovered"), y)
    )
    ends = (
        alt.Chart(data(rows)).mark_rule(strokeWidth=2).encode(alt.X("low:Q"), alt.X2("high:Q"), y)
    )
    return sized(bars + ends, 320, 120)


def crops(model: HookedModel, shown: Any, names: Sequence[Mapping[str, Any]]) -> Figure:
    """The parts of photographs that excite units most, three a unit, of two units for each kind of name."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name in sorted(names, key=lambda n: -n["score"]):
        key = name["evidence"].get("kind") or name["text"].split("°")[0].rstrip("0123456789 ")
        groups.setdefault(key, []).append(name)
    panels = []
    for some in groups.values():
        for name in some[:2]:
            unit = Unit.parse(name["unit"])
            parts = [
                _crop(model, shown, unit, file) for file, _ in name["evidence"]["best_photographs"]
            ]
            picture = encoded((np.concatenate(parts, 1) * 255).round().astype(np.uint8))
            drawn = alt.Chart(data([{"url": picture}])).mark_image(width=3 * _CROP, height=_CROP)
            drawn = drawn.encode(url="url:N", x=alt.value(1.5 * _CROP), y=alt.value(_CROP / 2))
            panels.append(
                panel(sized(drawn, 3 * _CROP, _CROP), [name["unit"], name["text"][:40]], 40)
            )
    return together(panels, 4)


def _crop(model: HookedModel, shown: Any, unit: Unit, file: str) -> np.ndarray:
    """The part of a photograph that a unit sees where it is most active, at most the half around its middle."""
    inputs = shown.shown.load(shown.names.index(file))[None]
    site = model.site(f"{unit.site}_pre_relu")
    value = model.run(inputs, read=[site], until=site)[site][0, unit.index]
    y, x = divmod(int(value.argmax()), value.shape[1])
    top, left, bottom, right = receptive_field(model, site).at((y, x))
    side = int(min(bottom - top, right - left, inputs.shape[2] // 2))
    size, pixels = inputs.shape[2], inputs.shape[2] / value.shape[0]
    middle = [int((v + 0.5) * pixels) for v in (y, x)]
    start = [min(max(m - side // 2, 0), size - side) for m in middle]
    image = model.input.restore(inputs)  # type: ignore[union-attr]
    part = image[:, :, start[0] : start[0] + side, start[1] : start[1] + side]
    made = torch.nn.functional.interpolate(part, (_CROP, _CROP), mode="bilinear", antialias=True)
    return made[0].clamp(0, 1).permute(1, 2, 0).numpy()
