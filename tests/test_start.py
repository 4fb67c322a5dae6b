"""What starting costs: `import circuits` and `circuits --help` load nothing that they do not need."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import circuits
from circuits.cli.commands import ENTRIES
from circuits.cli.main import run

HEAVY = (
    "torch._dynamo", "numba", "sklearn", "transformers", "transformer_lens", "streamlit", "altair", "vl_convert",
    "pandas", "scipy.stats",
)  # fmt: skip

LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def loaded(code: str) -> set[str]:
    """The modules that a fresh process has loaded after some code."""
    made = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(made.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "most", "without"),
    [
        ("import circuits", 1, (*HEAVY, "torch", "numpy")),
        ("import circuits.units", 10, HEAVY),
        ("import circuits; circuits.load_model('shapes')", 84, (*HEAVY, "h5py")),
        ("from circuits.cli.main import run; assert run(['--help']) == 0", 12, (*HEAVY, "torch", "numpy")),
        ("from circuits.cli.main import run; assert run(['--version']) == 0", 12, (*HEAVY, "torch", "numpy")),
    ],
)  # fmt: skip
def test_starting_loads_only_what_it_needs(code: str, most: int, without: tuple[str, ...]) -> None:
    found = loaded(code)
    assert not found & set(without)
    assert len([m for m in found if m.partition(".")[0] in ("circuits", "apps")]) <= most


def test_the_top_is_what_its_table_and_type_checkers_say() -> None:
    assert set(circuits._HOMES) == set(circuits.__all__)
    tree = ast.parse(Path(circuits.__file__).read_text())
    checked = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom) and node.module != "circuits"
        for alias in node.names
    }
    assert checked == {name: f"circuits.{home}" for name, home in circuits._HOMES.items()}
    for name in circuits.__all__:
        assert getattr(circuits, name).__name__ == name
    assert circuits.edits.zero is not None


def test_a_name_that_is_not_at_the_top_says_where_it_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'zero'; it is circuits\.edits\.zero"):
        circuits.zero  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        circuits.nonsense  # noqa: B018


@pytest.mark.parametrize("name", ENTRIES)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    entry = ENTRIES[name]
    about = entry.load().help.partition("\n\n")[0]
    assert " ".join(about.split()) == entry.about or about.startswith(entry.about)


def test_the_version_is_printed(capsys) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"circuits {circuits.__version__}\n"
