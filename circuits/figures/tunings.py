"""Responses to drawings: tuning curves, orientation x curvature, invariances, and a hand-written network's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import altair as alt
import numpy as np
from jaxtyping import Float

from circuits.figures.charts import (
    BLUE,
    GREY,
    ORANGE,
    Figure,
    Row,
    cells,
    data,
    largest,
    lines,
    panel,
    rising,
    run_color,
    signed,
    sized,
    titled,
    together,
)
from circuits.tuning.heatmaps import HeatMap
from circuits.tuning.invariances import Invariance
from circuits.tuning.radial import RadialTuning

_SHOWN = 48
_DEGREES = "angle at which the shape bulges, degrees"

Runs = Sequence[RadialTuning] | Mapping[str, Sequence[RadialTuning]]
"""Tuning curves, or those of several runs by the runs' names."""


def tuning_figure(
    tunings: Runs, title: str = "", compared_with: Sequence[RadialTuning] = ()
) -> Figure:
    """Each unit's response by angle, with its replicates as a band; of several units, all of them together at the end.

    Args:
        tunings: of units, or of the same units in several runs: a panel for each unit, a line for each run.
        title: above it.
        compared_with: what another figure shows that this one is compared with: both get the same vertical axis.

    Raises:
        ValueError: if there is none.
    """
    runs = dict(tunings) if isinstance(tunings, Mapping) else {"": tunings}
    units = list(dict.fromkeys(t.unit for run in runs.values() for t in run))
    if not units:
        raise ValueError("tunings is empty: nothing to draw")
    shown = units[:_SHOWN]
    scale = _shared([t for run in runs.values() for t in run], compared_with)
    panels = []
    for unit in shown:
        of_unit = {n: t for n, run in runs.items() for t in run if t.unit == unit}
        curve = curves(
            {n: (t.angles, t.mean, t.curves.min(0), t.curves.max(0)) for n, t in of_unit.items()},
            scale,
        )
        if len(units) > 1:
            curve = panel(sized(curve), [str(unit), _measures(next(iter(of_unit.values())))])
        panels.append(curve)
    if len(units) > 1:
        panels.append(_together([t for run in runs.values() for t in run if t.unit in shown]))
    left = f", {len(shown)} of {len(units)} shown" if len(units) > len(shown) else ""
    return together(panels, min(4, len(panels)), f"{title}{left}")


def curves(
    runs: Mapping[str, tuple[Float[np.ndarray, " angle"], ...]], scale: alt.Scale | None = None
) -> Figure:
    """Lines over all angles: of each run the angles, the responses, and with a band its lower and its upper end."""
    rows: list[Row] = []
    for name, (angles, mean, *band) in runs.items():
        for k, (a, v) in enumerate(zip(angles.tolist(), mean.tolist(), strict=True)):
            ends = {"low": float(band[0][k]), "high": float(band[1][k])} if band else {}
            rows.append({"run": name, "angle": a, "response": v, **ends})
    x = _degrees()
    with_band = "low" in rows[0]
    y = alt.Y(
        "response:Q", title="activation (band: replicates)" if with_band else "activation",
        scale=scale or alt.Scale(),
    )  # fmt: skip
    tips = {"angle:Q": "degrees", "response:Q": "activation"}
    drawn = lines(rows, x, y, tips if len(runs) == 1 else {"run:N": "run", **tips}, runs)
    if not with_band:
        return drawn
    area = alt.Chart(data(rows)).mark_area(opacity=0.2)
    return alt.layer(
        area.encode(x, y=alt.Y("low:Q"), y2="high:Q", color=run_color(runs, of_lines=True)), drawn
    )


def _degrees() -> alt.X:
    quarters = alt.Axis(values=[0, 90, 180, 270, 360])
    return alt.X(
        "angle:Q", title=_DEGREES, scale=alt.Scale(domain=[0, 360], nice=False), axis=quarters
    )


def _shared(tunings: Sequence[RadialTuning], others: Sequence[RadialTuning]) -> alt.Scale | None:
    """One vertical axis for all of them, where they are compared."""
    if not others:
        return None
    every = [*tunings, *others]
    # Zero is always on the axis: a curve that only varies a little should look flat.
    low = min(0.0, *(float(t.curves.min()) for t in every))
    return alt.Scale(domain=[low, max(float(t.curves.max()) for t in every) or 1.0])


def _measures(tuning: RadialTuning) -> str:
    m = tuning.measures
    return f"{m.direction.value:.0f}° FWHM {m.fwhm.value:.0f}° echo {m.echo.value:.2f}"


def _together(tunings: Sequence[RadialTuning]) -> Figure:
    rows = [
        {"run": str(t.unit), "angle": a, "response": v / float(t.mean.max())}
        for t in tunings
        if t.mean.max() > 0
        for a, v in zip(t.angles.tolist(), t.mean.tolist(), strict=True)
    ]
    drawn = (
        alt.Chart(data(rows))
        .mark_line(strokeWidth=1, color=BLUE, opacity=0.7)
        .encode(
            _degrees(),
            alt.Y("response:Q", title="activation / peak"),
            detail="run:N", tooltip=[alt.Tooltip("run:N", title="unit"), alt.Tooltip("angle:Q", title="degrees")],
        )
    )  # fmt: skip
    return panel(sized(drawn), "all together")


def heat_map_figure(maps: Sequence[HeatMap], title: str = "") -> Figure:
    """Orientation x curvature, in standard deviations of a dataset where one is known; the smallest curve on top.

    Raises:
        ValueError: if there is none.
    """
    if not maps:
        raise ValueError("maps is empty: nothing to draw")
    panels = []
    for m in maps[:_SHOWN]:
        known = np.isfinite(m.deviation) and m.deviation > 0
        values = m.in_deviations if known else m.responses
        radii = ["line" if c == 0 else f"{1 / c:.3g}" for c in m.curvatures]
        what = "standard deviations from the mean" if known else "activation"
        shades = signed(what, values) if values.min() < 0 else rising(what, largest(values))
        shades = replace(shades, at="bottom")  # two maps fit next to each other on a page
        drawn = cells(
            # Curvature rises with the rows, and the first row is on top: reversed, the tightest curve comes first.
            values[::-1].astype(float), shades, rows=radii[::-1], columns=[f"{a:g}" for a in m.angles],
            y="radius, pixels", x="angle at which the curve bulges, degrees",
            size=(max(4, min(14, 300 // len(m.angles))), 16),
        )  # fmt: skip
        panels.append(panel(drawn, str(m.unit)) if len(maps) > 1 else drawn)
    made = together(panels, min(3, len(panels)), title)
    return made.resolve_scale(color="independent") if len(panels) > 1 else made


_ASPECTS = {
    "contrast": "contrast: -1 light on dark, 1 dark on light", "colour": "hue, degrees",
    "fill": "fill: 0 line, 1 dark and -1 light disk", "thickness": "thickness / usual", "corner": "0 arc to 1 corner",
}  # fmt: skip


def invariance_figure(found: Sequence[Invariance], title: str = "") -> Figure:
    """Each unit's response, at its angle and at the opposite one, as one aspect changes; one scale for each unit.

    Raises:
        ValueError: if there is none.
    """
    if not found:
        raise ValueError("found is empty: nothing to draw")
    units = list(dict.fromkeys(i.unit for i in found))[:12]
    aspects = list(dict.fromkeys(i.aspect for i in found))
    panels = []
    for unit in units:
        of_unit = [i for i in found if i.unit == unit]
        ends = np.concatenate([a for i in of_unit for a in (i.responses, i.opposite)])
        scale = alt.Scale(domain=[min(0.0, float(ends.min())), float(ends.max()) or 1.0])
        for i in sorted(of_unit, key=lambda i: aspects.index(i.aspect)):
            rows: list[Row] = [
                {"run": run, "value": v, "response": r}
                for run, responses in (("at its angle", i.responses), ("at the opposite angle", i.opposite))
                for v, r in zip(i.values, responses.tolist(), strict=True)
            ]  # fmt: skip
            x = alt.X(
                "value:Q",
                title=_ASPECTS[i.aspect],
                axis=alt.Axis(values=list(i.values), format=".3~g"),
            )
            y = alt.Y("response:Q", title="activation", scale=scale)
            names = ("at its angle", "at the opposite angle")
            tips = {"value:Q": i.aspect, "response:Q": "activation"}
            drawn = lines(rows, x, y, tips, names, colours=(BLUE, GREY))
            panels.append(panel(sized(drawn, 110, 90), str(unit)))
    return titled(alt.concat(*panels, columns=len(aspects)), title)


Angles = tuple[str, Float[np.ndarray, " unit"], Float[np.ndarray, " unit"]]
"""A family: its name, the angle of each unit, and how active each is."""


def layers_figure(layers: Mapping[str, Sequence[Angles]], at: float) -> Figure:
    """How active the units of each layer's families are, by their angle; `at` is the stimulus'."""
    panels = []
    for layer, families in layers.items():
        rows = [
            {"run": layer, "kind": name, "angle": a, "response": v}
            for name, angles, active in families
            for a, v in sorted(zip(angles.tolist(), active.tolist(), strict=True))
        ]
        x = alt.X(
            "angle:Q", title="angle written for, degrees (orange: stimulus)",
            scale=alt.Scale(domain=[0, 360], nice=False), axis=alt.Axis(values=list(range(0, 361, 45))),
        )  # fmt: skip
        y = alt.Y("response:Q", title="activation")
        tips = {"kind:N": "family", "angle:Q": "degrees", "response:Q": "activation"}
        drawn = lines(rows, x, y, tips, [layer], dashed=len(families) > 1)
        stimulus = alt.Chart(alt.Data(values=[{"angle": at % 360}])).mark_rule(color=ORANGE)
        panels.append(panel(sized(alt.layer(drawn, stimulus.encode(x="angle:Q")), 440, 110), layer))
    return alt.vconcat(*panels).resolve_scale(strokeDash="independent", color="independent")


def overlaid(
    picture: Float[np.ndarray, "h w 3"], heat: Float[np.ndarray, "h w"], limit: float | None = None
) -> Float[np.ndarray, "h w 3"]:
    """A grey picture with an attribution over it: red for, blue against, clear where it says nothing.

    Args:
        picture: in 0..1.
        heat: signed.
        limit: the value of full colour; the 99.5th percentile of the absolute values if not given.
    """
    # The 99.5th percentile, so that a few extreme pixels do not leave the rest colourless.
    top = float(np.quantile(np.abs(heat), 0.995)) if limit is None else limit
    strength = (np.abs(heat) / max(top, 1e-12)).clip(0, 1)[..., None]
    colour = np.where(heat[..., None] > 0, [0.84, 0.1, 0.11], [0.13, 0.4, 0.67])
    # From 0.35 up: on black neither colour could be seen.
    grey = 0.35 + 0.65 * picture.mean(2, keepdims=True)
    return (grey * (1 - strength) + colour * strength).clip(0, 1)
