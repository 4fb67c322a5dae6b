"""Recipes: ordered edits with the hash of the model they were written for (layer 4)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.edits.operators import Edit, parse_edit
from circuits.files import write_json
from circuits.hooks import Change
from circuits.models.adapter import HookedModel

SCHEMA = 1
"""Version of the recipe file's layout."""


@dataclass(frozen=True)
class Recipe:
    """Edits in order.

    Attributes:
        edits: applied first to last.
        model_hash: of the weights they were written for; empty fits any model.
        note: why.
    """

    edits: tuple[Edit, ...]
    model_hash: str = ""
    note: str = ""

    @classmethod
    def of(cls, model: HookedModel, edits: Iterable[Edit], note: str = "") -> Recipe:
        """A recipe for a model, its units checked and under their sites' own names.

        Raises:
            KeyError: if a site is unknown.
            ValueError: if a unit does not exist.
        """
        checked = tuple(edit.moved(model.unit(edit.target)) for edit in edits)
        return cls(checked, model.hash, note)

    def check(self, model: HookedModel) -> None:
        """Raise ValueError if the recipe was written for other weights than the model's."""
        if self.model_hash and self.model_hash != model.hash:
            raise ValueError(
                f"recipe is for model {self.model_hash[:16]}, not {model.hash[:16]} ({model.name})"
            )

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return {
            "schema": SCHEMA,
            "model_hash": self.model_hash,
            "note": self.note,
            "edits": [edit.to_dict() for edit in self.edits],
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a recipe, or of a newer layout.
            KeyError: if it has an unknown operator.
        """
        try:
            raw = json.loads(Path(path).read_text())
            schema, edits = raw["schema"], raw["edits"]
            if not isinstance(edits, list):
                raise TypeError("edits is not a list")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"recipe {str(path)!r} is not a recipe file") from error
        if schema != SCHEMA:
            raise ValueError(f"recipe {str(path)!r} has layout {schema!r}: expected {SCHEMA}")
        return cls(
            tuple(parse_edit(e) for e in edits),
            str(raw.get("model_hash") or ""),
            str(raw.get("note") or ""),
        )


@contextmanager
def edited(model: HookedModel, recipe: Recipe | Iterable[Edit]) -> Iterator[HookedModel]:
    """The model with edits in force inside the block; as it was, to the bit, after it.

    Other threads that share the model wait until the block ends.

    Args:
        model: the model.
        recipe: a recipe, or just edits.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if a unit does not exist, or the recipe is for other weights. Nothing has been
            changed then.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe(tuple(recipe))
    recipe.check(model)
    with model.intervening(changes(model, recipe.edits)):
        yield model


def changes(model: HookedModel, edits: Iterable[Edit]) -> dict[str, Change]:
    """The edits of each site as one function, in order."""
    by_site: dict[str, list[Change]] = {}
    for edit in edits:
        unit = model.unit(edit.target)
        by_site.setdefault(unit.site, []).append(edit.moved(unit).change(model.site(unit.site)))
    return {site: _composed(steps) for site, steps in by_site.items()}


def _composed(steps: list[Change]) -> Change:
    def apply(value):
        for step in steps:
            value = step(value)
        return value

    return apply
