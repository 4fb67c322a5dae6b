from __future__ import annotations

import re
from pathlib import Path

import pytest

from circuits.cli.commands import ENTRIES

README = (Path(__file__).parent.parent / "README.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_has_its_scripts() -> None:
    assert len(SCRIPTS) == 9
    lines = [line for line in SCRIPTS[0].splitlines() if line]
    assert len(lines) == 11, "an import and ten lines"


@pytest.mark.parametrize(
    "script",
    SCRIPTS,
    ids=[
        "ten-lines",
        "own-model",
        "harvest",
        "weights",
        "pictures",
        "behaviours",
        "units",
        "edits",
        "concepts",
    ],
)
def test_readme_scripts_run(script: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_readme_names_only_verbs_that_exist() -> None:
    verbs = set(ENTRIES)
    named = set(re.findall(r"^circuits (\w+)", README, flags=re.MULTILINE))
    assert named <= verbs
    assert named | {"demo"} == verbs
