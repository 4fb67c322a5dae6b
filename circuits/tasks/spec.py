"""How a task is made, as data: whoever keeps it can make the task again, or the same task of other examples."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from circuits.examples import How
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.specs import normal_data
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import Source, open_source
from circuits.tasks.builtin import load_task, named_metric, paired_with, with_counterparts
from circuits.tasks.contrasts import class_against_class, most_active
from circuits.tasks.images import Kind
from circuits.tasks.task import Task


@dataclass(frozen=True)
class TaskSpec:
    """How a task is made.

    Attributes:
        spec: the task's name or file, as `load_task` takes it; empty for what the data states, or the model's own.
        examples: how many examples are drawn for both halves.
        seed: of the examples and of their halves.
        metric: the metric, or a unit `SITE:INDEX`; the task's own if empty.
        data: the data of tasks that need some.
        text: one text instead.
        take: how examples of the data are chosen.
        labels: of images: a file with the class of each, or `names`; what the data itself says if empty.
        counterpart: of images without counterparts: what their counterparts are made of; none if empty.
        counterparts: of images without counterparts: where theirs lie.
        one_class: of images: the class, or classes, that are told apart from `other_class`.
        other_class: the class or classes that they are told apart from.
        most_active: of images and a unit: how many that activate it most are taken; all if 0.
    """

    spec: str = ""
    examples: int = 200
    seed: int = 0
    metric: str = ""
    data: str = ""
    text: str = ""
    take: How = "spread"
    labels: str = ""
    counterpart: Kind | None = None
    counterparts: str = ""
    one_class: str = ""
    other_class: str = ""
    most_active: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What is not as by default, as JSON has it, with the number of examples and the seed."""
        usual, always = TaskSpec(), ("examples", "seed")
        return {k: v for k, v in asdict(self).items() if k in always or v != getattr(usual, k)}

    @property
    def names(self) -> dict[str, str]:
        """What it opens, by what that is. If it is from a file, each goes through `from_file` before `compile`."""
        return {
            "task": self.spec, "data": self.data, "counterparts": self.counterparts, "labels": self.labels,
        }  # fmt: skip

    def compile(self, model: HookedModel, folder: Path = Path()) -> Task:
        """The task for a model, which says how it was made.

        Args:
            model: the model.
            folder: where a file of labels is looked for.

        Raises:
            KeyError: if there is no such task, metric or class.
            FileNotFoundError: if a file does not exist.
            ValueError: if what is given does not go together, or does not fit the model.
        """
        source = open_source(self.data) if self.data else None
        make = self._compared if self.one_class or self.other_class else self._plain
        task = make(model, source, folder)
        return replace(task, spec=self._with_whole_paths(folder).to_dict())

    def _with_whole_paths(self, folder: Path) -> TaskSpec:
        """The same, with files that are found from anywhere, by whoever makes the task again."""
        spec, labels = self.spec, self.labels
        if Path(spec).suffix and os.path.isfile(spec):
            spec = str(Path(spec).resolve())
        if labels not in ("", "names"):
            labels = str((folder / labels).resolve())
        return replace(
            self, spec=spec, labels=labels, data=normal_data(self.data), counterparts=normal_data(self.counterparts)
        )  # fmt: skip

    def _plain(self, model: HookedModel, source: Source | None, folder: Path) -> Task:
        task = load_task(
            model, self.spec, n=self.examples, seed=self.seed, how=self.take, data=source or "",
            texts=[self.text] if self.text else (), metric=self.metric,
            labels=self._labels(model, source, self.labels, folder),
        )  # fmt: skip
        if self.most_active:
            task = most_active(task, self.most_active)
        if self.counterpart is not None and self.counterparts:
            raise ValueError(
                f"counterparts {self.counterparts!r} do not go with counterpart {self.counterpart}"
            )
        if self.counterparts:
            return paired_with(task, self.counterparts)
        return (
            task
            if self.counterpart is None
            else with_counterparts(task, self.counterpart, self.seed)
        )

    def _compared(self, model: HookedModel, source: Source | None, folder: Path) -> Task:
        if source is None or not (self.one_class and self.other_class):
            raise ValueError(
                f"one_class {self.one_class!r}, other_class {self.other_class!r}: expected both classes, and data with "
                "images of them"
            )
        labels = self._labels(model, source, self.labels or "names", folder) or []
        task = class_against_class(
            model, source, labels, self.one_class, self.other_class, n=self.examples, seed=self.seed
        )
        return task.with_metric(named_metric(model, self.metric)) if self.metric else task

    def _labels(
        self, model: HookedModel, source: Source | None, labels: str, folder: Path
    ) -> list[int] | None:
        if not labels:
            return None
        if source is None or not isinstance(model.input, ImageInput):
            raise ValueError(f"labels {labels!r} are of images: expected data with images")
        return read_labels(source, model.classes, None if labels == "names" else folder / labels)
