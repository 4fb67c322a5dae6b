"""What a test measured, and what follows: holds, refuted, undecided, could not be tested, or stale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from circuits.claims.evidence import Evidence, Region, p_inside, p_outside
from circuits.tables import between

Verdict = Literal["holds", "refuted", "undecided", "could not be tested", "stale"]

ALPHA = 0.05
"""The chance of any wrong verdict in a claim file, unless the file says another."""

Expected = Literal["holds", "refuted"]


@dataclass(frozen=True)
class Level:
    """How sure a test has to be, so that all tests of a file together are wrong with the chance alpha at most.

    Bonferroni: each of m tests is made at the level 1 - alpha / m. Of a claim that is true only *refuted* can be wrong,
    of one that is false only *holds*, so that each counts once.

    Attributes:
        alpha: the chance of any wrong verdict.
        tests: how many tests the file has.
    """

    alpha: float = ALPHA
    tests: int = 1

    @property
    def each(self) -> float:
        """The level of one test's interval."""
        return 1 - self.alpha / self.tests

    def corrected(self, p: float) -> float:
        """A p-value corrected for the number of tests."""
        return float(np.minimum(1.0, p * self.tests))  # NaN stays NaN


@dataclass(frozen=True)
class Quantity:
    """A number that a test measured, and the region that the claim says it lies in.

    Attributes:
        name: what it is.
        value: the estimate.
        low: lower end of the interval at the corrected level.
        high: its upper end.
        region: the values that the claim allows.
        p_holds: the p-value of the claim (null hypothesis: the number lies outside), corrected.
        p_refuted: the p-value against it (null hypothesis: it lies inside), corrected.
        unit: of the number; empty for a share.
        n: the number of examples, draws or pairs.
        clusters: how many of them are independent.
        null: what the number is with something random in place of what the claim is about.
        null_is: what that is.
        exact: whether nothing was sampled: the whole domain was enumerated, or the number is of the weights alone.
    """

    name: str
    value: float
    low: float
    high: float
    region: Region
    p_holds: float
    p_refuted: float
    unit: str = ""
    n: int = 0
    clusters: int = 0
    null: tuple[float, ...] = ()
    null_is: str = ""
    exact: bool = False

    @property
    def interval(self) -> str:
        """The interval in words."""
        return "exact" if self.exact else between(self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"null": list(self.null)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Quantity:
        """What `to_dict` gave."""
        numbers = ("value", "low", "high", "p_holds", "p_refuted")
        known: dict[str, Any] = {k: _number(raw[k]) for k in numbers}
        known |= {k: str(raw[k]) for k in ("name", "unit", "null_is")}
        known["region"] = Region(
            *(_bound(raw["region"][k], s) for k, s in (("low", -1), ("high", 1)))
        )
        known["null"] = tuple(map(_number, raw["null"]))
        return cls(**{**raw, **known})


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _bound(value: float | None, sign: int) -> float:
    return sign * math.inf if value is None else float(value)


def quantity(
    name: str, evidence: Evidence, region: Region, level: Level, *, parts: int = 1, **more: Any
) -> Quantity:
    """A quantity of what a sample says.

    Args:
        name: what it is.
        evidence: what the sample says.
        region: what the claim allows.
        level: of the file.
        parts: how many quantities its test has: any of them may refute the claim, so that this is corrected for them;
            that all hold needs no correction.
        **more: unit, null, null_is; n and exact of what was enumerated.
    """
    n, clusters = evidence.size
    low, high = evidence.interval(level.each)
    holds, refuted = p_inside(evidence, region), p_outside(evidence, region)
    facts = {"n": n, "clusters": clusters, "exact": not n, **more}
    return Quantity(
        name, float(evidence.value), low, high, region, level.corrected(holds), level.corrected(refuted * parts),
        **facts,
    )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What a test found.

    Attributes:
        quantities: the numbers that decide; all of them have to hold.
        examples: on which examples, in words.
        seed: of everything random.
        notes: what a reader has to know to judge the numbers, a sentence each.
        details: more numbers, as JSON has them.
        untestable: why nothing could be tested; empty if something was.
        cannot_hold: why the best verdict is `undecided`; empty if the claim may hold. For tests that can only fail to
            refute.
    """

    quantities: tuple[Quantity, ...]
    examples: str = ""
    seed: int = 0
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    untestable: str = ""
    cannot_hold: str = ""

    @property
    def by_doubt(self) -> list[Quantity]:
        """The numbers, those that hold least surely first."""
        return sorted(self.quantities, key=lambda q: -q.p_holds)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, but for numbers that are not finite."""
        return asdict(self) | {"quantities": [q.to_dict() for q in self.quantities]}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Measured:
        """What `to_dict` gave."""
        quantities = tuple(map(Quantity.from_dict, raw["quantities"]))
        texts: dict[str, Any] = {k: str(raw[k]) for k in ("examples", "untestable", "cannot_hold")}
        texts["notes"] = tuple(map(str, raw["notes"]))
        return cls(**{**raw, **texts, "quantities": quantities})

    def verdict(self, alpha: float) -> tuple[Verdict, str]:
        """The verdict, and why in a sentence.

        Args:
            alpha: the chance of any wrong verdict in the file; p-values are already corrected.
        """
        if self.untestable:
            return "could not be tested", self.untestable
        if not self.quantities:
            return "could not be tested", "nothing was measured"
        unknown = [q for q in self.quantities if math.isnan(q.p_holds) or math.isnan(q.p_refuted)]
        if unknown:
            why = (
                "too few independent examples"
                if math.isfinite(unknown[0].value)
                else "it is not a number"
            )
            return "could not be tested", f"{unknown[0].name}: {why}"
        out = [q for q in self.quantities if q.p_refuted < alpha and not q.p_holds < alpha]
        if out:
            return "refuted", _said(min(out, key=lambda q: q.p_refuted), "outside")
        if self.cannot_hold:
            return "undecided", self.cannot_hold
        open_ = [q for q in self.quantities if not q.p_holds < alpha]
        if open_:
            return "undecided", _said(max(open_, key=lambda q: q.p_holds), "not wholly inside")
        return "holds", _said(max(self.quantities, key=lambda q: q.p_holds), "inside")


def _said(q: Quantity, where: str) -> str:
    interval = f"interval {between(q.low, q.high)}"
    if q.exact:
        interval = "exactly"
    elif q.low == q.high:
        interval = f"the same in all {q.clusters} independent examples"
    return f"{q.name} {q.value:.4g} ({interval}) is {where} the claimed {q.region}"


def exit_code(verdicts: Sequence[tuple[Verdict, Expected]]) -> int:
    """The exit code of a verification.

    0 if every verdict is the expected one, 4 if a claim is stale, 1 if a verdict is the opposite of the expected one,
    3 if one is undecided or could not be tested.

    >>> exit_code([("holds", "holds"), ("refuted", "refuted")]), exit_code([("undecided", "holds")])
    (0, 3)
    """
    if any(v == "stale" for v, _ in verdicts):
        return 4
    if any(v in ("holds", "refuted") and v != expected for v, expected in verdicts):
        return 1
    return 3 if any(v != expected for v, expected in verdicts) else 0
