"""Patched grids, readouts, lenses and heads as figures."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np
from jaxtyping import Float

from circuits.figures.charts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    Figure,
    Row,
    Shades,
    cells,
    data,
    named_ticks,
    panel,
    printed,
    rising,
    run_color,
    short,
    signed,
    titled,
    together,
    with_unit,
    zero_line,
)
from circuits.localization import (
    HeadEffects,
    HeadScores,
    Lens,
    LensTokens,
    PatchGrid,
    Readouts,
    Sufficiency,
)
from circuits.localization.grids import PatchDirection, Quantity

_ROWS = {
    "head": ("site", "head"), "head_position": ("head", "position"), "unit": ("site", "unit"), "path": ("from", "into"),
}  # fmt: skip


def patch_grid_figure(
    grid: PatchGrid, what: Quantity = "normalised", null: bool = True, title: str = ""
) -> Figure:
    """The grid of each direction, next to what other pairs' runs do; one colour scale for all.

    Args:
        grid: what was found.
        what: a share of the way to the other run, or the change in the metric's unit.
        null: also what another pair's run does, as a share.
        title: above it.
    """
    panels = {way: grid.matrix(what, way) for way in grid.sides}
    if null and what == "normalised":
        panels |= {
            f"{way}, control: another pair": grid.matrix("null", way)
            for way, side in grid.sides.items()
            if len(side.random)
        }
    unit = with_unit(f"change of {grid.metric.name}", grid.metric.unit)
    # One scale for all panels, the control's too: what the null does can then be compared by eye.
    shades = signed("share of the way" if what == "normalised" else unit, *panels.values())
    y, x = _ROWS.get(grid.by, ("site", "position"))
    drawn = [
        panel(_grid(matrix, shades, grid.rows, grid.columns, y, x), name, 40)
        for name, matrix in panels.items()
    ]
    return _compared(drawn, title or f"{grid.metric.name} of {grid.record.measured_on}")


def patch_cells_figure(grid: PatchGrid, way: PatchDirection | None = None) -> Figure:
    """One direction of a grid as a single view, in which a page can ask which cell was clicked.

    Args:
        grid: what was found.
        way: the direction; the first one if None.
    """
    matrix = grid.matrix("normalised", way)
    y, x = _ROWS.get(grid.by, ("site", "position"))
    return _grid(matrix, signed("share of the way", matrix), grid.rows, grid.columns, y, x)


def readout_figure(readouts: Readouts, title: str = "") -> Figure:
    """Accuracy on held-out examples by site and position, next to random directions and the control task."""
    names = {
        "accuracy": "held-out accuracy", "random": "random directions (mean)", "control": "control task (mean)",
    }  # fmt: skip
    if not any(r.random for r in readouts.readouts):
        names.pop("random")
    shades = rising("accuracy, share of examples")
    drawn = []
    for part, name in names.items():
        matrix = readouts.matrix(part)  # type: ignore[arg-type]
        drawn.append(
            panel(_grid(matrix, shades, readouts.rows, readouts.columns, "site", "position"), name)
        )
    method = {"mean_difference": "mean differences", "logistic": "logistic probes"}[readouts.method]
    said = f"{readouts.labels} by {method}: {readouts.record.measured_on}"
    return _compared(drawn, title or said)


def lens_figure(lens: Lens, title: str = "") -> Figure:
    """A task's metric at each depth with its interval, next to that with another example's stream."""
    names = ("this example's stream", "another example's stream", "whole model")
    whole = float(lens.intact.mean())
    rows: list[Row] = []
    for i, d in enumerate(lens.depths):
        rows.append({"place": i, "run": names[0], "value": d.value, "low": d.low, "high": d.high})
        rows += [
            {"place": i, "run": n, "value": v} for n, v in ((names[1], d.null), (names[2], whole))
        ]
    sites = [short(d.site) for d in lens.depths]
    size = max(26.0, 300 / len(sites))
    x = alt.X("place:O", title="stream after", axis=named_ticks(sites, size, True))
    y = alt.Y("value:Q", title=with_unit(lens.metric.name, lens.metric.unit))
    color = run_color(names, (ORANGE, GREY, BLUE), of_lines=True)
    tips = [alt.Tooltip("run:N"), alt.Tooltip("value:Q", format=".3g")]
    line = alt.Chart(data(rows)).encode(x, y, color=color)
    patterns = alt.Scale(domain=list(names), range=[[1, 0], [3, 3], [6, 2]])
    dash = alt.StrokeDash("run:N", title=None, scale=patterns)
    ends = alt.Chart(data([r for r in rows if "low" in r])).mark_rule(color=ORANGE)
    known = any(np.isfinite(d.low) for d in lens.depths)  # one example has no interval
    made = alt.layer(
        *([ends.encode(x, alt.Y("low:Q"), y2="high:Q")] if known else []),
        line.mark_line().encode(strokeDash=dash),
        line.mark_point(filled=True, size=25).encode(tooltip=tips),
    )
    made = made.properties(width=size * len(sites), height=200)
    held = "" if lens.norm == "own" else ", final normalisation held"
    return titled(made, title or f"logit lens{held}: {lens.record.measured_on}")


def lens_tokens_figure(lens: LensTokens, title: str = "") -> Figure:
    """The first choice at each depth and position of a text; darker where it is more probable."""
    shades = rising("probability of the first choice")
    tokens = [printed(t) for t in lens.tokens]
    grid = cells(
        lens.probability.astype(float), shades, rows=[short(s) for s in lens.sites], columns=tokens,
        y="stream after", x="token", size=(58, 20),
    )  # fmt: skip
    rows = [
        {"i": i, "j": j, "word": printed(word), "probability": float(lens.probability[i, j])}
        for i, row in enumerate(lens.words)
        for j, word in enumerate(row)
    ]
    words = alt.Chart(data(rows)).mark_text(fontSize=9, limit=56)
    # Dark cells need light letters.
    light = (
        alt.when("datum.probability > 0.5").then(alt.value("white")).otherwise(alt.value("#222"))
    )
    made = alt.layer(grid, words.encode(x="j:O", y="i:O", text="word:N", color=light))
    return titled(made, title or "most probable next token at each depth")


def heads_figure(scores: HeadScores, title: str = "") -> Figure:
    """Scores by layer and head for each kind; heads that attend there more than by chance are framed."""
    layers = tuple(dict.fromkeys(u.site for u in scores.heads))
    # Layers may differ in their number of heads; the widest gives the columns.
    heads = tuple(str(i) for i in range(1 + max(u.index for u in scores.heads)))
    drawn = []
    for kind in scores.kinds:
        grid = _grid(
            scores.matrix(kind), rising("share of attention"), layers, heads, "layer", "head"
        )
        found = [
            {"i": layers.index(s.head.site), "j": s.head.index} for s in scores.of(kind) if s.is_one
        ]
        frames = alt.Chart(data(found)).mark_rect(filled=False, stroke=ORANGE, strokeWidth=2)
        layered = alt.layer(grid, frames.encode(x="j:O", y="i:O")) if found else grid
        drawn.append(panel(layered, kind.replace("_", " ")))
    said = (
        f"heads of {scores.record.model}: {scores.scores.shape[2]} texts, seed {scores.record.seed} "
        "(framed: above chance, p < 0.05 corrected)"
    )
    return _compared(drawn, title or said)


def head_effects_figure(found: HeadEffects, title: str = "") -> Figure:
    """Total, direct and indirect effect and self-repair of each head with 95 % intervals, next to another pair's."""
    effects = found.effects()
    parts = ("total", "direct", "indirect", "self_repair")
    rows: list[Row] = []
    for e in effects:
        for part in parts:
            p = getattr(e, part)
            rows.append(
                {
                    "head": e.head,
                    "run": part.replace("_", "-"),
                    "change": p.value,
                    "low": p.low,
                    "high": p.high,
                }
            )
        rows.append({"head": e.head, "run": _OTHER_PAIR, "change": e.null})
    names = [*(part.replace("_", "-") for part in parts), _OTHER_PAIR]
    metric = found.grid.metric
    x = alt.X("head:N", title="head", sort=None, axis=alt.Axis(labelAngle=0))
    y = alt.Y("change:Q", title=with_unit(f"change of {metric.name}", metric.unit))
    base = alt.Chart(data(rows)).encode(
        x, y, xOffset=alt.XOffset("run:N", sort=names), color=run_color(names, (ORANGE, BLUE, GREEN, PINK, GREY)),
        tooltip=[alt.Tooltip("head:N"), alt.Tooltip("run:N", title="effect"), *_interval()],
    )  # fmt: skip
    ends = base.mark_rule().encode(alt.Y("low:Q"), y2="high:Q")
    made = alt.layer(zero_line(), ends, base.mark_point(filled=True, size=36, opacity=1))
    way = next(iter(found.grid.sides))
    made = made.properties(width=alt.Step(11), height=200)
    return titled(made, title or f"{way}: {found.grid.record.measured_on}")


_OTHER_PAIR = "another pair's total"


def _interval() -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{field}:Q", format=".3g") for field in ("change", "low", "high")]


def sufficiency_figure(found: Sufficiency, title: str = "") -> Figure:
    """How far the kept units come from nothing (0) to the whole model (1), next to random sets."""
    names = ("kept", "random sets")
    own = [{"run": names[0], "value": found.faithfulness, "low": found.low, "high": found.high}]
    null = [{"run": names[1], "value": v} for v in found.null]
    x = alt.X(
        "run:N",
        title="units kept",
        scale=alt.Scale(domain=list(names)),
        axis=alt.Axis(labelAngle=0),
    )
    y = alt.Y("value:Q", title=[f"faithfulness ({found.metric}):", "0 nothing kept, 1 whole model"])
    tip = alt.Tooltip("value:Q", title="faithfulness", format=".3g")
    levels = alt.Chart(alt.Data(values=[{"value": 0}, {"value": 1}])).mark_rule(color=GREY)
    layers = [
        levels.encode(y),
        alt.Chart(data(own)).mark_rule(color=ORANGE).encode(x, alt.Y("low:Q"), y2="high:Q"),
        alt.Chart(data(own)).mark_point(color=ORANGE, filled=True, size=70, opacity=1).encode(x, y, tooltip=tip),
        alt.Chart(data(null)).mark_point(color=GREY).encode(x, y, tooltip=tip),
    ]  # fmt: skip
    made = alt.layer(*layers).properties(width=200, height=220)
    return titled(made, title or f"{found.record.measured_on}, p {found.p_value:.2g}", 60)


def _grid(
    matrix: Float[np.ndarray, "row column"],
    shades: Shades,
    rows: Sequence[str],
    columns: Sequence[str],
    y: str,
    x: str,
) -> Figure:
    """A matrix by hook point; token names are printed as they can be seen."""
    names = [short(c).replace("\n", "↵") for c in columns]
    return cells(matrix, shades, rows=[short(r) for r in rows], columns=names, y=y, x=x)


def _compared(panels: Sequence[Figure], title: str) -> Figure:
    """Panels that share a colour scale, in one row."""
    return together(panels, len(panels), title)
