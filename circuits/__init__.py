"""A workbench for reverse-engineering neural networks."""

from circuits.attribution import (
    Attribution,
    Passes,
    Target,
    attribute,
    card,
    channel_groups,
    direct_logit_attribution,
    extremal,
    meaningful,
    parse_target,
    randomization_test,
    relevance,
    saliency,
)
from circuits.edits.activations import scale, zero
from circuits.edits.associative import associate, second_moment
from circuits.edits.attention import knock_out
from circuits.edits.ledger import Ledger
from circuits.edits.making import leace, means, patch, project_out, resample, steer
from circuits.edits.recipes import Recipe, bake, commute, diff, edited, save_baked
from circuits.edits.records import Edit, read_edit
from circuits.effects import EditReport, fine_tune, measure
from circuits.equivariance import Equivariance, equivariance
from circuits.examples import Examples
from circuits.experiments.ablation import ablate
from circuits.experiments.patching import patch_paths
from circuits.families import Family, find_families, measure_family
from circuits.featurevis import comparisons, objectives
from circuits.featurevis.embeddings import Dream, dream
from circuits.featurevis.natural import NaturalImages
from circuits.featurevis.objectives import Objective
from circuits.featurevis.pictures import Picture
from circuits.featurevis.reliability import Reliability, natural_responses, reliability
from circuits.featurevis.render import Settings, visualize, visualize_units
from circuits.featurevis.sheets import Sheet, render_sheet
from circuits.graph import CircuitGraph, GraphStore, UnitAt, UnitGroup
from circuits.graph.formats import read_circuit, write_circuit
from circuits.graph.saved import load_circuit, save_circuit
from circuits.harvesting import harvest
from circuits.localization import (
    attention_patterns,
    contrastive_directions,
    head_effects,
    keep_only,
    lens_tokens,
    linear_probes,
    logit_lens,
    patch_grid,
    path_grid,
    score_heads,
    steering_grid,
    sufficiency,
)
from circuits.models.adapter import ActivationCache, HookedModel
from circuits.models.inputs import ImageInput, TokenInput
from circuits.models.loading import load_model
from circuits.stimuli.datasets import from_dataset
from circuits.stimuli.images import read_image
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore, spectrum
from circuits.tasks import Task, compile_task
from circuits.tasks.builtin import load_task
from circuits.tuning import find_curve_units, heat_map, joint_tuning, measure_tuning, radial_tuning
from circuits.units import Direction, Site, Unit
from circuits.weights import (
    Connection,
    ExpandedWeights,
    Factors,
    LayerWeights,
    build_graph,
    direct_logits,
    expand_weights,
    factorize,
    incoming,
    neuron_directions,
    outgoing,
    ov_circuit,
    qk_circuit,
    raw_weights,
)  # fmt: skip
from circuits.workspace import Workspace

__all__ = [
    "ActivationCache",
    "ActivationStore",
    "Attribution",
    "CircuitGraph",
    "Connection",
    "Direction",
    "Dream",
    "Edit",
    "EditReport",
    "Equivariance",
    "Examples",
    "ExpandedWeights",
    "Factors",
    "Family",
    "GraphStore",
    "HookedModel",
    "ImageInput",
    "LayerWeights",
    "Ledger",
    "NaturalImages",
    "Objective",
    "Passes",
    "Picture",
    "Recipe",
    "Reliability",
    "Settings",
    "Sheet",
    "Site",
    "Target",
    "Task",
    "TokenInput",
    "Unit",
    "UnitAt",
    "UnitGroup",
    "Workspace",
    "ablate",
    "associate",
    "attention_patterns",
    "attribute",
    "bake",
    "build_graph",
    "card",
    "channel_groups",
    "commute",
    "comparisons",
    "compile_task",
    "contrastive_directions",
    "diff",
    "direct_logit_attribution",
    "direct_logits",
    "dream",
    "edited",
    "equivariance",
    "expand_weights",
    "extremal",
    "factorize",
    "find_curve_units",
    "find_families",
    "fine_tune",
    "from_dataset",
    "harvest",
    "head_effects",
    "heat_map",
    "incoming",
    "joint_tuning",
    "keep_only",
    "knock_out",
    "leace",
    "lens_tokens",
    "linear_probes",
    "load_circuit",
    "load_model",
    "load_task",
    "logit_lens",
    "meaningful",
    "means",
    "measure",
    "measure_family",
    "measure_tuning",
    "natural_responses",
    "neuron_directions",
    "objectives",
    "open_source",
    "outgoing",
    "ov_circuit",
    "parse_target",
    "patch",
    "patch_grid",
    "patch_paths",
    "path_grid",
    "project_out",
    "qk_circuit",
    "radial_tuning",
    "randomization_test",
    "raw_weights",
    "read_circuit",
    "read_edit",
    "read_image",
    "read_labels",
    "relevance",
    "reliability",
    "render_sheet",
    "resample",
    "saliency",
    "save_baked",
    "save_circuit",
    "scale",
    "score_heads",
    "second_moment",
    "spectrum",
    "steer",
    "steering_grid",
    "sufficiency",
    "visualize",
    "visualize_units",
    "write_circuit",
    "zero",
]
