"""Calling what a person names in their own code, and nothing that a file names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from circuits.environment import TRUST_PYTHON
from circuits.errors import their_code
from circuits.specs import runs_code, split_key
from circuits.units import unknown


def from_file(what: str, name: str, where: str, instead: str) -> str:
    """A name of a model or data that a file holds, which nobody has typed: it may not name code.

    Files come from others: whoever opens an autoencoder or a workspace has not asked for the code that it names. Every
    name that is read from a file goes through here before anything is opened by it.

    Args:
        what: what it names, for messages: `model`, `data`.
        name: the name.
        where: what holds it, for messages.
        instead: what to do to use it all the same, for messages.

    Returns:
        The name.

    Raises:
        ValueError: if opening it would run Python code, and the environment does not say that files are trusted.
    """
    if runs_code(name) and os.environ.get(TRUST_PYTHON) != "1":
        raise ValueError(
            f"{where} names {what} {name!r}, which would run its own code: {instead}, or set {TRUST_PYTHON}=1 if you "
            "trust all code that your files name"
        )
    return name


def call_factory(what: str, name: str) -> object:
    """What the function or class `MODULE:FACTORY` (or `FILE.py:FUNCTION`) returns; it runs their code.

    Args:
        what: what it is to be, for messages: `model`, `data`.
        name: where it is.

    Raises:
        ImportError: if the module cannot be imported.
        KeyError: if it has no such function.
        ValueError: if `name` is not of that form, or the function raises.
    """
    factory = named_function(what, name)
    with their_code(f"{what} 'python:{name}': {split_key(name)[1]}()"):
        return factory()


def named_function(what: str, name: str) -> Callable[..., Any]:
    """The function or class `MODULE:NAME` (or `FILE.py:NAME`); it runs the code of the module.

    Args:
        what: what it makes or is, for messages.
        name: where it is.

    Raises:
        ImportError: if the module cannot be imported.
        KeyError: if it has no such function.
        ValueError: if `name` is not of that form.
    """
    module_name, factory_name = split_key(name)
    if not factory_name:
        raise ValueError(
            f"{what} 'python:{name}' is not of the form python:MODULE:FACTORY or FILE.py:FUNCTION"
        )
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise ImportError(f"{what} 'python:{name}': there is no file {module_name!r}")
    with their_code(f"{what} 'python:{name}': cannot import {module_name!r}: it", ImportError):
        namespace = _import(module_name)
    factory = getattr(namespace, factory_name, None)
    if not callable(factory):
        functions = [
            n for n, v in vars(namespace).items() if inspect.isroutine(v) or inspect.isclass(v)
        ]
        raise unknown(f"factory of {module_name}", factory_name, functions)
    return factory


def _import(name: str) -> object:
    """Import by module name, or by the path of a `.py` file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
