"""Attention patterns as a figure: raw next to weighted by values."""

from __future__ import annotations

from dataclasses import replace

import altair as alt
import numpy as np

from circuits.figures.charts import Figure, cells, panel, printed, rising, short, titled
from circuits.localization import AttentionPatterns, HeadPattern

_DIM = 0.25
"""How much of its colour a sink's column keeps."""


def attention_figure(found: AttentionPatterns, title: str = "") -> Figure:
    """Each head's attention as queries in rows and keys in columns, raw and times the length of keys' values.

    The column of a sink is dimmed and named, and the colour scale is that of the other columns.
    """
    rows = [_pair(pattern, [printed(t) for t in found.tokens]) for pattern in found.patterns]
    made = alt.vconcat(*rows).resolve_scale(color="independent")
    return titled(made, title or f"{found.model}: queries in rows, keys in columns")


def _pair(pattern: HeadPattern, words: list[str]) -> alt.HConcatChart:
    name = short(pattern.head.site).partition(" ")[0] + f".{pattern.head.index}"
    note = ""
    if pattern.sink is not None:
        word = words[pattern.sink]
        note = f"sink (dimmed): {word} at {pattern.sink} gets {pattern.sink_share:.0%} of attention"
    drawn = []
    for what, values in (("attention", pattern.raw), ("times value norms", pattern.weighted)):
        one = _matrix(values.numpy(), pattern.sink, words, what)
        drawn.append(panel(one, [f"{name}: {what}", *filter(None, [note])], 48))
    return alt.hconcat(*drawn).resolve_scale(color="independent")


def _matrix(values: np.ndarray, sink: int | None, words: list[str], what: str) -> Figure:
    # A sink takes most of the attention; with it the scale would leave the rest white.
    others = values if sink is None else np.delete(values, sink, 1)
    top = float(others.max()) if others.size and others.max() > 0 else 1.0
    # Infinity is what `cells` leaves out; a 0 would be drawn as if a later key could be attended to.
    shown = np.where(np.triu(np.ones(values.shape, bool), 1), np.inf, values)  # no key is later
    shades = replace(rising(f"{what}, share of the query's", top), at="bottom")
    return cells(
        shown, shades, rows=words, columns=words, y="query", x="key",
        opacity=None if sink is None else lambda _, key: _DIM if key == sink else 1.0,
    )  # fmt: skip
