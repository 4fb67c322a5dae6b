"""How verdicts and numbers of claims look, for the page of HTML and for the app."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from circuits.claims.verdicts import Quantity, Verdict
from circuits.tables import between

COLOURS: Mapping[Verdict, str] = {
    "holds": "#1a6b3c", "refuted": "#a3261f", "undecided": "#6b5900", "could not be tested": "#555555",
    "stale": "#555555",
}  # fmt: skip
"""The colour behind each verdict, which is written on it in white."""

_HEIGHT, _EDGE = 22, 8
_REGION, _NUMBER = "#8a8a8a", "#0072b2"  # seen on white and on dark


def interval_svg(q: Quantity, width: int = 220) -> str:
    """The interval as a line over the claimed region, with a text for readers who do not see it.

    It stands in a page of HTML, and is a file of its own as well.

    Args:
        q: the number, with its interval and its region.
        width: of the drawing, in pixels.
    """
    ends = [v for v in (q.low, q.high, q.value, q.region.low, q.region.high) if math.isfinite(v)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = 0.15 * (high - low) or max(abs(low), 1) * 0.1
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(_EDGE + share * (width - 2 * _EDGE), 1)

    left, right, middle = at(q.region.low), at(q.region.high), _HEIGHT / 2
    marks = (
        f'<rect x="{left}" y="2" width="{max(1.0, right - left):.1f}" height="{_HEIGHT - 4}" fill="{_REGION}" '
        'fill-opacity="0.4"/>'
    )
    if math.isfinite(q.low) and math.isfinite(q.high):
        marks += (
            f'<line x1="{at(q.low)}" x2="{at(q.high)}" y1="{middle}" y2="{middle}" stroke="{_NUMBER}" '
            'stroke-width="3"/>'
        )
    if math.isfinite(q.value):
        marks += f'<circle cx="{at(q.value)}" cy="{middle}" r="4" fill="{_NUMBER}"/>'
    said = escape(f"{q.value:.3g}, interval {between(q.low, q.high)}, claimed {q.region}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" role="img" '
        f'aria-label="{said}">{marks}</svg>'
    )
