"""All tests of claims, by name, and the kinds of claim that each can test."""

from __future__ import annotations

from collections.abc import Mapping

from circuits.claims import (
    against_chance,
    frequencies,
    roles,
    specificity,
    structure,
    sufficiency,
    unit_tests,
)
from circuits.claims.abstraction import alignment, interchange, scrubbing, specification
from circuits.claims.settings import ClaimTest

_MODULES = (
    sufficiency, against_chance, structure, specificity, roles, unit_tests, frequencies, interchange, alignment,
    scrubbing, specification,
)  # fmt: skip

TESTS: Mapping[str, ClaimTest] = {test.name: test for module in _MODULES for test in module.TESTS}
"""Every test, by name."""

KINDS: Mapping[str, tuple[str, ...]] = {
    kind: tuple(t.name for t in TESTS.values() if kind in t.kinds)
    for kind in dict.fromkeys(k for t in TESTS.values() for k in t.kinds)
}
"""Every kind of claim, with its tests."""
