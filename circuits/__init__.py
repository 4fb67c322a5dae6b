"""A workbench for reverse-engineering neural networks."""

from circuits.edits.effects import EditReport, measure
from circuits.edits.operators import scale, zero
from circuits.edits.recipes import Recipe, edited
from circuits.featurevis.render import Picture, visualize, visualize_units
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
    "EditReport",
    "HookedModel",
    "ImageInput",
    "Inputs",
    "Picture",
    "Recipe",
    "Site",
    "TokenInput",
    "Unit",
    "Workspace",
    "edited",
    "from_dataset",
    "harvest",
    "incoming",
    "load_model",
    "measure",
    "open_source",
    "outgoing",
    "read_image",
    "scale",
    "visualize",
    "visualize_units",
    "zero",
]
