"""Which units, and which parts of the input, are responsible for what a model does (layer 4)."""

from circuits.attribution.cards import MethodCard, card
from circuits.attribution.channels import attribute
from circuits.attribution.faithfulness import (
    agreement,
    infidelity,
    insertion_deletion,
    road,
    sensitivity_n,
)
from circuits.attribution.groups import ChannelGroups, channel_groups
from circuits.attribution.logits import LogitParts, direct_logit_attribution
from circuits.attribution.passes import Passes
from circuits.attribution.perturbations import Perturbation, extremal, extremal_channels, meaningful
from circuits.attribution.relevance import relevance
from circuits.attribution.results import AblationCheck, Attribution
from circuits.attribution.saliency import METHODS, saliency
from circuits.attribution.sanity import RandomizationTest, label_test, randomization_test
from circuits.tasks.targets import Target, parse_target

__all__ = [
    "METHODS",
    "AblationCheck",
    "Attribution",
    "ChannelGroups",
    "LogitParts",
    "MethodCard",
    "Passes",
    "Perturbation",
    "RandomizationTest",
    "Target",
    "agreement",
    "attribute",
    "card",
    "channel_groups",
    "direct_logit_attribution",
    "extremal",
    "extremal_channels",
    "infidelity",
    "insertion_deletion",
    "label_test",
    "meaningful",
    "parse_target",
    "randomization_test",
    "relevance",
    "road",
    "saliency",
    "sensitivity_n",
]
