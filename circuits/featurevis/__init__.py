"""Feature visualization: images that excite units, and how far each is to be trusted."""

from circuits.featurevis import comparisons, objectives
from circuits.featurevis.badges import Reliability, natural_responses, reliability
from circuits.featurevis.embeddings import Dream, dream
from circuits.featurevis.natural import NaturalImages
from circuits.featurevis.objectives import Objective
from circuits.featurevis.pictures import Picture
from circuits.featurevis.render import Settings, visualize, visualize_units
from circuits.featurevis.sheets import Sheet, render_sheet

__all__ = [
    "Dream",
    "NaturalImages",
    "Objective",
    "Picture",
    "Reliability",
    "Settings",
    "Sheet",
    "comparisons",
    "dream",
    "natural_responses",
    "objectives",
    "reliability",
    "render_sheet",
    "visualize",
    "visualize_units",
]
