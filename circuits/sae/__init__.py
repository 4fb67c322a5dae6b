"""Sparse autoencoders of a model's activations: training, measures, names, bottlenecks (layer 5)."""

from circuits.sae.batches import ArrayRows, ModelRows, RowFilter, StoreRows
from circuits.sae.behaviour import Behaviour, behaviour
from circuits.sae.bottleneck import (
    Bottleneck,
    Intervention,
    as_recipe,
    intervene,
    suspects,
    train_bottleneck,
)
from circuits.sae.comparing import (
    Matching,
    Stability,
    known_dictionary,
    match,
    recovery,
    stability,
)
from circuits.sae.dissecting import Dissection, dissect
from circuits.sae.evaluations import as_evaluation, load_evaluation, save_evaluation
from circuits.sae.learners import Architecture, Hyperparameters
from circuits.sae.metrics import Metrics, reconstruction, rule_of, unseen
from circuits.sae.naming import (
    Name,
    Naming,
    call,
    history,
    name_by_attributes,
    name_by_text,
    names_of,
    save_names,
)
from circuits.sae.pooling import pooled
from circuits.sae.probing import Probe, probe
from circuits.sae.training import Schedule, TrainingProgress, train

__all__ = [
    "Architecture",
    "ArrayRows",
    "Behaviour",
    "Bottleneck",
    "Dissection",
    "Hyperparameters",
    "Intervention",
    "Matching",
    "Metrics",
    "ModelRows",
    "Name",
    "Naming",
    "Probe",
    "RowFilter",
    "Schedule",
    "Stability",
    "StoreRows",
    "TrainingProgress",
    "as_evaluation",
    "as_recipe",
    "behaviour",
    "call",
    "dissect",
    "history",
    "intervene",
    "known_dictionary",
    "load_evaluation",
    "match",
    "name_by_attributes",
    "name_by_text",
    "names_of",
    "pooled",
    "probe",
    "reconstruction",
    "recovery",
    "rule_of",
    "save_evaluation",
    "save_names",
    "stability",
    "suspects",
    "train",
    "train_bottleneck",
    "unseen",
]  # fmt: skip
