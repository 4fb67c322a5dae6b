"""Results as figures (Vega-Lite, by Altair), for the app, for notebooks, and as PNG and SVG."""

from circuits.figures.activations import histogram_figure, spectrum_figure
from circuits.figures.attention import attention_figure, image_attention_figure
from circuits.figures.attributions import (
    attribution_figure,
    saliency_figure,
    sanity_figure,
)
from circuits.figures.charts import Figure
from circuits.figures.circuits import faithfulness_figure, series_figure
from circuits.figures.edits import ablation_figure, edit_figure
from circuits.figures.graphs import circuit_figure
from circuits.figures.localization import (
    head_effects_figure,
    heads_figure,
    lens_figure,
    lens_tokens_figure,
    patch_cells_figure,
    patch_grid_figure,
    readout_figure,
    sufficiency_figure,
)
from circuits.figures.predictions import losses_figure, predictions_figure
from circuits.figures.saving import check_figure_path, figure_bytes, save_figure
from circuits.figures.tunings import (
    heat_map_figure,
    invariance_figure,
    layers_figure,
    tuning_figure,
)
from circuits.figures.weights import (
    families_figure,
    family_figure,
    kernels_figure,
    map_picture,
    matrix_figure,
)

__all__ = [
    "Figure",
    "ablation_figure",
    "attention_figure",
    "attribution_figure",
    "check_figure_path",
    "circuit_figure",
    "edit_figure",
    "faithfulness_figure",
    "families_figure",
    "family_figure",
    "figure_bytes",
    "head_effects_figure",
    "heads_figure",
    "heat_map_figure",
    "histogram_figure",
    "image_attention_figure",
    "invariance_figure",
    "kernels_figure",
    "layers_figure",
    "lens_figure",
    "lens_tokens_figure",
    "losses_figure",
    "map_picture",
    "matrix_figure",
    "patch_cells_figure",
    "patch_grid_figure",
    "predictions_figure",
    "readout_figure",
    "saliency_figure",
    "sanity_figure",
    "save_figure",
    "series_figure",
    "spectrum_figure",
    "sufficiency_figure",
    "tuning_figure",
]
