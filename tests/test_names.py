"""What the packages export."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import circuits


def test_no_name_is_exported_for_two_things() -> None:
    packages = [m.name for m in pkgutil.walk_packages(circuits.__path__, "circuits.") if m.ispkg]
    meanings: dict[str, dict[int, str]] = {}
    for name in ("circuits", *packages):
        package = importlib.import_module(name)
        for word in getattr(package, "__all__", ()):
            meanings.setdefault(word, {})[id(getattr(package, word))] = name
    assert len(meanings) > 200
    assert {word: list(m.values()) for word, m in meanings.items() if len(m) > 1} == {}


def test_no_package_exports_a_name_that_one_of_its_modules_has() -> None:
    packages = [m.name for m in pkgutil.walk_packages(circuits.__path__, "circuits.") if m.ispkg]
    hidden = {
        f"{name}.{module.name}"
        for name in packages
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__)
        if module.name in getattr(importlib.import_module(name), "__all__", ())
        and not inspect.ismodule(getattr(importlib.import_module(name), module.name))
    }
    assert hidden == set()
