"""Attribution: which units are responsible for a model's output."""

from circuits.attribution.channels import attribute
from circuits.attribution.groups import ChannelGroups, channel_groups
from circuits.attribution.logits import LogitParts, direct_logit_attribution
from circuits.attribution.lrp import relevance
from circuits.attribution.passes import Passes
from circuits.attribution.results import AblationCheck, Attribution
from circuits.tasks.targets import Target, parse_target

__all__ = [
    "AblationCheck",
    "Attribution",
    "ChannelGroups",
    "LogitParts",
    "Passes",
    "Target",
    "attribute",
    "channel_groups",
    "direct_logit_attribution",
    "parse_target",
    "relevance",
]
