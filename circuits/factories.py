"""Calling what a person names in their own code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

from circuits.errors import their_code
from circuits.specs import split_key
from circuits.units import unknown


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
    module_name, factory_name = split_key(name)
    if not factory_name:
        raise ValueError(
            f"{what} 'python:{name}' is not of the form python:MODULE:FACTORY or FILE.py:FUNCTION"
        )
    with their_code(f"{what} 'python:{name}': cannot import {module_name!r}: it", ImportError):
        namespace = _import(module_name)
    factory = getattr(namespace, factory_name, None)
    if not callable(factory):
        functions = [
            n for n, v in vars(namespace).items() if inspect.isroutine(v) or inspect.isclass(v)
        ]
        raise unknown(f"factory of {module_name}", factory_name, functions)
    with their_code(f"{what} 'python:{name}': {factory_name}()"):
        return factory()


def _import(name: str) -> object:
    """Import by module name, or by the path of a `.py` file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no file {name!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
