"""A workbench for reverse-engineering neural networks.

At the top are the types that everything takes and the verbs that most work begins with; the rest is found under its
domain, e.g. `circuits.edits.zero` or `circuits.sae.train`. Names and domains are imported when they are first used
(PEP 562), so that `import circuits` costs next to nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import (
        attribution,
        autoencoders,
        claims,
        cleanroom,
        concepts,
        discovery,
        edits,
        effects,
        equivariance,
        experiments,
        families,
        featurevis,
        figures,
        graph,
        harvesting,
        localization,
        models,
        sae,
        saliency,
        stimuli,
        store,
        tasks,
        transplant,
        tuning,
        unit_maps,
        weights,
    )
    from circuits.attribution.channels import attribute
    from circuits.attribution.results import Attribution
    from circuits.edits.ledger import Ledger
    from circuits.edits.recipes import Recipe, edited
    from circuits.edits.records import Edit
    from circuits.effects.measuring import measure
    from circuits.examples import Examples
    from circuits.experiments.ablation import ablate
    from circuits.experiments.patching import patch_paths
    from circuits.featurevis.render import visualize
    from circuits.graph.circuit import CircuitGraph
    from circuits.graph.store import GraphStore
    from circuits.harvesting.running import harvest
    from circuits.models.adapter.hooked_model import ActivationCache, HookedModel
    from circuits.models.adapter.inputs import ImageInput, TokenInput
    from circuits.models.zoo.loading import load_model
    from circuits.stimuli.sources import open_source
    from circuits.store.reading import ActivationStore
    from circuits.tasks.builtin import load_task
    from circuits.tasks.targets import Target
    from circuits.tasks.task import Task
    from circuits.tuning.measures import measure_tuning
    from circuits.units import Direction, Site, Unit
    from circuits.weights.expanded import expand_weights
    from circuits.workspace import Workspace

__version__ = "0.1.0"

# Where each name of the top is defined. It says again what is imported above: that is for type checkers, which cannot
# follow `__getattr__`. tests/test_start.py holds the two to each other.
_HOMES = {
    "ActivationCache": "models.adapter.hooked_model",
    "ActivationStore": "store.reading",
    "Attribution": "attribution.results",
    "CircuitGraph": "graph.circuit",
    "Direction": "units",
    "Edit": "edits.records",
    "Examples": "examples",
    "GraphStore": "graph.store",
    "HookedModel": "models.adapter.hooked_model",
    "ImageInput": "models.adapter.inputs",
    "Ledger": "edits.ledger",
    "Recipe": "edits.recipes",
    "Site": "units",
    "Target": "tasks.targets",
    "Task": "tasks.task",
    "TokenInput": "models.adapter.inputs",
    "Unit": "units",
    "Workspace": "workspace",
    "ablate": "experiments.ablation",
    "attribute": "attribution.channels",
    "edited": "edits.recipes",
    "expand_weights": "weights.expanded",
    "harvest": "harvesting.running",
    "load_model": "models.zoo.loading",
    "load_task": "tasks.builtin",
    "measure": "effects.measuring",
    "measure_tuning": "tuning.measures",
    "open_source": "stimuli.sources",
    "patch_paths": "experiments.patching",
    "visualize": "featurevis.render",
}

__all__ = [
    "ActivationCache",
    "ActivationStore",
    "Attribution",
    "CircuitGraph",
    "Direction",
    "Edit",
    "Examples",
    "GraphStore",
    "HookedModel",
    "ImageInput",
    "Ledger",
    "Recipe",
    "Site",
    "Target",
    "Task",
    "TokenInput",
    "Unit",
    "Workspace",
    "ablate",
    "attribute",
    "edited",
    "expand_weights",
    "harvest",
    "load_model",
    "load_task",
    "measure",
    "measure_tuning",
    "open_source",
    "patch_paths",
    "visualize",
]


def __getattr__(name: str) -> Any:
    """Import a name of the top, or a domain, when it is first used."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"circuits.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _domains():
        return importlib.import_module(f"circuits.{name}")
    raise AttributeError(f"module 'circuits' has no attribute {name!r}{_hint(name)}")


def _domains() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def _hint(name: str) -> str:
    """In which domain a name is that somebody looks for at the top."""
    if name.startswith("_"):
        return ""
    for domain in _domains():
        if name in getattr(importlib.import_module(f"circuits.{domain}"), "__all__", ()):
            return f"; it is circuits.{domain}.{name}"
    return ""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_domains()})
