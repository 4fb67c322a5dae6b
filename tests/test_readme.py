from __future__ import annotations

import re
from pathlib import Path

import pytest

from circuits.cli.commands import ENTRIES
from circuits.tuning import radial

README = (Path(__file__).parent.parent / "README.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

SMALLER = {
    "steps=64": "steps=3",
    "steps=32": "steps=3",
    "steps=50, batch=1024": "steps=3, batch=256",
    "n_random=19": "n_random=2",
    "range(195, 205), step=15.0": "range(199, 201), step=90.0",
    '["mixed3b:200"], step=15.0': '["mixed3b:200"], step=90.0',
    "permutations=99": "permutations=19",
    '"photos", 60': '"photos", 12',
    "task = circuits.load_task(model, n=32)": "task = circuits.load_task(model, n=12)",
    "size=20, n_random=20": "size=20, n_random=2, n_curves=1, check=4",
}
"""Settings of the scripts on which it does not depend whether they run, and those with which they run here."""


def test_readme_has_its_scripts() -> None:
    assert len(SCRIPTS) == 12
    lines = [line for line in SCRIPTS[0].splitlines() if line]
    assert len(lines) == 11, "an import and ten lines"


def test_readme_has_the_settings_that_are_made_smaller() -> None:
    assert [whole for whole in SMALLER if whole not in "".join(SCRIPTS)] == []


@pytest.mark.usefixtures("fewer_drawings")
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
        "own-task",
        "circuits",
        "own-heads",
        "units",
        "edits",
        "concepts",
    ],
)
def test_readme_scripts_run(script: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(radial, "_REPLICATES", 2)
    for whole, small in SMALLER.items():
        script = script.replace(whole, small)
    exec(compile(script, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_readme_names_only_verbs_that_exist() -> None:
    verbs = set(ENTRIES)
    named = set(re.findall(r"^circuits (\w+)", README, flags=re.MULTILINE))
    assert named <= verbs
    assert named | {"demo"} == verbs
