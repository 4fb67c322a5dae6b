"""The thresholds and choices of tests: their names, defaults and what they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from circuits.checks import clipped
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Level, Measured
from circuits.units import unknown

Settings = Mapping[str, Any]
"""A test's thresholds and choices, all of them."""

MOST_ITEMS = 1000
"""The longest list that a setting may be."""


@dataclass(frozen=True)
class Parameter:
    """A threshold or choice of a test.

    Attributes:
        name: what it is called.
        about: what it means, with its unit.
        default: used unless a file says otherwise; None if a file has to say it.
        low: the smallest number that is allowed.
        high: the largest.
        whole: whether only whole numbers are.
        choices: the texts that are allowed; any if there are none and the default is a text.
        form: `number`, `text`, or `texts` for a list of them.
    """

    name: str
    about: str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    choices: tuple[str, ...] = ()
    form: str = "number"

    def checked(self, value: Any, where: str) -> Any:
        """A value as the test takes it.

        Raises:
            ValueError: if it is of another form or out of range.
        """
        expected = self.expected
        if self.form == "number":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = (
                number
                and self.low <= value <= self.high
                and not (self.whole and value != int(value))
            )
            if not fits or math.isinf(value):
                raise ValueError(f"{where}.{self.name} {clipped(repr(value))}: expected {expected}")
            return int(value) if self.whole else float(value)
        texts = value if self.form == "texts" else [value]
        needed = self.default != ()
        if not isinstance(texts, list) or len(texts) > MOST_ITEMS or (needed and not texts):
            raise ValueError(f"{where}.{self.name} {clipped(repr(value))}: expected {expected}")
        for text in texts:
            if not isinstance(text, str) or not text or (self.choices and text not in self.choices):
                raise ValueError(f"{where}.{self.name} {clipped(repr(text))}: expected {expected}")
        return tuple(texts) if self.form == "texts" else value

    @property
    def expected(self) -> str:
        """What is allowed, in words."""
        if self.form == "number":
            kind = "a whole number" if self.whole else "a number"
            if math.isinf(self.high):
                return kind if math.isinf(self.low) else f"{kind} of at least {self.low:g}"
            return f"{kind} from {self.low:g} to {self.high:g}"
        one = f"one of {', '.join(self.choices)}" if self.choices else "a text, not empty"
        return f"a list, each {one}" if self.form == "texts" else one

    def schema(self) -> dict[str, Any]:
        """As a JSON schema."""
        about = self.about if self.default is None else f"{self.about} (default {self.default})"
        found: dict[str, Any] = {"description": about}
        if self.form == "number":
            found["type"] = "integer" if self.whole else "number"
            found |= {} if math.isinf(self.low) else {"minimum": self.low}
            found |= {} if math.isinf(self.high) else {"maximum": self.high}
            return found
        text: dict[str, Any] = (
            {"enum": list(self.choices)} if self.choices else {"type": "string", "minLength": 1}
        )
        return found | (
            {"type": "array", "items": text, "maxItems": MOST_ITEMS}
            if self.form == "texts"
            else text
        )


Run = Callable[[Subject, Settings, Level], Measured]

Check = Callable[[Subject, Settings], object]


def _nothing(subject: Subject, settings: Settings) -> None:
    """For tests whose settings name nothing."""


@dataclass(frozen=True)
class ClaimTest:
    """A test that could refute a claim.

    Attributes:
        name: as claim files write it.
        kinds: the kinds of claim that it tests.
        about: what it measures and against what, in a sentence or two, with the source.
        parameters: its thresholds and choices.
        run: measures.
        circuit: whether it is about a circuit.
        check: raises KeyError or ValueError if its settings name what the model does not have; called for all claims of
            a file before any is registered.
    """

    name: str
    kinds: tuple[str, ...]
    about: str
    parameters: tuple[Parameter, ...]
    run: Run
    circuit: bool = True
    check: Check = _nothing

    def settings(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """All settings: those that are given, checked, and the defaults of the others.

        Raises:
            ValueError: if one is unknown, missing or out of range.
        """
        known = {p.name: p for p in self.parameters}
        for name in given:
            if name not in known:
                raise ValueError(
                    unknown(
                        f"setting of the test {self.name} in {where}:", clipped(name), known
                    ).args[0]
                )
        made = {}
        for name, parameter in known.items():
            if name in given:
                made[name] = parameter.checked(given[name], where)
            elif parameter.default is None:
                raise ValueError(
                    f"{where}: the test {self.name} needs {name}: {parameter.expected}"
                )
            else:
                made[name] = parameter.default
        return made
