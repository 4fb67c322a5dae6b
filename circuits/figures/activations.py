"""How active a unit is over a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import altair as alt
import numpy as np
from PIL import Image

from circuits.figures.charts import BLUE, GREY, ORANGE, Figure, Row, data, encoded, titled
from circuits.store import UnitStatistics
from circuits.store.spectra import Spectrum

_LEAST = 0.5  # positions at the foot of a logarithmic axis: one position can be seen
_WIDE = 520  # pixels of a spectrum


def histogram_figure(
    statistics: UnitStatistics, compared_with: Sequence[UnitStatistics] = ()
) -> Figure:
    """How often a unit is how active: counts on a log scale over activation; the fitted tail in steps.

    Args:
        statistics: of the unit.
        compared_with: what other histograms show that this one is compared with: all get the same axes.
    """
    every = [statistics, *compared_with]
    low, high = min(_ends(s)[0] for s in every), max(_ends(s)[1] for s in every)
    top = max(max(float(s.histogram.max()) for s in every), 2.0) * 1.2
    x = alt.X(
        "low:Q", title="activation", scale=alt.Scale(domain=[low, high], nice=False, padding=0)
    )
    sampled = any(s.looked_at < s.count for s in every)
    y = alt.Y(
        "positions:Q", title=f"positions{' looked at' if sampled else ''}, log scale",
        scale=alt.Scale(type="log", domain=[_LEAST, top], nice=False), axis=alt.Axis(format="~s", tickCount=5),
    )  # fmt: skip
    tips = [
        alt.Tooltip("activation:N"),
        alt.Tooltip("positions:Q", format=","),
    ]
    layers: list[alt.Chart] = [
        alt.Chart(data(_bars(statistics)))
        .mark_bar(color=BLUE, orient="vertical")
        .encode(x, y, x2="high:Q", y2="foot:Q", tooltip=tips)
    ]
    if tail := _tail(statistics):
        steps = alt.Chart(data(tail)).mark_rule(color=ORANGE, strokeWidth=2)
        expected = alt.Tooltip("positions:Q", title="positions, exponential tail", format=".3g")
        layers.append(steps.encode(x, y, x2="high:Q", tooltip=expected))
    if low < 0 < high:
        zero = alt.Chart(alt.Data(values=[{"low": 0}])).mark_rule(color=GREY)
        layers.append(zero.encode(x="low:Q"))
    return alt.layer(*layers)


def _ends(statistics: UnitStatistics) -> tuple[float, float]:
    """Where a histogram begins and ends: its outer bars hold all beyond, and are as wide as the rest."""
    edges = statistics.edges
    width = float(edges[1] - edges[0])
    return float(edges[0]) - width, float(edges[-1]) + width


def _bars(statistics: UnitStatistics) -> list[Row]:
    edges, (first, last) = statistics.edges, _ends(statistics)
    said = [
        f"below {edges[0]:.3g}",
        *(f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges.tolist())),
        f"above {edges[-1]:.3g}",
    ]
    places = pairwise([first, *edges.tolist(), last])
    return [
        {"low": a, "high": b, "foot": _LEAST, "positions": n, "activation": where}
        for (a, b), n, where in zip(places, statistics.histogram.tolist(), said, strict=True)
        if n
    ]


def _tail(statistics: UnitStatistics) -> list[Row]:
    """What the fitted exponential expects in each bin."""
    edges, tail = statistics.edges, statistics.tail
    if not np.isfinite(tail.rate):
        return []
    width = float(edges[1] - edges[0])
    lefts = edges[:-1][edges[:-1] >= tail.threshold]
    falling = np.exp(-tail.rate * (lefts - tail.threshold))
    # The share of an exponential between two edges a and a + w is exp(-rate a) (1 - exp(-rate w)).
    expected = tail.count * (1 - np.exp(-tail.rate * width)) * falling
    return [
        {"low": left, "high": left + width, "positions": count}
        for left, count in zip(lefts.tolist(), expected.tolist(), strict=True)
        # On a log scale there is nothing below the axis' foot.
        if count >= _LEAST
    ]


def spectrum_figure(
    found: Spectrum, crops: Mapping[int, Sequence[Image.Image]] | None = None, title: str = ""
) -> Figure:
    """How often a unit is how active, what that contributes, and examples of each range.

    Args:
        found: the spectrum.
        crops: pictures of the examples of each bin, by the bin's number.
        title: of the figure.
    """
    bins = found.bins
    domain = [bins[0].low, bins[-1].high]
    rows: list[Row] = [
        {
            "low": b.low,
            "high": b.high,
            "density": b.density,
            "contribution": b.contribution,
            "seen": b.seen,
        }
        for b in bins
    ]
    x = alt.X("low:Q", title="activation", scale=alt.Scale(domain=domain, nice=False, padding=0))
    # Half of the smallest density that is shown, so that its bar has a height.
    least = min((b.density for b in bins if b.density > 0), default=1e-3) / 2
    log = alt.Scale(
        type="log", domain=[least, max(2 * least, 1.2 * max(b.density for b in bins))], nice=False
    )
    density = _columns(
        # A bar on a logarithmic axis cannot stand on zero, which is infinitely far down.
        [r | {"foot": least} for r in rows if r["density"] > 0],
        x, alt.Y("density:Q", title="density p(x), log scale", scale=log, axis=alt.Axis(format="~g")), BLUE,
    )  # fmt: skip
    y = alt.Y("contribution:Q", title=["x p(x): what it adds", "to the mean activation"])
    share = _columns([r | {"foot": 0} for r in rows], x, y, ORANGE)
    tail = _density_of_tail(found, least)
    if tail:
        line = alt.Chart(data(tail)).mark_line(color=GREY, strokeDash=[4, 3])
        density = alt.layer(density, line.encode(x, alt.Y("density:Q")))
    panels: list[Figure] = [
        density.properties(width=_WIDE, height=110),
        share.properties(width=_WIDE, height=110),
    ]
    if crops:
        panels.append(_examples(found, crops, domain))
    about = f"{found.above_two:.0%} of the positive mean is above two standard deviations"
    headline = title or f"{found.unit} on {found.data} (seed {found.seed})"
    return titled(alt.vconcat(*panels), f"{headline}\np(x) of {found.looks_at}\n{about}")


def _columns(rows: Sequence[Row], x: alt.X, y: alt.Y, colour: str) -> alt.Chart:
    bars = alt.Chart(data(rows)).mark_bar(color=colour, binSpacing=1, orient="vertical")
    tips = [
        alt.Tooltip(f"{f}:Q", format=".3g")
        for f in ("low", "high", "density", "contribution", "seen")
    ]
    return bars.encode(x, y, x2="high:Q", y2="foot:Q", tooltip=tips)


def _density_of_tail(found: Spectrum, least: float) -> list[Row]:
    """The fitted exponential as a density."""
    tail = found.statistics.tail
    if not np.isfinite(tail.rate) or tail.rate <= 0:
        return []
    x = np.linspace(tail.threshold, max(tail.threshold, found.bins[-1].high), 50)
    # The density of the whole is that of the tail times the share of activations that are in it.
    p = tail.share * tail.rate * np.exp(-tail.rate * (x - tail.threshold))
    return [{"low": float(a), "density": float(b)} for a, b in zip(x, p, strict=True) if b >= least]


def _examples(
    found: Spectrum, crops: Mapping[int, Sequence[Image.Image]], domain: list[float]
) -> alt.Chart:
    """Pictures below the bin that they are examples of."""
    size = min(60.0, 0.95 * _WIDE / len(found.bins))
    rows = [
        {"middle": (found.bins[n].low + found.bins[n].high) / 2, "place": k, "url": encoded(picture)}
        for n, some in crops.items()
        for k, picture in enumerate(some)
    ]  # fmt: skip
    x = alt.X(
        "middle:Q",
        title="activation of the examples",
        scale=alt.Scale(domain=domain, nice=False, padding=0),
    )
    y = alt.Y("place:O", title="examples", axis=alt.Axis(labels=False, ticks=False))
    pictures = alt.Chart(data(rows)).mark_image(width=size, height=size).encode(x, y, url="url:N")
    return pictures.properties(width=_WIDE, height=alt.Step(size + 3))
