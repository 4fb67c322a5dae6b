"""What the command line gives the library, and what it prints, in this process."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from circuits.cli.main import run


class _GivenError(Exception):
    """Ends a command once the library was called."""


def given(where: str, *arguments: str) -> dict[str, Any]:
    """What a command line gives to a library function; the function itself is not run.

    Args:
        where: the function as the command's module names it: `patching.localization.patch_grid`.
        arguments: of the command line; those of the call must fit the function's signature.
    """
    module, *path, name = where.split(".")
    owner: Any = import_module(f"circuits.cli.{module}")
    for part in path:
        owner = getattr(owner, part)
    signature = inspect.signature(inspect.unwrap(getattr(owner, name)))
    seen: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> None:
        seen.update(signature.bind(*args, **kwargs).arguments)
        raise _GivenError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, record)
        run(arguments)
    assert seen, f"{where} was not called"
    return seen


def put(patch: pytest.MonkeyPatch, where: str, answer: Callable[..., Any]) -> None:
    """Answer for a library function that a command's module names."""
    patch.setattr(f"circuits.cli.{where}", answer)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints as JSON."""
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints for people."""
    assert run(arguments) == code, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: str) -> None:
    """Assert that a command is refused with exit code 2 and a message in one line, and prints nothing else."""
    capsys.readouterr()  # of commands before
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("circuits: ")
    assert captured.err.count("\n") == 1
    assert not captured.out


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return min(image.size) > 100
