"""Files of names of units, each with its evidence; some ship with the package, for models that ship too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from circuits.concepts.naming import Name, names_of, save_names
from circuits.database import Database, Record
from circuits.files import write_json
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import BUILTIN
from circuits.units import Unit

FORMAT = 1


@dataclass(frozen=True)
class NamesFile:
    """Names of a model's units.

    Attributes:
        model: the model's name.
        model_hash: its hash.
        about: how the names were found, and what their scores are.
        names: at most one for each unit.
    """

    model: str
    model_hash: str
    about: str
    names: tuple[Name, ...]


def write_names(path: Path, model: HookedModel, names: Sequence[Name], about: str) -> None:
    """Write names of a model's units to a JSON file."""
    write_json(
        path,
        {
            "circuits_names": FORMAT, "model": model.name, "model_hash": model.hash, "about": about,
            "names": [name.to_dict() for name in names],
        },
    )  # fmt: skip


def read_names(path: str | Path) -> NamesFile:
    """Read what `write_names` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, or names a unit twice.
    """
    raw = read_json(path, f"names file {str(path)!r}")
    if not isinstance(raw, dict) or raw.get("circuits_names") != FORMAT:
        raise ValueError(
            f"names file {str(path)!r} has no field 'circuits_names' of value {FORMAT}"
        )
    try:
        model, model_hash, about = raw["model"], raw["model_hash"], raw["about"]
        if not all(isinstance(text, str) for text in (model, model_hash, about)):
            raise ValueError("model, model_hash and about must be texts")
        names = tuple(Name.from_dict(each) for each in raw["names"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"names file {str(path)!r}: {str(error)[:200]}") from error
    _check_once(path, names)
    return NamesFile(model, model_hash, about, names)


def _check_once(path: str | Path, names: Sequence[Name]) -> None:
    seen: set[Unit] = set()
    if twice := next((n.unit for n in names if n.unit in seen or seen.add(n.unit)), None):
        raise ValueError(f"names file {str(path)!r}: unit {twice} is named twice")


def shipped_names(model: HookedModel) -> Path | None:
    """The names file that ships with the package for a model; None if there is none."""
    path = BUILTIN / f"{model.name}.names.json"
    return path if path.is_file() else None


def import_names(
    database: Database, model: HookedModel, path: str | Path | None = None, note: str = ""
) -> list[Record]:
    """Put the names of a file into a workspace's database; units that have a name already keep it.

    Args:
        database: of the workspace.
        model: the model whose units are named.
        path: the file; by default the one that ships with the package.
        note: kept with each name.

    Returns:
        What was saved: nothing, if all units had names.

    Raises:
        FileNotFoundError: if there is no such file, or none ships for this model.
        KeyError: if the model lacks a site.
        ValueError: if the file is none of names, or of another model, or the model lacks a unit.
    """
    path = shipped_names(model) if path is None else path
    if path is None:
        raise FileNotFoundError(f"no names file ships for model {model.name!r}: name one")
    found = read_names(path)
    if not model.has_hash(found.model_hash):
        raise ValueError(
            f"names file {str(path)!r} is of {found.model} ({found.model_hash[:16]}), not of {model.name} "
            f"({model.hash[:16]})"
        )
    known = names_of(database, model.hash)
    # Under the site's own name: a file may use an alias.
    own = [replace(name, unit=model.unit(name.unit)) for name in found.names]
    _check_once(path, own)
    fresh = [name for name in own if str(name.unit) not in known]
    return save_names(database, model.hash, fresh, note)
