"""The table of docs/models.md: no verb is wrong or ends in a traceback on any family."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from benchmarks import families

OFTEN = {"gemma2", "convnext", "branches", "written-out"}
"""The families that are tried at every run of the tests; all the others are by night."""

EVERY = [name for names, _ in families.GROUPS.values() for name in names]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")  # other packages' own
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.nightly] * (n not in OFTEN)) for n in EVERY]
)
def test_every_verb_gives_what_plain_torch_gives_or_refuses(name: str) -> None:
    cells = families.tried([name], list(families.VERBS), show=False)[name][1]
    assert {v: c for v, c in cells.items() if c.verdict in ("WRONG", "CRASH")} == {}
    (line,) = (x for x in families.DOCS.read_text().splitlines() if x.startswith(f"| {name} | "))
    shown = [re.sub("[0-9]+", "number", mark.strip()) for mark in line.split("|")[3:-1]]
    found = [cells.get(verb, families.Cell("")) for verb in ("load", *families.VERBS)]
    assert shown == [families.MARKS.get(c.verdict, "number") for c in found], (
        "docs/models.md is not what benchmarks/families.py writes"
    )
