"""Tasks: a behaviour as data. A task holds clean inputs, corrupted counterparts, counted positions and answers.

Every measure that depends on what a model is meant to do takes a `Task`. A measure is averaged over each example's
counted positions first, then over examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.checks import clipped
from circuits.examples import BATCH, Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.tasks.halves import LEAST, halves
from circuits.tasks.metrics import (
    Metric,
    cross_entropy,
    kl,
    log_probability_difference,
    logit_difference,
)
from circuits.tasks.reading import Places
from circuits.tasks.schema import Feeding

Half = Literal["all", "find", "test"]
"""Which part of a task's examples this is. A search sees only the `find` half; an evaluation sees only `test`."""


@dataclass(frozen=True)
class Question:
    """What one example asks of the model.

    Attributes:
        positions: the counted positions, from 0. None counts every position at which the model gives an output (one
            for an image classifier).
        answers: the tokens of each answer (for images, one class each). Any of them counts as right.
        against: the wrong answers that they are compared with, in the same form.
        labels: used instead of answers: the one right token at each counted position.
        group: the template instance that the example belongs to.
        fillers: the words that fill the template.
        spans: named parts of the input, as start and stop in tokens.
        template: the template's name.
    """

    positions: tuple[int, ...] | None = None
    answers: tuple[tuple[int, ...], ...] = ()
    against: tuple[tuple[int, ...], ...] = ()
    labels: tuple[int, ...] | None = None
    group: str = ""
    fillers: tuple[str, ...] = ()
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    template: str = ""


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Some of a task's examples, as the model runs them.

    Attributes:
        inputs: as the model takes them. An answer of several tokens has a row of its own.
        mask: True at tokens, False at padding; None if nothing was padded.
        counterparts: the counterpart of each row, of the same shape; None if the task has none.
        which: the indices of the batch's examples in the task.
        rows: the example of each row, as an index into the batch.
    """

    inputs: Tensor
    mask: Bool[Tensor, "row position"] | None
    counterparts: Tensor | None
    which: Sequence[int]
    rows: Int[Tensor, " row"]
    _places: Places | None
    _labels: Tensor | None
    _against: Tensor | None = None

    def __len__(self) -> int:
        return len(self.which)

    def places(self, n_positions: int) -> Places:
        """Where the batch is read, given the number of positions at which the model gives an output.

        Raises:
            ValueError: if the model gives an output at several positions of an image that has one label.
        """
        if self._places is not None:
            return self._places
        # Only images get here: how many positions an image model has (one for a classifier, h x w for a segmenter)
        # is not known before it has run.
        labels = self._labels
        if labels is not None and labels.shape[1] and n_positions > 1:
            raise ValueError(
                f"labels: there is one for each example, but the model gives {n_positions} outputs per example"
            )
        n = len(self.inputs)
        row = torch.arange(n).repeat_interleave(n_positions)
        none = torch.zeros(len(row), 0, dtype=torch.int64)
        wanted = none if labels is None or not labels.shape[1] else labels
        against = none if self._against is None or n_positions > 1 else self._against
        return Places(
            row, torch.arange(n_positions).repeat(n), self.rows[row], wanted, against, none.new_zeros(0), len(self)
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Task:
    """A behaviour of a model.

    Attributes:
        name: the task's name.
        examples: the clean inputs.
        questions: what each example asks.
        counterparts: the corrupted input of each example, of the same length; None if there are none.
        metric: what is measured unless a caller asks for another metric.
        feeding: how answers are read.
        seed: seed of the split into halves.
        half: which part of the task this is.
        about: one sentence on what the model does.
        left_out: what was left out, by reason.
        split: the half that each example is in. A subset inherits it from the whole task, so that no example that a
            search saw can end up in the test half of another subset. None: it is drawn when a half is asked for.
        spec: how it can be made again, as `TaskSpec.to_dict` gives it; empty if that is not known.
    """

    name: str
    examples: Examples
    questions: tuple[Question, ...]
    metric: Metric
    counterparts: Examples | None = None
    feeding: Feeding = "one"
    seed: int = 0
    half: Half = "all"
    about: str = ""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: tuple[Literal["find", "test", "neither"], ...] | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.examples)
        if len(self.questions) != n:
            raise ValueError(
                f"questions of task {self.name}: there are {len(self.questions)} for {n} examples, expected one each"
            )
        if self.counterparts is not None and len(self.counterparts) != n:
            raise ValueError(
                f"counterparts of task {self.name}: there are {len(self.counterparts)} for {n} examples, expected one "
                "each"
            )
        check_metric(self, self.metric)
        if isinstance(self.model.input, TokenInput):
            self._check_tokens()

    def _check_tokens(self) -> None:
        for i, question in enumerate(self.questions):
            length, name = len(self.examples.load(i)), self.examples.names[i]
            if question.positions is None or not question.positions:
                raise ValueError(
                    f"positions of {name!r} in task {self.name} are empty: expected at least one"
                )
            far = [p for p in question.positions if not 0 <= p < length]
            if far:
                raise ValueError(
                    f"position {far[0]} of {name!r} in task {self.name}: expected 0 to {length - 1}"
                )
            if question.labels is not None and len(question.labels) != len(question.positions):
                raise ValueError(
                    f"labels of {name!r} in task {self.name}: there are {len(question.labels)} for "
                    f"{len(question.positions)} counted positions, expected one each"
                )
            if self.counterparts is not None and len(self.counterparts.load(i)) != length:
                raise ValueError(
                    f"counterpart of {name!r} in task {self.name} has {len(self.counterparts.load(i))} tokens: "
                    f"expected {length}, the length of the clean text"
                )

    # --- what it is ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        """Counts, the metric and one example, in two lines."""
        n, groups, spec = len(self), len(set(self.clusters)), self.model.input
        of = f"{n} example{'s' * (n != 1)}" + (f" in {groups} groups" if groups != n else "")
        half = "" if self.half == "all" else f", {self.half} half"
        pairs = "no counterparts" if self.counterparts is None else "with counterparts"
        unit = f" ({self.metric.unit})" if self.metric.unit else ""
        first, shown = self.questions[0], [clipped(self.examples.names[0])]
        if isinstance(spec, TokenInput):
            both = [self.examples, *([] if self.counterparts is None else [self.counterparts])]
            texts = [repr("".join(map(spec.word, some.tokens(0)))) for some in both]
            shown = [" / ".join(map(clipped, texts))]
        for name, words in (("answer", first.answers), ("against", first.against)):
            if words and isinstance(spec, TokenInput):
                said = "|".join("".join(map(spec.word, tokens)) for tokens in words)
                shown.append(f"{name} {clipped(said)!r}")
            elif words:
                names = (self.model.classes[t] if self.model.classes else str(t) for t, *_ in words)
                shown.append(f"{name} {clipped('|'.join(names))}")
        head = f"Task {self.name!r} of {self.model.name}: {of}{half}, {pairs}, by {self.metric.name}{unit}"
        return f"{head}\n  e.g. {'; '.join(shown)}"

    @property
    def model(self) -> HookedModel:
        """The model that the task was made for."""
        return self.examples.model

    @property
    def answered(self) -> bool:
        """Whether every example has an answer."""
        return all(q.answers or q.labels is not None for q in self.questions)

    @property
    def compared(self) -> bool:
        """Whether every example has wrong answers to compare the right ones with."""
        return all(q.against for q in self.questions)

    @cached_property
    def clusters(self) -> tuple[int, ...]:
        """A cluster number for each example; those of one template instance or one photograph share it, not being
        independent."""
        # An example without a group is a cluster of its own: the NUL keeps its key apart from every group's name.
        known: dict[str, int] = {}
        return tuple(
            known.setdefault(q.group or self.examples.group(i) or f"\0{i}", len(known))
            for i, q in enumerate(self.questions)
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of all inputs, counterparts, questions and the metric."""
        digest = hashlib.sha256(f"{self.metric.name}|{self.feeding}".encode())
        for i, question in enumerate(self.questions):
            digest.update(repr((question, self.examples.identity(i))).encode())
            if self.counterparts is not None:
                digest.update(self.counterparts.identity(i).encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The task's record in JSON reports."""
        return {
            "task": self.name, "about": self.about, "metric": self.metric.name, "half": self.half,
            "answers": self.feeding, "split_seed": self.seed, "task_hash": self.hash,
            "examples": self.examples.describe(),
            "counterparts": None if self.counterparts is None else self.counterparts.describe(),
            "left_out": {reason: len(names) for reason, names in self.left_out.items()},
        }  # fmt: skip

    def with_metric(self, metric: Metric) -> Task:
        """The same task with another metric.

        Raises:
            ValueError: if the metric needs something that the task does not have.
        """
        return replace(self, metric=metric)

    # --- parts -----------------------------------------------------------------------------------

    def subset(self, which: Sequence[int], half: Half | None = None) -> Task:
        """The task with only some of its examples, by index."""
        other = self.counterparts
        # The split is made before examples are taken away, so that each keeps the half that it has in the whole task.
        try:
            split = self._halves
        except (
            ValueError
        ):  # too few examples to split: asking the subset for a half raises the error
            split = None
        return replace(
            self, examples=self.examples.subset(which), half=half or self.half,
            questions=tuple(self.questions[i] for i in which),
            counterparts=None if other is None else other.subset(which),
            split=None if split is None else tuple(split[i] for i in which),
        )  # fmt: skip

    def _partners(self, place: int) -> tuple[str, ...]:
        """Of images: what ties an example to the one that is its counterpart, so that both are in one half."""
        if self.counterparts is None or not isinstance(self.model.input, ImageInput):
            return ()
        own, theirs = self.examples.identity(place), self.counterparts.identity(place)
        return tuple(f"image {name}" for name in (own, theirs) if name in self._images)

    @cached_property
    def _images(self) -> frozenset[str]:
        return frozenset(map(self.examples.identity, range(len(self))))

    @cached_property
    def _halves(self) -> tuple[Literal["find", "test", "neither"], ...]:
        """The half of each example; `neither` for examples that would tie the two halves together."""
        if self.split is not None:
            return self.split
        keys = [
            (
                q.group or self.examples.group(i) or self.examples.identity(i),
                *q.fillers,
                *self._partners(i),
            )
            for i, q in enumerate(self.questions)
        ]
        of: dict[int, Literal["find", "test"]] = {}
        for half, places in halves(keys, self.seed).items():
            of |= dict.fromkeys(places, half)
        return tuple(of.get(i, "neither") for i in range(len(keys)))

    @property
    def find(self) -> Task:
        """The half that searching, fitting and choosing may use.

        Raises:
            ValueError: if this is the test half, or there are too few examples to split.
        """
        return self._half("find")

    @property
    def test(self) -> Task:
        """The half that results are evaluated on; no search may use it.

        Raises:
            ValueError: if this is the find half, or there are too few examples to split.
        """
        return self._half("test")

    def _half(self, half: Literal["find", "test"]) -> Task:
        if self.half == half:
            return self
        if self.half != "all":
            raise ValueError(
                f"task {self.name} is already the {self.half} half: take the {half} half of the whole task"
            )
        places = [i for i, own in enumerate(self._halves) if own == half]
        if len(places) < LEAST:
            raise ValueError(
                f"{len(places)} of the {len(self)} examples of task {self.name} are in the {half} half: expected at "
                f"least {LEAST}"
            )
        return self.subset(places, half)

    # --- running ---------------------------------------------------------------------------------

    def batches(self, size: int = BATCH, one_length: bool = False) -> Iterator[TaskBatch]:
        """All examples in batches of at most `size`, in the order of `Examples.batches`."""
        if size < 1:
            raise ValueError(f"batch {size} must be at least 1")
        # A batch of fed answers is padded as a whole, so it takes the examples in the task's own order.
        if self.feeding == "fed":
            for start in range(0, len(self), size):
                yield self._fed_batch(range(start, min(start + size, len(self))))
            return
        for batch in self.examples.batches(size, one_length):
            other = None
            if self.counterparts is not None:
                other = self.counterparts.batch(batch.which).inputs
            places, labels = self._places_of(batch.which, batch.mask)
            against = None
            if not isinstance(self.model.input, TokenInput):
                against = _table([[a[0] for a in self.questions[i].against] for i in batch.which])
            yield TaskBatch(
                batch.inputs,
                batch.mask,
                other,
                batch.which,
                torch.arange(len(batch)),
                places,
                labels,
                against,
            )

    def _places_of(
        self, which: Sequence[int], mask: Tensor | None
    ) -> tuple[Places | None, Tensor | None]:
        """Where some examples are read; for images only their labels, since the positions are not known yet."""
        questions = [self.questions[i] for i in which]
        if not isinstance(self.model.input, TokenInput):
            given = [[a[0] for a in q.answers] for q in questions]
            return None, _table(given)
        # Positions count from each text's first token, which padding on the left moves to the right.
        first = [0] * len(questions) if mask is None else mask.int().argmax(1).tolist()
        row, position, example, wanted, against = [], [], [], [], []
        for i, question in enumerate(questions):
            assert question.positions is not None, "checked when built"
            for k, at in enumerate(question.positions):
                row.append(i)
                position.append(at + first[i])
                example.append(i)
                label = None if question.labels is None else [question.labels[k]]
                wanted.append(label or [a[0] for a in question.answers])
                against.append([a[0] for a in question.against])
        places = Places(
            torch.tensor(row), torch.tensor(position), torch.tensor(example), _table(wanted), _table(against),
            torch.zeros(0, dtype=torch.int64), len(questions),
        )  # fmt: skip
        return places, None

    def _fed_batch(self, which: range) -> TaskBatch:
        """A batch with a row for each answer of several tokens, into which all of its tokens but the last are fed."""
        # With the prompt ending at position s, the logits at s + j predict the answer's token j given tokens 0 to
        # j - 1 (teacher forcing), so log p(answer) is the sum of log p(token j at s + j), one place for each token.
        # The counterpart's row is fed the same answer, so that both rows have the same shape.
        rows, others, side, example = [], [], [], []
        place: list[tuple[int, int, int, int]] = []
        for k, i in enumerate(which):
            question, prompt = self.questions[i], self.examples.load(i)
            assert question.positions is not None, "checked when built"
            start = question.positions[0]
            for own, answers in ((1, question.answers), (0, question.against)):
                for answer in answers:
                    end = torch.tensor(answer[:-1], dtype=prompt.dtype)
                    place += [(len(rows), start + j, k, token) for j, token in enumerate(answer)]
                    rows.append(torch.cat([prompt[: start + 1], end]))
                    if self.counterparts is not None:
                        others.append(torch.cat([self.counterparts.load(i)[: start + 1], end]))
                    side.append(own)
                    example.append(k)
        inputs, mask = self.model.pad(rows)
        first = mask.int().argmax(1)
        row, position, of, token = (torch.tensor(column) for column in zip(*place, strict=True))
        # `side` says of each row whether it is a right or a wrong answer, so both columns hold the row's own token.
        places = Places(
            row, position + first[row], of, token[:, None], token[:, None], torch.tensor(side), len(which)
        )  # fmt: skip
        other = self.model.pad(others)[0] if others else None
        return TaskBatch(inputs, mask, other, which, torch.tensor(example), places, None)


def _table(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row column"]:
    """Rows of different lengths as one table, filled up with -1."""
    width = max((len(r) for r in rows), default=0)
    made = torch.full((len(rows), width), -1, dtype=torch.int64)
    for i, row in enumerate(rows):
        made[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return made


def check_metric(task: Task, metric: Metric) -> None:
    """Raise ValueError if a metric needs something that a task does not have."""
    if "answers" in metric.needs and not task.answered:
        raise ValueError(
            f"metric {metric.name} needs answers, which task {task.name} does not have"
        )
    # Whether an answer of several tokens is the model's first choice among all texts cannot be read from one pass;
    # whether it is more probable than the wrong answers can. So the accuracy of fed answers needs wrong answers.
    compared = "against" in metric.needs or (metric.name == "accuracy" and task.feeding == "fed")
    if compared and not task.compared:
        raise ValueError(
            f"metric {metric.name} needs wrong answers to compare with, which task {task.name} does not have "
            "(--against)"
        )
    if "one_token" in metric.needs and task.feeding == "fed":
        raise ValueError(
            f"metric {metric.name} needs answers of one token, but those of task {task.name} have several (use "
            "log_probability_difference, or feeding 'first', which compares the first token that differs)"
        )
    if "rows" in metric.needs and task.feeding == "fed":
        raise ValueError(
            f"metric {metric.name} reads one row per example, but task {task.name} has a row for each answer of "
            "several tokens"
        )


def of_examples(examples: Examples, name: str = "") -> Task:
    """The task that follows from examples alone.

    For texts it is predicting the next token at every position but the last; for images with labels, the class. Images
    without labels have no right answer: the metric is then the KL divergence from the intact model's prediction.
    """
    if isinstance(examples.model.input, TokenInput):
        return next_tokens(examples, name or "next token")
    if examples.labels is None:
        return Task(
            name or "prediction", examples, (Question(),) * len(examples), kl,
            about="the model's own prediction, right or wrong",
        )  # fmt: skip
    n = output_width(examples.model)
    far = [label for label in examples.labels if not 0 <= label < n]
    if far:
        raise ValueError(f"label {far[0]}: expected a class from 0 to {n - 1}")
    asked = tuple(Question(answers=((label,),)) for label in examples.labels)
    return Task(name or "classes", examples, asked, cross_entropy, about="the class of each image")


def next_tokens(examples: Examples, name: str = "next token") -> Task:
    """The task of predicting each token of a text from those before it.

    Raises:
        ValueError: if a text has only one token.
    """
    asked = []
    for i in range(len(examples)):
        tokens = examples.tokens(i)
        if len(tokens) < 2:
            raise ValueError(
                f"text {examples.names[i]!r} has one token: predicting the next one needs at least 2"
            )
        asked.append(Question(tuple(range(len(tokens) - 1)), labels=tuple(tokens[1:])))
    return Task(
        name, examples, tuple(asked), cross_entropy, about="the next token at every position"
    )


def labelled_tokens(
    examples: Examples,
    labels: Int[Tensor, "example position"] | Sequence[Sequence[int]],
    name: str = "labelled tokens",
) -> Task:
    """The task of texts whose right next tokens are given, -1 at positions that do not count.

    Args:
        examples: texts.
        labels: for each text and position, the token that should come next. A row may be longer than its text if the
            rest is -1.
        name: the task's name.

    Raises:
        ValueError: if there is not one row for each text, a row is too short or has a label after the end of its text,
            a label is not a token, or a text has no label at all.
    """
    rows = labels.tolist() if isinstance(labels, Tensor) else [list(row) for row in labels]
    if len(rows) != len(examples):
        raise ValueError(f"labels: {len(rows)} rows for {len(examples)} texts, expected one each")
    n, asked = output_width(examples.model), []
    for i, row in enumerate(rows):
        length, text = len(examples.load(i)), examples.names[i]
        places = tuple(p for p, token in enumerate(row) if token != -1)
        if len(row) < length or any(p >= length for p in places):
            raise ValueError(
                f"labels of {text!r}: {len(row)} for {length} tokens, expected one each, -1 where nothing counts"
            )
        far = [token for token in row if not -1 <= token < n]
        if far:
            raise ValueError(
                f"label {far[0]} of {text!r}: expected a token from 0 to {n - 1}, or -1"
            )
        asked.append(Question(places, labels=tuple(row[p] for p in places)))
    return Task(
        name,
        examples,
        tuple(asked),
        cross_entropy,
        about="the token that is right at each labelled position",
    )


def output_width(model: HookedModel) -> int:
    """The number of classes or tokens that a model chooses from."""
    from circuits.tasks.targets import output_site

    return output_site(model).n_units


def default_metric(questions: Sequence[Question], feeding: Feeding = "one") -> Metric:
    """The metric of a task that does not name one.

    It is the logit difference if there are wrong answers (the difference of log-probabilities for answers of several
    tokens), else the cross-entropy, or the KL divergence from the intact model if there are no answers at all.
    """
    if all(q.against for q in questions):
        return log_probability_difference if feeding == "fed" else logit_difference
    return cross_entropy if all(q.answers or q.labels for q in questions) else kl
