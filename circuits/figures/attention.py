"""Attention patterns as a figure: raw next to weighted by values, or laid over the image that was looked at."""

from __future__ import annotations

from dataclasses import replace

import altair as alt
import numpy as np

from circuits.figures.charts import (
    GREEN,
    GREY,
    ORANGE,
    Figure,
    Row,
    cells,
    data,
    encoded,
    panel,
    printed,
    rising,
    short,
    titled,
)
from circuits.localization import (
    AttentionPatterns,
    HeadPattern,
    ImageAttention,
    Look,
    UnplacedPattern,
)
from circuits.units import Unit

_DIM = 0.25
"""How much of its colour a sink's column keeps."""

_LEAST, _MOST, _WIDE = 4, 18, 270
"""Pixels of a cell of a pattern, at least and at most, and of a whole pattern: two of them fit next to each other."""

_PICTURE = 220
"""Pixels of the longer side of an image."""

_STRONGEST = 0.85
"""How much of the image the strongest attention covers."""


def attention_figure(found: AttentionPatterns, title: str = "") -> Figure:
    """Each head's attention as queries in rows and keys in columns, raw and times the length of keys' values.

    The column of a sink is dimmed and named, and the colour scale is that of the other columns. Where queries see no
    later keys the first column is always treated so: the first query has nothing else to attend to, and many heads rest
    there when they find nothing to do.
    """
    rows = [_pair(pattern, [printed(t) for t in found.tokens]) for pattern in found.patterns]
    made = alt.vconcat(*rows).resolve_scale(color="independent")
    return titled(made, title or f"{found.model}: queries in rows, keys in columns")


def _pair(pattern: HeadPattern, words: list[str]) -> alt.HConcatChart:
    name = _named(pattern.head)
    note = ""
    dimmed, n = pattern.sink, len(words)
    if dimmed is not None:
        note = (
            f"sink (dimmed): {words[dimmed]} at {dimmed} gets {pattern.sink_share:.0%} of attention"
        )
    elif n > 2 and not pattern.raw.triu(1).any():
        dimmed, share = 0, float(pattern.raw[1:, 0].mean())
        note = f"first token (dimmed): {words[0]} gets {share:.0%} of later tokens' attention"
    drawn = []
    for what, values in (("attention", pattern.raw), ("times value norms", pattern.weighted)):
        one = _matrix(values.numpy(), dimmed, words, what)
        drawn.append(panel(one, [f"{name}: {what}", *filter(None, [note])], 48))
    return alt.hconcat(*drawn).resolve_scale(color="independent")


def _matrix(values: np.ndarray, sink: int | None, words: list[str], what: str) -> Figure:
    # A sink takes most of the attention; with it the scale would leave the rest white.
    others = values if sink is None else np.delete(values, sink, 1)
    top = float(others.max()) if others.size and others.max() > 0 else 1.0
    # Infinity is what `cells` leaves out; a 0 would be drawn as if a later key could be attended to.
    later = np.triu(np.ones(values.shape, bool), 1)
    shown = values if values[later].any() else np.where(later, np.inf, values)
    shades = replace(rising(f"{what}, share of the query's", top), at="bottom")
    cell = max(_LEAST, min(_MOST, _WIDE // len(words)))
    return cells(
        shown, shades, rows=words, columns=words, y="query", x="key", size=(cell, cell),
        opacity=None if sink is None else lambda _, key: _DIM if key == sink else 1.0,
    )  # fmt: skip


def _named(head: Unit) -> str:
    """A head as briefly as it can be said: `0.3`, `decoder 0 cross.3`."""
    return f"{short(head.site).removesuffix(' pattern')}.{head.index}"


# --- over an image -------------------------------------------------------------------------------


def image_attention_figure(found: ImageAttention, title: str = "") -> Figure:
    """What each head and query attends to, laid over the image, next to what goes to tokens that hold no patch.

    The more opaque a patch, the larger its share; the legend also says what uniform attention would give each. The
    query's own patch is framed. Where nothing tells which part of the image a head's tokens hold, its pattern is shown
    as a matrix, with the reason.
    """
    image = found.image.movedim(0, -1).cpu().numpy()
    rows = [_over(look, image) for look in found.looks] + [_whole(p) for p in found.unplaced]
    made = alt.vconcat(*rows).resolve_scale(opacity="independent", color="independent")
    return titled(made, title or f"{found.model}: where heads look")


def _over(look: Look, image: np.ndarray) -> alt.HConcatChart:
    name = f"{_named(look.head)}: attention of the {look.query}"
    drawn = [panel(_photograph(image), "the image", 40), panel(_overlay(look, image), name, 40)]
    if look.others:
        drawn.append(panel(_elsewhere(look), "to each kind of token", 40))
    return alt.hconcat(*drawn).resolve_scale(opacity="independent")


def _size(image: np.ndarray) -> tuple[int, int]:
    """Width and height at which an image is shown."""
    high, wide = image.shape[:2]
    return round(_PICTURE * wide / max(high, wide)), round(_PICTURE * high / max(high, wide))


def _photograph(image: np.ndarray) -> alt.Chart:
    width, height = _size(image)
    drawn = alt.Chart(data([{"url": encoded(image)}])).mark_image(
        width=width, height=height, align="left", baseline="top", aspect=False
    )
    drawn = drawn.encode(x=alt.value(0), y=alt.value(0), url="url:N")
    return drawn.properties(width=width, height=height)


def _overlay(look: Look, image: np.ndarray) -> Figure:
    shares = look.patches.numpy()
    (n, m), (high, wide) = shares.shape, image.shape[:2]
    width, height = _size(image)
    # From 0.35 up, so that colour is seen on black; what lies outside the query's window is paler.
    grey = 0.35 + 0.65 * image.mean(2)
    outside = np.isnan(shares)[np.arange(high) * n // high][:, np.arange(wide) * m // wide]
    grey = np.where(outside, 1 - 0.35 * (1 - grey), grey)
    rows: list[Row] = [
        {
            "left": x,
            "right": x + 1,
            "top": y,
            "bottom": y + 1,
            "patch": f"{y},{x}",
            "share": float(shares[y, x]),
            "times": float(shares[y, x]) / look.uniform,
        }
        for y, x in np.argwhere(~np.isnan(shares)).tolist()
    ]
    layers: list[alt.Chart] = [
        _photograph(np.repeat(grey[..., None], 3, 2)),
        _placed(rows, (m, n), (width, height))
        .mark_rect(color=ORANGE)
        .encode(
            opacity=_opacity(look, float(np.nanmax(shares))),
            tooltip=[
                alt.Tooltip("patch:N"),
                alt.Tooltip("share:Q", format=".3g"),
                alt.Tooltip("times:Q", title="times uniform", format=".3g"),
            ],
        ),
    ]
    if look.at is not None:
        top, left, bottom, right = look.at
        own: Row = {"left": left, "right": right, "top": top, "bottom": bottom}
        framed = _placed([own], (m, n), (width, height))
        layers.append(framed.mark_rect(filled=False, stroke=GREEN, strokeWidth=2))
    return alt.layer(*layers)


def _placed(rows: list[Row], patches: tuple[int, int], size: tuple[int, int]) -> alt.Chart:
    """Boxes in units of patches, from the top left."""
    x, y = (
        alt.Scale(domain=[0, count], range=[0, pixels], nice=False, zero=False)
        for count, pixels in zip(patches, size, strict=True)
    )
    return alt.Chart(data(rows)).encode(
        x=alt.X("left:Q", scale=x, axis=None), y=alt.Y("top:Q", scale=y, axis=None), x2="right:Q", y2="bottom:Q"
    )  # fmt: skip


def _opacity(look: Look, top: float) -> alt.Opacity:
    """Opacity by the share of attention, with the share that uniform attention would give named in the legend."""
    top = max(top, look.uniform)
    return alt.Opacity(
        "share:Q",
        scale=alt.Scale(domain=[0, top], range=[0, _STRONGEST], clamp=True),
        legend=alt.Legend(
            title="share of attention, each patch", values=sorted({look.uniform, top}, reverse=True),
            labelExpr=f"format(datum.value, '.3g') + (datum.value < {look.uniform * 1.000001} ? ' (uniform)' : '')",
            symbolType="square", symbolFillColor=ORANGE, symbolStrokeWidth=0, orient="bottom", direction="vertical",
        ),
    )  # fmt: skip


def _elsewhere(look: Look) -> Figure:
    """Bars: what goes to each token that holds no patch and to all patches together; ticks: with uniform attention."""
    patches = len(look.shares) - len(look.others)
    rows: list[Row] = [
        *({"to": k, "share": v, "uniform": look.uniform} for k, v in look.others.items()),
        {"to": f"{patches} patches", "share": look.on_patches, "uniform": patches * look.uniform},
    ]
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("to:N", sort=None, title="token", axis=alt.Axis(labelLimit=140, labelOverlap=False))
    )
    scale = alt.Scale(domain=[0, 1])
    tips = [
        alt.Tooltip("to:N"),
        *(alt.Tooltip(f"{f}:Q", format=".3g") for f in ("share", "uniform")),
    ]
    bars = base.mark_bar(color=ORANGE).encode(
        x=alt.X("share:Q", scale=scale, title="share of attention (tick: uniform)"), tooltip=tips
    )
    ticks = base.mark_tick(color=GREY, thickness=3).encode(x=alt.X("uniform:Q", scale=scale))
    return alt.layer(bars, ticks).properties(width=150, height=alt.Step(18))


def _whole(pattern: UnplacedPattern) -> Figure:
    """A pattern as a matrix; of windows the first."""
    raw = pattern.raw[0].numpy()
    n, m = raw.shape
    uniform = f"share of the query's attention (uniform: {1 / m:.3g})"
    made = cells(
        raw, rising(uniform, float(raw.max()) or 1.0), rows=[str(i) for i in range(n)],
        columns=[str(i) for i in range(m)], y="query", x="key",
    )  # fmt: skip
    which = f", window 1 of {len(pattern.raw)}" if len(pattern.raw) > 1 else ""
    return panel(made, [f"{_named(pattern.head)}: attention{which}", pattern.why], 64)
