"""Labels of the examples of a dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from circuits.stimuli.sources import Source


def read_labels(
    source: Source, classes: Sequence[str], path: str | Path | None = None
) -> list[int]:
    """Read the class of each example of a source.

    Args:
        source: the examples.
        classes: the names of the model's classes, by index; empty if they have no names.
        path: a JSON file with a list of classes in the order of the examples, a mapping from the example's name (or
            its file's name) to its class, or a mapping that holds one of these under `labels`; a class is an index or
            a name. Or `FILE.npz:KEY`. By default the class is part of the example's name: the folder of an image, or
            what comes before ` #`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an example has no label, or a label is not a class.
    """
    if path is None:
        found: Any = [_from_name(name) for name in source.names]
    else:
        found = _read(str(path))
    if isinstance(found, dict):
        found = found.get("labels", found)
    if isinstance(found, dict):
        # A full name goes before a file's name.
        known = {**{PurePath(k).name: v for k, v in found.items()}, **found}
        found = [known.get(n, known.get(PurePath(n).name)) for n in source.names]
    if not isinstance(found, list) or len(found) != len(source):
        n = len(found) if isinstance(found, list) else "no"
        raise ValueError(
            f"labels {str(path)!r} have {n} entries: expected one for each of {len(source)} examples of {source.spec}"
        )
    return [_index(label, name, classes) for label, name in zip(found, source.names, strict=True)]


def _from_name(name: str) -> str | None:
    """The class in an example's name: what comes before ` #`, or its folder."""
    if " #" in name:
        return name.rpartition(" #")[0]
    folder = PurePath(name).parent.name
    return folder or None


def _read(path: str) -> Any:
    file, _, key = path.partition(":")
    place = Path(file).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"labels file {file!r} does not exist or is not a file")
    try:
        if place.suffix == ".npz":
            with np.load(place, allow_pickle=False) as arrays:
                found = arrays[key or "labels"]
                if not np.issubdtype(found.dtype, np.integer):
                    raise ValueError(f"labels are {found.dtype}, not whole numbers")
                return found.tolist()
        return json.loads(place.read_text())
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"labels file {file!r} cannot be read: {error}") from error


def index_of(name: str, names: Sequence[str], what: str = "class") -> int:
    """The index of a name.

    Raises:
        ValueError: if several have the name (ImageNet has two cranes), or none.

    >>> index_of("b", ["a", "b"])
    1
    """
    found = [i for i, other in enumerate(names) if other == name]
    if len(found) != 1:
        which = " and ".join(map(str, found)) or "none"
        raise ValueError(f"{what} {name!r} is the name of {which}: give its number")
    return found[0]


def _index(label: Any, example: str, classes: Sequence[str]) -> int:
    if isinstance(label, str) and label in classes:
        return index_of(label, classes)
    if isinstance(label, str) and label.isdigit():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool) and label >= 0:
        if classes and label >= len(classes):
            raise ValueError(
                f"label {label} of {example!r} is not a class: expected 0 to {len(classes) - 1}"
            )
        return label
    if label is None:
        raise ValueError(f"{example!r} has no label: expected a file with labels")
    raise ValueError(f"label {label!r} of {example!r} is not a class of the model")


def read_attributes(source: Source, path: str | Path) -> tuple[list[list[str]], int]:
    """What is true of each example of a source, from a JSON file, and how many examples the file does not have.

    The file holds texts, or lists of texts, in the order of the examples or by their names (or by the names of their
    files). Nothing is true of an example that it does not have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON of this form, or fits no example.
    """
    file, what = Path(path).expanduser(), f"attributes {str(path)!r}"
    if not file.is_file():
        raise FileNotFoundError(f"attributes file {str(path)!r} does not exist or is not a file")
    try:
        given = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"attributes file {str(path)!r} is not JSON: {error}") from error
    missing = 0
    if isinstance(given, dict):
        known = {**{PurePath(k).name: v for k, v in given.items()}, **given}
        found = [known.get(n, known.get(PurePath(n).name)) for n in source.names]
        missing = sum(v is None for v in found)
        if missing == len(found):
            raise ValueError(
                f"{what}: no key is the name of an example of {source.spec}, such as {source.names[0]!r}"
            )
        given = [[] if v is None else v for v in found]
    if not isinstance(given, list) or len(given) != len(source):
        n = len(given) if isinstance(given, list) else "no"
        raise ValueError(f"{what}: {n} for {len(source)} examples of {source.spec}")
    made = [[v] if isinstance(v, str) else v for v in given]
    for name, v in zip(source.names, made, strict=True):
        if not isinstance(v, list) or not all(isinstance(t, str) for t in v):
            raise ValueError(f"attributes of {name!r} are {v!r}: expected a list of texts")
    return made, missing
