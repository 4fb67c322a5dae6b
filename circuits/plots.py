"""Results as figures (layer 6). Zero is in the middle of every diverging scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.effects import Prediction
from circuits.store import UnitStatistics
from circuits.weights import Connection

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # distinct to colour-blind eyes
_MARGIN = {"l": 50, "r": 10, "t": 30, "b": 40}


def histogram_figure(statistics: UnitStatistics) -> go.Figure:
    """How often a unit is how active: counts on a log scale over activation."""
    edges, counts = statistics.edges, statistics.histogram
    width = edges[1] - edges[0]
    middles = np.concatenate(
        [[edges[0] - width / 2], edges[:-1] + width / 2, [edges[-1] + width / 2]]
    )
    figure = go.Figure(
        go.Bar(
            x=middles,
            y=np.where(counts > 0, counts, np.nan),
            width=width,
            marker_color=BLUE,
            hovertemplate="activation %{x:.3g}<br>%{y} positions<extra></extra>",
        )
    )
    tail = statistics.tail
    if np.isfinite(tail.rate):
        lefts = edges[:-1][edges[:-1] >= tail.threshold]
        falling = np.exp(-tail.rate * (lefts - tail.threshold))
        expected = tail.count * (1 - np.exp(-tail.rate * width)) * falling
        seen = expected >= 0.5
        figure.add_scatter(
            x=lefts[seen] + width / 2,
            y=expected[seen],
            mode="lines",
            line_color=ORANGE,
            hovertemplate="exponential tail: %{y:.3g}<extra></extra>",
        )
    figure.add_vline(x=0, line_color=GREY, line_width=1)
    figure.update_yaxes(type="log", title="positions")
    figure.update_xaxes(title="activation (outermost bars: all beyond)")
    figure.update_layout(height=260, margin=_MARGIN, bargap=0, showlegend=False)
    return figure


def kernels_figure(connections: Sequence[Connection], end: str) -> go.Figure:
    """Kernels as small multiples with one shared colour scale, zero in the middle.

    Args:
        connections: at least one, all convolution kernels (y x x).
        end: which unit names each kernel: `source` or `target`.

    Raises:
        ValueError: if there is none.
    """
    if not connections:
        raise ValueError("connections is empty: nothing to draw")
    kernels = [np.atleast_2d(c.kernel.numpy()) for c in connections]
    limit = max(float(np.abs(k).max()) for k in kernels) or 1.0
    columns = min(5, len(kernels))
    rows = -(-len(kernels) // columns)
    titles = [f"{getattr(c, end).site}<br>:{getattr(c, end).index}" for c in connections]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.2 / rows)
    for i, kernel in enumerate(kernels):
        heat = go.Heatmap(
            z=kernel[::-1],  # plotly draws the first row at the bottom
            coloraxis="coloraxis",
            hovertemplate="%{z:.3g}<extra></extra>",
        )
        figure.add_trace(heat, row=i // columns + 1, col=i % columns + 1)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    for i in range(len(kernels)):  # each panel square by its own axes
        axis = "" if i == 0 else str(i + 1)
        figure.layout[f"yaxis{axis}"].scaleanchor = f"x{axis}"
    figure.update_annotations(font_size=10)
    figure.update_layout(
        height=40 + 150 * rows,
        margin={"l": 5, "r": 5, "t": 40, "b": 5},
        coloraxis={
            "colorscale": "RdBu_r",
            "cmin": -limit,
            "cmax": limit,
            "colorbar_title": "weight",
        },
    )
    return figure


def predictions_figure(runs: Mapping[str, Sequence[Prediction]]) -> go.Figure:
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
