"""Results as figures that can be looked into, with Plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from circuits.effects import Prediction
from circuits.experiments import Effect
from circuits.plots.colors import BLUE, GREY, ORANGE
from circuits.tuning import HeatMap, RadialTuning

_MARGIN = {"l": 50, "r": 10, "t": 30, "b": 40}
_LABELLED = 32  # positions whose tokens can be read beside a map


def predictions_chart(runs: Mapping[str, Sequence[Prediction]]) -> go.Figure:
    """Probabilities of the same outputs in one or two runs, by the runs' names."""
    figure = go.Figure()
    for (name, predictions), color in zip(runs.items(), (BLUE, ORANGE), strict=False):
        figure.add_bar(
            name=name,
            y=[_label(p, predictions) for p in predictions],
            x=[p.probability for p in predictions],
            orientation="h",
            marker_color=color,
            hovertemplate="%{y}: %{x:.4f}<extra>" + name + "</extra>",
        )
    n = len(next(iter(runs.values()), ()))
    figure.update_xaxes(title="probability", range=[0, 1])
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(
        height=90 + 50 * n,
        margin=_MARGIN | {"l": 160},
        showlegend=True,
        legend={"orientation": "h", "y": 1.2},
    )
    return figure


def _label(prediction: Prediction, among: Sequence[Prediction]) -> str:
    """A prediction's name, with its number where two share a name (ImageNet has two cranes)."""
    alone = sum(p.name == prediction.name for p in among) == 1
    return prediction.name if alone else f"{prediction.name} ({prediction.index})"


def tuning_chart(runs: Mapping[str, RadialTuning]) -> go.Figure:
    """A unit's responses to a curve at every angle, in one run or several, with the spread over replicates."""
    figure = go.Figure()
    for (name, tuned), color in zip(runs.items(), (BLUE, ORANGE), strict=False):
        angles = tuned.angles
        low, high = tuned.curves.min(0), tuned.curves.max(0)
        figure.add_scatter(
            x=np.concatenate([angles, angles[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself",
            line_width=0, fillcolor=color, opacity=0.2, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        figure.add_scatter(
            x=angles, y=tuned.mean, name=name, line_color=color,
            hovertemplate="%{x}°: %{y:.3g}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="where the curve bulges, degrees", tickvals=list(range(0, 361, 90)))
    figure.update_yaxes(title="activation (band: replicates)", rangemode="tozero")
    figure.update_layout(
        height=300, margin=_MARGIN, showlegend=len(runs) > 1, legend={"orientation": "h", "y": 1.15}
    )
    return figure


def heat_map_chart(found: HeatMap) -> go.Figure:
    """Responses by where a curve bulges and how much it is bent."""
    limit = float(np.abs(found.responses).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            x=found.angles, y=found.curvatures, z=found.responses, zmid=0, zmin=-limit, zmax=limit,
            colorscale="RdBu_r", colorbar_title="activation",
            hovertemplate="%{x}°, curvature %{y:.3g}: %{z:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="where the curve bulges, degrees")
    figure.update_yaxes(title="curvature, 1 / px (0: a line)")
    figure.update_layout(height=300, margin=_MARGIN)
    return figure


def pattern_chart(pattern: Float[np.ndarray, "query key"], words: Sequence[str]) -> go.Figure:
    """How much each position (row) looks at each (column)."""
    places = list(range(len(words)))
    figure = go.Figure(
        go.Heatmap(
            z=pattern, zmin=0, zmax=1, colorscale="Cividis", colorbar_title="attention",
            customdata=[[f"{q} → {k}" for k in words] for q in words],
            hovertemplate="%{customdata}: %{z:.2f}<extra></extra>",
        )
    )  # fmt: skip
    ticks = {"tickvals": places, "ticktext": list(words)} if len(words) <= _LABELLED else {}
    figure.update_xaxes(title="looked at", **ticks)
    figure.update_yaxes(title="from", autorange="reversed", **ticks)
    figure.update_layout(height=min(520, 160 + 22 * len(words)), margin=_MARGIN)
    return figure


def effects_chart(effects: Mapping[str, Effect]) -> go.Figure:
    """Changes with their intervals, compared with those that the random variants make."""
    figure = go.Figure()
    names = list(effects)
    points = [(n, v) for n in names for v in effects[n].null]
    figure.add_scatter(
        x=[v for _, v in points], y=[n for n, _ in points], mode="markers", name="null", marker_color=GREY,
        marker_symbol="circle-open", hovertemplate="%{x:.3g}<extra>null</extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[e.change for e in effects.values()], y=names, mode="markers", name="the edits",
        marker={"color": ORANGE, "size": 10},
        error_x={
            "type": "data", "symmetric": False, "array": [e.high - e.change for e in effects.values()],
            "arrayminus": [e.change - e.low for e in effects.values()],
        },
        hovertemplate="%{y}: %{x:.3g}<extra>the edits</extra>",
    )  # fmt: skip
    figure.add_vline(x=0, line_color=GREY, line_width=1)
    figure.update_xaxes(title="change (95 % interval over examples)")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(
        height=190 + 40 * len(names),
        margin=_MARGIN | {"l": 110, "b": 110},
        legend={"orientation": "h", "yanchor": "top", "y": -50 / (50 + 40 * len(names))},
    )
    return figure


def matrix_chart(matrix: Float[np.ndarray, "y x"], what: str) -> go.Figure:
    """A kernel with its scale."""
    figure = _signed(matrix)
    figure.update_traces(showscale=True, colorbar_title=what)
    figure.update_layout(width=300, height=240, margin={"l": 5, "r": 5, "t": 10, "b": 5})
    return figure


def map_chart(values: Float[np.ndarray, "y x"]) -> go.Figure:
    """A unit's map, small and without a scale."""
    figure = _signed(values)
    figure.update_layout(height=120, margin={"l": 0, "r": 0, "t": 0, "b": 0})
    return figure


def _signed(values: Float[np.ndarray, "y x"]) -> go.Figure:
    """Numbers in squares, the first row on top, zero in the middle of the scale."""
    limit = float(np.abs(values).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values, zmin=-limit, zmax=limit, colorscale="RdBu_r", showscale=False,
            hovertemplate="%{y}, %{x}: %{z:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, scaleanchor="x", constrain="domain", autorange="reversed")
    return figure


Angles = tuple[str, Float[np.ndarray, " unit"], Float[np.ndarray, " unit"]]
"""A family: its name, the angle of each unit, and how active each is."""


def layers_chart(layers: Mapping[str, Sequence[Angles]], at: float) -> go.Figure:
    """How active the units of each layer's families are, by their angle; `at` is the stimulus'."""
    n, gap = len(layers), 0.07
    height = (1 - gap * (n - 1)) / n
    layout: dict[str, object] = {"height": 150 * n + 60, "margin": _MARGIN, "showlegend": False}
    data, titles, lines = [], [], []
    for i, (layer, families) in enumerate(layers.items()):
        axis = str(i + 1) if i else ""
        top = 1 - i * (height + gap)
        layout[f"xaxis{axis}"] = {
            "range": [-5, 365], "tickvals": list(range(0, 361, 45)), "anchor": f"y{axis}", "showticklabels": i == n - 1,
            "title": "angle written for, degrees (orange: stimulus)" if i == n - 1 else None,
        }  # fmt: skip
        layout[f"yaxis{axis}"] = {
            "rangemode": "tozero", "title": "activation", "anchor": f"x{axis}", "domain": [max(0.0, top - height), top],
        }  # fmt: skip
        titles.append({
            "text": layer, "x": 0.5, "y": top, "xref": "paper", "yref": "paper", "yanchor": "bottom",
            "showarrow": False,
        })  # fmt: skip
        lines.append({
            "type": "line", "x0": at % 360, "x1": at % 360, "y0": 0, "y1": 1, "xref": f"x{axis}",
            "yref": f"y{axis} domain", "line": {"color": ORANGE, "width": 1},
        })  # fmt: skip
        dashes = ("solid", "dash", "dot", "dashdot")
        for (name, angles, active), dash in zip(families, dashes, strict=False):
            order = np.argsort(angles)
            data.append(
                go.Scatter(
                    x=angles[order], y=active[order], name=name, mode="lines+markers", marker_size=4,
                    line={"color": BLUE, "dash": dash}, xaxis=f"x{axis}", yaxis=f"y{axis}",
                    hovertemplate="%{x}°: %{y:.3g}<extra>" + name + "</extra>",
                )
            )  # fmt: skip
    return go.Figure(data, {**layout, "annotations": titles, "shapes": lines})


def losses_chart(
    runs: Mapping[str, Float[np.ndarray, " position"]], words: Sequence[str]
) -> go.Figure:
    """How surprising each token is, in one run or two; `words` are those that are predicted."""
    figure = go.Figure()
    for (name, losses), color in zip(runs.items(), (BLUE, ORANGE), strict=False):
        figure.add_scatter(
            y=losses, name=name, mode="lines+markers", line_color=color, marker_size=4, customdata=list(words),
            hovertemplate="%{customdata}: %{y:.3g} nats<extra>" + name + "</extra>",
        )  # fmt: skip
    ticks = (
        {"tickvals": list(range(len(words))), "ticktext": list(words)}
        if len(words) <= _LABELLED
        else {}
    )
    figure.update_xaxes(title="token", **ticks)
    figure.update_yaxes(title="loss, nats", rangemode="tozero")
    figure.update_layout(
        height=280, margin=_MARGIN, showlegend=True, legend={"orientation": "h", "y": 1.2}
    )
    return figure
