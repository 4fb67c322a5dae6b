"""Transplants: a family of one network in the place of another's."""

from circuits.transplant.grafts import Graft, Tuned, UnitMatch, grafted, match_and_fit, match_angles
from circuits.transplant.measuring import Condition, TransplantReport, measure_transplant

__all__ = [
    "Condition",
    "Graft",
    "TransplantReport",
    "Tuned",
    "UnitMatch",
    "grafted",
    "match_and_fit",
    "match_angles",
    "measure_transplant",
]
