"""All tests of claims, by name, and the kinds of claim that each can test."""

from __future__ import annotations

from collections.abc import Mapping

from circuits.claims.abstraction.alignment import TESTS as ALIGNMENT
from circuits.claims.abstraction.interchange import TESTS as INTERCHANGE
from circuits.claims.abstraction.scrubbing import TESTS as SCRUBBING
from circuits.claims.abstraction.specification import TESTS as SPECIFICATION
from circuits.claims.against_chance import TESTS as AGAINST_CHANCE
from circuits.claims.frequencies import TESTS as FREQUENCIES
from circuits.claims.roles import TESTS as ROLES
from circuits.claims.settings import ClaimTest
from circuits.claims.specificity import TESTS as SPECIFICITY
from circuits.claims.structure import TESTS as STRUCTURE
from circuits.claims.sufficiency import TESTS as SUFFICIENCY
from circuits.claims.unit_tests import TESTS as OF_UNITS

_ALL = (
    *SUFFICIENCY, *AGAINST_CHANCE, *STRUCTURE, *SPECIFICITY, *ROLES, *OF_UNITS, *FREQUENCIES, *INTERCHANGE, *ALIGNMENT,
    *SCRUBBING, *SPECIFICATION,
)  # fmt: skip

TESTS: Mapping[str, ClaimTest] = {test.name: test for test in _ALL}
"""Every test, by name."""

KINDS: Mapping[str, tuple[str, ...]] = {
    kind: tuple(t.name for t in TESTS.values() if kind in t.kinds)
    for kind in dict.fromkeys(k for t in TESTS.values() for k in t.kinds)
}
"""Every kind of claim, with its tests."""
