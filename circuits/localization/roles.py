"""Roles of heads, tested: a measure of every head, against what it is by chance, corrected for the number of heads.

A head has a role only if a measure that could have shown otherwise says so after a correction for all heads that were
looked at. A role that no head has is absent, which is a result too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from circuits.experiments.statistics import (
    Correction,
    Interval,
    corrected,
    mean_intervals,
    mean_ps,
)
from circuits.files import finite

ALPHA = 0.05
"""Below this corrected p-value a difference from chance counts."""

Side = Literal["above", "below"]
"""On which side of chance a head of the role lies."""


@dataclass(frozen=True)
class HeadTest:
    """One head's test.

    Attributes:
        head: the head, written `layer.head`.
        value: the measure with its 95 % interval.
        chance: what the measure is by chance.
        p_value: of whether the measure differs from chance, corrected for all heads.
        holds: whether it lies on the role's side of chance, with a corrected p-value below 0.05, and is large enough.
    """

    head: str
    value: Interval
    chance: float
    p_value: float
    holds: bool


@dataclass(frozen=True)
class RoleTests:
    """The tests of all heads for one role.

    Attributes:
        role: the role.
        measure: what was measured, in words.
        unit: its unit.
        chance_is: what it is compared with, in words.
        test: the test of each head, in words.
        correction: how p-values were corrected.
        n_tests: for how many tests they were corrected.
        least: how far from 0, on the role's side, the whole interval has to lie; None if the test alone decides.
        tests: one for each head, in the order in which the heads were given.
    """

    role: str
    measure: str
    unit: str
    chance_is: str
    test: str
    correction: Correction
    n_tests: int
    least: float | None
    tests: tuple[HeadTest, ...]

    @property
    def found(self) -> tuple[HeadTest, ...]:
        """The heads that have the role, the clearest first: by the distance from chance."""
        some = [t for t in self.tests if t.holds]
        return tuple(sorted(some, key=lambda t: -abs(t.value.value - t.chance)))

    @property
    def absent(self) -> bool:
        """Whether no head has the role."""
        return not self.found

    def of(self, head: str) -> HeadTest:
        """The test of one head.

        Raises:
            KeyError: if it was not tested.
        """
        found = next((t for t in self.tests if t.head == head), None)
        if found is None:
            raise KeyError(f"head {head!r} was not tested for the role {self.role!r}")
        return found

    def to_dict(self, top: int) -> dict[str, Any]:
        """As JSON has it, with as many heads as `top` says: those that have the role, then those next to them."""
        rest = [t for t in self.tests if not t.holds]
        rest.sort(key=lambda t: (t.p_value, -abs(t.value.value - t.chance)))
        shown = [*self.found, *rest][:top]
        facts = {k: v for k, v in asdict(self).items() if k != "tests"}
        return finite(facts | {
            "found": [t.head for t in self.found], "absent": self.absent, "heads": [asdict(t) for t in shown],
        })  # fmt: skip


def judge_heads(
    role: str,
    heads: Sequence[str],
    values: Float[np.ndarray, "head example"],
    chance: Float[np.ndarray, "head example"] | None = None,
    *,
    measure: str,
    unit: str = "",
    chance_is: str = "no effect",
    side: Side = "above",
    least: float | None = None,
    clusters: Sequence[int] | None = None,
    correction: Correction = "holm",
    n_tests: int | None = None,
    seed: int = 0,
) -> RoleTests:
    """Test for each head whether a measure differs from chance, example by example.

    The test is a t-test of the paired differences, over clusters of examples (`statistics.mean_ps`): with a few dozen
    examples permutations cannot reach p-values that survive a correction for hundreds of heads.

    Args:
        role: the role.
        heads: the heads, written `layer.head`.
        values: the measure of each head on each example.
        chance: the same by chance, on the same examples; 0 if None.
        measure: what was measured, in words.
        unit: its unit.
        chance_is: what chance is, in words.
        side: on which side of chance a head of the role lies.
        least: how far from 0, on that side, the whole interval has to lie: with many examples an effect of no
            consequence differs from chance too, and so does no effect where chance is on the other side of 0. None
            leaves it to the test alone.
        clusters: a number for each example, shared by those that are not independent; all are independent if None.
        correction: how p-values are corrected: `holm` or `benjamini-hochberg`.
        n_tests: the number of tests to correct for, if heads were left out that were looked at; that of the heads if
            None.
        seed: of the intervals' resamples.

    Raises:
        ValueError: if there are fewer than two clusters of examples, shapes do not fit, `side` or `correction` is
            unknown, `least` is negative, or `n_tests` is below the number of heads.
    """
    _check(heads, values, chance, side, correction, n_tests)
    if least is not None and not least >= 0:
        raise ValueError(f"least {least}: expected a number of at least 0")
    groups = range(values.shape[1]) if clusters is None else clusters
    if len(set(groups)) < 2:
        raise ValueError(f"values of {role}: expected examples of at least two clusters")
    other = np.zeros_like(values) if chance is None else chance
    raw = mean_ps(values - other, clusters)
    n = len(heads) if n_tests is None else n_tests
    # Heads that were looked at and are not here count as tests that found nothing.
    p = corrected([*raw.tolist(), *[1.0] * (n - len(heads))], correction)[: len(heads)]
    made = []
    for row, interval in enumerate(mean_intervals(values, tuple(groups), seed)):
        usual = float(other[row].mean())
        above = side == "above"
        apart = interval.value > usual if above else interval.value < usual
        enough = least is None or (interval.low > least if above else interval.high < -least)
        made.append(
            HeadTest(heads[row], interval, usual, p[row], apart and enough and p[row] < ALPHA)
        )
    said = f"paired t-test over {len(set(groups))} independent groups of examples"
    return RoleTests(role, measure, unit, chance_is, said, correction, n, least, tuple(made))


def _check(
    heads: Sequence[str],
    values: Float[np.ndarray, "head example"],
    chance: np.ndarray | None,
    side: str,
    correction: str,
    n_tests: int | None,
) -> None:
    for name, value, known in (("side", side, Side), ("correction", correction, Correction)):
        if value not in get_args(known):
            raise ValueError(f"{name} {value!r}: expected one of {', '.join(get_args(known))}")
    if len(values) != len(heads):
        raise ValueError(
            f"values have {len(values)} rows: expected one for each of {len(heads)} heads"
        )
    if chance is not None and chance.shape != values.shape:
        raise ValueError(
            f"chance has shape {chance.shape}: expected that of values, {values.shape}"
        )
    if n_tests is not None and n_tests < len(heads):
        raise ValueError(f"n_tests {n_tests}: expected at least the number of heads, {len(heads)}")
