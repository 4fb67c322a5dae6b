"""What a task file may hold: the form of each field, both as a check and as a JSON schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

LAYOUT = 1
"""Version of the file's layout."""

MAX_NUMBER = 2**31 - 1
"""The largest token, position or seed."""

Feeding = Literal["one", "fed", "first"]
"""How answers are read. `one`: each answer is one token. `fed`: answers of several tokens are fed in, and the
log-probabilities of their tokens are added up. `first`: only the first token by which the answers differ is compared,
and the tokens that they share are fed in."""


@dataclass(frozen=True)
class Form:
    """A form that a JSON value can have.

    Attributes:
        fits: whether a value has this form.
        schema: the same form as a JSON schema.
    """

    fits: Callable[[Any], bool]
    schema: Mapping[str, Any]


def _text(least: int = 0) -> Form:
    schema = {"type": "string", "minLength": least} if least else {"type": "string"}
    return Form(lambda value: isinstance(value, str) and len(value) >= least, schema)


def _integer(low: int) -> Form:
    # In JSON 1.0 and 1 are the same number, and JSON schema takes both as integers; a Python bool is an int.
    def fits(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and low <= value <= MAX_NUMBER and value == int(value)

    return Form(fits, {"type": "integer", "minimum": low, "maximum": MAX_NUMBER})


def _array(form: Form, least: int = 0, most: int | None = None) -> Form:
    def fits(value: Any) -> bool:
        return (
            isinstance(value, list)
            and least <= len(value) <= (len(value) if most is None else most)
            and all(map(form.fits, value))
        )

    schema: dict[str, Any] = {"type": "array", "items": form.schema}
    if least:
        schema["minItems"] = least
    return Form(fits, schema if most is None else {**schema, "maxItems": most})


def _either(first: Form, second: Form) -> Form:
    return Form(
        lambda value: first.fits(value) or second.fits(value),
        {"anyOf": [first.schema, second.schema]},
    )


def _mapping(form: Form) -> Form:
    return Form(
        lambda value: isinstance(value, dict) and all(map(form.fits, value.values())),
        {"type": "object", "additionalProperties": form.schema},
    )


def _one_of(*known: object) -> Form:
    # Types are compared too: True == 1 in Python, but not in JSON.
    def fits(value: Any) -> bool:
        return any(type(value) is type(k) and value == k for k in known)

    return Form(fits, {"enum": list(known)})


@dataclass(frozen=True)
class Field:
    """A field of a line.

    Attributes:
        form: the form of its value.
        expected: the form in words, for error messages.
        about: what the field means.
        required: whether every line must have it.
    """

    form: Form
    expected: str
    about: str
    required: bool = False


_TOKENS = _array(_integer(0), least=1)
_WORDS = _either(_text(1), _TOKENS)
_A_TEXT = (_text(), "a text")
_SOME_WORDS = (_WORDS, "a text or a list of tokens, not empty")
_SETS_OF_WORDS = (_array(_WORDS), "a list of texts or of lists of tokens, none of them empty")

HEADER: Mapping[str, Field] = {
    "circuits_task": Field(_one_of(LAYOUT), str(LAYOUT), "the layout of the file", required=True),
    "name": Field(_text(1), "a text, not empty", "the name of the task", required=True),
    "about": Field(*_A_TEXT, "a sentence on what a model does that shows the behaviour"),
    "metric": Field(*_A_TEXT, "the name of the metric that the task is measured by"),
    "reading": Field(
        _one_of(*get_args(Feeding)), f"one of {', '.join(get_args(Feeding))}",
        "how answers are read: of one token, fed in whole, or by the first token that differs",
    ),
    "tokenizer": Field(*_A_TEXT, "what the tokens in the file are of; empty where all is text"),
    "seed": Field(_integer(0), "a whole number from 0", "the seed of the split into halves"),
}  # fmt: skip
"""The fields of the first line."""

ITEM: Mapping[str, Field] = {
    "clean": Field(*_SOME_WORDS, "the input on which the model shows the behaviour", required=True),
    "answers": Field(*_SETS_OF_WORDS, "what the model should say, any of which counts"),
    "against": Field(*_SETS_OF_WORDS, "what the answers are compared with"),
    "corrupted": Field(*_SOME_WORDS, "the counterpart of the input"),
    "labels": Field(
        _TOKENS, "a list of tokens, not empty",
        "in place of answers: the one token that is right at each counted position",
    ),
    "positions": Field(
        _either(_text(1), _array(_integer(-MAX_NUMBER), least=1)),
        "last, all, the name of a span, or a list of whole numbers", "where the answer is read",
    ),
    "group": Field(*_A_TEXT, "the template instance; those of one instance stay in one half of a split"),
    "fillers": Field(_array(_text()), "a list of texts", "the words that fill the template"),
    "spans": Field(
        _mapping(_array(_integer(0), 2, 2)), "names, each with a list of a start and a stop from 0",
        "named stretches of the input, from a start to a stop that is left out",
    ),
    "template": Field(*_A_TEXT, "the name of the template"),
}  # fmt: skip
"""The fields of all other lines."""


def task_schema() -> dict[str, Any]:
    """The JSON schema of one line of a task file: the first is a header, all others are items."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "circuits task file, one line (the first is a header, all others are items)",
        "oneOf": [{"$ref": "#/$defs/header"}, {"$ref": "#/$defs/item"}],
        "$defs": {"header": _object(HEADER), "item": _object(ITEM)},
    }


def _object(known: Mapping[str, Field]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            name: {"description": field.about, **field.form.schema} for name, field in known.items()
        },
        "required": [name for name, field in known.items() if field.required],
        "additionalProperties": False,
    }
