"""What all figures are made of: Vega-Lite marks (Altair), colours that are seen on white and on dark, named cells.

A figure holds data and says what its marks mean; whoever shows it (the app, `save_figure`, a notebook) chooses the
fonts and the background. All text is drawn as text: names of classes and tokens are never HTML, Markdown or a formula.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from circuits.checks import clipped

Figure = (
    alt.Chart
    | alt.LayerChart
    | alt.FacetChart
    | alt.ConcatChart
    | alt.HConcatChart
    | alt.VConcatChart
)
"""A finished figure."""

Row = dict[str, Any]
"""One mark's fields."""

BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
"""Distinct to colour-blind eyes (Okabe and Ito), and seen on white as well as on dark."""

GREY = "#8a8a8a"
PALETTE = (BLUE, ORANGE, GREEN, PINK, "#7f7f00", "#8c6bb1", GREY, "#a65628")

PANEL = (150, 120)
"""Width and height of one of many panels, in pixels."""

_CELL, _LEAST_CELL = 18, 5  # pixels of a cell: usual, smallest
_SIDE = 340  # pixels of a matrix, where that leaves cells of the smallest size
_LABEL = 11  # pixels: what a line of small text needs
_KEY = 64  # characters of a row of a legend
_DASHES = ([1, 0], [7, 3], [2, 2], [9, 2, 2, 2])
MOST_CELLS = 20_000
"""Matrices with more cells are drawn as one image, without tooltips: a browser would take seconds for the marks."""

_DIVERGING = (
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b",
    "#67001f",
)  # fmt: skip
_RISING = (
    "#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b",
)  # fmt: skip


# --- colour scales -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shades:
    """A colour scale for numbers.

    Attributes:
        low: the number of the first colour.
        high: the number of the last one.
        colours: evenly spaced, mixed in between.
        title: what the numbers are, with their unit.
        at: on which side of the cells the scale is shown.
    """

    low: float
    high: float
    colours: tuple[str, ...]
    title: str
    at: Literal["right", "bottom"] = "right"

    def encoding(self, field: str = "value") -> alt.Color:
        """The scale as an encoding of a field; cells without a number are grey."""
        stops = np.linspace(self.low, self.high, len(self.colours)).tolist()
        scale = alt.Scale(domain=stops, range=list(self.colours), clamp=True)
        words = textwrap.wrap(self.title, 22 if self.at == "right" else 34)
        legend = alt.Legend(title=words, gradientLength=90, orient=self.at)
        return alt.Color(f"{field}:Q", scale=scale, legend=legend)

    def painted(self, matrix: Float[np.ndarray, "row column"]) -> UInt8[np.ndarray, "row column 3"]:
        """The colour of each number; grey where there is none."""
        stops = np.linspace(self.low, self.high, len(self.colours))
        # "#d6604d" has red at 1 to 3, green at 3 to 5, blue at 5 to 7.
        channels = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in self.colours])
        mixed = np.stack([np.interp(matrix, stops, channel) for channel in channels.T], 2)
        # 136 = 0x88: about the grey of `GREY`, as cells without a number have.
        return np.where(np.isnan(matrix)[..., None], 136, mixed).round().astype(np.uint8)


def signed(title: str, *arrays: np.ndarray) -> Shades:
    """Blue below zero, white at it, red above; as far as the largest absolute value of all arrays."""
    limit = largest(*arrays)
    return Shades(-limit, limit, _DIVERGING, title)


def rising(title: str, high: float = 1.0) -> Shades:
    """From white at zero to dark blue."""
    return Shades(0.0, high, _RISING, title)


def largest(*arrays: np.ndarray) -> float:
    """The largest absolute value; 1 where there is none but zeros."""
    found = [float(np.nanmax(np.abs(a))) for a in arrays if np.isfinite(a).any()]
    return max(found, default=0.0) or 1.0


# --- names and numbers ---------------------------------------------------------------------------

_HOOK_POINT = re.compile(
    r"(?:(?P<stack>encoder|decoder)_)?blocks\.(?P<number>[0-9]+)\.(?:(?:(?P<kind>self|cross)_)?attn\.|mlp\.)?hook_"
)


def number(value: float) -> float | None:
    """A number as JSON has it: nothing for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def data(rows: Iterable[Row]) -> alt.Data:
    """Rows as a chart's data; what is not finite becomes missing."""
    return alt.Data(
        values=[{k: number(v) if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    )


def short(site: str) -> str:
    """A hook point's name without what all of them have.

    >>> short("blocks.3.attn.hook_z:1"), short("blocks.0.hook_resid_pre"), short("mixed3b")
    ('3 z:1', '0 resid_pre', 'mixed3b')
    >>> short("encoder_blocks.0.attn.hook_z:1"), short("decoder_blocks.2.cross_attn.hook_pattern")
    ('encoder 0 z:1', 'decoder 2 cross pattern')
    """
    found = _HOOK_POINT.match(site)
    if found is None:
        return site
    stack, number, kind = found["stack"], found["number"], found["kind"]
    return " ".join(filter(None, (stack, number, kind, site[found.end() :])))


def printed(token: str) -> str:
    """A token as it can be seen: blanks and line ends are marked.

    >>> printed(" a\\n")
    '·a↵'
    """
    return clipped(token.replace(" ", "·").replace("\n", "↵"), 12)


def folded(name: str, width: int) -> list[str]:
    """A long name on several lines, broken after punctuation where that is possible.

    >>> folded("mixed4a_3x3_bottleneck:100", 14)
    ['mixed4a_3x3_', 'bottleneck:100']
    """
    lines = [""]
    # After the mark, but before a colon: a unit's number keeps its colon on the next line.
    for piece in re.split(r"(?<=[_./\s-])|(?=:)", name):
        for part in textwrap.wrap(piece, width, drop_whitespace=False):
            if lines[-1] and len(lines[-1] + part.rstrip()) > width:
                lines.append("")
            lines[-1] += part
    return [line.strip() for line in lines]


def with_unit(name: str, unit: str) -> str:
    """A quantity for an axis.

    >>> with_unit("logit_diff", "logits"), with_unit("top1", "")
    ('logit diff, logits', 'top1')
    """
    return f"{name.replace('_', ' ')}, {unit}" if unit else name.replace("_", " ")


def titled(figure: Any, title: str, width: int = 96) -> Any:
    """A figure with a title above all of it, on as many lines as it needs; without one if it is empty."""
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, width)]
    if not lines:
        return figure
    return figure.properties(title=alt.Title(lines, fontSize=12, anchor="start", offset=10))


def panel(figure: Any, title: str | Sequence[str], width: int = 32) -> Any:
    """One of several panels with a small title of its own."""
    lines = [title] if isinstance(title, str) else title
    text = [part for line in lines for part in folded(line, width)]
    return figure.properties(
        title=alt.Title(text, fontSize=11, fontWeight="normal", anchor="start", frame="group")
    )


def sized(figure: Any, width: float = PANEL[0], height: float = PANEL[1]) -> Any:
    """One of several panels with its size."""
    return figure.properties(width=width, height=height)


def together(panels: Sequence[Any], columns: int, title: str = "") -> Figure:
    """Panels in rows, with a title above; a single one stays as it is, so that it may become as wide as the page."""
    made = panels[0] if len(panels) == 1 else alt.concat(*panels, columns=columns)
    return titled(made, title)


# --- marks ---------------------------------------------------------------------------------------


def run_color(
    names: Iterable[str], colours: Sequence[str] = PALETTE, of_lines: bool = False
) -> alt.Color:
    """A colour for each run, in the order given; a legend where there are several."""
    known = list(dict.fromkeys(names))
    scale = alt.Scale(domain=known, range=[colours[i % len(colours)] for i in range(len(known))])
    key = key_of_lines(known) if of_lines else alt.Legend(orient="top", symbolOpacity=1)
    return alt.Color("run:N", title=None, scale=scale, legend=key if len(known) > 1 else None)


def key_of_lines(names: Sequence[str], colour: str | None = None) -> alt.Legend:
    """A legend with short lines, in as many rows as it takes; of one colour where the colour says nothing."""
    more: dict[str, Any] = {"symbolStrokeColor": colour} if colour else {}
    return alt.Legend(
        # About 8 characters for a line and its gap beside each name.
        orient="top", columns=max(1, _KEY // (8 + max(map(len, names), default=0))), symbolOpacity=1,
        symbolType="stroke", symbolSize=300, symbolStrokeWidth=2, **more,
    )  # fmt: skip


def zero_line(axis: str = "y") -> alt.Chart:
    """A line at zero."""
    rule = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=GREY)
    return rule.encode(y="zero:Q") if axis == "y" else rule.encode(x="zero:Q")


def named_ticks(names: Sequence[str], size: float, across: bool) -> alt.Axis:
    """An axis of places that have names, as many of them as can be read.

    The names are looked up by place: two places may have the same name, such as a token that occurs twice.
    """
    # Cells of 5 pixels get a name every third place: lines of text need 11.
    step = max(1, math.ceil(_LABEL / size))
    # About 6 pixels a character at this size of letters.
    turned = across and max(map(len, names), default=0) * 6 > size * step
    return alt.Axis(
        values=list(range(0, len(names), step)),
        # Names by number, since two places may have one name (a token that repeats), which would be one place on the
        # axis.
        labelExpr=f"{json.dumps(list(names))}[datum.value]",
        labelAngle=-90 if turned else 0,
        labelFontSize=9,
        labelLimit=180,
        labelOverlap=False,
        grid=False,
    )


def cells(
    matrix: Float[np.ndarray, "row column"],
    shades: Shades,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    y: str,
    x: str,
    size: tuple[float, float] | None = None,
    opacity: Callable[[int, int], float] | None = None,
    labels: bool = True,
) -> Figure:
    """A matrix as coloured cells, the first row on top, each with its names and number in a tooltip.

    Args:
        matrix: the numbers; NaN where there is none, infinity where nothing is drawn.
        shades: their colours.
        rows: names of the rows.
        columns: names of the columns.
        y: what rows are.
        x: what columns are.
        size: width and height of a cell in pixels; square and as large as fits if not given.
        opacity: of a row and column, where not all cells are as strong.
        labels: whether the names of rows and columns stand at the sides.
    """
    n, m = matrix.shape
    # whole pixels: between cells of broken sizes the background would shine through
    wide, high = size or (max(_LEAST_CELL, min(_CELL, _SIDE // max(n, m))),) * 2
    bare = alt.Axis(labels=False, ticks=False, domain=False, titleFontSize=9)
    across = alt.X("j:O", title=x, axis=named_ticks(columns, wide, True) if labels else bare)
    down = alt.Y("i:O", title=y, axis=named_ticks(rows, high, False) if labels else bare)
    if matrix.size > MOST_CELLS:
        return _painted(matrix, shades, across, down, (wide, high))
    found = [
        {"i": i, "j": j, "row": rows[i], "column": columns[j], "value": float(matrix[i, j])}
        | ({"opacity": opacity(i, j)} if opacity else {})
        for i in range(n)
        for j in range(m)
        if not np.isinf(matrix[i, j])
    ]
    colour = alt.when("isValid(datum.value)").then(shades.encoding()).otherwise(alt.value(GREY))
    tips = [
        alt.Tooltip("row:N", title=y),
        alt.Tooltip("column:N", title=x),
        alt.Tooltip("value:Q", title=shades.title, format=".3g"),
    ]
    made = alt.Chart(data(found)).mark_rect().encode(across, down, color=colour, tooltip=tips)
    if opacity:
        made = made.encode(opacity=alt.Opacity("opacity:Q", scale=None, legend=None))
    return made.properties(width=wide * m, height=high * n)


def _painted(
    matrix: Float[np.ndarray, "row column"],
    shades: Shades,
    across: alt.X,
    down: alt.Y,
    size: tuple[float, float],
) -> Figure:
    """A large matrix as one image, on the same axes and with the same legend."""
    n, m = matrix.shape
    width, height = size[0] * m, size[1] * n
    paint = shades.painted(np.where(np.isinf(matrix), np.nan, matrix))
    image = alt.Chart(data([{"url": encoded(paint)}])).mark_image(
        width=width, height=height, align="left", baseline="top", aspect=False, smooth=False
    )
    # One point for each row and column is enough for an axis to know all of them.
    places = [
        {"i": min(k, n - 1), "j": min(k, m - 1), "value": shades.low} for k in range(max(n, m))
    ]
    unseen = alt.Chart(data(places)).mark_point(opacity=0)  # it brings the axes and the legend
    made = alt.layer(
        image.encode(x=alt.value(0), y=alt.value(0), url="url:N"),
        unseen.encode(across, down, color=shades.encoding()),
    )
    return made.properties(width=width, height=height)


def lines(
    rows: Sequence[Row],
    x: alt.X,
    y: alt.Y,
    tips: Mapping[str, str],
    names: Iterable[str],
    dashed: bool = False,
    colours: Sequence[str] = PALETTE,
) -> Figure:
    """A line for each run, with its numbers in tooltips.

    Args:
        rows: fields `run` and those of x and y; with `dashed` also `kind`.
        x: across.
        y: up.
        tips: titles of the fields that a tooltip shows, by field.
        names: of the runs, in order.
        dashed: whether lines of one run differ by `kind`.
        colours: of the runs.
    """
    base = alt.Chart(data(rows)).encode(x, y, color=run_color(names, colours, of_lines=True))
    drawn = base.mark_line()
    if dashed:
        kinds = list(dict.fromkeys(row["kind"] for row in rows))
        patterns = [_DASHES[i % len(_DASHES)] for i in range(len(kinds))]
        dashes = alt.Scale(domain=kinds, range=patterns)
        legend = key_of_lines(kinds, GREY)
        drawn = drawn.encode(
            strokeDash=alt.StrokeDash("kind:N", title=None, scale=dashes, legend=legend)
        )
    shown = [alt.Tooltip(field, title=title) for field, title in tips.items()]
    points = base.mark_point(opacity=0, size=90)  # tooltips are easier to hit than on the line
    return alt.layer(drawn, points.encode(tooltip=shown))


# --- pictures ------------------------------------------------------------------------------------


def encoded(picture: Image.Image | np.ndarray) -> str:
    """A picture as a data URL. Arrays are y x x x 3: bytes, or shares of 1."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            picture = (picture.clip(0, 1) * 255).round().astype(np.uint8)
        picture = Image.fromarray(picture)
    held = io.BytesIO()
    picture.convert("RGB").save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
