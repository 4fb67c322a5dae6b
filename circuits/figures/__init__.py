"""Results as figures for paper, PNG and SVG."""

from circuits.figures.attention import attention_figure
from circuits.figures.attributions import (
    attribution_figure,
    saliency_figure,
    sanity_figure,
)
from circuits.figures.edits import ablation_figure, edit_figure
from circuits.figures.graphs import circuit_figure, family_figure, kernels_figure
from circuits.figures.localization import (
    head_effects_figure,
    heads_figure,
    lens_figure,
    lens_tokens_figure,
    patch_grid_figure,
    readout_figure,
    sufficiency_figure,
)
from circuits.figures.saving import check_figure_path, save_figure
from circuits.figures.tunings import (
    heat_map_figure,
    invariance_figure,
    spectrum_figure,
    tuning_figure,
)

__all__ = [
    "ablation_figure",
    "attention_figure",
    "attribution_figure",
    "check_figure_path",
    "circuit_figure",
    "edit_figure",
    "family_figure",
    "head_effects_figure",
    "heads_figure",
    "heat_map_figure",
    "invariance_figure",
    "kernels_figure",
    "lens_figure",
    "lens_tokens_figure",
    "patch_grid_figure",
    "readout_figure",
    "saliency_figure",
    "sanity_figure",
    "save_figure",
    "spectrum_figure",
    "sufficiency_figure",
    "tuning_figure",
]
