"""Colours of plots."""

from __future__ import annotations

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # distinct to colour-blind eyes
