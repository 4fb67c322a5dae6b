"""Behaviours as data: inputs and counterparts, the positions that count, answers, and what is measured."""

from circuits.tasks.compiling import compile_task
from circuits.tasks.items import Item
from circuits.tasks.metrics import METRICS, Custom, Metric, UnitActivation, as_metric
from circuits.tasks.prompts import task_of_prompts
from circuits.tasks.task import Question, Task, next_tokens, of_examples

__all__ = [
    "METRICS",
    "Custom",
    "Item",
    "Metric",
    "Question",
    "Task",
    "UnitActivation",
    "as_metric",
    "compile_task",
    "next_tokens",
    "of_examples",
    "task_of_prompts",
]
