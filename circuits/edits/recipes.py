"""Recipes: ordered edits, with the hash of the model that they were written for."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.checks import clipped
from circuits.edits import activations, attention, connections, layers  # noqa: F401  (whose operators can be read)
from circuits.edits.activations import ActivationEdit, UnitsEdit, changes
from circuits.edits.records import Edit, canonical, edit_schema, fitting, parse_edit
from circuits.edits.weights import WeightEdit, Weights
from circuits.files import write_json
from circuits.json_files import read_json
from circuits.models.adapter.copying import deep_copy
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.weights_files import BAKED
from circuits.tensors import write_tensors
from circuits.units import unknown

SCHEMA = 2
"""Version of the recipe file's layout; layout 1 (one operator, `target` for `units`) is read too."""

MOST_EDITS = 100_000
"""How many edits a recipe may have."""


@dataclass(frozen=True)
class Recipe:
    """An ordered list of edits.

    Activation edits change sites at run time, weight edits change parameters. Each kind is applied in its own order;
    the order between the two kinds makes no difference.

    Attributes:
        edits: the edits, applied first to last.
        model_hash: the hash of the model that they were written for; empty fits any model.
        note: what the recipe is for.
        author: who wrote it.
        seed: the seed of whatever was random when the edits were made.
    """

    edits: tuple[Edit, ...]
    model_hash: str = ""
    note: str = ""
    author: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.edits) > MOST_EDITS:
            raise ValueError(f"recipe has {len(self.edits)} edits: expected at most {MOST_EDITS}")

    @classmethod
    def of(
        cls,
        model: HookedModel,
        edits: Iterable[Edit],
        note: str = "",
        author: str = "",
        seed: int = 0,
    ) -> Recipe:
        """A recipe for a model, with its edits checked and each site under its main name.

        Raises:
            KeyError: if a site or layer is unknown.
            ValueError: if a unit does not exist, or an edit does not fit.
        """
        return cls(checked(model, edits), model.hash, note, author, seed)

    def check(self, model: HookedModel) -> None:
        """Raise ValueError if the recipe was written for other weights than the model's.

        Inside an edit both the edited and the original weights are accepted.
        """
        if not self.model_hash or model.has_hash(self.model_hash):
            return
        # Inside an edit, a recipe may be for the model as it is now or for the one without edits.
        if not model.edited or self.model_hash != model.hash:
            raise ValueError(
                f"recipe is for model {self.model_hash[:16]}: expected {model.intact_hash[:16]} ({model.name})"
            )

    def forced(self, model: HookedModel) -> Recipe:
        """The recipe, for a model that it was not written for, if its edits fit.

        A unit with the same number may do something else in another model, and earlier measurements do not apply.

        Raises:
            KeyError, ValueError: if an edit does not fit.
        """
        return replace(self, edits=checked(model, self.edits), model_hash=model.hash)

    def __add__(self, other: Recipe) -> Recipe:
        """Both recipes' edits, one after the other.

        Raises:
            ValueError: if they are for different models.
        """
        hashes = {h for h in (self.model_hash, other.model_hash) if h}
        if len(hashes) > 1:
            raise ValueError(
                f"recipes are for different models: {self.model_hash[:16]} and {other.model_hash[:16]}"
            )
        note, author = (
            "; ".join(dict.fromkeys(filter(None, words)))
            for words in ((self.note, other.note), (self.author, other.author))
        )
        return replace(
            self,
            edits=self.edits + other.edits,
            model_hash=self.model_hash or other.model_hash,
            note=note,
            author=author,
        )

    def reordered(self, model: HookedModel, order: Sequence[int]) -> Recipe:
        """The same edits in another order, if the order makes no difference.

        Args:
            model: the model that they are for.
            order: the old indices, in their new order.

        Raises:
            ValueError: if `order` is not a permutation, or two edits that swap order do not commute.
        """
        if sorted(order) != list(range(len(self.edits))):
            raise ValueError(
                f"order {list(order)} is not a permutation of 0 to {len(self.edits) - 1}"
            )
        # Pairs that come in the other order than before: only these have to commute. In the order 2 0 1 they are 2
        # before 0 and 2 before 1.
        pairs = ((i, j) for k, i in enumerate(order) for j in order[k + 1 :] if j < i)
        with model.steady():
            for i, j in pairs:
                if not commute(model, self.edits[i], self.edits[j]):
                    raise ValueError(
                        f"edits {j + 1} ({clipped(str(self.edits[j]))}) and {i + 1} "
                        f"({clipped(str(self.edits[i]))}) do not commute: keep their order"
                    )
        return replace(self, edits=tuple(self.edits[i] for i in order))

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return {
            "schema": SCHEMA,
            "model_hash": self.model_hash,
            "author": self.author,
            "note": self.note,
            "seed": self.seed,
            "edits": [edit.to_dict() for edit in self.edits],
        }

    @classmethod
    def from_dict(cls, raw: Any, what: str = "recipe") -> Recipe:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: if it is not a recipe, has a newer layout, or an edit is invalid.
            KeyError: if it has an unknown operator or field.
        """
        if (
            not isinstance(raw, Mapping)
            or not isinstance(raw.get("edits"), list)
            or "schema" not in raw
        ):
            raise ValueError(f"{what} is not a recipe file")
        schema = raw["schema"]
        if schema not in (1, SCHEMA) or isinstance(schema, bool):
            newer = isinstance(schema, int) and schema > SCHEMA
            hint = ": a newer version of circuits wrote it" if newer else ""
            raise ValueError(
                f"{what} has layout {reprlib.repr(schema)}{hint}: expected 1 or {SCHEMA}"
            )
        if len(raw["edits"]) > MOST_EDITS:
            raise ValueError(f"{what} has {len(raw['edits'])} edits: expected at most {MOST_EDITS}")
        known = ["schema", "model_hash", "author", "note", "seed", "edits"]
        if extra := [name for name in raw if name not in known]:
            raise unknown(f"field of {what}", str(extra[0])[:60], known)
        words = {k: raw.get(k, "") or "" for k in ("model_hash", "note", "author")}
        seed = raw.get("seed", 0)
        for name, value in words.items():
            if not isinstance(value, str):
                raise ValueError(f"{name} {reprlib.repr(value)} of {what} is not a text")
        if not re.fullmatch("([0-9a-f]{64})?", words["model_hash"]):
            said = reprlib.repr(words["model_hash"])
            raise ValueError(f"model_hash {said} of {what} is not 64 hexadecimal digits")
        if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**63:
            said = f"seed {reprlib.repr(seed)} of {what}"
            raise ValueError(f"{said} is not a whole number of 64 bits")
        edits = []
        for i, edit in enumerate(raw["edits"], 1):
            try:
                edits.append(parse_edit(edit, schema))
            except (KeyError, ValueError) as error:
                raise type(error)(f"edit {i} of {what}: {error.args[0]}") from None
        return cls(tuple(edits), seed=seed, **words)

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
        what = f"recipe {str(path)!r}"
        return cls.from_dict(read_json(path, what), what)


def checked(model: HookedModel, edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Edits checked against a model; an error names the bad edit by its number."""
    found: list[Edit] = []
    with model.steady():
        for i, edit in enumerate(edits, 1):
            try:
                found.append(fitting(model, edit))
            except (KeyError, ValueError) as error:
                raise type(error)(f"edit {i}: {error.args[0]}") from None
    return tuple(found)


@contextmanager
def edited(model: HookedModel, recipe: Recipe | Iterable[Edit]) -> Iterator[HookedModel]:
    """The model with edits applied inside the block; afterwards it is restored, bit for bit.

    Other threads that share the model wait until the block ends. Blocks can be nested: an inner block edits the model
    as the outer ones have edited it.

    Args:
        model: the model.
        recipe: a recipe, or just edits.

    Raises:
        KeyError: if a site or layer is unknown.
        ValueError: if a unit does not exist, an edit does not fit, or the recipe is for other weights; the model is
            then unchanged.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe(tuple(recipe))
    with model.lock:
        recipe.check(model)
        edits = checked(model, recipe.edits)
        # Before the context is entered: an edit that cannot be made leaves the model untouched.
        tensors = rewritten(model, edits)
        with (
            model.rewriting(tensors),
            model.intervening(changes(model, [e for e in edits if isinstance(e, ActivationEdit)])),
        ):
            yield model


def rewritten(model: HookedModel, edits: Iterable[Edit]) -> dict[str, Tensor]:
    """The new values of the parameters that edits change, by name; the model's own are not written to."""
    wanted = [edit for edit in edits if isinstance(edit, WeightEdit)]
    if not wanted:
        return {}
    weights = Weights(model)
    for edit in wanted:
        weights.apply(edit)
    return weights.changed


@recording_gradients()
def bake(model: HookedModel, recipe: Recipe | Iterable[Edit]) -> HookedModel:
    """A new model with the edits in its weights; the given one is not touched.

    Raises:
        KeyError: if a layer is unknown.
        ValueError: if the recipe is for other weights, an edit does not fit, or one changes activations, which weights
            cannot hold.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe(tuple(recipe))
    recipe.check(model)
    if model.edited:
        raise ValueError(f"model {model.name} is edited: bake a recipe outside the edit")
    edits = checked(model, recipe.edits)
    for i, edit in enumerate(edits, 1):
        if isinstance(edit, ActivationEdit):
            raise ValueError(
                f"edit {i} ({clipped(str(edit))}) changes activations, which weights cannot hold: expected edits of "
                "weights (scale_weights, erase_weights, …); use `edited` for this recipe"
            )
    with model.lock:
        tensors = rewritten(model, edits)
        module = deep_copy(model.module)
    made = model.around(module, f"{model.name}, edited")
    for name, tensor in tensors.items():
        made.parameters[name].data.copy_(tensor)
    return made


def save_baked(model: HookedModel, path: str | Path, base: HookedModel, recipe: Recipe) -> None:
    """Write the weights of a baked model; `load_model(spec, weights=path)` loads them again.

    Args:
        model: what `bake` made.
        path: must end in `.safetensors`.
        base: the model that was edited.
        recipe: how; kept in the file, with the hashes of both models.

    Raises:
        ValueError: if the path ends in something else.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"weights file {str(target)!r} must end in .safetensors")
    state = model.module.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    about = {
        BAKED: base.hash,
        "circuits.model": base.name,
        "circuits.hash": model.hash,
        "circuits.recipe": canonical(recipe.to_dict()),
    }
    write_tensors(target, tensors, about)


# --- comparing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One line of the difference of two recipes.

    Attributes:
        sign: `-` only in the first, `+` only in the second, ` ` in both.
        edit: which.
    """

    sign: Literal["-", "+", " "]
    edit: Edit


def diff(before: Recipe, after: Recipe) -> list[Difference]:
    """The edits to remove from and to insert into one recipe to get the other, in order."""
    a, b = before.edits, after.edits
    # autojunk would take edits that occur often for noise in recipes of 200 and more.
    matcher = difflib.SequenceMatcher(
        None, [e.identity for e in a], [e.identity for e in b], autojunk=False
    )
    found: list[Difference] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            found += [Difference(" ", e) for e in a[i:j]]
        else:
            found += [Difference("-", e) for e in a[i:j]] + [Difference("+", e) for e in b[k:m]]
    return found


def commute(model: HookedModel, first: Edit, second: Edit) -> bool:
    """Whether the order of two edits makes no difference, bit for bit.

    True if one changes activations and the other weights, or if they change different sites, units or parameters. Two
    edits of the same numbers count as not commuting, since floating-point results depend on the order.
    """
    if isinstance(first, ActivationEdit) != isinstance(second, ActivationEdit):
        # Weights are changed before a pass and activations during it, in whatever order they are listed.
        return True
    if first == second:
        return True
    if isinstance(first, ActivationEdit) and isinstance(second, ActivationEdit):
        if model.site(first.where) != model.site(second.where):
            return True
        if not isinstance(first, UnitsEdit) or not isinstance(second, UnitsEdit):
            return False
        site = model.site(first.where)
        return not set(first.units.among(site)) & set(second.units.among(site))
    assert isinstance(first, WeightEdit)
    assert isinstance(second, WeightEdit)
    touched = [_elements(model, edit) for edit in (first, second)]
    # Two edits without a common element of a parameter read and write nothing in common.
    shared = touched[0].keys() & touched[1].keys()
    return not any(bool((touched[0][name] & touched[1][name]).any()) for name in shared)


def _elements(model: HookedModel, edit: WeightEdit) -> dict[str, Tensor]:
    """Which elements of each parameter an edit reads or writes, as masks."""
    matrices = model.matrices
    masks = {
        name: torch.zeros(model.parameters[name].shape, dtype=torch.bool)
        for name in edit.parameters(matrices)
    }
    parts = getattr(edit, "parts", None)
    weights = {p.matrix.weight for p in parts(matrices)} if parts else set()
    for part in parts(matrices) if parts else ():
        # Whole rows for those two: they clear what is not named.
        cleared = edit.operator in ("keep_weights", "transplant")
        columns = torch.arange(part.matrix.shape[1]) if cleared else part.columns
        mask = masks[part.matrix.weight]
        block = torch.ones_like(part.matrix.block(mask, part.rows, columns))
        part.matrix.put(mask, part.rows, columns, block)
    # Edits of whole layers have no parts; of biases, all count as one: two edits of the same bias never commute.
    for name in masks.keys() - weights:
        masks[name][...] = True
    return masks


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipe files."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "circuits recipe",
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "model_hash": {"type": "string", "pattern": "^([0-9a-f]{64})?$"},
            "author": {"type": "string"},
            "note": {"type": "string"},
            "seed": {"type": "integer"},
            "edits": {"type": "array", "maxItems": MOST_EDITS, "items": edit_schema()},
        },
        "required": ["schema", "edits"],
        "additionalProperties": False,
    }
