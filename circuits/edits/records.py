"""Edits as data: an operator's name and its fields, converted to and from JSON and text."""

from __future__ import annotations

import base64
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Generator, Tensor

from circuits.checks import clipped, number, whole
from circuits.errors import UNREADABLE
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.stimuli.arrays import read_array
from circuits.units import Direction, Unit, Units, nearest, unknown

OPERATORS: dict[str, type[Edit]] = {}
"""Every operator by name; subclasses of `Edit` enter themselves."""

_LISTED = 64
"""Arrays of up to this many numbers are written as lists, larger ones as bytes in base64."""

_TYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """One change of a model. Two edits are equal if all their fields are equal, bit by bit."""

    operator: ClassVar[str]
    about: ClassVar[str]

    def __init_subclass__(cls, operator: str = "", about: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if operator:
            cls.operator, cls.about = operator, about
            OPERATORS[operator] = cls

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(self, field)
        self._check_values()

    def _check_values(self) -> None:  # noqa: B027 (most edits have nothing to check)
        """Raise ValueError if the fields contradict each other."""

    @abstractmethod
    def checked(self, model: HookedModel) -> Edit:
        """The edit, checked against a model, with each site under its main name.

        Raises:
            KeyError: if a site or layer is unknown.
            ValueError: if a unit does not exist, or a shape does not fit.
        """

    @abstractmethod
    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        """The same edit of substitute units, or of a random direction of the same norm; None if there is none."""

    def edited_units(self, model: HookedModel) -> Mapping[Unit, frozenset[int] | None]:
        """The units that a twin replaces, each with the units of its site that can replace it (None: any)."""
        return {}

    # --- to and from data ----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The edit for JSON; fields with default values are left out."""
        return {"operator": self.operator} | {
            field.name: _as_json(value)
            for field in fields(self)
            if not _is_default(field, value := getattr(self, field.name))
        }

    @cached_property
    def identity(self) -> str:
        """The edit as canonical JSON, which is the same exactly for equal edits."""
        # By the text and not by `==` on tensors: NaN cannot occur, and -0.0 and 0.0 are different numbers in it.
        return canonical(self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __str__(self) -> str:
        """The edit as the command line takes it; long arrays are shown as their shape."""
        words = [self.operator]
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_default(field, value):
                words.append(f"{field.name}={_in_words(value)}")
        return " ".join(words)


_E = TypeVar("_E", bound=Edit)


def fitting(model: HookedModel, edit: _E) -> _E:
    """`Edit.checked`, with the type of the edit kept; its numbers must be finite in the model's own type, too.

    Raises:
        KeyError: if a site or layer is unknown.
        ValueError: if the edit does not fit the model.
    """
    made, kind = edit.checked(model), model.dtype or torch.float32
    for field in fields(made):
        value = getattr(made, field.name)
        if not isinstance(value, float | Tensor):
            continue
        largest = abs(value) if isinstance(value, float) else float(value.abs().max())
        if largest > torch.finfo(kind).max:
            raise ValueError(
                f"{field.name} of edit {edit.operator!r} has {largest:g}: expected at most "
                f"{torch.finfo(kind).max:.3g}, the largest number of {model.name} ({str(kind).removeprefix('torch.')})"
            )
    return cast(_E, made)


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys and no spaces, so that equal values give equal texts."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


class Substitutes:
    """Substitute units for those of a recipe; a unit has the same substitute in every edit.

    Args:
        model: the model.
        swap: the substitute of each unit.
        generator: draws everything else, such as directions.
    """

    def __init__(self, model: HookedModel, swap: Mapping[Unit, Unit], generator: Generator) -> None:
        self.model, self.swap, self.generator = model, swap, generator

    def of(self, units: Units) -> Units | None:
        """The substitutes of some units; None if one of them has none."""
        site = self.model.site(units.site)
        found = [self.swap.get(site.unit(index)) for index in units.among(site)]
        if any(unit is None for unit in found):
            return None
        return Units(site.name, tuple(unit.index for unit in found if unit is not None))


def twin_of(
    model: HookedModel, edits: Sequence[Edit], swap: Mapping[Unit, Unit], seed: int = 0
) -> tuple[Edit, ...] | None:
    """The edits with each unit replaced by its substitute; None if an edit has no twin."""
    # One generator for the whole list, in its order: a recipe's random directions differ from each other and come again
    # with the seed.
    substitutes, found = Substitutes(model, swap, Generator().manual_seed(seed)), []
    for edit in edits:
        made = edit.twin(model, substitutes)
        if made is None:
            return None
        found.append(made)
    return tuple(found)


def of_same_norm(tensor: Tensor, generator: Generator) -> Tensor:
    """Random numbers of the same shape and norm."""
    # A Gaussian vector has no preferred direction; scaled, it is uniform on the sphere of the wanted radius.
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (drawn * (tensor.double().norm() / drawn.norm().clamp_min(1e-300))).to(tensor.dtype)


def parse_edit(raw: object, layout: int = 2) -> Edit:
    """Read an edit that `to_dict` wrote.

    Args:
        raw: the record.
        layout: the layout of its recipe; in layout 1 `units` is called `target`.

    Raises:
        KeyError: if the operator or a field is unknown.
        ValueError: if a field is missing or has the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"edit {clipped(repr(raw))}: expected an object with an operator and its fields"
        )
    operator = raw.get("operator")
    kind = OPERATORS.get(str(operator))
    if kind is None:
        raise _unknown_operator(str(operator), OPERATORS)
    if layout == 1 and "target" in raw:
        raw = {("units" if k == "target" else k): v for k, v in raw.items()}
    by_name = {field.name: field for field in fields(kind)}
    given = {name: value for name, value in raw.items() if name != "operator"}
    for name in given:
        if name not in by_name:
            raise unknown(f"field of edit {operator!r}", str(name), by_name)
    missing = [n for n, f in by_name.items() if n not in given and f.default is MISSING]
    if missing:
        raise ValueError(f"edit {operator!r} lacks {', '.join(missing)}")
    return kind(**{n: _from_json(operator, by_name[n], value) for n, value in given.items()})


def _required_fields(kind: type[Edit]) -> list[str]:
    # `zero` is a `scale` whose factor is not asked for.
    return [f.name for f in fields(kind) if f.default is MISSING and f.name != "factor"]


def _unknown_operator(name: str, known: Iterable[str]) -> KeyError:
    close = nearest(name, known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return KeyError(f"unknown edit operator {name!r}: {hint}expected one of {', '.join(known)}")


def read_edit(model: HookedModel, text: str, files: bool = True) -> Edit:
    """Parse an edit as text: `OPERATOR NAME=VALUE …`; the name of the first field may be left out.

    The numbers of an array are separated by commas, or `@FILE` names a JSON or NumPy file; a direction is written
    `mixed3b:379+0.5*mixed3b:385`. `zero UNITS` is short for `scale UNITS factor=0`.

    Args:
        model: the model that the edit is for.
        text: the edit.
        files: whether `@FILE` is allowed.

    Raises:
        KeyError: if the operator, a field, a site or a layer is unknown.
        ValueError: if the text cannot be parsed or the edit does not fit the model.
        FileNotFoundError: if a file does not exist.

    >>> from circuits.models.zoo.loading import load_model
    >>> str(read_edit(load_model("shapes"), "scale mixed3b:3,4 factor=0.5"))
    'scale units=mixed3b:3-4 factor=0.5'
    """
    words = text.split()
    if not words:
        raise ValueError("edit is empty: expected OPERATOR NAME=VALUE …, e.g. zero mixed3b:379")
    operator, rest = words[0], words[1:]
    raw: dict[str, Any] = {"operator": operator}
    if operator == "zero":
        raw = {"operator": "scale", "factor": 0.0}
    kind = OPERATORS.get(raw["operator"])
    if kind is None:
        raise _unknown_operator(operator, ["zero", *OPERATORS])
    by_name = {field.name: field for field in fields(kind)}
    for i, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if not equals:
            if i:
                raise ValueError(f"edit {text!r}: {word!r} is not NAME=VALUE")
            name, value = fields(kind)[0].name, word
        elif name == "from":
            name = "source"
        if name == "direction" and "vector" in by_name:
            # The part before the first `:` and after a `*`: `0.5*mixed3b:379+…` is in mixed3b.
            site = value.partition(":")[0].rpartition("*")[2].lstrip("+-")
            direction = Direction.parse(value, model.site(site).n_units)
            if "vector" in raw:
                raise ValueError(
                    f"edit {clipped(repr(text))} gives vector or direction twice: expected one of them"
                )
            if model.site(raw.get("site", site)) != model.site(site):
                raise ValueError(
                    f"edit {clipped(repr(text))}: direction is in {site}, site is {raw['site']}: expected "
                    "one site for both"
                )
            raw |= {"site": direction.site, "vector": _as_json(direction.vector.float())}
            continue
        if name not in by_name:
            raise unknown(f"field of edit {operator!r}", name, by_name)
        if name in raw and (operator == "zero" or name != "operator"):
            raise ValueError(f"edit {text!r} gives {name} twice: expected it once")
        if value.startswith("@") and not files:
            raise ValueError(f"edit {text!r}: {name} {value!r} names a file: expected numbers")
        raw[name] = _from_words(text, by_name[name], value)
    if len(raw) == 1 + (operator == "zero"):
        raise ValueError(f"edit {text!r} lacks {', '.join(_required_fields(kind)) or 'its fields'}")
    return fitting(model, parse_edit(raw))


# --- fields --------------------------------------------------------------------------------------


def _check_field(edit: Edit, field: Field[Any]) -> None:
    """Convert a field to its type where possible, and check that numbers are finite."""
    # The dataclass is frozen, hence `object.__setattr__`. Tensors are cloned: an edit must not change when the
    # caller's tensor does.
    value = _as_type(edit.operator, field, getattr(edit, field.name))
    if isinstance(value, Tensor):
        value = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    object.__setattr__(edit, field.name, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field.name} {value} of edit {edit.operator!r} must be finite")
    if isinstance(value, Tensor):
        if not value.numel():
            raise ValueError(f"{field.name} of edit {edit.operator!r} holds no numbers")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{field.name} of edit {edit.operator!r} must be finite")


def _as_type(operator: object, field: Field[Any], value: Any) -> Any:
    """A value converted to its field's type.

    Raises:
        ValueError: if it cannot be converted.
    """
    kind = str(field.type)
    if value is None and "None" in kind:
        return None
    try:
        if value is None:
            raise TypeError
        if kind.startswith("Units"):
            return Units.of(value)
        if kind.startswith("Tensor"):
            made = torch.as_tensor(value)
            return made if made.dtype in _TYPES.values() else made.to(torch.float32)
        # bool is an int in Python; `factor=True` is more likely a slip than a 1.
        if kind.startswith("float"):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError
            return float(value)
        if kind.startswith("tuple"):
            if any(isinstance(i, bool) or not isinstance(i, int) for i in value):
                raise TypeError
            return tuple(value)
        if not isinstance(value, {"str": str, "bool": bool}[kind]):
            raise TypeError
        return value
    except (TypeError, AttributeError, OverflowError):
        what = f"{field.name} {clipped(repr(value))} of edit {operator!r}"
        raise ValueError(f"{what} is not {_expected(kind)}") from None


def compact(tensor: Tensor) -> Tensor:
    """The same numbers in float32 if float32 represents them exactly."""
    # Compared in float64, where every float32 has its exact place.
    short = tensor.detach().cpu().float()
    return (
        short
        if torch.equal(short.double(), tensor.detach().cpu().double())
        else tensor.detach().cpu()
    )


def _is_default(field: Field[Any], value: Any) -> bool:
    # A tensor is never a default, and comparing it would give a tensor.
    return field.default is not MISSING and not isinstance(value, Tensor) and value == field.default


def _as_json(value: Any) -> Any:
    if isinstance(value, Units):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, Tensor):
        return value
    # Lists are for people. JSON keeps float32 exactly: it writes the shortest text that gives the same float64, which
    # holds every float32. A list does not say its type, so float64 always goes as bytes.
    if value.numel() <= _LISTED and value.dtype == torch.float32:
        return value.tolist()
    name = str(value.dtype).removeprefix("torch.")
    # Little-endian whatever the machine, so that a recipe's hash does not depend on where it was written.
    data = base64.b64encode(value.numpy().astype(value.numpy().dtype.newbyteorder("<")).tobytes())
    return {"dtype": name, "shape": list(value.shape), "base64": data.decode()}


def _from_json(operator: object, field: Field[Any], value: Any) -> Any:
    """A field's value from JSON."""
    kind = str(field.type)
    if value is not None and kind.startswith("Units") and not isinstance(value, str):
        raise ValueError(
            f"{field.name} {clipped(repr(value))} of edit {operator!r} is not {_expected(kind)}"
        )
    if value is not None and kind.startswith("Tensor"):
        try:
            value = _array(value)
        except TypeError:
            what = f"{field.name} {clipped(repr(value))} of edit {operator!r}"
            raise ValueError(f"{what} is not {_expected(kind)}") from None
        except ValueError as error:
            raise ValueError(f"{field.name} of edit {operator!r}: {error}") from None
    return _as_type(operator, field, value)


def _expected(kind: str) -> str:
    return _EXPECTED[re.split(r"[ \[]", kind)[0]]


_EXPECTED = {
    "Units": "units SITE:1,2,5-9",
    "Tensor": "an array of finite numbers",
    "float": "a finite number",
    "tuple": "a list of whole numbers",
    "str": "a text",
    "bool": "true or false",
}


def _array(value: Any) -> Tensor:
    if isinstance(value, Mapping):
        return _from_bytes(value)
    if isinstance(value, bool) or not isinstance(value, list | int | float):
        raise TypeError
    try:
        # Via float64 and then rounded once, as the text of a float32 was.
        return torch.tensor(value, dtype=torch.float64).float()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"{clipped(repr(value))} is not an array of finite numbers, all rows alike"
        ) from None


def _from_bytes(value: Mapping[str, Any]) -> Tensor:
    if set(value) != {"dtype", "shape", "base64"} or value["dtype"] not in _TYPES:
        raise ValueError("expected dtype (float32 or float64), shape and base64")
    kind, shape = _TYPES[value["dtype"]], value["shape"]
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape {clipped(repr(shape))} is not a list of whole numbers")
    try:
        # frombuffer needs memory that can be written to, which bytes are not.
        data = bytearray(base64.b64decode(value["base64"], validate=True))
    except (TypeError, ValueError):
        raise ValueError(f"base64 {clipped(repr(value['base64']))} cannot be read") from None
    if not data or math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes do not fill shape {shape}")
    return torch.frombuffer(data, dtype=kind).reshape(shape)


def _from_words(text: str, field: Field[Any], value: str) -> Any:
    kind = str(field.type)
    try:
        if kind.startswith("float"):
            return _given(number(value))
        if kind.startswith("bool"):
            return {"true": True, "false": False, "yes": True, "no": False}[value.lower()]
        if kind.startswith("tuple"):
            return [_given(whole(part)) for part in value.split(",")]
        if kind.startswith("Tensor"):
            return (
                _from_file(value[1:])
                if value.startswith("@")
                else [_given(number(v)) for v in value.split(",")]
            )
    except (ValueError, KeyError):
        if value.startswith("@"):
            raise
        raise ValueError(
            f"edit {text!r}: {field.name} {value!r} is not {_expected(kind)}"
        ) from None
    return value


def _given(found: float | None) -> float:
    if found is None:
        raise ValueError
    return found


def _from_file(path: str) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"array file {path!r} does not exist or is not a file")
    try:
        if path.endswith(".npy"):
            return _as_json(torch.from_numpy(read_array(Path(path))).float())
        return read_json(path)
    except UNREADABLE as error:
        raise ValueError(f"array file {path!r} is not a JSON or .npy file of numbers") from error


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() <= 8 and value.ndim <= 1:
            return ",".join(f"{v:.6g}" for v in value.reshape(-1).tolist())
        return f"array({'x'.join(map(str, value.shape))})"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- the published schema ------------------------------------------------------------------------

_ARRAY = {
    "anyOf": [
        {"type": "number"},
        {"type": "array"},
        {
            "type": "object",
            "properties": {
                "dtype": {"enum": list(_TYPES)},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                "base64": {"type": "string", "contentEncoding": "base64"},
            },
            "required": ["dtype", "shape", "base64"],
            "additionalProperties": False,
        },
    ]
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "Units": {
        "type": "string",
        "pattern": r"^[^\s:,+*]+:(\*|[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)$",
    },
    "Tensor": _ARRAY,
    "float": {"type": "number"},
    "tuple": {"type": "array", "items": {"type": "integer"}},
    "str": {"type": "string"},
    "bool": {"type": "boolean"},
}


def edit_schema() -> dict[str, Any]:
    """The JSON schema of an edit: one of the operators, each with its fields."""
    kinds = []
    for name, kind in sorted(OPERATORS.items()):
        parts: dict[str, Any] = {"operator": {"const": name}}
        for field in fields(kind):
            schema = _SCHEMAS[re.split(r"[ \[]", str(field.type))[0]]
            optional = "None" in str(field.type)
            parts[field.name] = {"anyOf": [schema, {"type": "null"}]} if optional else schema
        needed = [f.name for f in fields(kind) if f.default is MISSING]
        kinds.append(
            {
                "description": kind.about,
                "type": "object",
                "properties": parts,
                "required": ["operator", *needed],
                "additionalProperties": False,
            }
        )
    return {"oneOf": kinds}
