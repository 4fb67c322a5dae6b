"""The effects of edits: on target, off target, and compared with random edits and fine-tuning."""

from circuits.effects.finetuning import FineTuned, fine_tune
from circuits.effects.measuring import measure
from circuits.effects.predicting import Prediction, predictions, token_losses
from circuits.effects.reports import EditReport, Norm, TuningChange

__all__ = [
    "EditReport",
    "FineTuned",
    "Norm",
    "Prediction",
    "TuningChange",
    "fine_tune",
    "measure",
    "predictions",
    "token_losses",
]
