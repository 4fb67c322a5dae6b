"""Sparse autoencoders of a model's activations: training, evaluation against null models, and comparison."""

from circuits.sae.batches import ArrayRows, ModelRows, RowFilter, StoreRows
from circuits.sae.comparing import (
    Matching,
    Stability,
    known_dictionary,
    match,
    recovery,
    stability,
)
from circuits.sae.evaluations import as_evaluation, load_evaluation, save_evaluation
from circuits.sae.learners import Architecture, Hyperparameters
from circuits.sae.metrics import Metrics, reconstruction, rule_of, unseen
from circuits.sae.substitution import Behaviour, behaviour
from circuits.sae.training import Schedule, TrainingProgress, train

__all__ = [
    "Architecture",
    "ArrayRows",
    "Behaviour",
    "Hyperparameters",
    "Matching",
    "Metrics",
    "ModelRows",
    "RowFilter",
    "Schedule",
    "Stability",
    "StoreRows",
    "TrainingProgress",
    "as_evaluation",
    "behaviour",
    "known_dictionary",
    "load_evaluation",
    "match",
    "reconstruction",
    "recovery",
    "rule_of",
    "save_evaluation",
    "stability",
    "train",
    "unseen",
]
