"""What is counted of a model's predictions, before and after a change (layer 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.inputs import TokenInput

_RESAMPLES = 1000


@dataclass(frozen=True)
class Difference:
    """A number of a changed model, beside that of the model as it is.

    Attributes:
        intact: of the model as it is.
        changed: of the changed one.
        change: the difference.
        low: the 2.5th percentile of the change over resampled examples (paired bootstrap).
        high: the 97.5th.
        random: the change that each random one makes.
        p_value: how many of the random ones change it at least as much, either way, counting the change
            itself: at least 1 / (1 + how many there are).
    """

    intact: float
    changed: float
    change: float
    low: float
    high: float
    random: tuple[float, ...]
    p_value: float


@dataclass(frozen=True)
class ClassChange:
    """A class's accuracy before and after a change.

    Attributes:
        index: of the class.
        name: of it.
        n: examples of it.
        intact: share of them that were right.
        changed: share after.
    """

    index: int
    name: str
    n: int
    intact: float
    changed: float


class Counted:
    """What is counted of a batch's predictions, in a variant beside the intact model's.

    Args:
        intact: the logits.
        labels: one for each example and position, -1 where there is none.
    """

    def __init__(
        self, intact: Float[Tensor, "example position output"], labels: Tensor | None
    ) -> None:
        self.intact = intact.log_softmax(-1)
        self.first = intact.argmax(-1, keepdim=True)
        if labels is not None and labels.shape[1] != intact.shape[1]:
            raise ValueError(
                f"labels: one an example, but the model puts out {intact.shape[1]} predictions an example"
            )
        self.labels = labels

    def of(self, logits: Float[Tensor, "example position output"]) -> dict[str, np.ndarray]:
        """One number an example, by name."""
        log_q = logits.log_softmax(-1)
        found = {
            "kl": (self.intact.exp() * (self.intact - log_q)).sum(-1).mean(1),
            "top1_changed": (logits.argmax(-1, keepdim=True) != self.first)
            .double()[..., 0]
            .mean(1),
            "logit": logits.gather(-1, self.first)[..., 0].mean(1),
        }
        if self.labels is not None:
            known = (self.labels >= 0).double()
            wanted = self.labels.clamp_min(0)[..., None]
            # how many are above it; NaN is above and below everything
            rank = (~(logits <= logits.gather(-1, wanted))).sum(-1)
            scored = {"loss": -log_q.gather(-1, wanted)[..., 0], "top1": (rank < 1).double()}
            if logits.shape[-1] > 10:
                scored["top5"] = (rank < 5).double()
            n = known.sum(1)  # none: not a number
            found |= {name: (value * known).sum(1) / n for name, value in scored.items()}
        return {name: value.cpu().numpy() for name, value in found.items()}


def difference(
    numbers: Float[np.ndarray, "variant example"], generator: np.random.Generator
) -> Difference:
    """Means of the intact model's numbers (first), the changed one's, and of random changes beside."""
    change = numbers[1:] - numbers[:1]
    low, high = interval(change[0], generator)
    means = change.mean(1)
    return Difference(
        float(numbers[0].mean()), float(numbers[1].mean()), float(means[0]), low, high,
        tuple(means[1:].tolist()), p_value(means[0], means[1:]),
    )  # fmt: skip


def interval(
    change: Float[np.ndarray, " example"], generator: np.random.Generator
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the mean over resampled examples."""
    n = len(change)
    drawn = [
        (change * generator.multinomial(n, np.full(n, 1 / n))).sum() / n for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def p_value(change: float, beside: np.ndarray) -> float:
    """How many of some random changes are at least as large, either way, counting the change itself."""
    if not np.isfinite(change):
        return float("nan")
    at_least = int((~(np.abs(beside) < abs(change))).sum())  # one that is not finite is larger
    return (1 + at_least) / (1 + len(beside))


def labels_of(model: HookedModel, x: Tensor, labels: Tensor | None) -> Tensor | None:
    """A label for each example and prediction, -1 where none is known; of tokens the next token."""
    if isinstance(model.input, TokenInput):
        following = torch.full_like(x, -1)
        following[:, :-1] = x[:, 1:]
        return following.to(model.device)
    return None if labels is None else labels[:, None]


def checked_labels(model: HookedModel, labels: Sequence[int] | None, n: int, outputs: int) -> None:
    """Raise ValueError if there is not one class for each of n examples."""
    if labels is None:
        return
    if isinstance(model.input, TokenInput):
        raise ValueError("labels: tokens have the next token as label")
    if len(labels) != n or not all(isinstance(i, int) and 0 <= i < outputs for i in labels):
        raise ValueError(f"labels: {len(labels)} for {n} examples, of {outputs} classes")


def class_changes(
    model: HookedModel, labels: Sequence[int] | None, right: Sequence[np.ndarray]
) -> tuple[ClassChange, ...]:
    """Classes whose accuracy changed, most first.

    Args:
        model: the model.
        labels: of all examples.
        right: of each batch, which examples were right: intact and changed x example.
    """
    if labels is None or not right:
        return ()
    each, own = np.concatenate(right, 1), np.array(labels)
    found = []
    for index in np.unique(own).tolist():
        intact, changed = each[:, own == index].mean(1).tolist()
        name = model.classes[index] if model.classes else str(index)
        found.append(ClassChange(index, name, int((own == index).sum()), intact, changed))
    moved = [c for c in found if c.intact != c.changed]
    return tuple(sorted(moved, key=lambda c: -abs(c.intact - c.changed)))
