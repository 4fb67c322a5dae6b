"""From the words of the command line to what they name: units, labels, stores, models to load again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from circuits.checks import number, whole
from circuits.cli.output import note
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import Source
from circuits.units import Unit, Units


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


def readable(examples: Examples) -> Examples:
    """The examples without files that cannot be read; of a folder it is said what was taken, what was not, and why."""
    examples = examples.readable()
    if examples.account:
        note(examples.account)
    return examples


def labels_of(model: HookedModel, source: Source, labels: str) -> list[int]:
    """The class of each example of a source, from a file or, for `names`, from the examples' names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an example has none.
    """
    return read_labels(source, model.classes, None if labels == "names" else labels)


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
    for found in (whole(text), number(text)):
        if found is not None:
            return found
    return None if text == "none" else text
