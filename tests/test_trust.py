"""Nothing that a file names is run: code is called only where a person typed its name."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest

from circuits.autoencoders import About, save_autoencoder
from circuits.cli.main import run
from circuits.environment import TRUST_PYTHON, WORKSPACE
from circuits.factories import from_file
from circuits.models.zoo.loading import load_model
from circuits.workspace import ModelRecord, Workspace
from tests.test_attaching import code_of

VERBS = (
    ("sae", "eval", "x"),
    ("sae", "name", "x", "--labels", "names"),
    ("sae", "bottleneck", "x", "--labels", "names"),
)  # fmt: skip
"""Commands that take a model or data from what an autoencoder or a workspace says, if nobody names any."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code that tells when it was run, and the workspace of an autoencoder."""
    (tmp_path / "prep.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'a').close()\n"
        "def f():\n    raise RuntimeError('never reached in these tests')\n"
    )
    monkeypatch.setenv(WORKSPACE, str(tmp_path / "ws"))
    monkeypatch.delenv(TRUST_PYTHON, raising=False)
    return tmp_path


def _autoencoders(place: Path, data: str, model_hash: str = "") -> None:
    model = load_model("shapes")
    for name in ("x", "y"):
        code = code_of(model, "mixed3a", n=8)
        code.about = About(name, "mixed3a", "mixed3a", "shapes", model_hash or model.hash, data)
        save_autoencoder(code, place / "ws" / "saes" / name)


@pytest.mark.parametrize("scheme", ["python:", ""])
def test_an_autoencoder_names_data_and_runs_none(
    scheme: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _autoencoders(place, f"{scheme}{place / 'prep.py'}:f")
    for verb in VERBS:
        assert run([*verb, "--model", "shapes"]) == 2, verb
        said = capsys.readouterr().err.strip()
        assert not (place / "ran").exists(), verb
        assert len(said.splitlines()) == 1, said
        assert "which would run its own code: name it with --data" in said, verb


def test_a_workspace_names_a_model_and_runs_none(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(place / "ws")
    workspace.register(ModelRecord(f"python:{place / 'prep.py'}:f", "1" * 64))
    _autoencoders(place, "shapes", "1" * 64)
    for verb in VERBS:
        assert run(verb) == 2, verb
        assert not (place / "ran").exists(), verb
        assert "name it with --model" in capsys.readouterr().err, verb


def test_what_a_person_types_or_trusts_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{place / 'prep.py'}:f"
    _autoencoders(place, name)
    assert run(["sae", "eval", "x", "--model", "shapes", "--data", name]) == 2
    assert (place / "ran").exists()
    assert "never reached" in capsys.readouterr().err
    monkeypatch.setenv(TRUST_PYTHON, "1")
    assert from_file("data", name, "a file", "type it") == name


def test_the_code_in_a_folder_of_weights_is_not_run_and_not_offered(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "weights"
    folder.mkdir()
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    told = {
        "model_type": "odd",
        "architectures": ["Odd"],
        "auto_map": dict.fromkeys(kinds, "odd.Odd"),
    }
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "odd.py").write_text((place / "prep.py").read_text() + "class Odd: pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for scheme in ("hf", "tl"):
        assert run(["sites", f"{scheme}:{folder}"]) == 2
        captured = capsys.readouterr()
        assert "[y/N]" not in captured.out + captured.err
        assert not (place / "ran").exists()


def test_every_name_that_is_read_from_a_file_is_asked_about() -> None:
    """`load_model(record.spec)` and `open_source(known.data)` go through `from_file`, or are a plan of the package."""
    root = Path(__file__).parents[1]
    found = []
    for path in sorted([*(root / "circuits").rglob("*.py"), *(root / "apps").rglob("*.py")]):
        for call in ast.walk(ast.parse(path.read_text())):
            name = (
                call.func.id
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                else ""
            )
            if name in ("load_model", "open_source") and isinstance(call, ast.Call):
                found += [
                    f"{path.relative_to(root)}: {ast.unparse(call.args[0])}"
                    for a in call.args[:1]
                    if isinstance(a, ast.Attribute)
                    and ast.unparse(a) not in ("self.spec", "self.data")
                ]
    # The demo's plans are the package's own; `Sae.load_model` has asked about what nobody typed.
    assert found == [
        "circuits/cli/options.py: record.spec", "circuits/demo.py: plan.model", "circuits/demo.py: plan.data",
    ]  # fmt: skip
