"""Errors in a line: damaged files, other people's exceptions, values of any length, and whose code failed."""

from __future__ import annotations

import errno
import json
import pickle
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from circuits.cli.commands import ENTRIES
from circuits.cli.main import run
from circuits.errors import LONGEST, line


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "workspace"))
    return tmp_path / "workspace"


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command says when it refuses its input."""
    assert run(words) == 2, words
    said = capsys.readouterr()
    (only,) = said.err.splitlines()
    assert not said.out
    assert len(only) <= LONGEST + len("circuits: ")
    return only


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), "it is not text in UTF-8 (byte 0xe9 at position 0)"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "no"), r"text '\udcff' holds characters that utf-8 cannot write"),
        (MemoryError(), "not enough memory"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "not enough memory for 7.28 TiB: fewer or smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4e12 bytes"), "not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (BadZipFile("Bad CRC-32"), "a file is damaged or of another kind (Bad CRC-32)"),
        (EOFError(), "a file is damaged or of another kind (EOFError)"),
        (TokenError("EOF in multi-line statement", (2, 0)), "a file is damaged or of another kind"),
        (zlib.error("Error -3"), "a file is damaged or of another kind (Error -3)"),
        (pickle.UnpicklingError("invalid load key"), "a file is damaged or of another kind (invalid load key)"),
        (sqlite3.OperationalError("database is locked"), "a database cannot be read or written: database is locked"),
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), "'a.png': there is no permission to read"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 4000), "aaaa': the name is too long"),
        (OSError(errno.ENOSPC, "No space left on device", "a.h5"), "'a.h5': the disk is full"),
        (ValueError("embedded null byte"), "a path holds a NUL character"),
        (ValueError("Exceeds the limit (4300 digits) for integer"), "a number has more than 4300 digits"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero (CIRCUITS_DEBUG=1 shows where)"),
    ],
)  # fmt: skip
def test_errors_of_python_are_said_in_words(error: Exception, said: str) -> None:
    assert said in line(error)
    assert len(line(error)) <= LONGEST


def verbs() -> Iterator[tuple[str, Any]]:
    for name, entry in ENTRIES.items():
        loaded = entry.load()
        commands = loaded.commands.items() if entry.group else [("", loaded)]
        yield from ((f"{name} {own}".strip(), command) for own, command in commands)


def test_values_of_any_length_are_shortened_by_each_verb(capsys) -> None:
    tried = 0
    for name, command in verbs():
        needed = [p for p in command.params if p.param_type_name == "argument" and p.required]
        if needed:
            for value in ("x" * 4000, f"{'x' * 2000}:{'1' * 2000}"):
                one_line(capsys, *name.split(), value, *["mixed3b:1"] * (len(needed) - 1))
            tried += 1
    assert tried > 30


# --- files ----------------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    import os

    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path)


HOSTILE: dict[str, Callable[[Path, bytes], object]] = {
    "empty": lambda path, whole: path.write_bytes(b""),
    "cut": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "noise": lambda path, whole: path.write_bytes(np.random.default_rng(0).bytes(999)),
    "latin": lambda path, whole: path.write_bytes(b"caf\xe9 {"),
    "folder": lambda path, whole: path.mkdir(),
    "fifo": lambda path, whole: _fifo(path),
    "loop": lambda path, whole: _loop(path),
}


def _whole(path: Path) -> bytes:
    """A good file of each kind."""
    if path.suffix == ".npy":
        np.save(path, np.zeros(4))
    elif path.suffix == ".npz":
        np.savez(path, labels=np.zeros(4, int))
    elif path.suffix == ".safetensors":
        save_file({"a": torch.zeros(9)}, path)
    elif path.suffix == ".pt":
        torch.save({"a": torch.zeros(9)}, path)
    else:
        path.write_text('{"a": 1}\n')
    return path.read_bytes()


@pytest.mark.parametrize("how", [*HOSTILE, "NUL", "long"])
def test_damaged_files_are_one_line(how: str, capsys, tmp_path: Path) -> None:
    commands = {
        ".safetensors": ("sites shapes --weights {}", "sae eval {}"),
        ".pt": ("sites shapes --weights {}",),
        ".json": (
            "edit measure shapes {}", "graph import shapes {} --name a",
            "ablate shapes mixed3b:1 --data shapes --labels {}",
        ),
        ".npy": ("edit measure shapes set|mixed3b:1|values=@{}", "ablate shapes mixed3b:1 --data shapes --labels {}"),
        ".npz": ("ablate shapes mixed3b:1 --data npz:{}", "ablate shapes mixed3b:1 --data shapes --labels {}"),
        ".csv": ("ablate shapes mixed3b:1 --data shapes --labels {}",),
        ".png": ("attribute shapes mixed3b --image {}",),
        ".py": ("sites {}:make", "ablate shapes mixed3b:1 --data {}:make"),
    }  # fmt: skip
    for suffix, some in commands.items():
        path = tmp_path / f"{'x' * 3000 if how == 'long' else how}{suffix}"
        if how == "NUL":
            path = tmp_path / f"a\0b{suffix}"
        elif how != "long":
            HOSTILE[how](path, _whole(tmp_path / f"whole{suffix}"))
        for words in some:
            said = one_line(
                capsys, *(w.replace("{}", str(path)).replace("|", " ") for w in words.split())
            )
            for raw in ("codec", "Errno", "CIRCUITS_DEBUG", "Traceback"):
                assert raw not in said, (words, said)


def test_names_that_are_no_text_are_printed_as_escapes(capsys, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a\udcff.png")
    assert run(["attribute", "shapes", "mixed3b", "--image", str(tmp_path / "a\udcff.png")]) == 0
    assert r"a\udcff.png" in capsys.readouterr().out


# --- whose code failed ----------------------------------------------------------------------------

THEIRS = """\
import logging
import sys
import warnings

import torch
from torch import nn

class MineError(Exception):
    pass

class Net(nn.Module):
    input_shape = (3, 16, 16)

    def __init__(self, what=None):
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 4, 3), what

    def forward(self, x):
        if isinstance(self.what, BaseException):
            raise self.what
        if self.what:
            print("printed")
            warnings.warn("warned")
            logging.getLogger("other").warning("logged")
        return self.conv(x)

class Rows:
    def __len__(self):
        return 5

    def __getitem__(self, i):
        if i:
            raise MineError("row")
        return torch.zeros(3, 64, 64)

def talks(): return Net(True)
def runs_into(): return Net(MineError("on purpose"))
def leaves(): return Net(SystemExit(3))
def stops(): raise KeyboardInterrupt("KeyboardInterrupt")
def exits(): sys.exit("bye")
def divides(): return 1 / 0
"""


def test_errors_of_their_code_are_theirs_with_file_and_line(capsys, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(THEIRS)
    at = {name: n for n, text in enumerate(THEIRS.splitlines(), 1) for name in [text.strip()]}
    in_forward = f"{file}, line {at['raise self.what']}"
    for factory, said in {
        "runs_into": f"its code raised MineError: on purpose ({in_forward})",
        "leaves": f"its code called sys.exit(3) ({in_forward})",
        "stops": "stops() raised KeyboardInterrupt",
        "exits": "exits() called sys.exit('bye')",
        "divides": f"divides() raised ZeroDivisionError: division by zero ({file}, line ",
    }.items():
        assert said in one_line(capsys, "sites", f"{file}:{factory}")
    said = one_line(
        capsys, "attribute", "shapes", "mixed3b", "--limit", "5", "--data", f"{file}:Rows"
    )
    assert f"raised MineError: row ({file}, line " in said
    for text, said in {
        "def f(:": "it is not Python: invalid syntax ({}, line 1)",
        "\nraise SystemExit(4)": "it called sys.exit(4) ({}, line 2)",
        "import no_such_module": "raised ModuleNotFoundError: No module named 'no_such_module' ({}, line 1)",
    }.items():
        file.write_text(text)
        assert said.format(file) in one_line(capsys, "sites", f"{file}:f")


def test_what_a_persons_own_code_says_is_on_stderr_line_by_line(capsys, tmp_path: Path) -> None:
    """pytest makes errors of warnings, and takes logs: so in a process of its own."""
    file = tmp_path / "own.py"
    file.write_text(THEIRS)
    done = subprocess.run(
        [sys.executable, "-m", "circuits", "sites", f"{file}:talks", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [site["name"] for site in json.loads(done.stdout)] == ["conv"]
    warned = f"circuits: {file}, line 23: UserWarning: warned"
    assert set(done.stderr.splitlines()) == {"printed", warned, "circuits: logged"}


def test_a_name_with_pickle_in_it_is_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["visualize", "shapes", "class:pickle"]) == 2
    assert "unknown class" in capsys.readouterr().err
