"""From the words of the command line to what they name: units, labels, stores, models to load again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo.loading import find_autoencoder
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import Source
from circuits.store import ActivationStore
from circuits.units import Unit, Units
from circuits.workspace import ModelRecord, Workspace


def units_of(model: HookedModel, text: str) -> list[Unit]:
    """Units written as `SITE:1,2,5-9` (several separated by a blank or `;`); a site alone is all of its units.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if it is not of this form, or there is no such unit.
    """
    found = []
    for part in filter(None, re.split(r"[;\s]+", text)):
        units = Units.parse(part if ":" in part else f"{part}:*")
        place = model.site(units.site)
        found += [place.unit(i) for i in units.among(place)]
    if not found:
        raise ValueError(f"units {text!r} name none: expected SITE:1,2,5-9")
    return found


def usual_data(model: HookedModel) -> str:
    """The name of the data that a command takes when nobody names any."""
    return "photos" if isinstance(model.input, ImageInput) else "repeats"


def labels_of(model: HookedModel, source: Source, labels: str) -> list[int]:
    """The class of each example of a source, from a file or, for `names`, from the examples' names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an example has none.
    """
    return read_labels(source, model.classes, None if labels == "names" else labels)


def record_of(spec: str, weights: Path | None, model_hash: str) -> ModelRecord:
    """How to load the model again, from any folder."""
    spec, *attached = spec.split("+")
    if attached:
        base = record_of(spec, weights, model_hash)
        names = [_in_workspace(find_autoencoder(a).resolve()) for a in attached]
        return ModelRecord("+".join([base.spec, *names]), model_hash, base.weights)
    scheme, _, rest = spec.partition(":")
    path = Path(rest.partition(":")[0])
    if scheme in ("python", "tl", "hf") and path.exists():  # a file of their own, a local folder
        spec = ":".join([scheme, str(path.resolve()), *rest.split(":")[1:]])
    return ModelRecord(spec, model_hash, str(weights.resolve()) if weights else None)


def _in_workspace(path: Path) -> str:
    """An autoencoder by its name where it is the workspace's own, so that the workspace can be moved."""
    place = Workspace.default().root.resolve() / "saes"
    if not path.is_relative_to(place):
        return str(path)
    return f"sae/{path.relative_to(place).with_suffix('')}"


def stored(place: Workspace, model_hash: str, site: str, data: str = "") -> ActivationStore | None:
    """The newest finished store of a model that has a site (of some data, if it is named); None if none has."""
    found = []
    for folder in place.store_folders(model_hash):
        try:
            store = ActivationStore.open(folder, model_hash)
        except (OSError, ValueError):
            continue
        if site in store.sites and data in ("", store.provenance.data):
            found.append(store)
    return max(found, key=lambda s: (s.folder / "statistics.h5").stat().st_mtime, default=None)


def name_values(given: Sequence[str] | None) -> dict[str, Any]:
    """Options of a method written NAME=VALUE: whole numbers, numbers, `none`, or words.

    Raises:
        ValueError: if one is not of this form.

    >>> name_values(["samples=20", "noise=0.1", "blank=blur"])
    {'samples': 20, 'noise': 0.1, 'blank': 'blur'}
    """
    found: dict[str, Any] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--option {item!r} is not of the form NAME=VALUE, e.g. samples=20")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text == "none" else text
