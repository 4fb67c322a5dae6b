"""Attention patterns as a figure: raw next to weighted by values."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuits.figures.localization import printed, short
from circuits.localization import AttentionPatterns, HeadPattern

_DIM = 0.25
"""How much of its colour a sink's column keeps."""

_MOST = 48
"""Tokens beyond which only every other one, or fewer, is written out."""


def attention_figure(found: AttentionPatterns, title: str = "") -> Figure:
    """Each head's attention as queries in rows and keys in columns, raw and times the length of keys' values.

    The column of a sink is dimmed and named, and the colour scale is that of the other columns.
    """
    n = len(found.tokens)
    side = min(7.0, max(2.2, 0.16 * n + 1.0))
    figure = Figure((2 * side + 0.6, len(found.patterns) * side + 0.4), layout="constrained")
    axes = figure.subplots(len(found.patterns), 2, squeeze=False)
    for row, pattern in zip(axes, found.patterns, strict=True):
        name = short(pattern.head.site).partition(" ")[0] + f".{pattern.head.index}"
        _draw(row[0], pattern, pattern.raw.numpy(), found.tokens, f"{name}: attention")
        _draw(row[1], pattern, pattern.weighted.numpy(), found.tokens, f"{name}: times value norms")
    figure.suptitle(title or f"{found.model}: queries in rows, keys in columns", fontsize=8)
    return figure


def _draw(
    axis: Axes,
    pattern: HeadPattern,
    values: Float[np.ndarray, "query key"],
    tokens: tuple[str, ...],
    name: str,
) -> None:
    n = len(tokens)
    others = np.delete(values, pattern.sink, 1) if pattern.sink is not None else values
    top = float(others.max()) if others.size and others.max() > 0 else 1.0
    shown = np.ma.masked_array(values, np.triu(np.ones((n, n), bool), 1))
    strength = np.ones((n, n))
    if pattern.sink is not None:
        strength[:, pattern.sink] = _DIM
    axis.imshow(shown, cmap="Blues", vmin=0, vmax=top, alpha=strength)
    step = -(-n // _MOST)
    at = list(range(0, n, step))
    labels = [printed(tokens[i]) for i in at]
    axis.set_xticks(at, labels, rotation=90, fontsize=5)
    axis.set_yticks(at, labels, fontsize=5)
    note = ""
    if pattern.sink is not None:
        word = printed(tokens[pattern.sink])
        note = (
            f"\nsink (dimmed): {word} at {pattern.sink} gets {pattern.sink_share:.0%} of attention"
        )
    axis.set_title(f"{name}, up to {top:.2f}{note}", fontsize=6)
