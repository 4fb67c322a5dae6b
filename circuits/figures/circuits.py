"""How good found circuits are, as figures."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import altair as alt

from circuits.discovery import Evaluation, ModelSeries
from circuits.figures.charts import (
    BLUE,
    GREY,
    ORANGE,
    Figure,
    Row,
    data,
    run_color,
    titled,
)

_OWN, _RANDOM = "edges by score", "random rankings"
_CIRCUIT, _OTHERS = "the circuit", "random circuits of its size"
_WHOLE = {0.0: "no edges", 1.0: "all edges"}
_MOST_TICKS = 8


def faithfulness_figure(made: Evaluation, title: str = "") -> Figure:
    """Faithfulness by the number of edges, next to random rankings; the circuit next to random ones of its size.

    Args:
        made: how good a circuit is; without a ranking only the circuit is drawn.
        title: above it.

    Raises:
        ValueError: if faithfulness is undefined.
    """
    if not made.defined:
        raise ValueError(made.undefined)
    x = alt.X(
        "edges:Q",
        title="edges, logarithmic",
        scale=alt.Scale(type="log", domain=[1, made.n_edges], nice=False),
        axis=alt.Axis(format="d", tickCount=_MOST_TICKS, grid=False),
    )
    y = alt.Y("f:Q", title="faithfulness")
    levels = alt.Chart(data({"f": f} for f in _WHOLE)).mark_rule(color=GREY, strokeDash=[2, 3])
    layers = [levels.encode(y), _points(made, x, y)]
    if made.curve is not None:
        layers.insert(1, _lines(made, x, y))
    drawn = alt.layer(*layers).resolve_scale(color="independent").properties(width=520, height=240)
    said = f"{made.metric.replace('_', ' ')}, {made.ablation} ablation, seed {made.record.seed}"
    return titled(drawn, title or f"{made.record.measured_on}; {said}")


_OWN_CIRCUIT, _FIRST_CIRCUIT, _SHARED = (
    "f of its own circuit",
    "f of the first model's circuit",
    "Jaccard with the first model's circuit",
)


def series_figure(made: ModelSeries, title: str = "") -> Figure:
    """How the circuit of a task differs over models: faithfulness of two circuits, and what they share.

    Args:
        made: the models, in order.
        title: above it.

    Raises:
        ValueError: if faithfulness is undefined in every model.
    """
    rows: list[Row] = [
        {"model": m.name, "of": of, "value": value, "low": low, "high": high}
        for m in made.members
        for of, value, low, high in (
            (_OWN_CIRCUIT, m.own.value, m.own.low, m.own.high),
            (_FIRST_CIRCUIT, m.of_first.value, m.of_first.low, m.of_first.high),
            (_SHARED, m.jaccard, None, None),
        )
        if isfinite(value)
    ]
    if not any(row["of"] == _OWN_CIRCUIT for row in rows):
        raise ValueError("faithfulness is undefined in every model: no effect can be told from 0")
    x = alt.X("model:N", title="model", sort=[m.name for m in made.members])
    color = run_color((_OWN_CIRCUIT, _FIRST_CIRCUIT, _SHARED), (BLUE, ORANGE, GREY), of_lines=True)
    base = alt.Chart(data(rows)).encode(x, color=color)
    y = alt.Y("value:Q", title="share")
    drawn = alt.layer(
        base.mark_rule(strokeWidth=2, opacity=0.5).encode(alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y),
        base.mark_point(filled=True, size=50, opacity=1).encode(
            y, tooltip=[alt.Tooltip("model:N"), alt.Tooltip("of:N"), alt.Tooltip("value:Q", format=".3g")]
        ),
    ).properties(width=520, height=240)  # fmt: skip
    return titled(
        drawn,
        title
        or f"{made.metric.replace('_', ' ')}, {made.size} edges by {made.method}, seed {made.seed}",
    )


def _lines(made: Evaluation, x: alt.X, y: alt.Y) -> Figure:
    """The curve of the ranking over those of random rankings."""
    color = run_color((_OWN, _RANDOM), (BLUE, GREY), of_lines=True)
    tips = [
        alt.Tooltip("run:N", title="ranking"),
        alt.Tooltip("edges:Q"),
        alt.Tooltip("connected:Q", title="connected"),
        alt.Tooltip("f:Q", title="faithfulness", format=".3g"),
    ]
    base = alt.Chart(data(_random_rows(made))).encode(x, y, color=color, detail="ranking:N")
    own = [
        {"run": _OWN, "edges": size, "connected": connected, "f": f}
        for size, connected, f, _ in made.by_size()
    ]
    line = alt.Chart(data(own)).encode(x, y, color=color)
    return alt.layer(
        base.mark_line(strokeWidth=1, opacity=0.5),
        line.mark_line(strokeWidth=2.5),
        line.mark_point(opacity=0, size=90).encode(tooltip=tips),
    )


def _random_rows(made: Evaluation) -> Iterator[Row]:
    for size, _, _, others in made.by_size():
        for i, f in enumerate(others):
            yield {"run": _RANDOM, "ranking": i, "edges": size, "f": f}


def _points(made: Evaluation, x: alt.X, y: alt.Y) -> Figure:
    """The circuit with its interval, and random circuits."""
    size, f = len(made.edges), made.faithfulness
    own: list[Row] = [{"run": _CIRCUIT, "edges": size, "f": f.value, "low": f.low, "high": f.high}]
    others: list[Row] = [
        {"run": _OTHERS, "edges": size, "f": value} for value in made.random_faithfulness
    ]
    names = (_CIRCUIT, _OTHERS) if others else (_CIRCUIT,)
    color = run_color(names, (ORANGE, GREY))
    tip = [alt.Tooltip("run:N", title="of"), alt.Tooltip("edges:Q")]
    value = alt.Tooltip("f:Q", title="faithfulness", format=".3g")
    ends = [alt.Tooltip(f"{end}:Q", format=".3g") for end in ("low", "high")]
    marks = alt.Chart(data(own)).encode(x, color=color)
    random = alt.Chart(data(others)).encode(x, y, color=color, tooltip=[*tip, value])
    return alt.layer(
        *([random.mark_point(filled=True, size=22, opacity=0.5)] if others else []),
        marks.mark_rule(strokeWidth=2).encode(alt.Y("low:Q"), y2="high:Q"),
        marks.mark_point(filled=True, size=50, opacity=1).encode(y, tooltip=[*tip, value, *ends]),
    )
