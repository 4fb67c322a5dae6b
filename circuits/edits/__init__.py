"""Edits of a model's activations and weights: operators, recipes and the ledger."""

from circuits.edits.activations import scale, zero
from circuits.edits.associative import associate, second_moment
from circuits.edits.attention import knock_out
from circuits.edits.estimation import (
    leace,
    means,
    patch,
    project_out,
    resample,
    steer,
    transplant,
)
from circuits.edits.ledger import Ledger
from circuits.edits.recipes import Recipe, bake, commute, diff, edited, save_baked
from circuits.edits.records import Edit, read_edit

__all__ = [
    "Edit",
    "Ledger",
    "Recipe",
    "associate",
    "bake",
    "commute",
    "diff",
    "edited",
    "knock_out",
    "leace",
    "means",
    "patch",
    "project_out",
    "read_edit",
    "resample",
    "save_baked",
    "scale",
    "second_moment",
    "steer",
    "transplant",
    "zero",
]
