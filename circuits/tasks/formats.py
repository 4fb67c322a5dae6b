"""The tables of prompt pairs that circuit-discovery projects publish: their columns, and how a row becomes an item."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from circuits.checks import clipped, whole
from circuits.tasks.items import Item, Words
from circuits.tasks.templates.tokenizers import Reader
from circuits.tasks.templates.words import BEING
from circuits.units import unknown

Row = Mapping[str, Any]

_IDS = (
    ("correct_idx", "incorrect_idx"),
    ("clean_answer_idx", "corrupted_answer_idx"),
    ("country_idx", "corrupted_country_idx"),
    ("answers_idx", "corrupted_answers_idx"),
)
_CLEAN = ("clean", "clean_prompt", "clean_prefix")
_CORRUPTED = (
    "corrupted", "corrupt", "corrupted_prompt", "corrupt_prompt", "patch_prompt", "corrupted_prefix", "patch_prefix",
)  # fmt: skip
_ANSWERS = ("answers", "answer", "correct_answers", "correct_answer", "clean_answer")
_AGAINST = (
    "against", "wrong_answers", "wrong_answer", "incorrect_answers", "incorrect_answer", "corrupted_answer",
    "patch_answer",
)  # fmt: skip
_YEARS = ("correct_idx", "label", "year")
_COUNTERFACTUAL = "_counterfactual"
_DEFAULTS = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")
"""The counterfactuals that MIB's own circuit track uses."""


class NoCounterpartError(ValueError):
    """A row of a table has no counterpart."""


@dataclass(frozen=True)
class Format:
    """A table format.

    Attributes:
        about: what kind of behaviour it describes, in one sentence.
        expected: its columns in words, for error messages.
        fits: whether given columns are those of this format.
        read: turns a row into an item; raises NoCounterpartError if the row has no counterpart.
        metric: what is measured if the items have wrong answers.
    """

    about: str
    expected: str
    fits: Callable[[tuple[str, ...]], bool]
    read: Callable[[Row, TableContext], Item]
    metric: str = "logit_difference"


@dataclass(frozen=True)
class TableContext:
    """What reading a row needs to know of the table.

    Attributes:
        columns: the table's columns.
        counterpart: which counterpart to take if there are several.
        reader: how the tokenizer reads texts.
    """

    columns: tuple[str, ...]
    counterpart: str | None
    reader: Reader

    def first(self, names: Iterable[str]) -> str | None:
        """The first of several column names that the table has."""
        return next((name for name in names if name in self.columns), None)

    def corrupted(self, row: Row) -> str:
        """The counterpart of a row: the column that was asked for, else the first of the usual ones.

        Raises:
            KeyError: if there is no such column.
            ValueError: if the cell holds several counterparts and none was asked for.
            NoCounterpartError: if the cell is empty.
        """
        asked, name = self.counterpart, self.first(_CORRUPTED)
        name = asked if asked in self.columns else name
        assert name is not None, "the format has one"
        value = row.get(name)
        if isinstance(
            value, Mapping
        ):  # ACDC's files keep several counterparts in one cell, by name
            key = next(iter(value)) if len(value) == 1 and asked in (None, name) else asked
            if key not in value:
                raise ValueError(
                    f"counterpart {asked!r}: {name} has {listed(value)}, expected one of these"
                )
            value = value[key]
        elif asked not in (None, name):
            raise unknown("counterpart", str(asked), [c for c in self.columns if c])
        if not value:
            raise NoCounterpartError(name)
        return _text({name: value}, name)


# --- formats -----------------------------------------------------------------------------------


def _read_token_ids(row: Row, reading: TableContext) -> Item:
    """EAP-IG: texts, with answers as token ids."""
    names = next(pair for pair in _IDS if set(pair) <= set(reading.columns))
    answers, against = (tuple((i,) for i in _tokens(row, name)) for name in names)
    corrupted = reading.corrupted(row)
    return Item(_text(row, "clean"), answers, against, corrupted)


def _read_greater_than(row: Row, reading: TableContext) -> Item:
    """EAP-IG's and MIB's greater-than: the year that the answers have to exceed."""
    clean, corrupted = _text(row, "clean"), reading.corrupted(row)
    name = reading.first(_YEARS)
    assert name is not None, "the format has one"
    year = str(row.get(name, "")).strip()
    year = year[-2:] if name == "year" and re.fullmatch("[0-9]{4}", year) else year
    if not re.fullmatch("[0-9]{1,2}", year) or year == "99" or not re.search("[0-9]{2}$", clean):
        raise ValueError(
            f"{name} {clipped(year)!r}: expected the two digits of a year below 99, and a text that ends in a century"
        )
    # The prompt ends in a century, so that the answers are the years' last two digits (Hanna et al. 2023).
    words = {y: _year(f"{y:02d}", reading.reader) for y in range(100)}
    above = tuple(word for y, word in words.items() if y > int(year))
    upto = tuple(word for y, word in words.items() if y <= int(year))
    return Item(clean, above, upto, corrupted)


def _year(digits: str, reader: Reader) -> Words:
    if reader.blind:
        return digits
    tokens = reader.tokens(digits)
    if not tokens or len(tokens) != 1:
        raise ValueError(f"year {digits!r} is not one token of this tokenizer")
    return tokens


def _read_agreement(row: Row, reading: TableContext) -> Item:
    """EAP-IG's subject-verb agreement: whether the subject is plural."""
    said = str(row.get("plural", "")).strip()
    if said not in ("0", "1"):
        raise ValueError(f"plural {clipped(said)!r}: expected 0 or 1")
    verbs = [pair for pair in BEING if all(reading.reader.single("it", verb) for verb in pair)]
    if not verbs:
        raise ValueError(
            f"verbs {', '.join(map('/'.join, BEING))}: no pair is single tokens of this tokenizer"
        )
    number, corrupted = int(said), reading.corrupted(row)
    return Item(
        _text(row, "clean"), tuple(pair[number] for pair in verbs), tuple(pair[1 - number] for pair in verbs),
        corrupted, template=str(row.get("group") or ""),
    )  # fmt: skip


def _read_mib(row: Row, reading: TableContext) -> Item:
    """MIB: a prompt with choices or a label, and counterfactual prompts of the same form."""
    name = _counterfactual(reading)
    other = _parsed(row.get(name))
    if not isinstance(other, Mapping) or not other.get("prompt"):
        raise NoCounterpartError(name)
    metadata = _parsed(row.get("metadata"))
    names = (
        (metadata.get(k) for k in ("subject", "indirect_object"))
        if isinstance(metadata, Mapping)
        else ()
    )
    fillers = tuple(str(word) for word in names if word)
    right, wrong = _chosen(row), _chosen(other)
    choices = _parsed(row.get("choices"))
    if isinstance(
        choices, list
    ):  # names (indirect objects): answers get a leading space, as in MIB's own code
        others = tuple(f" {c}" for c in choices if c != right)
        return Item(
            _text(row, "prompt"), (f" {right}",), others, _text(other, "prompt"), fillers=fillers
        )
    # The counterfactual's own answer is the wrong one here; where both prompts have one answer nothing is compared.
    against = (wrong,) if wrong != right else ()
    return Item(_text(row, "prompt"), (right,), against, _text(other, "prompt"), fillers=fillers)


def _counterfactual(reading: TableContext) -> str:
    there = [c for c in reading.columns if c.endswith(_COUNTERFACTUAL)]
    if reading.counterpart is not None:
        if reading.counterpart not in there:
            raise unknown("counterpart", reading.counterpart, there)
        return reading.counterpart
    known = [c for c in _DEFAULTS if c in there]
    if len(known) != 1 and len(there) != 1:
        raise ValueError(f"counterpart: the table has {listed(there)}, name one of them")
    return known[0] if len(known) == 1 else there[0]


def _chosen(row: Row) -> str:
    """The answer of a prompt with choices or a label."""
    choices = _parsed(row.get("choices"))
    if choices is None:
        return _text(row, "label")
    labels = choices.get("label") if isinstance(choices, Mapping) else choices
    key = str(row.get("answerKey", ""))
    index = whole(key)
    if not isinstance(labels, list) or index is None or not 0 <= index < len(labels):
        raise ValueError(
            f"answerKey {clipped(key)!r}: expected the index of one of the choices, from 0"
        )
    return str(labels[index])


def _read_texts(row: Row, reading: TableContext) -> Item:
    """ACDC's prompts and similar tables: texts, with answers as texts."""
    clean, answers, against = (reading.first(names) for names in (_CLEAN, _ANSWERS, _AGAINST))
    assert clean is not None, "the format has it"
    assert answers is not None, "the format has it"
    corrupted = None if reading.first(_CORRUPTED) is None else reading.corrupted(row)
    return Item(
        _text(row, clean), _texts(row, answers), () if against is None else _texts(row, against), corrupted,
        group=str(row.get("group") or ""), template=str(row.get("template") or ""),
    )  # fmt: skip


FORMATS: Mapping[str, Format] = {
    "mib": Format(
        "The right one of the choices in a prompt.",
        "prompt, answerKey and choices (or label), and a column that ends in _counterfactual",
        lambda columns: (
            "prompt" in columns
            and ({"answerKey", "choices"} <= set(columns) or "label" in columns)
            and any(c.endswith(_COUNTERFACTUAL) for c in columns)
        ),
        _read_mib,
    ),
    "eap-ig": Format(
        "The right token rather than the wrong one.",
        "clean, corrupted, correct_idx and incorrect_idx (or clean_answer_idx and corrupted_answer_idx, "
        "country_idx and corrupted_country_idx, answers_idx and corrupted_answers_idx)",
        lambda columns: (
            {"clean", "corrupted"} <= set(columns) and any(set(pair) <= set(columns) for pair in _IDS)
        ),
        _read_token_ids,
    ),
    "greater-than": Format(
        "A year later than the one in the prompt.",
        "clean, corrupted, and correct_idx, label or year (the year that answers are above)",
        lambda columns: (
            {"clean", "corrupted"} <= set(columns) and any(name in columns for name in _YEARS)
        ),
        _read_greater_than,
        "probability_difference",
    ),
    "agreement": Format(
        "A verb that agrees with its subject in number.",
        "clean, corrupted and plural (0 or 1)",
        lambda columns: {"clean", "corrupted", "plural"} <= set(columns),
        _read_agreement,
        "probability_difference",
    ),
    "acdc": Format(
        "The right answer rather than a wrong one.",
        "clean (or clean_prompt, clean_prefix), answers (or correct_answers, clean_answer), and, where there are such, "
        "corrupted (or corrupt_prompt, patch_prompt, patch_prefix) and against (or wrong_answers, patch_answer)",
        lambda columns: all(any(n in columns for n in names) for names in (_CLEAN, _ANSWERS)),
        _read_texts,
    ),
}  # fmt: skip
"""Table formats by name, in the order in which they are tried: MIB's datasets; EAP-IG's tables with token ids, its
greater-than and its agreement; the prompts of ACDC and of projects that build on it."""


# --- cells -------------------------------------------------------------------------------------


def listed(columns: Iterable[str]) -> str:
    """Column names as an error message shows them."""
    return clipped(", ".join(c or "(unnamed)" for c in columns), 200) or "none"


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {clipped(repr(value))}: expected a text")
    return value


def _texts(row: Row, name: str) -> tuple[str, ...]:
    """One text or several: a list, or the text of a list in a CSV cell."""
    value = _parsed(row.get(name))
    listed = value if isinstance(value, list) else [row.get(name)]
    return tuple(_text({name: part}, name) for part in listed)


def _tokens(row: Row, name: str) -> tuple[int, ...]:
    """One token id or several."""
    value = _parsed(row.get(name))
    listed = value if isinstance(value, list) and value else [value]
    tokens = []
    for part in listed:
        # pandas writes a column of integers with gaps as floats: 318.0
        written = str(part).strip().removesuffix(".0")
        if isinstance(part, bool) or not re.fullmatch("[0-9]{1,9}", written):
            raise ValueError(f"{name} is {clipped(repr(part))}: expected a token id")
        tokens.append(int(written))
    return tuple(tokens)


def _parsed(value: Any) -> Any:
    """The list or record that a CSV cell holds as text, in JSON or in Python's notation."""
    # pandas writes lists with Python's repr; `literal_eval` reads constants only and runs no code.
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value
