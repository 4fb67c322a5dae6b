"""Results as plots for the app (layer 6). Zero is in the middle of every diverging scale."""

from circuits.plots.inline import histogram_html, kernels_html
from circuits.plots.interactive import (
    effects_figure,
    heat_map_figure,
    layers_figure,
    losses_figure,
    map_figure,
    matrix_figure,
    pattern_figure,
    predictions_figure,
    tuning_figure,
)

__all__ = [
    "effects_figure",
    "heat_map_figure",
    "histogram_html",
    "kernels_html",
    "layers_figure",
    "losses_figure",
    "map_figure",
    "matrix_figure",
    "pattern_figure",
    "predictions_figure",
    "tuning_figure",
]
