"""Spans of positions: the parts of texts at which what a target reads is patched by itself.

A span is a range of positions or a part that the task names, so that texts of different lengths have the same spans
(Haklay et al. 2025 call a set of them a schema). Every position of a text is in exactly one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.task import Question, Task, TaskBatch

REST = "rest"
"""The span of all positions that are in no other."""

_RANGE = re.compile(r"(?P<first>-?[0-9]{1,9})(?P<more>-(?P<last>-?[0-9]{1,9})?)?")

_EXPECTED = "expected ranges that hold each position once, in order, such as 0,1-4,5- or 0--2,-1"


@dataclass(frozen=True)
class _Range:
    """Positions from a first to a last one, both included; negative ones are counted from the end of the text."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> _Range | None:
        """The range that a name stands for; None if it is another name."""
        match = _RANGE.fullmatch(text)
        if match is None:
            return None
        first = int(match["first"])
        last = first if match["more"] is None else int(match["last"] or -1)
        return cls(first, last)

    def follows(self, before: _Range) -> bool:
        """Whether it begins where another one ends, in texts of any length."""
        return self.first == before.last + 1 and (self.first >= 0) == (before.last >= 0)

    @property
    def runs(self) -> bool:
        """Whether it holds a position in every text that is long enough."""
        same = (self.first >= 0) == (self.last >= 0)
        return self.first <= self.last if same else self.first >= 0

    def within(self, length: int) -> range:
        """Its positions in a text, if the text is long enough."""
        first, last = (p + length if p < 0 else p for p in (self.first, self.last))
        return range(max(first, 0), min(last, length - 1) + 1)


@dataclass(frozen=True)
class Spans:
    """Spans that together hold each position of a text once.

    Attributes:
        names: the ranges and names, as they are written.

    Raises:
        ValueError: if a name is given twice, or ranges leave out a position or hold it twice.

    >>> Spans.parse("0, 1-4, 5-").names
    ('0', '1-4', '5-')
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError(f"spans are empty: {_EXPECTED}")
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"span {name!r} is given twice: {_EXPECTED}")
            if not name.isprintable() or any(sign in name for sign in "@ >"):
                raise ValueError(f"span {name!r}: expected a name without spaces, @ and >")
        ranges = [_Range.parse(name) for name in self.names]
        if all(one is not None for one in ranges):
            self._check([one for one in ranges if one is not None])

    def _check(self, ranges: list[_Range]) -> None:
        """Raise ValueError unless ranges hold each position once."""
        start = _Range(0, -1)
        for i, (name, own) in enumerate(zip(self.names, ranges, strict=True)):
            if not own.runs:
                raise ValueError(f"span {name!r} holds no position: {_EXPECTED}")
            if i == 0 and own.first != start.first:
                raise ValueError(f"spans {self}: the first begins at {own.first}; {_EXPECTED}")
            if i and not own.follows(ranges[i - 1]):
                raise ValueError(
                    f"span {name!r} does not begin behind span {self.names[i - 1]!r}: {_EXPECTED}"
                )
        if ranges[-1].last != start.last:
            raise ValueError(
                f"spans {self}: nothing holds the positions behind {self.names[-1]!r}; {_EXPECTED}"
            )

    @classmethod
    def parse(cls, text: str) -> Spans:
        """The spans of a list separated by commas."""
        return cls(tuple(part.strip() for part in text.split(",") if part.strip()))

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return ",".join(self.names)

    def index(self, task: Task, part: TaskBatch) -> Int[Tensor, "row position"]:
        """The number of the span that each position of a batch is in; 0 for padding.

        Raises:
            ValueError: if the task has no texts or no span of a name, or some position of a text is in no span or in
                two.
        """
        if not isinstance(task.model.input, TokenInput):
            raise ValueError(f"spans {self}: task {task.name} is of images; expected texts")
        made = torch.zeros(part.inputs.shape, dtype=torch.int64)
        for row, example in enumerate(part.rows.tolist()):
            i = part.which[example]
            mask = None if part.mask is None else part.mask[row]
            length = part.inputs.shape[1] if mask is None else int(mask.sum())
            first = 0 if mask is None else int(mask.int().argmax())
            own = self._of_text(task, task.questions[i], task.examples.names[i], length)
            made[row, first : first + length] = torch.tensor(own)
        return made

    def _of_text(self, task: Task, question: Question, text: str, length: int) -> list[int]:
        """The span of each position of a text."""
        found: dict[int, int] = {}
        for k, name in enumerate(self.names):
            if name == REST:
                continue
            for p in _positions(task, name, question.spans, text, length):
                if p in found:
                    raise ValueError(
                        f"spans {self}: position {p} of text {text!r}, of {length} tokens, is in "
                        f"{self.names[found[p]]} and in {name}; expected one of them"
                    )
                found[p] = k
        missing = [p for p in range(length) if p not in found]
        if missing and REST not in self.names:
            raise ValueError(
                f"spans {self}: position {missing[0]} of text {text!r}, of {length} tokens, is in none of them; add a "
                f"span that holds it, or the span {REST}"
            )
        rest = self.names.index(REST) if REST in self.names else 0
        return [found.get(p, rest) for p in range(length)]


def _positions(
    task: Task, name: str, spans: Mapping[str, tuple[int, int]], text: str, length: int
) -> range:
    """The positions of one span in a text."""
    own = _Range.parse(name)
    if own is not None:
        return own.within(length)
    if name not in spans:
        known = dict.fromkeys(n for q in task.questions for n in q.spans)
        raise ValueError(
            f"span {name!r}: text {text!r} of task {task.name} has no part of that name; expected ranges, {REST}"
            f"{''.join(f', {n}' for n in known)}"
        )
    start, stop = spans[name]
    return range(start, min(stop, length))
