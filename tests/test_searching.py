"""How Hypothesis searches: the gate has the same examples whatever else is loaded."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import examples


def drawn() -> list[tuple[str, int]]:
    seen: list[tuple[str, int]] = []

    @settings(settings.get_profile("gate"), max_examples=200)
    @given(st.text(), st.integers())
    def search(text: str, number: int) -> None:
        seen.append((text, number))

    search()
    return seen


def test_examples_do_not_follow_what_is_loaded(tmp_path: Path, monkeypatch) -> None:
    before = drawn()
    lines = [f"a{i} = 'literal {i}', {10**9 + i}" for i in range(200)]
    (tmp_path / "literals.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("literals")
    after = drawn()
    del sys.modules["literals"]
    assert after == before


def test_a_search_tries_more_than_the_gate() -> None:
    fuzz, gate = settings.get_profile("fuzz"), settings.get_profile("gate")
    assert gate.derandomize
    assert not fuzz.derandomize
    now = settings.default.max_examples
    assert now in (gate.max_examples, fuzz.max_examples)
    assert examples(60) == 60 * now // 100
