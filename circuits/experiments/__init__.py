"""Runs variants of a model over a task: outcomes, effects, and the random variants that effects are compared with."""

from circuits.experiments.outcomes import Effect, Outcomes, Record
from circuits.experiments.running import measures_of, run
from circuits.experiments.twins import N_RANDOM, Null, null_of
from circuits.experiments.variants import INTACT, Context, Variant

__all__ = [
    "INTACT",
    "N_RANDOM",
    "Context",
    "Effect",
    "Null",
    "Outcomes",
    "Record",
    "Variant",
    "measures_of",
    "null_of",
    "run",
]
