"""Localizing a behaviour: which activations carry it, which suffice for it, and where it can be read off."""

from circuits.localization.attention import (
    AttentionPatterns,
    HeadPattern,
    attention_patterns,
    shown_pattern,
)
from circuits.localization.cells import Cell, GridPosition
from circuits.localization.copying import Copying, copying_heads
from circuits.localization.direct import DirectEffects, direct_effects
from circuits.localization.grids import CellEffect, GridSide, PatchGrid
from circuits.localization.heads import HeadScore, HeadScores, score_heads
from circuits.localization.lens import Depth, Lens, LensTokens, lens_tokens, logit_lens
from circuits.localization.looks import (
    ImageAttention,
    Look,
    UnplacedPattern,
    image_attention,
    query_names,
)
from circuits.localization.patching import patch_grid
from circuits.localization.paths import HeadEffect, HeadEffects, PathCell, head_effects, path_grid
from circuits.localization.probing import contrastive_directions, linear_probes
from circuits.localization.readouts import Readout, Readouts
from circuits.localization.roles import HeadTest, RoleTests, judge_heads
from circuits.localization.steering import steering_grid
from circuits.localization.subsets import Sufficiency, keep_only, sufficiency

__all__ = [
    "AttentionPatterns",
    "Cell",
    "CellEffect",
    "Copying",
    "Depth",
    "DirectEffects",
    "GridPosition",
    "GridSide",
    "HeadEffect",
    "HeadEffects",
    "HeadPattern",
    "HeadScore",
    "HeadScores",
    "HeadTest",
    "ImageAttention",
    "Lens",
    "LensTokens",
    "Look",
    "PatchGrid",
    "PathCell",
    "Readout",
    "Readouts",
    "RoleTests",
    "Sufficiency",
    "UnplacedPattern",
    "attention_patterns",
    "contrastive_directions",
    "copying_heads",
    "direct_effects",
    "head_effects",
    "image_attention",
    "judge_heads",
    "keep_only",
    "lens_tokens",
    "linear_probes",
    "logit_lens",
    "patch_grid",
    "path_grid",
    "query_names",
    "score_heads",
    "shown_pattern",
    "steering_grid",
    "sufficiency",
]
