"""A workbench for reverse-engineering neural networks."""

from circuits.edits.effects import EditReport, measure
from circuits.edits.operators import scale, zero
from circuits.edits.recipes import Recipe, edited
from circuits.featurevis import comparisons, objectives
from circuits.featurevis.embeddings import Dream, dream
from circuits.featurevis.natural import NaturalImages
from circuits.featurevis.objectives import Objective
from circuits.featurevis.pictures import Picture
from circuits.featurevis.reliability import Reliability, natural_responses, reliability
from circuits.featurevis.render import Settings, visualize, visualize_units
from circuits.featurevis.sheets import Sheet, render_sheet
from circuits.harvesting import Inputs, harvest
from circuits.models.adapter import ActivationCache, HookedModel
from circuits.models.inputs import ImageInput, TokenInput
from circuits.models.loading import load_model
from circuits.stimuli.datasets import from_dataset
from circuits.stimuli.images import read_image
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore
from circuits.units import Direction, Site, Unit
from circuits.weights import Connection, incoming, outgoing
from circuits.workspace import Workspace

__all__ = [
    "ActivationCache",
    "ActivationStore",
    "Connection",
    "Direction",
    "Dream",
    "EditReport",
    "HookedModel",
    "ImageInput",
    "Inputs",
    "NaturalImages",
    "Objective",
    "Picture",
    "Recipe",
    "Reliability",
    "Settings",
    "Sheet",
    "Site",
    "TokenInput",
    "Unit",
    "Workspace",
    "comparisons",
    "dream",
    "edited",
    "from_dataset",
    "harvest",
    "incoming",
    "load_model",
    "measure",
    "natural_responses",
    "objectives",
    "open_source",
    "outgoing",
    "read_image",
    "reliability",
    "render_sheet",
    "scale",
    "visualize",
    "visualize_units",
    "zero",
]
