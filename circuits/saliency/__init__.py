"""Saliency: which pixels of the input a model's output depends on, and how far such a map can be trusted."""

from circuits.saliency.cards import MethodCard, card
from circuits.saliency.faithfulness import (
    agreement,
    infidelity,
    insertion_deletion,
    road,
    sensitivity_n,
)
from circuits.saliency.maps import METHODS, saliency_map
from circuits.saliency.perturbations import Perturbation, extremal, extremal_channels, meaningful
from circuits.saliency.sanity import RandomizationTest, label_test, randomization_test

__all__ = [
    "METHODS",
    "MethodCard",
    "Perturbation",
    "RandomizationTest",
    "agreement",
    "card",
    "extremal",
    "extremal_channels",
    "infidelity",
    "insertion_deletion",
    "label_test",
    "meaningful",
    "randomization_test",
    "road",
    "saliency_map",
    "sensitivity_n",
]
