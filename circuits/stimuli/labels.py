"""Labels of the examples of a dataset."""

from __future__ import annotations

import csv
import json
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from circuits.specs import split_key
from circuits.stimuli.arrays import stored_arrays
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import Source

Parts = tuple[str, ...]
"""The parts of a path."""

NAME_COLUMNS = ("name", "names", "file", "filename", "file_name", "path", "image", "example")
LABEL_COLUMNS = ("label", "labels", "class", "target")


def read_labels(
    source: Source, classes: Sequence[str], path: str | Path | None = None
) -> list[int]:
    """Read the class of each example of a source.

    Args:
        source: the examples.
        classes: the names of the model's classes, by index; empty if they have no names.
        path: a file with a class for each example: in the order of the examples, or by their names (see `by_example`).
            A class is an index or a name. In `.json` a list or a mapping, either of them also under `labels`; a
            list may come with `names`; in `.csv` and `.tsv` a column `label` and optionally `name`; in `.npz` an
            array `labels` (`FILE.npz:KEY` for another) and optionally `names`; in `.npy` an array. By default the
            class is part of the example's name: the folder of an image, or what comes before ` #`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an example has no label, a label is not a class, or it is not clear which is meant.
    """
    if path is None:
        found: Any = [_from_name(name) for name in source.names]
    else:
        found = _read(str(path))
    if isinstance(found, dict):
        found = by_example(source, found, f"labels {str(path)!r}")
    if not isinstance(found, list) or len(found) != len(source):
        n = len(found) if isinstance(found, list) else "no"
        raise ValueError(
            f"labels {str(path)!r} have {n} entries: expected one for each of {len(source)} examples of {source.spec}"
        )
    known = _Classes(classes)
    return [known.index(label, name) for label, name in zip(found, source.names, strict=True)]


def _from_name(name: str) -> str | None:
    """The class in an example's name: its folder, or what comes before ` #`.

    >>> _from_name("val/cat #2/1.png"), _from_name("circle #3"), _from_name("1.png")
    ('cat #2', 'circle', None)
    """
    return PurePath(name).parent.name or name.rpartition(" #")[0] or None


# --- by name -----------------------------------------------------------------------------------


def by_example(source: Source, given: Mapping[str, Any], what: str) -> list[Any]:
    """The value that a mapping has for each example, by the example's name; None where it has none.

    A key is for the example whose name it is. Else it fits each file of a folder whose path it ends (`1.png`,
    `cat/1.png`, `val/cat/1.png`), or whose whole name it ends in (`/elsewhere/cat/1.png`); of several keys the one that
    has most of the path counts. Differences of case, and of how accents are composed, count only where a key fits
    without them.

    Args:
        source: the examples.
        given: what is known, by name.
        what: what it is, for messages.

    Raises:
        ValueError: if several keys fit an example equally well and differ in value, or a key fits several examples.
    """
    folder = source.folder if isinstance(source, ImageSource) else None
    best: dict[int, str] = {}
    taken: set[str] = set()  # keys that are the names of examples, and so are for no others
    fits: dict[str, list[str]] = {}
    for fold in (_same, _folded):
        root = _parts("" if folder is None else folder.as_posix(), fold)
        names = {i: _parts(n, fold) for i, n in enumerate(source.names) if i not in best}
        if not names:
            break
        keys = _Keys(given, fold, {len(parts) for parts in names.values()})
        own = {i: keys.whole.get(p) or keys.whole.get(root + p) or [] for i, p in names.items()}
        taken |= {key for found in own.values() for key in found}
        for i, parts in names.items():
            loose = [k for k in keys.fitting(root, parts) if k not in taken]
            for key in loose:
                fits.setdefault(key, []).append(source.names[i])
            found = own[i] or keys.longest(loose, root + parts)
            for key in found:
                if given[key] != given[found[0]]:
                    raise ValueError(
                        f"{what}: {source.names[i]!r} may be {found[0]!r} ({given[found[0]]!r}) or {key!r} "
                        f"({given[key]!r}): expected more of its path"
                    )
            if found:
                best[i] = found[0]
    for key in best.values():
        if len(several := fits.get(key, ())) > 1:
            raise ValueError(
                f"{what}: {key!r} may be {several[0]!r} or {several[1]!r}: expected more of its path"
            )
    return [given[best[i]] if i in best else None for i in range(len(source))]


class _Keys:
    """Keys that name examples, by their parts and by the ends of these that are as long as an example's name."""

    def __init__(
        self, keys: Iterable[str], fold: Callable[[str], str], lengths: Iterable[int]
    ) -> None:
        self._parts = {key: _parts(key, fold) for key in keys}
        self.whole: dict[Parts, list[str]] = {}
        self._ends: dict[Parts, list[str]] = {}
        for key, parts in self._parts.items():
            self.whole.setdefault(parts, []).append(key)
            for n in lengths:
                if 0 < n < len(parts):
                    self._ends.setdefault(parts[-n:], []).append(key)

    def fitting(self, root: Parts, name: Parts) -> list[str]:
        """The keys that end an example's path, or end in its name."""
        path = root + name
        ending = [key for i in range(len(path)) for key in self.whole.get(path[i:], ())]
        return list(dict.fromkeys(ending + self._ends.get(name, [])))

    def longest(self, keys: Sequence[str], path: Parts) -> list[str]:
        """Those that have most of a path in common with it, from the end."""

        def common(key: str) -> int:
            pairs = list(zip(reversed(self._parts[key]), reversed(path), strict=False))
            return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

        most = max(map(common, keys), default=0)
        return [key for key in keys if common(key) == most]


def _parts(path: str, fold: Callable[[str], str]) -> Parts:
    """The parts of a path, without what says that it starts here, above or at the root."""
    parts = posixpath.normpath(fold(path)).split("/")
    return tuple(part for part in parts if part not in ("", ".", ".."))


def _same(text: str) -> str:
    return text


def _folded(text: str) -> str:
    """A text without differences of case and of how accents are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


# --- files -------------------------------------------------------------------------------------


def _read(path: str) -> Any:
    """A list of labels, or a mapping from names to labels."""
    file, key = split_key(path)
    place = Path(file).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"labels file {file!r} does not exist or is not a file")
    try:
        if place.suffix in (".npz", ".npy"):
            return _arrays(place, key)
        if place.suffix in (".csv", ".tsv"):
            return _table(place)
        found = json.loads(
            place.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_contradiction
        )
    except (OSError, ValueError, KeyError, EOFError, RecursionError, csv.Error) as error:
        raise ValueError(f"labels file {file!r} cannot be read: {error}") from error
    if isinstance(found, dict) and "labels" in found:
        return _named(found.get("names"), found["labels"])
    return found


def _arrays(place: Path, key: str) -> Any:
    arrays = stored_arrays(place)
    if "" in arrays:
        return _plain(arrays[""].whole)
    wanted = key or "labels"
    if wanted not in arrays:
        raise ValueError(f"it has no array {wanted!r}: expected one of {', '.join(arrays)}")
    names = _plain(arrays["names"].whole) if "names" in arrays else None
    return _named(names, _plain(arrays[wanted].whole))


def _plain(array: np.ndarray) -> list[Any]:
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.dtype.kind == "U"):
        raise ValueError(
            f"labels are {array.dtype} of shape {array.shape}, not a list of whole numbers or names"
        )
    return array.tolist()


def _table(place: Path) -> Any:
    """The labels in a table, with or without a line that names its columns."""
    with place.open(encoding="utf-8-sig", newline="") as file:
        rows = [
            [cell.strip() for cell in row]
            for row in csv.reader(file, delimiter="\t" if place.suffix == ".tsv" else ",")
        ]
    rows = [row for row in rows if any(row)]
    if not rows:
        raise ValueError("it is empty")
    names, labels = (
        [i for i, cell in enumerate(rows[0]) if cell.lower() in known]
        for known in (NAME_COLUMNS, LABEL_COLUMNS)
    )
    if labels:
        rows = rows[1:]
    elif len(rows[0]) <= 2:  # names and labels, or labels alone
        names, labels = list(range(len(rows[0]) - 1)), [len(rows[0]) - 1]
    if len(names) > 1 or len(labels) != 1:
        raise ValueError(
            "it is not clear which columns are meant: expected the first line name,label"
        )
    for row in rows:
        if len(row) <= max(names + labels):
            raise ValueError(f"line {','.join(row)!r} has too few columns")
    return _named(
        [row[names[0]] for row in rows] if names else None, [row[labels[0]] for row in rows]
    )


def _named(names: Any, labels: Any) -> Any:
    """Labels by name if there are names, else as they are."""
    if names is None or not isinstance(labels, list):
        return labels
    if not isinstance(names, list) or len(names) != len(labels):
        n = len(names) if isinstance(names, list) else "no"
        raise ValueError(f"{n} names for {len(labels)} labels: expected as many")
    return _without_contradiction(
        [(str(name), label) for name, label in zip(names, labels, strict=True)]
    )


def _without_contradiction(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for name, value in pairs:
        if found[name] != value:
            raise ValueError(f"{name!r} is there twice, with {value!r} and {found[name]!r}")
    return found


# --- classes -----------------------------------------------------------------------------------


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


class _Classes:
    """From labels to the indices of classes."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._alike: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            self._alike.setdefault(_folded(name), []).append(i)

    def index(self, label: Any, example: str) -> int:
        """The index of the class that a label names, by number or by name, whatever its case."""
        names = self._names
        if isinstance(label, str) and label in names:
            return index_of(label, names)
        if isinstance(label, str) and (alike := self._alike.get(_folded(label))):
            if len(alike) > 1:
                raise ValueError(
                    f"label {label!r} of {example!r} may be class {names[alike[0]]!r} or {names[alike[1]]!r}"
                )
            return alike[0]
        if isinstance(label, str) and label.isdecimal():
            label = int(label)
        if isinstance(label, int) and not isinstance(label, bool) and label >= 0:
            if names and label >= len(names):
                raise ValueError(
                    f"label {label} of {example!r} is not a class: expected 0 to {len(names) - 1}"
                )
            return label
        if label is None:
            raise ValueError(f"{example!r} has no label: expected a file with labels")
        if not names:
            raise ValueError(
                f"label {label!r} of {example!r}: the model has no names of classes: expected numbers, or a model with "
                "names (`HookedModel(…, classes=[…])`)"
            )
        known = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise ValueError(
            f"label {label!r} of {example!r} is not a class of the model: expected one of {known}"
        )


def read_attributes(source: Source, path: str | Path) -> tuple[list[list[str]], int]:
    """What is true of each example of a source, from a JSON file, and how many examples the file does not have.

    The file holds texts, or lists of texts, in the order of the examples or by their names (see `by_example`). Nothing
    is true of an example that it does not have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON of this form, fits no example, or a name is not clear.
    """
    file, what = Path(path).expanduser(), f"attributes {str(path)!r}"
    if not file.is_file():
        raise FileNotFoundError(f"attributes file {str(path)!r} does not exist or is not a file")
    try:
        given = json.loads(
            file.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_contradiction
        )
    except ValueError as error:
        raise ValueError(f"attributes file {str(path)!r} cannot be read: {error}") from error
    missing = 0
    if isinstance(given, dict):
        found = by_example(source, given, what)
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
