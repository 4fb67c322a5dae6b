"""Tuning of units to drawings: tuning curves, heat maps, invariances, preferred kinds."""

from circuits.tuning.finding import CurveUnit, JointTuning, find_curve_units, joint_tuning
from circuits.tuning.heatmaps import HeatMap, heat_map
from circuits.tuning.invariances import Invariance, invariance
from circuits.tuning.measures import Interval, TuningMeasures, measure_tuning
from circuits.tuning.preferring import Preference, preferences
from circuits.tuning.radial import RadialTuning, radial_tuning

__all__ = [
    "CurveUnit",
    "HeatMap",
    "Interval",
    "Invariance",
    "JointTuning",
    "Preference",
    "RadialTuning",
    "TuningMeasures",
    "find_curve_units",
    "heat_map",
    "invariance",
    "joint_tuning",
    "measure_tuning",
    "preferences",
    "radial_tuning",
]
