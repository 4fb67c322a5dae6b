"""Results as plots for the app. Zero is in the middle of every diverging scale."""

from circuits.plots.inline import histogram_html, kernels_html
from circuits.plots.interactive import (
    effects_chart,
    heat_map_chart,
    layers_chart,
    losses_chart,
    map_chart,
    matrix_chart,
    pattern_chart,
    predictions_chart,
    tuning_chart,
)

__all__ = [
    "effects_chart",
    "heat_map_chart",
    "histogram_html",
    "kernels_html",
    "layers_chart",
    "losses_chart",
    "map_chart",
    "matrix_chart",
    "pattern_chart",
    "predictions_chart",
    "tuning_chart",
]
