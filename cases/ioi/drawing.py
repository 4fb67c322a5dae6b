"""The case's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from cases.ioi.subject import layer_of
from circuits.discovery import EdgeGraph, EdgeScores
from circuits.discovery.graphs import Mask
from circuits.figures import Figure, attention_figure
from circuits.figures.charts import BLUE, GREY, ORANGE, cells, data, signed, sized
from circuits.localization import AttentionPatterns

DRAWN = 30
"""As many edges of a circuit are drawn: those that matter most."""


def grid(heads: Sequence[str], values: np.ndarray, title: str) -> Figure:
    """A number for each head, layers in rows."""
    layers = 1 + max(map(layer_of, heads))
    made = np.full((layers, len(heads) // layers), np.nan)
    for head, value in zip(heads, values, strict=True):
        layer, index = map(int, head.split("."))
        made[layer, index] = value
    rows, columns = [str(n) for n in range(layers)], [str(n) for n in range(made.shape[1])]
    return cells(made, signed(title, made), rows=rows, columns=columns, y="layer", x="head")


def attention(found: AttentionPatterns) -> Figure:
    """Some heads' attention on one text."""
    return attention_figure(found, "Queries in rows, keys in columns")


def bars(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Effects with their intervals, coloured by whether they are of heads or directions that were chosen or drawn."""
    base = alt.Chart(data(dict(row) for row in rows))
    order = [row["what"] for row in rows]
    y = alt.Y("what:N", title=None, sort=order, axis=alt.Axis(labelLimit=320))
    scale = alt.Scale(domain=["predicted", "measured", "random"], range=[ORANGE, BLUE, GREY])
    drawn = base.mark_bar().encode(
        alt.X("value:Q", title=title), y, alt.Color("kind:N", title=None, scale=scale)
    )
    ends = base.mark_rule(strokeWidth=1.5).encode(alt.X("low:Q"), alt.X2("high:Q"), y)
    return sized(drawn + ends, 420, 22 * len(rows))


def strongest(graph: EdgeGraph, kept: Mask, scores: EdgeScores) -> Mask:
    """The edges of a circuit that are drawn: the most important ones that lie on a path together."""
    worth = np.where(kept, scores.worth(), 0)
    order = np.argsort(-worth, kind="stable")[: min(DRAWN, int(kept.sum()))]
    drawn = np.zeros(len(kept), bool)
    drawn[order] = True
    return drawn & kept
