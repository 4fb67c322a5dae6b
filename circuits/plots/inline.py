"""Results as plain HTML: what every unit's page shows, for a browser draws it at once.

A figure of Plotly costs a browser tens of milliseconds, and its library some hundred more. Numbers are in tooltips.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from plotly.colors import get_colorscale, unlabel_rgb

from circuits.plots.colors import BLUE, GREY, ORANGE
from circuits.store import UnitStatistics
from circuits.weights import Connection

_HEIGHT, _LEFT, _BOTTOM = 250, 62, 44  # pixels: of a histogram, and of its margins
_LEAST = 0.5  # positions at the foot of a logarithmic axis: one position can be seen
_TICKS = 6
_ACROSS = 5  # kernels in a row


def histogram_html(statistics: UnitStatistics) -> str:
    """How often a unit is how active: counts on a log scale over activation; the fitted tail in steps."""
    edges, counts, tail = statistics.edges, statistics.histogram, statistics.tail
    width = float(edges[1] - edges[0])
    low, high = float(edges[0]) - width, float(edges[-1]) + width
    top = 1.05 * np.log10(max(float(counts.max()), 1.0) / _LEAST)

    def across(value: float) -> float:
        return 100 * (value - low) / (high - low)

    def up(count: float) -> float:
        return 100 * float(np.log10(max(count, _LEAST) / _LEAST)) / top

    def bar(left: float) -> str:
        return f"left:{across(left):.3f}%;width:{across(low + width):.3f}%"

    parts = []
    for power in range(int(top + np.log10(_LEAST)) + 1):
        at = f"bottom:{up(10.0**power):.2f}%"
        parts += [_box(f"left:0;width:100%;{at};border-top:1px solid #8884")]
        parts += [_text(f"right:100%;{at};transform:translate(-5px,50%)", _short(10**power))]
    for value in _ticks(low, high):
        at = f"left:{across(value):.2f}%;top:100%;transform:translate(-50%,3px)"
        parts += [_text(at, f"{value:.6g}")]
    said = [
        f"below {edges[0]:.3g}",
        *(f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges.tolist())),
        f"above {edges[-1]:.3g}",
    ]
    for i, (count, where) in enumerate(zip(counts.tolist(), said, strict=True)):
        if count:
            style = f"{bar(low + i * width)};bottom:0;height:{up(count):.2f}%;background:{BLUE}"
            parts += [_box(style, f"activation {where}: {count:,} positions")]
    if np.isfinite(tail.rate):
        lefts = edges[:-1][edges[:-1] >= tail.threshold]
        falling = np.exp(-tail.rate * (lefts - tail.threshold))
        expected = tail.count * (1 - np.exp(-tail.rate * width)) * falling
        for left, count in zip(lefts.tolist(), expected.tolist(), strict=True):
            if count >= _LEAST:
                style = f"{bar(left)};bottom:{up(count):.2f}%;border-top:2px solid {ORANGE}"
                parts += [_box(style, f"exponential tail: {count:.3g} positions")]
    if low < 0 < high:
        parts += [_box(f"left:{across(0):.3f}%;bottom:0;height:100%;border-left:1px solid {GREY}")]
    parts += [_text("left:50%;top:100%;transform:translate(-50%,22px)", "activation")]
    turned = "writing-mode:vertical-rl;transform:translateY(-50%) rotate(180deg)"
    parts += [_text(f"right:calc(100% + {_LEFT - 18}px);top:50%;{turned}", "positions")]
    return (
        f'<div role="img" aria-label="histogram" style="position:relative;height:{_HEIGHT - _BOTTOM}px;'
        f'margin:8px 10px {_BOTTOM}px {_LEFT}px;border-bottom:1px solid {GREY}">{"".join(parts)}</div>'
    )


def kernels_html(connections: Sequence[Connection], end: str) -> str:
    """Kernels side by side with one shared colour scale, zero in the middle.

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
    panels = "".join(
        f'<div style="min-width:0"><div style="overflow-wrap:anywhere">{escape(unit.site)}<br>:{unit.index}</div>'
        f"{_kernel(kernel, limit)}</div>"
        for kernel, unit in zip(kernels, (getattr(c, end) for c in connections), strict=True)
    )
    stops = ",".join(_color(np.linspace(-1, 1, 11)))
    scale = (
        '<div style="display:flex;justify-content:flex-end;align-items:center;gap:6px">'
        f'<span>weight</span><span>{-limit:.2g}</span><span title="zero is in the middle" style="width:120px;'
        f'height:10px;background:linear-gradient(to right,{stops})"></span><span>{limit:.2g}</span></div>'
    )
    return (
        f'<div role="img" aria-label="kernels" style="font-size:12px;line-height:1.3">{scale}<div style="display:grid;'
        f'grid-template-columns:repeat({_ACROSS},1fr);gap:1rem;align-items:end">{panels}</div></div>'
    )


def _kernel(kernel: Float[np.ndarray, "y x"], limit: float) -> str:
    rows, columns = kernel.shape
    cells = "".join(
        f'<div title="{weight:.3g}" style="background:{color}"></div>'
        for weight, color in zip(kernel.ravel(), _color(kernel.ravel() / limit), strict=True)
    )
    return (
        f'<div style="display:grid;grid-template-columns:repeat({columns},1fr);width:100%;max-width:120px;'
        f'aspect-ratio:{columns}/{rows};margin-top:4px">{cells}</div>'
    )


def _color(shares: Float[np.ndarray, " value"]) -> list[str]:
    """Colours of -1 to 1: blue, white at zero, red."""
    stops = get_colorscale("RdBu_r")
    places = np.array([place for place, _ in stops]) * 2 - 1
    channels = np.array([unlabel_rgb(color) for _, color in stops])
    mixed = np.stack([np.interp(shares, places, channel) for channel in channels.T], 1)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in mixed.round().astype(int).tolist()]


def _box(style: str, title: str = "") -> str:
    said = f' title="{escape(title)}"' if title else ""
    return f'<div{said} style="position:absolute;{style}"></div>'


def _text(style: str, text: str) -> str:
    plain = "position:absolute;white-space:nowrap;font-size:12px;line-height:1.2"
    return f'<span style="{plain};{style}">{escape(text)}</span>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range, about as many as can be read."""
    rough = (high - low) / _TICKS
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * next(s for s in (1, 2, 5, 10) if s * power >= rough)
    return [float(n * step) for n in range(int(np.ceil(low / step)), int(high // step) + 1)]


def _short(count: int) -> str:
    """A power of ten, short.

    >>> [_short(10**n) for n in (0, 3, 4, 6)]
    ['1', '1k', '10k', '1M']
    """
    for size, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count // size}{name}"
    return str(count)
